"""What many tests share: a tiny real model with its tokenizer, and a small pool with a target."""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No test reads or writes the user's own measurements, prices and models.
os.environ["THRIFTY_CACHE"] = tempfile.mkdtemp(prefix="thrifty-tests-")
atexit.register(shutil.rmtree, os.environ["THRIFTY_CACHE"], ignore_errors=True)
os.environ["THRIFTY_ROWS_CACHE_GIB"] = "0"  # nor rows that another test has tokenised


_MADE_ONCE = ("done", "golden", "corpus", "scored", "by_the_counter")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one run, or of one set of files, which take seconds to make, share a worker."""
    for item in items:
        for name in _MADE_ONCE:
            if name in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(scope="session", autouse=True)
def measured_machine() -> None:
    """A cautious guess, taken for measured: measuring takes seconds."""
    import torch

    from thrifty.costs.hardware import keep, load_device

    threads = torch.get_num_threads()
    keep(replace(load_device(None), name="local", calibrated=True, num_threads=threads))


_WORDS = {
    "sums": "add two and three to get five plus minus equals number count total sum",
    "fruit": "apple pear plum cherry sweet ripe red green tree basket juice slice",
    "weather": "rain sun wind cloud storm cold warm snow sky grey bright thunder",
}


def sentences(topic: str, count: int, seed: int) -> list[dict[str, str]]:
    """Prompt and completion rows about a topic: random words of its own, so that topics differ."""
    rng = random.Random(f"{topic}-{seed}")
    words = _WORDS[topic].split()
    return [
        {
            "prompt": f"say {' '.join(rng.choices(words, k=rng.randint(3, 9)))}:",
            "completion": f" {' '.join(rng.choices(words, k=rng.randint(5, 25)))}.",
        }
        for _ in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, 32 wide, with a byte-level tokenizer of 320 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [row["prompt"] + row["completion"] for t in _WORDS for row in sentences(t, 50, 0)]
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=128
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """pool.jsonl: 300 rows of each of three topics (small_pool: 150 of them); signal, dev and test
    rows about sums."""
    folder = tmp_path_factory.mktemp("tiny-data")
    pool = [row for topic in _WORDS for row in sentences(topic, 300, 1)]
    random.Random(0).shuffle(pool)
    return {
        "pool": write_jsonl(folder / "pool.jsonl", pool),
        "small_pool": write_jsonl(folder / "small_pool.jsonl", pool[:150]),
        "signal": write_jsonl(folder / "signal.jsonl", sentences("sums", 12, 2)),
        "dev": write_jsonl(folder / "dev.jsonl", sentences("sums", 16, 3)),
        "test": write_jsonl(folder / "test.jsonl", sentences("sums", 16, 4)),
    }
