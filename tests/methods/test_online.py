"""Online methods against their papers in twenty lines."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from tests.methods.conftest import Tally
from thrifty.core.contracts import Chosen, Progress
from thrifty.core.resolve import resolve


def rows(num: int, tokens: int = 10) -> Chosen:
    return Chosen(
        tokens=[SimpleNamespace(input_ids=[0] * tokens)] * num,
        num_tokens=np.full(num, tokens),
        scores=np.arange(num, dtype=np.float32),
    )


def at(share: float, num: int, *, number: int = 0, losses=None, tokens: int = 10**9) -> Progress:
    return Progress(
        number=number,
        share=share,
        round_tokens=tokens,
        losses=np.full(num, np.nan) if losses is None else np.asarray(losses, dtype=float),
        drawn=np.zeros(num, dtype=np.int64),
        seed=3,
    )


# -- curriculum -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.49, 0.5, 0.9])
def test_the_competence_of_the_paper(share):
    """c(t) = min(1, sqrt(t (1 - c0^2) / T + c0^2)), arXiv:1903.09848, equation 7."""
    method = resolve("online", {"curriculum": {"start": 0.3, "ramp": 0.5}})
    assert method.exposed(share) == pytest.approx(
        min(1.0, math.sqrt(share * (1 - 0.3**2) / 0.5 + 0.3**2))
    )
    linear = resolve("online", {"curriculum": {"start": 0.3, "ramp": 0.5, "pacing": "linear"}})
    assert linear.exposed(share) == pytest.approx(min(1.0, share * (1 - 0.3) / 0.5 + 0.3))


def test_a_step_curriculum_has_four_steps():
    method = resolve("online", {"curriculum": {"start": 0.2, "ramp": 1.0, "pacing": "step"}})
    shares = {round(method.exposed(share), 6) for share in np.linspace(0, 0.999, 200)}
    assert shares == {0.2, 0.4, 0.6, 0.8}
    assert method.exposed(1.0) == 1.0


@pytest.mark.parametrize(
    ("first", "expected"), [("easy", [0, 1, 2]), ("hard", [7, 8, 9]), ("middle", [3, 4, 5, 6])]
)
def test_a_curriculum_exposes_its_end_first(first, expected):
    method = resolve("online", {"curriculum": {"first": first, "by": "score", "start": 0.3}})
    chosen = rows(10)
    known = method.prepare(chosen, {}, None, Tally())
    found = method.next_round(chosen, known, at(0.0, 10)).rows
    assert set(found.tolist()) <= set(expected)
    assert len(found) == 3
    assert len(method.next_round(chosen, known, at(0.5, 10)).rows) == 10


def test_a_curriculum_draws_first_what_it_drew_least():
    method = resolve("online", {"curriculum": {"by": "score", "ramp": 0.0}})
    chosen = rows(10)
    known = method.prepare(chosen, {}, None, Tally())
    drawn = np.array([1, 1, 0, 1, 1, 0, 1, 1, 1, 0])
    now = Progress(
        number=0, share=0.0, round_tokens=30, losses=np.full(10, np.nan), drawn=drawn, seed=0
    )
    assert sorted(method.next_round(chosen, known, now).rows.tolist()) == [2, 5, 9]


def test_rows_without_a_score_are_of_middling_difficulty():
    method = resolve("online", {"curriculum": {"by": "score"}})
    chosen = rows(5)
    chosen.scores[0] = np.nan
    assert method.prepare(chosen, {}, None, Tally())["order"].tolist() == [1, 2, 0, 3, 4]


# -- self-paced -----------------------------------------------------------------------------------


def test_self_paced_takes_what_is_below_the_bound():
    method = resolve("online", {"self_paced": {"start": 0.4, "ramp": 1.0}})
    chosen, losses = rows(10), np.array([3, 1, 4, 1.5, 5, 9, 2, 6, 5.5, 3.5])
    known = {"losses": losses}
    for share in (0.0, 0.5, 1.0):
        bound = np.quantile(losses, 0.4 + 0.6 * share, method="inverted_cdf")
        found = method.next_round(chosen, known, at(share, 10))
        assert sorted(found.rows.tolist()) == np.flatnonzero(losses <= bound).tolist()
        assert found.left_out == 10 * (losses > bound).sum()


def test_self_paced_believes_what_training_saw_last():
    method = resolve("online", {"self_paced": {"start": 0.5}})
    seen = np.array([np.nan, 9.0, np.nan, 0.1])
    found = method.next_round(rows(4), {"losses": np.array([1.0, 2, 3, 4])}, at(0, 4, losses=seen))
    assert sorted(found.rows.tolist()) == [0, 3]


# -- infobatch ------------------------------------------------------------------------------------


def test_infobatch_is_unbiased():
    """The expected sum of weights times gradient is that of the whole pass."""
    method = resolve("online", {"infobatch": {"drop": 0.4}})
    num = 50
    chosen, losses = rows(num), np.random.default_rng(0).exponential(size=num)
    gradients = np.random.default_rng(1).normal(size=num)
    sums, saved, rounds = [], [], 4000
    for number in range(rounds):
        found = method.next_round(chosen, {}, at(0.1, num, number=number, losses=losses))
        sums.append(found.weights @ gradients[found.rows])
        saved.append(found.left_out)
        kept_hard = set(np.flatnonzero(losses >= losses.mean())) - set(found.rows.tolist())
        assert not kept_hard, "a hard row is never left out"
    error = np.std(sums) / math.sqrt(rounds)
    assert abs(np.mean(sums) - gradients.sum()) < 4 * error
    easy = (losses < losses.mean()).sum()
    assert np.mean(saved) == pytest.approx(10 * 0.4 * easy, rel=0.02)


def test_infobatch_is_whole_at_first_and_at_last():
    method = resolve("online", "infobatch")
    losses = np.arange(20.0)
    for now in (at(0.0, 20), at(0.9, 20, losses=losses)):
        found = method.next_round(rows(20), {}, now)
        assert sorted(found.rows.tolist()) == list(range(20))
        assert found.weights is None
        assert found.left_out == 0


# -- rho-1 ----------------------------------------------------------------------------------------


def test_rho1_keeps_the_tokens_with_most_excess_loss():
    method = resolve("online", {"rho1": {"keep": 0.25}})
    random = np.random.default_rng(0)
    known = {"losses": random.exponential(size=40), "starts": np.array([0, 15, 40])}
    row = np.array([0] * 8 + [1] * 12)
    place = np.concatenate([np.arange(1, 9), np.arange(3, 15)])
    now = random.exponential(size=20)
    weights = method.token_weights(known, row, place, now)
    excess = [now[i] - known["losses"][known["starts"][row[i]] + place[i]] for i in range(20)]
    best = sorted(range(20), key=lambda i: -excess[i])[:5]
    assert sorted(np.flatnonzero(weights).tolist()) == sorted(best)
    assert weights[best].tolist() == [4.0] * 5
    assert weights.mean() == pytest.approx(1.0)


def test_rho1_without_a_target_says_what_it_needs(models):
    with pytest.raises(ValueError, match="needs a model that knows a target"):
        resolve("online", "rho1").prepare(rows(3), {}, models, Tally())


def test_rho1_refuses_a_reference_that_splits_text_otherwise(models, tmp_path):
    import shutil

    from tokenizers import Tokenizer

    folder = shutil.copytree(models.folder, tmp_path / "other")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["plum"])
    tokenizer.save(str(folder / "tokenizer.json"))
    method = resolve("online", {"rho1": {"model": str(folder)}})
    with pytest.raises(ValueError, match=r"another tokenizer.*\nhint: rho1"):
        method.prepare(rows(3), {}, models, Tally())


def test_rho1_knows_the_reference_losses_token_by_token(pool, target, models):
    import torch

    tokens = list(pool.shard(0).tokens[:7])
    lengths = np.array([len(each.input_ids) for each in tokens])
    chosen = Chosen(tokens=tokens, num_tokens=lengths, scores=np.zeros(7, dtype=np.float32))
    method = resolve("online", {"rho1": {"model": str(models.folder)}})
    known = method.prepare(chosen, {}, models, Tally())
    with torch.no_grad():
        for i, each in enumerate(tokens):
            ids = torch.as_tensor(np.asarray(each.input_ids, dtype=np.int64))[None]
            logits = models.base()(input_ids=ids).logits[0].double()
            here = known["losses"][known["starts"][i] : known["starts"][i + 1]]
            assert here[0] == 0
            nll = -logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            np.testing.assert_allclose(here[1:], nll.numpy(), atol=1e-4)
