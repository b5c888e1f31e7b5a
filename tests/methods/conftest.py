"""A tokenised pool in several shards, a target and a model for the contract tests."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

from thrifty.core.budget import Cost
from thrifty.core.contracts import Scorer
from thrifty.core.resolve import method_class, resolve
from thrifty.data.pool import read_rows
from thrifty.data.store import Store, build_store, open_store
from thrifty.data.tokens import load_tokenizer, tokenizer_fingerprint
from thrifty.signals.models import LoadedModels


@dataclass
class Tally:
    """A meter that adds up."""

    cost: Cost = field(default_factory=Cost)

    def tick(self, cost: Cost, *, steps: int = 1) -> None:
        self.cost += cost


BRIEF = {
    "max_warmup_rows": 24,
    "max_curvature_rows": 24,
    "max_target_rows": 8,
    "dimensions": 256,
    "rank": 2,
    "landmarks": 24,
    "num_subsets": 4,
    "rounds": 2,
    "draws": 2,
}
"""Options with which scorers that train or invert something take seconds less in tests."""


TRAINED = ("cads", "cartography", "aum", "cascade", "datainf", "datamodel", "ekfac")
TRAINED += ("influence_distillation", "logra", "s2l", "tracin", "trak")


def usual(names: Sequence[str]) -> list[Any]:
    """Those that take a second or two; the others, of kinds that one of these stands for, beside
    the slow tests."""
    return [pytest.param(n, marks=pytest.mark.slow) if n in TRAINED else n for n in names]


def briefly(name: str) -> Scorer:
    """A scorer of that name, with those of ``BRIEF`` that it has."""
    has = {each.name for each in fields(method_class("scorer", name))}
    options = {option: value for option, value in BRIEF.items() if option in has}
    return resolve("scorer", {name: options} if options else name)


def build(source: Path, folder: Path, model: Path, shard_rows: int) -> Store:
    tokenizer = load_tokenizer(str(model))
    build_store(
        read_rows([str(source)]),
        folder,
        tokenizer,
        128,
        shard_rows=shard_rows,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )
    return open_store(folder)


@pytest.fixture(scope="session")
def pool(tiny_model: Path, tiny_data: dict[str, Path], tmp_path_factory) -> Store:
    return build(tiny_data["small_pool"], tmp_path_factory.mktemp("pool"), tiny_model, 40)


@pytest.fixture(scope="session")
def whole_pool(tiny_model: Path, tiny_data: dict[str, Path], tmp_path_factory) -> Store:
    """The same rows in one shard."""
    return build(tiny_data["small_pool"], tmp_path_factory.mktemp("whole"), tiny_model, 4096)


@pytest.fixture(scope="session")
def target(tiny_model: Path, tiny_data: dict[str, Path], tmp_path_factory) -> Store:
    return build(tiny_data["signal"], tmp_path_factory.mktemp("signal"), tiny_model, 4096)


@pytest.fixture(scope="session")
def models(tiny_model: Path) -> LoadedModels:
    return LoadedModels(tiny_model, "float32")


@pytest.fixture(scope="session")
def letters(tiny_model: Path, tmp_path_factory) -> Path:
    """The model with a tokenizer that joins no letters."""
    from tokenizers import Tokenizer

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("letters") / "model")
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.model = type(tokenizer.model)(vocab=tokenizer.get_vocab(), merges=[])
    tokenizer.save(str(file))
    return folder
