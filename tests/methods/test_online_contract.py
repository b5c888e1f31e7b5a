"""What every online method must fulfil, run over every one there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.methods.conftest import Tally
from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Chosen, OnlineMethod, Work
from thrifty.core.resolve import all_names, method_class, name_of, resolve, summary
from thrifty.costs.hardware import load_device
from thrifty.costs.setting import MemorySetting
from thrifty.rounds import Rounds

NAMES = all_names("online")
RUN_TOKENS = 4.0
"""Passes of the runs below."""


@dataclass(frozen=True)
class Example:
    """As ``tokens.Tokens``."""

    input_ids: Any
    loss_mask: Any


@pytest.fixture(scope="module")
def chosen(pool) -> Chosen:
    tokens = [row for shard in pool.shards() for row in shard.tokens][:60]
    lengths = np.array([len(row.input_ids) for row in tokens])
    scores = np.random.default_rng(0).normal(size=len(tokens)).astype(np.float32)
    scores[-5:] = np.nan  # replayed
    return Chosen(tokens=tokens, num_tokens=lengths, scores=scores)


@pytest.fixture(scope="module")
def prepared(chosen, target, models):
    """name -> what the method prepared, and its ticks."""
    found = {}
    for name in NAMES:
        tally = Tally()
        known = resolve("online", name).prepare(chosen, {"sums": target.shard(0)}, models, tally)
        found[name] = known, tally.cost
    return found


def rounds_of(name: str, chosen: Chosen, known, seed: int = 0) -> Rounds:
    tokens = RUN_TOKENS * float(chosen.num_tokens.sum())
    return Rounds(resolve("online", name), chosen, known, num_tokens=tokens, seed=seed)


def train(rounds: Rounds, number: int, random: np.random.Generator) -> None:
    """As if the rows of a round were trained on: their losses are told."""
    for row in rounds.order(number).tolist():
        size = int(rounds.chosen.num_tokens[row])
        losses = random.exponential(size=size)
        numbers = np.full(size, number)
        weights = rounds.weigh(numbers, np.full(size, row), np.arange(size), losses)
        assert weights.shape == (size,)
        assert (weights >= 0).all()
        assert np.isfinite(weights).all()


def orders(rounds: Rounds, num: int) -> list[list[int]]:
    found, random = [], np.random.default_rng(1)
    for number in range(num):
        found.append(rounds.order(number).tolist())
        train(rounds, number, random)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_is(name):
    cls = method_class("online", name)
    assert issubclass(cls, OnlineMethod)
    assert 10 < len(summary(cls)) < 100
    assert cls.source
    assert cls() == resolve("online", name), "all fields have defaults"
    assert name_of(cls()) == name


@pytest.mark.parametrize("name", NAMES)
def test_gives_rows_that_there_are_and_the_same_again(name, chosen, prepared):
    known, _ = prepared[name]
    first, again = (orders(rounds_of(name, chosen, known), 12) for _ in range(2))
    assert first == again
    for rows in first:
        assert rows
        assert len(set(rows)) == len(rows), "a row is in a round once"
        assert set(rows) <= set(range(len(chosen)))
    other = orders(rounds_of(name, chosen, known, seed=5), 12)
    assert name == "ordered" or first != other, "the seed decides"


@pytest.mark.parametrize("name", NAMES)
def test_every_row_has_its_turn(name, chosen, prepared):
    rounds = rounds_of(name, chosen, prepared[name][0])
    found, number, random = set(), 0, np.random.default_rng(2)
    while rounds._given < rounds._run_tokens:
        found |= set(rounds.order(number).tolist())
        train(rounds, number, random)
        number += 1
    assert found == set(range(len(chosen)))


@pytest.mark.parametrize("name", NAMES)
def test_goes_on_from_a_checkpoint_as_if_nothing_had_happened(name, chosen, prepared, tmp_path):
    known, _ = prepared[name]
    whole = orders(rounds_of(name, chosen, known), 10)
    stopped = rounds_of(name, chosen, known)
    random = np.random.default_rng(1)
    for number in range(4):
        stopped.order(number)
        train(stopped, number, random)
    stopped.order(4)  # asked for ahead, as a data loader does
    stopped.save(tmp_path)
    resumed = rounds_of(name, chosen, known)
    if resumed.remembers:
        resumed.load(tmp_path)
    found = [resumed.order(number).tolist() for number in range(4)]
    for number in range(4, 10):
        found.append(resumed.order(number).tolist())
        train(resumed, number, random)
    assert found == whole
    assert resumed.left_out >= 0


@pytest.mark.parametrize("name", NAMES)
def test_costs_what_it_says(name, chosen, prepared, models, target):
    _, ticked = prepared[name]
    lengths = chosen.num_tokens
    work = Work(
        pool=PoolStats(
            num_examples=len(chosen),
            num_tokens=int(lengths.sum()),
            max_tokens=int(lengths.max()),
            num_squared_tokens=int((lengths**2).sum()),
        ),
        targets={"sums": target.manifest.stats},
        shape=models.shape,
        device=load_device("h100"),
        max_length=128,
    )
    predicted = resolve("online", name).cost(work)
    assert ticked.flops == pytest.approx(predicted.flops, rel=0.1)
    method, tally = resolve("online", name), Tally()
    if method.renewals:
        method.renew(chosen, {"sums": target.shard(0)}, models, tally)
    again = method.renewal_cost(work)
    assert tally.cost.flops == pytest.approx(again.flops, rel=0.1)
    for cost in (predicted, again):
        assert (cost.seconds > 0) == (cost.flops > 0)
    step = Cost(flops=1e9, seconds=1.0)
    setting = MemorySetting(micro_batch=4, sequence=64, dtype="float32")
    with_choice = method.step_cost(step, models.shape, setting)
    assert (with_choice.flops > step.flops) == method.chooses
    assert with_choice.seconds / step.seconds == pytest.approx(with_choice.flops / step.flops)
    more = predicted.flops + again.flops + with_choice.flops - step.flops
    assert (more > 0) == (method.cost_class != "free")


@pytest.mark.parametrize("name", NAMES)
def test_one_row_will_do(name, chosen, target, models):
    one = Chosen(
        tokens=chosen.tokens[:1], num_tokens=chosen.num_tokens[:1], scores=chosen.scores[:1]
    )
    known = resolve("online", name).prepare(one, {"sums": target.shard(0)}, models, Tally())
    rounds = rounds_of(name, one, known)
    assert orders(rounds, 5) == [[0]] * 5
