"""What the benchmarks run on: a small Llama with its tokenizer and rows of the standard library."""

from __future__ import annotations

import itertools
import os
import platform
import shutil
from datetime import UTC, datetime
from pathlib import Path

from thrifty.core.plan import Target
from thrifty.data.corpus import write_corpus

AS_INSTALLED = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
"""The environment of a process whose start is timed: an installed package lies there compiled."""


def heading(title: str) -> str:
    """Title, date, machine and versions, to stand above a printed table."""
    import torch
    import transformers

    threads = torch.get_num_threads()
    where = f"{platform.system()} {platform.machine()}, {threads} thread(s)"
    if torch.cuda.is_available():
        where += f", {torch.cuda.get_device_name(0)}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    versions += f", transformers {transformers.__version__}"
    return f"{title}\n{datetime.now(UTC):%Y-%m-%d}, {where}, {versions}"


def small_job(folder: Path, *, rows: int = 2000, hidden_size: int = 64) -> dict[str, object]:
    """A base model (20 steps of pretraining), a pool of so many rows and a target, made once.
    Returns the fields of ``Asked`` that name them."""
    from thrifty.pretrain import pretrain

    corpus = write_corpus(folder / "corpus")
    pool = folder / f"pool-{rows}.jsonl"
    if not pool.exists():
        with corpus.pool.open(encoding="utf-8") as lines:
            pool.write_text("".join(itertools.islice(lines, rows)), encoding="utf-8")
    base = folder / f"base-{hidden_size}"
    if not base.exists():
        draft = folder / "base.new"
        shutil.rmtree(draft, ignore_errors=True)
        texts = itertools.islice(corpus.texts("pretrain"), 2000)
        pretrain(
            list(texts),
            draft,
            vocab_size=1024,
            hidden_size=hidden_size,
            num_layers=2,
            sequence_length=128,
            steps=20,
            show_progress=False,
        )
        draft.rename(base)
    target = Target(signal=(str(corpus.signal),), dev=(str(corpus.dev),), test=(str(corpus.test),))
    return {"model": str(base), "pool": (str(pool),), "targets": {corpus.target: target}}
