"""Prices and costs that are no amount."""

import math

import pytest

from thrifty.core.budget import Budget, Cost, Rates
from thrifty.core.ledger import Ledger


@pytest.mark.parametrize("price", [math.nan, math.inf, -1.0, 1e308, 1e5])
def test_a_price_that_is_no_amount_is_refused(price):
    for rates in ({"dollars_per_second": price}, {"watts": price if price < 1e300 else math.inf}):
        if rates == {"watts": 1e5}:
            continue
        with pytest.raises(ValueError, match=r"must be at least zero.*\nhint: None where it is"):
            Rates(**rates)
    assert Rates(dollars_per_second=0.0, watts=0.0).of(Cost(seconds=9)).dollars == 0.0


@pytest.mark.parametrize("name", ["dollars", "joules", "flops"])
@pytest.mark.parametrize("amount", [math.nan, math.inf, -3.0])
def test_a_tick_of_no_amount_is_refused_and_the_rest_is_booked(name, amount, tmp_path):
    ledger = Ledger.create(tmp_path / "a.sqlite", Budget(tokens=9), Rates(dollars_per_second=0.0))
    with ledger, ledger.stage("a", "x") as stage:
        with stage.spending("work", Cost(dollars=1.0)) as lease:
            lease.tick(Cost(flops=2, dollars=0.5), steps=1)
            with pytest.raises(ValueError, match="negative or no number"):
                lease.tick(Cost(**{name: amount}), steps=1)
        assert (ledger.spent().flops, ledger.spent().dollars) == (2, 0.5)
