"""Models and checkpoints that were made to do harm: nothing of them is run, no path is followed out
of a folder, and all of it is refused in words, within seconds and little memory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import runs
from tests.conftest import write_jsonl
from tests.data.data_templates import CHATML
from tests.reliability.hostile import amend, code, copy_of, plant, safetensors
from thrifty import checkpoints
from thrifty.cli import main
from thrifty.core.sealed import read_sealed
from thrifty.data import chat, template_process
from thrifty.data.faults import Fault
from thrifty.data.tokens import load_tokenizer
from thrifty.signals import model_folder
from thrifty.signals.model_folder import base_of_adapter
from thrifty.signals.models import load_model, locate
from thrifty.signals.weight_files import stored_tensors

PICKLES = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "model.pkl")
OPTIONS = ["--flops", "4e9", "--scorer", "bm25", "--set", "training.max_length=64"]


@pytest.fixture
def sign(tmp_path: Path) -> Iterator[Path]:
    """What hostile code makes when it is run. Nothing must."""
    path = tmp_path / "was-run"
    yield path
    assert not path.exists()


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return copy_of(tiny_model, tmp_path / "model")


def plan(model: Path, data: dict[str, Path], run: Path, *more: str) -> int:
    target = ["--target", f"sums={data['signal']}", "--dev", f"sums={data['dev']}"]
    pool = ["--pool", str(data["small_pool"])]
    return main(["plan", "--model", str(model), *pool, *target, *OPTIONS, "-o", str(run), *more])


# -- pickles and code ---------------------------------------------------------------------------


def test_pickles_beside_a_model_are_not_loaded(
    model: Path, tiny_data: dict[str, Path], sign: Path, tmp_path: Path
) -> None:
    for name in PICKLES:
        plant(model / name, sign)
    amend(model / "pytorch_model.bin.index.json", weight_map={"x": "pytorch_model.bin"})
    assert plan(model, tiny_data, tmp_path / "run") == 0
    load_model(locate(str(model), weights=True)[0], "float32", "cpu")


def test_a_model_of_pickles_alone_is_refused(
    model: Path, tiny_data: dict[str, Path], sign: Path, tmp_path: Path, capsys: Any
) -> None:
    (model / "model.safetensors").unlink()
    for name in PICKLES:
        plant(model / name, sign)
    assert plan(model, tiny_data, tmp_path / "run") == 0  # sizes are known from the config
    assert "has no safetensors weights yet" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "run")]) == 4
    assert "pickled weights (.bin, .pt) are not loaded" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["config.json", "tokenizer_config.json"])
def test_a_models_own_code_is_not_run(
    key: str, model: Path, tiny_data: dict[str, Path], sign: Path, tmp_path: Path, capsys: Any
) -> None:
    (model / "evil.py").write_text(code(sign))
    names = ("AutoConfig", "AutoModelForCausalLM")
    amend(model / "config.json", auto_map=dict.fromkeys(names, "evil.Evil"))
    if key == "config.json":
        load_model(model, "float32", "cpu")  # its type is known: transformers' own class
        amend(model / "config.json", model_type="evil", architectures=["Evil"])
    else:
        auto = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        amend(model / key, auto_map=auto, tokenizer_class="Evil")
    assert plan(model, tiny_data, tmp_path / "run") == 4
    assert "hint:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("scheduler.pt", "rng_state.pth")),
    ],
)
@pytest.mark.long
def test_a_pickle_in_a_checkpoint_is_not_loaded_though_its_manifest_vouches_for_it(
    name: str, paused: Path, sign: Path, tmp_path: Path, capsys: Any
) -> None:
    run = copy_of(paused, tmp_path / "run")
    newest = checkpoints.committed(run / "checkpoints")[-1]
    plant(newest.path / name, sign)
    plant(newest.path / "training_args.bin", sign)
    details = read_sealed(newest.path / checkpoints.MANIFEST)
    del details["files"]
    checkpoints.commit(newest.path, details)
    assert checkpoints.damage(checkpoints.committed(run / "checkpoints")[-1]) is None
    assert main(["train", str(run)]) == 4
    error = capsys.readouterr().err
    assert "a file holds a pickle of more than tensors" in error
    assert "weights_only" not in error


@pytest.fixture(scope="module")
def paused(
    tiny_model: Path, tiny_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run whose training stopped behind its first checkpoint."""
    run = tmp_path_factory.mktemp("paused") / "run"
    runs.planned(run, tiny_model, tiny_data)
    with pytest.MonkeyPatch.context() as patch:
        runs.interrupt_at(patch, 10)
        assert main(["train", str(run)]) == 5
    return run


