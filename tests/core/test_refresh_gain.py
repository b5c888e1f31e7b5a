"""What choosing anew is worth, and a loop that does not oscillate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from thrifty.core.budget import Cost
from thrifty.core.contracts import Worth
from thrifty.core.marginal import replay
from thrifty.drift import Beliefs, Drift, Scale, drift
from thrifty.prospect import Prospect
from thrifty.refresh_gain import (
    REFRESH,
    Standing,
    Takeover,
    _mean_drift,
    could_pay,
    weigh_refresh,
    weigh_width,
)

STANDING = dict(
    tokens_left=1e6,
    tokens_seen=1e6,
    tokens_since_look=1e6,
    unique=4e6,
    share=1e-9,
    drift=Drift(0.5, 0.0),
    worth=Worth(3.0, 0.0, "a test"),
)


def _standing(**changes):
    return Standing(**{**STANDING, **changes})


def _prospect(left=1e12):
    return Prospect(
        now_flops=1e12,
        left=Cost(flops=left),
        resource="flops",
        loss_at=lambda flops: 3.0 - 0.1 * np.log(flops),
        relative_error=0.0,
        unit="nats/token",
    )


def _weigh(standing, cost=1e10, left=1e12, momentum=1.0):
    return weigh_refresh(
        standing, _prospect(left), momentum=momentum, width=1.0, cost=Cost(flops=cost), z=1.0
    )


def test_a_better_scorer_takes_over_and_one_that_is_too_dear_does_not():
    """By its own worth and its own price, beside the same rule."""

    def chosen(worth, cost, error=0.0):
        other = Takeover(scorer="other", worth=Worth(worth, error, ""), cost=Cost(flops=cost))
        given = {"momentum": 0.5, "width": 1.0, "cost": Cost(flops=1e10), "z": 1.0}
        return weigh_refresh(_standing(), _prospect(), **given, others=[other]).chosen

    assert chosen(2.0, 1e10) == REFRESH
    assert chosen(6.0, 1e10) == "choose rows anew by other"
    assert chosen(6.0, 1e10, error=6.0) == REFRESH  # as far as is known
    assert chosen(6.0, 9e11) == REFRESH


def test_half_a_drift_leaves_half_of_what_a_choice_is_worth():
    """As long as the rest of the run is short beside the time that it took to drift."""
    short = dict(tokens_left=1.0)
    assert _standing(**short).multiple(1.0) == pytest.approx(3.0 / 2.0, rel=1e-5)
    assert _standing(drift=Drift(0.0, 0.0)).multiple(1.0) == pytest.approx(1.0)
    turned = _standing(drift=Drift(1.6, 0.0), **short)
    assert turned.multiple(1.0) == pytest.approx(3.0, rel=1e-5)
    # Where the first look counts as much as the second, that one's part of what is believed.
    half = (1 + 2 * np.sqrt(0.75)) / 2.0
    assert _standing(**short).multiple(0.5) == pytest.approx(half, rel=1e-5)


def test_a_fresh_choice_goes_stale_as_the_present_one_did():
    """By half over as many tokens: it drifts by a quarter in the mean, the present one by three."""
    assert _standing().multiple(1.0) == pytest.approx(2.5 / 1.5)
    # Scores that turned round within a tenth of what is to come are not run after.
    assert _standing(drift=Drift(1.5, 0.0), tokens_since_look=1e5).multiple(1.0) < 1.1


@pytest.mark.parametrize("start", [0.0, 0.3, 1.2])
@pytest.mark.parametrize("rate", [0.0, 1e-7, 1e-5])
def test_the_mean_drift_is_its_integral(start, rate):
    times = np.linspace(0, 1e6, 100_001)
    mean = np.minimum(1, start + rate * times).mean()
    assert _mean_drift(start, rate, 1e6) == pytest.approx(mean, abs=1e-4)


WORN = dict(unique=5e4, tokens_seen=1e6, tokens_left=1e5, tokens_since_look=1e6)


def test_rows_that_repeat_are_worth_changing_the_more():
    assert _standing(**WORN).multiple(1.0) > 2
    same = _standing(**WORN, drift=Drift(0.0, 0.0))  # scores as they were choose the same rows
    assert same.multiple(1.0) == pytest.approx(1.0)


def test_rows_that_repeat_are_worth_widening_and_fresh_ones_are_not():
    still = dict(drift=Drift(0.0, 0.0), share=0.02)
    worn = weigh_width(_standing(**WORN, **still), _prospect(), z=1.0)
    assert worn.chosen == "widen the choice"
    assert weigh_width(_standing(**still), _prospect(), z=1.0).chosen is None
    # A choice of half the pool, none of it seen twice: fewer rows are better ones.
    broad = weigh_width(
        _standing(drift=Drift(0.0, 0.0), share=0.5, tokens_seen=0.0), _prospect(), z=1.0
    )
    assert broad.chosen == "narrow the choice"


def test_a_scorer_worth_nothing_is_never_asked_again():
    nothing = _standing(worth=Worth(1.0, 0.0, "a test"))
    assert nothing.multiple(1.0) == pytest.approx(1.0)
    assert _weigh(nothing).chosen is None


def test_it_is_taken_where_it_is_worth_more_than_training_on():
    assert _weigh(_standing()).chosen == REFRESH
    assert _weigh(_standing(), cost=9e11).chosen is None  # nearly all that is left
    unsure = _standing(worth=Worth(3.0, 2.5, "a test"), drift=Drift(0.1, 0.1))
    assert _weigh(unsure, cost=1e11).chosen is None
    choice = _weigh(_standing())
    assert replay(choice.to_dict()).chosen == choice.chosen


@pytest.mark.parametrize("width", [0.5, 1.0, 2.0])
def test_the_overlap_is_that_of_normal_scores(width):
    random = np.random.default_rng(0)
    then, noise = random.normal(size=(2, 200_000))
    now = 0.5 * then + np.sqrt(0.75) * noise
    believed = 0.3 * then + 0.7 * now
    first = np.argsort(-then)[:20_000]
    second = np.argsort(-believed)[: int(width * 20_000)]
    part = len(np.intersect1d(first, second)) / 20_000
    standing = _standing(share=0.1)
    assert standing.overlap(0.7, width) == pytest.approx(part, abs=0.01)
    same = replace(standing, drift=Drift(0.0, 0.0))
    assert same.overlap(0.7, width) == min(width, 1.0)


class TwoFamilies:
    """A model that is taught two things in turn: what it was trained on last is worth less to it,
    so that whoever believes the newest look alone changes sides each time."""

    def __init__(self):
        self.family = np.arange(400) % 2
        self.known = np.zeros(2)
        self.random = np.random.default_rng(1)

    def scores(self):
        noise = self.random.normal(size=400)
        return (-self.known[self.family] + 0.3 * noise)[:, None]

    def train_on(self, rows):
        share = np.bincount(self.family[rows], minlength=2) / len(rows)
        self.known = 0.2 * self.known + 2.0 * (share - 0.5)


class Switched(TwoFamilies):
    """What is asked for changes once, whatever the model was trained on."""

    evaluation = 0

    def train_on(self, rows):
        self.evaluation += 1
        self.known = np.array([1.0, 0.0] if self.evaluation < 8 else [0.0, 1.0])


EVALUATIONS = 24


def run(model, choose_anew):
    """The share of one family in what is trained on, at each evaluation."""
    first = model.scores()
    beliefs = Beliefs(Scale.of(first).standard(first))
    then, rows, shares, last = first, np.argsort(-first[:, 0])[:40], [], 0
    for evaluation in range(1, EVALUATIONS):
        model.train_on(rows)
        seen = model.scores()
        found = choose_anew(beliefs, then, seen, evaluation - last, EVALUATIONS - evaluation)
        if found is not None:
            beliefs, last, then = found, evaluation, seen
            rows = np.argsort(-beliefs.scores[:, 0])[:40]
        shares.append(model.family[rows].mean())
    return np.array(shares)


def naive(beliefs, then, seen, since, left):
    return Beliefs(Scale.of(seen).standard(seen))


def governed(beliefs, then, seen, since, left):
    moved = drift(then, seen)
    standing = _standing(
        drift=moved,
        share=0.1,
        tokens_seen=since * 1e5,
        tokens_since_look=since * 1e5,
        tokens_left=left * 1e5,
    )
    choice = _weigh(standing, left=left * 1e11, momentum=beliefs.momentum(0.5))
    if since < 2 or choice.chosen is None:
        return None
    return beliefs.after(Scale.of(seen).standard(seen), moved, 0.5)


def test_a_naive_loop_oscillates_and_this_one_does_not():
    flips = np.abs(np.diff(run(TwoFamilies(), naive)))
    calm = np.abs(np.diff(run(TwoFamilies(), governed)))
    assert (flips > 0.5).sum() >= 20  # from one family to the other, nearly each time
    assert (calm > 0.5).sum() <= 3, calm
    assert (calm[len(calm) // 2 :] > 0.3).sum() == 0, calm


def test_a_change_that_stays_is_followed():
    shares = run(Switched(), governed)
    assert (shares[2:7] > 0.9).all(), shares
    assert (shares[14:] < 0.1).all(), shares


def test_no_fewer_rows_than_leave_each_its_passes():
    """A plan gives a row four at most (arXiv:2305.16264); narrowing on the way keeps to it."""
    broad = dict(drift=Drift(0.0, 0.0), share=0.5, unique=1e6)
    few = _standing(**broad, tokens_seen=1e6, tokens_left=1e6)  # 1 + 2 passes of half of it
    assert weigh_width(few, _prospect(), z=1.0).chosen == "narrow the choice"
    many = _standing(**broad, tokens_seen=1e6, tokens_left=2e6)  # 1 + 4
    assert [*many.widths()] == ["widen the choice"]
    assert "narrow the choice" not in str(weigh_width(many, _prospect(), z=1.0).to_dict())
    assert many.best_width(0.5) >= 1.0


def test_no_look_is_bought_that_nothing_could_follow():
    """However far the scores had drifted. Where a look is bought, some drift makes it pay."""

    def could(cost, **changes):
        given = {"momentum": 0.5, "cost": Cost(flops=cost), "z": 1.0}
        return could_pay(_standing(**changes), _prospect(), **given)

    assert could(1e10)
    assert not could(9e11)  # nearly all that is left
    assert not could(1e10, worth=Worth(1.0, 0.0, "a test"))
    assert not could(1e11, worth=Worth(3.0, 20.0, "a test"))
    costs = [1e9 * 2**k for k in range(11)]
    for cost in costs:
        paid = any(
            _weigh(_standing(drift=Drift(d, 0.0)), cost=cost, momentum=0.5).chosen
            for d in (0.25, 0.5, 0.75, 1.0)
        )
        assert could(cost) or not paid
