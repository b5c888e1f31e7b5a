"""The price of compute where the size of a model is free."""

import pytest

from thrifty.core.budget import Budget, Cost
from thrifty.core.objective import Objective
from thrifty.frontier_price import frontier_price
from thrifty.scaling.allocation import best_for_flops, own_slope
from thrifty.scaling.law_file import read_law


def test_it_is_the_own_slope_of_the_best_run_of_the_budget():
    """Envelope theorem: at the optimum of a budget nothing is gained by another size."""
    (price,) = frontier_price(Objective(law="hoffmann"), Budget(flops=1e21))
    law = read_law("hoffmann").law
    best = best_for_flops(law, 1e21)
    interval = Cost(flops=1e18, seconds=50.0)
    assert price("flops", interval) == pytest.approx(own_slope(law, best.N, best.D), rel=1e-4)
    assert price("seconds", interval) == pytest.approx(price("flops", interval) * 2e16)
    # A model a tenth as large that was given the same FLOPs is past its best use of them.
    small = best.N / 10
    assert own_slope(law, small, 1e21 / 6 / small) < price("flops", interval)


def test_no_law_is_no_alternative():
    assert frontier_price(Objective(), Budget(flops=1e21)) == ()


@pytest.mark.parametrize(
    ("objective", "budget", "told"),
    [
        (Objective(law="hoffmann"), Budget(seconds=10.0), "does not limit them"),
        (Objective(law="nobody's"), Budget(flops=1e21), "nobody's"),
    ],
)
def test_what_cannot_be_priced_is_said(objective, budget, told):
    with pytest.raises(ValueError, match=told):
        frontier_price(objective, budget)


def test_a_law_prices_nats_alone():
    with pytest.raises(ValueError, match=r"objective\.law is in nats"):
        Objective(law="hoffmann", metric="exact_match")