@pytest.mark.parametrize("kind", ["adapter_model.bin", "adapter_model.safetensors"])
def test_pickled_adapters_are_not_loaded(
    kind: str, model: Path, tiny_model: Path, sign: Path, tmp_path: Path, capsys: Any
) -> None:
    """Where there is a pickle alone, and where a pickle has the name of safetensors."""
    adapter = tmp_path / "adapter"
    plant(adapter / "adapter_model.bin", sign)
    if kind != "adapter_model.bin":
        (adapter / "adapter_model.bin").rename(adapter / kind)
    amend(
        adapter / "adapter_config.json",
        peft_type="LORA",
        base_model_name_or_path=str(model),
        r=2,
        target_modules=["q_proj"],
    )
    prompts = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "say"}])
    command = ["decode", "--model", str(adapter), "--prompts", str(prompts), "--samples", "1"]
    assert main([*command, "-o", str(tmp_path / "out")]) in (4, 5)
    assert "hint:" in capsys.readouterr().err


def test_arrays_of_objects_are_not_loaded(paused: Path, sign: Path, tmp_path: Path) -> None:
    """In place of every array that a run keeps."""
    import pickle

    from tests.reliability.hostile import Payload

    run = copy_of(paused, tmp_path / "run")
    arrays = [path for path in run.rglob("*") if path.suffix in (".npy", ".npz")]
    assert {path.suffix for path in arrays} == {".npy", ".npz"}
    for path in arrays:
        hostile = np.array([Payload(sign)], dtype=object)
        if path.suffix == ".npy":
            np.save(path, hostile, allow_pickle=True)
        else:
            with np.load(path) as held:
                names = list(held)
            np.savez(path, allow_pickle=True, **dict.fromkeys(names, hostile))
    assert pickle.dumps(Payload(sign))
    assert main(["run", str(run)]) in (4, 5)


# -- paths --------------------------------------------------------------------------------------

OUT = ["../other/x.safetensors", "/etc/passwd", "..", "C:\\x.safetensors", "file:///etc/passwd"]
OUT += ["a/b.safetensors", "\\\\host\\x", "x\0.safetensors", 7, None]


@pytest.mark.parametrize("name", OUT)
def test_an_index_that_leads_out_of_its_folder_is_refused(name: Any, model: Path) -> None:
    amend(model / "model.safetensors.index.json", weight_map={"model.norm.weight": name})
    with pytest.raises(ValueError, match=r"points outside its folder.*\nhint"):
        load_model(model, "float32", "cpu")


