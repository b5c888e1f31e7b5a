import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty.core.budget import CONSUMED, RESOURCES, Budget, Cost, PoolStats, Rates

amounts = st.floats(0, 1e30, allow_subnormal=False)
costs = st.builds(
    Cost,
    flops=amounts,
    tokens=amounts,
    seconds=amounts,
    joules=st.none() | amounts,
    dollars=st.none() | amounts,
    peak_memory_bytes=amounts,
)
limits = st.none() | st.floats(1e-3, 1e30)
budgets = st.builds(
    Budget,
    flops=limits,
    tokens=limits,
    seconds=limits,
    joules=limits,
    dollars=limits,
    memory_bytes=limits,
)


@given(costs, costs)
def test_consumption_adds_and_the_peak_is_a_maximum(a, b):
    total = a + b
    for name in CONSUMED:
        if a.of(name) is None or b.of(name) is None:
            assert total.of(name) is None  # unknown stays unknown
        else:
            assert total.of(name) == a.of(name) + b.of(name)
    assert total.peak_memory_bytes == max(a.peak_memory_bytes, b.peak_memory_bytes)


@given(costs, costs, costs)
def test_addition_is_associative_and_commutative_with_a_zero(a, b, c):
    assert a + b == b + a
    assert a + Cost() == a
    for name in RESOURCES:
        left, right = ((a + b) + c).of(name), (a + (b + c)).of(name)
        assert left == (right if right is None else pytest.approx(right))


@given(costs, st.integers(1, 100))
def test_times_is_repeated_addition(cost, times):
    product, total = cost * times, sum([cost] * times, Cost())
    assert times * cost == product
    for name in RESOURCES:
        left, right = product.of(name), total.of(name)
        assert left == (right if right is None else pytest.approx(right))


@given(costs)
def test_a_cost_survives_a_dictionary(cost):
    assert Cost.from_dict(cost.to_dict()) == cost


def test_costs_are_printed_in_their_units():
    cost = Cost(flops=3e15, tokens=2e6, seconds=5, peak_memory_bytes=2**30, dollars=None)
    assert str(cost) == "3 PFLOP, 2 M tokens, 5 s, 1 GiB"
    assert str(Cost()) == "nothing"
    assert str(Budget()) == "no limit"
    assert str(Budget(flops=3e15, memory_bytes=2**30)) == "3 PFLOP, 1 GiB"


@given(costs)
def test_rates_price_seconds_and_leave_known_prices(cost):
    priced = Rates(dollars_per_second=0.5, watts=100).of(cost)
    assert priced.dollars == (cost.dollars or (None if cost.dollars is None else cost.seconds / 2))
    unpriced = Rates().of(cost)
    assert unpriced.dollars == (cost.dollars or None)
    assert unpriced.joules == (cost.joules or None)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, True, "3e17"])
@pytest.mark.parametrize("name", ["flops", "memory_bytes", "joules"])
def test_a_limit_is_a_positive_finite_number(name, value):
    with pytest.raises(ValueError, match=rf"budget's {name} .*\nhint: leave {name} out"):
        Budget(**{name: value})


@given(budgets, costs)
def test_exceeded_by_names_a_resource_past_its_limit(budget, cost):
    over = [
        name
        for name in RESOURCES
        if budget.limit(name) is not None
        and (cost.of(name) is None or cost.of(name) > budget.limit(name) * (1 + 1e-12))
    ]
    assert budget.exceeded_by(cost) == (over[0] if over else None)


@given(budgets, costs, costs)
def test_what_was_exceeded_stays_exceeded(budget, spent, more):
    if budget.exceeded_by(spent) is not None:
        assert budget.exceeded_by(spent + more) is not None


def test_exactly_the_limit_fits_in_spite_of_rounding():
    budget = Budget(flops=1.0)
    tenths = sum([Cost(flops=0.1)] * 10, Cost())
    assert budget.exceeded_by(tenths) is None
    assert budget.exceeded_by(tenths + Cost(flops=1e-9)) == "flops"


def test_what_is_no_number_cannot_be_held_to_a_limit():
    assert Budget(flops=1.0).exceeded_by(Cost(flops=math.nan)) == "flops"
    assert Budget(dollars=1.0).exceeded_by(Cost(dollars=None)) == "dollars"
    assert Budget(tokens=1.0).exceeded_by(Cost(flops=math.nan)) is None


@given(budgets, costs)
def test_left_is_the_limit_less_what_was_spent(budget, spent):
    left = budget.left(spent)
    assert set(left) == set(budget.limited)
    for name, amount in left.items():
        used = spent.of(name)
        assert amount == (0.0 if used is None else budget.limit(name) - used)


@given(budgets, costs, costs)
def test_binding_is_the_resource_that_runs_out_first(budget, spent, step):
    name, steps = budget.binding(spent, step)
    assert steps >= 0
    if name is None:
        assert steps == math.inf
        assert all(step.of(n) == 0 for n in budget.limited)
        return
    assert name in budget.limited
    for other, left in budget.left(spent).items():
        used = step.of(other)
        if used is None:
            assert steps == 0
        elif used > 0:
            assert steps <= max(left / used, 0.0)
    if 1 <= steps < 1e6 and not Budget.exceeded_by(budget, spent):
        consumed = spent + step * int(steps)
        assert all(consumed.of(n) <= budget.limit(n) * (1 + 1e-12) for n in budget.limited)


def test_binding_of_an_unknown_price_allows_no_step():
    assert Budget(dollars=5, flops=10).binding(Cost(), Cost(flops=1, dollars=None)) == (
        "dollars",
        0.0,
    )
    assert Budget(flops=10).binding(Cost(), Cost(flops=math.nan)) == ("flops", 0.0)


def test_the_mean_of_an_empty_pool_is_zero():
    assert PoolStats(num_examples=0, num_tokens=0, max_tokens=0).mean_tokens == 0


def test_the_rest_of_a_cost():
    whole = Cost(flops=5, tokens=4, seconds=3, joules=2, dollars=1, peak_memory_bytes=9)
    part = Cost(flops=2, tokens=4.5, seconds=1, joules=2, dollars=0.25, peak_memory_bytes=20)
    rest = Cost(flops=3, tokens=0, seconds=2, joules=0, dollars=0.75, peak_memory_bytes=9)
    assert whole.without(part) == rest
    assert whole.without(Cost()) == whole
    assert whole.without(Cost(joules=None)).joules is None
    assert Cost(dollars=None).without(whole).dollars is None
