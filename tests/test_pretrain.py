import math
import sys
from pathlib import Path

import pytest

from thrifty.pretrain import Pretrained, pretrain, train_tokenizer

TEXTS = [
    f"def area_{i}(width, height):\n    return width * height + {i % 7}  # größer\n"
    for i in range(200)
]
TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_layers": 1,
    "sequence_length": 32,
    "batch_size": 4,
    "steps": 10,
    "learning_rate": 1e-2,
    "show_progress": False,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return pretrain(TEXTS, tmp_path_factory.mktemp("base") / "model", **TINY)


def test_the_loss_is_finite_and_falls(made: Pretrained) -> None:
    assert len(made.losses) == 10
    assert all(math.isfinite(loss) for loss in made.losses)
    assert abs(made.losses[0] - math.log(300)) < 0.5
    assert made.losses[-1] < made.losses[0] - 0.5


def test_transformers_loads_the_folder(made: Pretrained) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made.directory)
    assert isinstance(model, LlamaForCausalLM)
    assert model.num_parameters() == made.num_parameters
    assert model.config.tie_word_embeddings
    assert {file.suffix for file in made.directory.iterdir()} <= {".json", ".safetensors"}

    tokenizer = AutoTokenizer.from_pretrained(made.directory)
    assert len(tokenizer) == model.config.vocab_size <= 300
    text = "def größe(x):\n\n    return '\t' + x  # 日本\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids == train_tokenizer(TEXTS, 300, 32)(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    config = model.config
    assert special == (config.pad_token_id, config.bos_token_id, config.eos_token_id)


def test_the_trained_weights_were_saved(made: Pretrained) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(made.directory).eval()
    ids = AutoTokenizer.from_pretrained(made.directory)(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < made.losses[0] - 0.5


@pytest.mark.long
def test_the_same_seed_gives_the_same_files(made: Pretrained, tmp_path: Path) -> None:
    again = pretrain(TEXTS, tmp_path / "again", **TINY)
    other = pretrain(TEXTS, tmp_path / "other", **TINY, seed=1)
    weights = "model.safetensors"
    assert (again.directory / weights).read_bytes() == (made.directory / weights).read_bytes()
    assert (other.directory / weights).read_bytes() != (made.directory / weights).read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (again.directory / name).read_bytes() == (made.directory / name).read_bytes()


def test_a_model_that_is_there_is_not_made_again(made: Pretrained, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("thrifty.pretrain.train_tokenizer", None)
        assert pretrain(TEXTS, made.directory, **TINY) == made


@pytest.mark.slow
def test_another_request_replaces_the_model(tmp_path: Path) -> None:
    first = pretrain(TEXTS, tmp_path / "model", **TINY | {"steps": 1})
    second = pretrain(TEXTS, tmp_path / "model", **TINY | {"steps": 2})
    assert (first.num_tokens, second.num_tokens) == (128, 256)
    assert pretrain(TEXTS, tmp_path / "model", **TINY | {"steps": 2}) == second
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"holds something else[^\n]*\nhint: "):
        pretrain(TEXTS, tmp_path, **TINY)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_progress_goes_to_standard_error(tmp_path: Path, capsys) -> None:
    pretrain(TEXTS, tmp_path / "model", **TINY | {"show_progress": True, "steps": 2})
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "pretraining" in shown.err
    assert "loss" in shown.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 258}, "vocab_size must be at least 259"),
        ({"hidden_size": 48}, "hidden_size must be a multiple of 32"),
        ({"steps": 0}, "must be at least 1"),
        ({"sequence_length": 100_000}, "fewer than one sequence of 100000"),
    ],
)
def test_settings_that_cannot_be(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{message}[^\n]*\nhint: "):
        pretrain(TEXTS, tmp_path / "model", **TINY | change)
    assert not list(tmp_path.iterdir())


def test_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no text[^\n]*\nhint: "):
        pretrain(["", ""], tmp_path / "model", **TINY)


def test_importing_loads_no_torch() -> None:
    import subprocess

    code = "import sys, thrifty.pretrain; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