@pytest.mark.parametrize("text", ["[]", '{"weight_map": []}', "{", "[" * 100_000, "\0"])
def test_an_index_that_is_none_is_refused(text: str, model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index.*\nhint"):
        load_model(model, "float32", "cpu")


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_link_out_of_the_folder_is_refused(
    file: str, model: Path, tiny_data: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / file).write_bytes((model / file).read_bytes())
    (model / file).unlink()
    (model / file).symlink_to(tmp_path / file)
    assert plan(model, tiny_data, tmp_path / "run") == 4
    assert f"{file} is a link out of its folder" in capsys.readouterr().err
    (model / file).unlink()
    (model / "real").mkdir()
    (tmp_path / file).rename(model / "real" / file)
    (model / file).symlink_to(model / "real" / file)
    assert locate(str(model), weights=True)[0] == model


def test_links_of_the_hubs_cache_are_followed(model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in model.iterdir():
        (blobs / f"blob-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    assert locate(str(snapshot), weights=True)[0] == snapshot
    load_model(snapshot, "float32", "cpu")


def test_a_tokenizers_own_paths_are_not_followed(model: Path, tmp_path: Path) -> None:
    """Configs in the wild name files of the machine that they were made on: those are ignored."""
    elsewhere = tmp_path / "elsewhere.json"
    rules = json.loads((model / "tokenizer.json").read_text())
    elsewhere.write_text(json.dumps(rules).replace('"s"', '"\\u2603"'))
    before = load_tokenizer(str(model)).get_vocab()
    files = ("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file")
    amend(model / "tokenizer_config.json", **dict.fromkeys(files, str(elsewhere)))
    assert load_tokenizer(str(model)).get_vocab() == before
    (model / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="there is no tokenizer"):
        load_tokenizer(str(model))
    amend(model / "tokenizer_config.json", fast_tokenizer_files=["tokenizer./../../x.json"])
    with pytest.raises(ValueError, match="points outside its folder"):
        locate(str(model), weights=False)


@pytest.mark.parametrize(
    "base", ["../other", "a/../../b", "~/model", "file:///model", "C:\\model", "x\0", 7, "", None]
)
def test_an_adapter_whose_base_leads_elsewhere_is_refused(base: Any, tmp_path: Path) -> None:
    amend(tmp_path / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(ValueError, match=r"\nhint: "):
        base_of_adapter(tmp_path)


def test_an_adapter_within_a_model_is_refused(model: Path) -> None:
    amend(model / "adapter_config.json", base_model_name_or_path="/etc", peft_type="LORA")
    with pytest.raises(ValueError, match=r"a model and an adapter.*\nhint"):
        load_model(model, "float32", "cpu")


# -- sizes and headers --------------------------------------------------------------------------


def tensor(shape: Any, begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS: dict[str, Callable[[], bytes]] = {
    "of 100 MB": lambda: struct.pack("<Q", 99_000_000) + b"{" + b" " * 99_000_000,
    "of a million": lambda: safetensors(
        {str(i): tensor([1], 4 * i, 4 * i + 4) for i in range(1_000_000)}, 4_000_000
    ),
    "longer than its file": lambda: struct.pack("<Q", 2**63),
    "overlapping": lambda: safetensors({"a": tensor([4], 0, 16), "b": tensor([4], 8, 24)}, 24),
    "with a hole": lambda: safetensors({"a": tensor([4], 8, 24)}, 24),
    "beyond the file": lambda: safetensors({"a": tensor([400], 0, 1600)}, 16),
    "of another size": lambda: safetensors({"a": tensor([400], 0, 16)}, 16),
    "of another kind": lambda: safetensors({"a": tensor([4], 0, 16, "F64")}, 16),
    "of no kind": lambda: safetensors({"a": tensor([4], 0, 16, "O")}, 16),
    "backwards": lambda: safetensors({"a": tensor([-4], 16, 0)}, 16),
    "before its file": lambda: safetensors({"a": tensor([4], -16, 0)}, 16),
    "of no number": lambda: safetensors(b'{"a": {"shape": [NaN]}}'),
    "with NaN": lambda: safetensors(
        b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', 4
    ),
    "deep": lambda: safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "of a list": lambda: safetensors([1]),
    "of nothing": lambda: b"",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * ("million" in n)) for n in HEADERS]
)
def test_a_hostile_header_is_refused_at_once(name: str, model: Path) -> None:
    (model / "model.safetensors").write_bytes(HEADERS[name]())
    start = time.process_time()
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"is damaged: .*\nhint"):
        stored_tensors(model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - start < 5
    assert peak < 64 << 20
    with pytest.raises(ValueError, match="is damaged"):
        load_model(model, "float32", "cpu")


def test_a_pattern_that_backtracks_without_end_is_refused(
    model: Path, tiny_data: dict[str, Path], tmp_path: Path, capfd: Any
) -> None:
    """Its engine counts its tries, and gives up after half a second."""
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    amend(model / "tokenizer.json", pre_tokenizer={**pattern, "invert": False})
    row = {"prompt": "a" * 40 + "b", "completion": " c"}
    pool = write_jsonl(tmp_path / "pool.jsonl", [row] * 3)
    start = time.monotonic()
    assert plan(model, {**tiny_data, "small_pool": pool}, tmp_path / "run") == 4
    assert time.monotonic() - start < 20
    error = capfd.readouterr().err
    assert f"the pool: the tokenizer in '{model}' gives up on a row: " in error
    assert "retry-limit" in error
    assert "\nhint: a pattern in its tokenizer.json backtracks without end" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", "tokenizer_config.json"])
def test_a_file_far_too_large_is_not_read(file: str, model: Path) -> None:
    with (model / file).open("r+b") as stream:
        stream.truncate(500_000_000)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"500,000,000 bytes; the most that is read.*\nhint"):
        locate(str(model), weights=False)
    assert time.process_time() - start < 1
    assert model_folder.MOST_TOKENIZER_BYTES < 500_000_000


def test_archives_are_not_opened(model: Path, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    """Neither as rows nor within a model."""
    import zipfile

    for folder in (model, tmp_path / "rows"):
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            archive.writestr("../../slipped.jsonl", '{"text": "a"}')
    (tmp_path / "rows" / "b.jsonl").write_bytes(tiny_data["small_pool"].read_bytes())
    data = {**tiny_data, "small_pool": tmp_path / "rows"}
    assert plan(model, data, tmp_path / "run") == 0
    assert not list(tmp_path.rglob("slipped*"))
    assert plan(model, {**data, "small_pool": tmp_path / "rows" / "a.zip"}, tmp_path / "two") == 4


# -- chat templates -----------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + CHATML
DOUBLED = (
    "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}{{ ns.x }}" + CHATML
)
ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ self.__init__.__globals__ }}",
    "import": "{{ cycler.__init__.__globals__.os.mkdir('SIGN') }}",
    "lipsum": "{{ lipsum.__globals__['os'].mkdir('SIGN') }}",
    "attr": "{{ (''|attr('__class__')).__base__ }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "include": "{% include '/etc/passwd' %}",
    "changes": "{{ messages.append(1) }}",
}


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model))


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_reaches_nothing(name: str, tokenizer: Any, sign: Path) -> None:
    tokenizer.chat_template = ESCAPES[name].replace("SIGN", str(sign)) + CHATML
    try:
        text, *_ = chat.render(TURNS, 0, tokenizer)
    except Fault:
        pass
    else:  # what is not allowed is undefined, which may be written as nothing
        assert "root:" not in text
        assert "<class" not in text
        assert "os.environ" not in text


