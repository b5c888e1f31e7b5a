"""CADS: its policy finds a known optimum; the budget decides between easy and hard rows."""

from __future__ import annotations

import itertools
import random
import shutil

import numpy as np
import pytest

from tests.conftest import write_jsonl
from tests.methods.conftest import Tally, build
from thrifty.core.resolve import resolve
from thrifty.scorers.gradients.cads import reinforce
from thrifty.signals.models import LoadedModels
from thrifty.signals.proxy_run import proxy_run

EFFECTS = np.array([-0.5, -0.3, 0.0, 0.2, 0.4, -0.1])


def test_the_policy_finds_the_mask_that_is_best_of_all():
    """Six groups whose effects add, but for two that are worth nothing beside each other; the best
    of the 64 masks is known."""

    def loss(mask: np.ndarray) -> float:
        return float(3.0 + EFFECTS @ mask + 0.45 * (mask[0] & mask[1]))

    masks = [np.array(bits, dtype=bool) for bits in itertools.product([0, 1], repeat=6)]
    best = min(masks[1:], key=loss)
    noise = np.random.default_rng(1)

    def tried(mask: np.ndarray, number: int) -> np.ndarray:
        return np.array([loss(mask) + noise.normal(scale=0.05)])

    phi = reinforce(tried, 6, 1, rounds=200, draws=8, rate=0.5, seed=0)
    assert ((phi[:, 0] > 0) == best).all()
    assert loss(phi[:, 0] > 0) == loss(best)


def test_targets_have_each_their_own_groups_and_no_difference_moves_nothing():
    def tried(mask: np.ndarray, number: int) -> np.ndarray:
        return np.array([1.0 - mask[0], 1.0 - mask[1]], dtype=float)

    phi = reinforce(tried, 3, 2, rounds=60, draws=8, rate=0.5, seed=0)
    assert phi[:, 0].argmax() == 0
    assert phi[:, 1].argmax() == 1
    same = reinforce(lambda mask, number: np.ones(2), 3, 2, rounds=5, draws=4, rate=1.0, seed=0)
    assert not same.any()


def test_a_larger_pool_is_refused(pool, target, models):
    scorer = resolve("scorer", {"cads": {"max_rows": 100}})
    with pytest.raises(ValueError, match=r"150 rows are more than its max_rows of 100\nhint: "):
        scorer.prepare(pool, {"sums": target.shard(0)}, models, Tally())


@pytest.mark.slow
def test_a_small_budget_picks_easy_rows_and_a_large_one_hard_ones(tiny_model, tmp_path, models):
    """The paper's crossover. The base model half knows the easy rows, and learning the hard ones
    costs it some of that at first: one pass is best spent on the first, eight on the second."""
    digits = random.Random(0)
    easy = [{"prompt": f"e{i}:", "completion": "ha" * 16} for i in range(16)]
    hard = [
        {"prompt": f"h{i}:", "completion": "".join(digits.choices("0123456789", k=24))}
        for i in range(16)
    ]
    pool = build(write_jsonl(tmp_path / "pool.jsonl", easy + hard), tmp_path / "p", tiny_model, 64)
    asked = write_jsonl(tmp_path / "asked.jsonl", easy + hard[:14])
    target = build(asked, tmp_path / "t", tiny_model, 64)
    examples = models.tokens(pool.shard(0))[:16]
    base = proxy_run(
        models.base(), models.shape, examples, Tally(), epochs=24, learning_rate=3e-3, seed=0
    )
    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    base.save_pretrained(folder)
    knowing = LoadedModels(folder, "float32", "cpu", lambda line: None)

    def prefers_hard(epochs: int) -> bool:
        scorer = resolve(
            "scorer",
            {
                "cads": {
                    "num_groups": 2,
                    "share": 0.5,
                    "epochs": epochs,
                    "rank": 0,
                    "learning_rate": 3e-3,
                    "penalty": 0.02,
                }
            },
        )
        _, scores = scorer.prepare(pool, {"both": target.shard(0)}, knowing, Tally())
        assert len(set(scores[:16, 0])) == len(set(scores[16:, 0])) == 1  # a group each
        return bool(scores[16, 0] > scores[0, 0])

    assert not prefers_hard(epochs=1)
    assert prefers_hard(epochs=8)