def test_a_template_has_no_secret_of_the_environment(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary_canary")
    template_process.process.stop()
    tokenizer.chat_template = CHATML
    chat.render(TURNS, 0, tokenizer)
    child = template_process.process._child
    assert child is not None
    if sys.platform == "linux":
        held = Path(f"/proc/{child.pid}/environ").read_bytes()
        assert b"PATH=" in held
        assert b"canary" not in held


ENDLESS = {
    "loops": LOOP,
    "doubles": DOUBLED,
    "repeats": "{{ 'a' * 10**10 }}",
    "centres": "{{ 'a'|center(10**11) }}",
}


@pytest.mark.parametrize(
    "template",
    [LOOP, *(pytest.param(ENDLESS[n], marks=pytest.mark.slow) for n in ENDLESS if n != "loops")],
    ids=list(ENDLESS),
)
@pytest.mark.long
def test_a_template_without_end_is_stopped(
    template: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THRIFTY_TEMPLATE_SECONDS", "1")
    template_process.process.stop()
    tokenizer.chat_template = template
    start = time.monotonic()
    with pytest.raises(Fault, match=r"does not come to an end|MemoryError|characters; the most"):
        chat.render(TURNS, 0, tokenizer)
    assert time.monotonic() - start < 60
    tokenizer.chat_template = CHATML  # the next is none the worse for it
    assert chat.render(TURNS, 0, tokenizer)[0].startswith("<|im_start|>user\na")
    template_process.process.stop()


@pytest.mark.slow
def test_a_plan_with_a_template_without_end_is_refused(
    model: Path,
    tiny_data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.setenv("THRIFTY_TEMPLATE_SECONDS", "0.3")
    template_process.process.stop()
    amend(model / "tokenizer_config.json", chat_template=LOOP)
    rows = [{"messages": TURNS}] * 20
    pool = tmp_path / "pool.jsonl"
    pool.write_text("\n".join(map(json.dumps, rows)))
    assert plan(model, {**tiny_data, "small_pool": pool}, tmp_path / "run") == 4
    assert "does not come to an end" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    template_process.process.stop()


@pytest.mark.slow
def test_the_whole_command_apart_runs_nothing(
    model: Path, tiny_data: dict[str, Path], sign: Path, tmp_path: Path
) -> None:
    """All of it at once, as a user would: from a folder full of modules that shadow others."""
    for name in PICKLES:
        plant(model / name, sign)
    folder = tmp_path / "here"
    folder.mkdir()
    for name in ("jinja2", "transformers", "trackio", "chat"):
        (folder / f"{name}.py").write_text(code(sign))
    amend(model / "tokenizer_config.json", chat_template=CHATML)
    command = Path(sys.executable).with_name("thrifty")
    target = ["--target", f"sums={tiny_data['signal']}", "--dev", f"sums={tiny_data['dev']}"]
    pool = ["--pool", str(tiny_data["small_pool"])]
    arguments = ["plan", "--model", str(model), *pool, *target, *OPTIONS, "-o", "run"]
    for more in (arguments, ["run", "run"]):
        done = subprocess.run(
            [str(command), *more],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
