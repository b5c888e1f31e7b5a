import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty.core.budget import Cost
from thrifty.core.marginal import Estimate, Option, choose, replay


def option(name, mean, stderr=0.0, flops=1.0, unit="nats/token"):
    return Option(name, Estimate(mean, stderr, unit, "prior"), Cost(flops=flops))


gains = st.builds(
    Estimate,
    mean=st.floats(-1e6, 1e6),
    stderr=st.floats(0, 1e6) | st.just(math.inf),
    unit=st.just("nats/token"),
    source=st.sampled_from(["prior", "pilot", "history"]),
)
costs = st.builds(
    Cost,
    flops=st.floats(0, 1e24) | st.just(math.inf),
    dollars=st.none() | st.floats(0, 1e6),
)
options_lists = st.lists(
    st.builds(Option, name=st.text(max_size=3), gain=gains, cost=costs),
    max_size=6,
    unique_by=lambda o: o.name,
)


@st.composite
def questions(draw):
    options = draw(options_lists)
    return options, {
        "resource": draw(st.sampled_from(["flops", "dollars"])),
        "price": draw(st.just(0.0) | st.floats(0, 1e6)),
        "incumbent": draw(st.none() | st.sampled_from([o.name for o in options] or [None])),
        "z": draw(st.just(0.0) | st.floats(0, 5)),
    }


@given(questions())
def test_a_record_decides_the_same_again(question):
    options, how = question
    choice = choose(options, **how)
    record = json.loads(json.dumps(choice.to_dict()))
    again = replay(record)
    assert again == choice
    assert not any(math.isnan(rate) for rate in choice.rates)


@given(questions())
def test_the_chosen_has_the_highest_rate_and_it_is_above_the_price(question):
    options, how = question
    choice = choose(options, **how)
    if choice.chosen is None:
        assert all(rate <= how["price"] for rate in choice.rates)
        return
    rates = dict(zip([o.name for o in options], choice.rates, strict=True))
    assert rates[choice.chosen] == max(choice.rates) > how["price"]
    chosen = next(o for o in options if o.name == choice.chosen)
    assert chosen.cost.of(how["resource"]) is not None  # an unknown cost never wins


@given(questions(), st.randoms())
def test_the_order_of_options_only_breaks_ties(question, random):
    options, how = question
    choice = choose(options, **how)
    mixed = list(options)
    random.shuffle(mixed)
    other = choose(mixed, **how)
    assert sorted(other.rates) == sorted(choice.rates)
    if other.chosen != choice.chosen:
        assert other.chosen is not None
        assert max(choice.rates) == max(other.rates)
        assert list(choice.rates).count(max(choice.rates)) > 1
        assert how["incumbent"] not in (choice.chosen, other.chosen)


@given(questions(), st.floats(0, 1e6))
def test_a_higher_price_never_makes_anything_win(question, more):
    options, how = question
    before = choose(options, **how).chosen
    after = choose(options, **{**how, "price": how["price"] + more}).chosen
    assert after in (before, None)


def test_the_incumbent_has_the_benefit_of_the_doubt_and_a_change_has_to_prove_itself():
    a, b = option("a", 1.0, 0.5), option("b", 1.2, 0.5)
    assert choose([a, b], resource="flops", incumbent="a").chosen == "a"
    assert choose([a, b], resource="flops", incumbent="b").chosen == "b"
    assert choose([a, b], resource="flops").chosen == "b"
    assert choose([a, b], resource="flops", incumbent="a", z=0).chosen == "b"
    assert choose([option("a", -0.4, 0.5)], resource="flops", incumbent="a").chosen == "a"
    assert choose([option("a", 0.4, 0.5)], resource="flops").chosen is None


def test_ties_go_to_the_incumbent_then_to_the_first():
    a, b, c = option("a", 1.0), option("b", 1.0), option("c", 1.0)
    assert choose([a, b, c], resource="flops").chosen == "a"
    assert choose([c, b, a], resource="flops").chosen == "c"
    assert choose([c, b, a], resource="flops", incumbent="b").chosen == "b"


def test_at_a_price_of_zero_a_gain_of_zero_does_not_win():
    assert choose([option("a", 0.0)], resource="flops", incumbent="a").chosen is None
    assert choose([option("a", 0.0, flops=0.0)], resource="flops").chosen is None
    assert choose([option("a", 1e-12)], resource="flops").chosen == "a"
    assert choose([], resource="flops").chosen is None


def test_what_is_free_wins_by_its_gain():
    small, large = option("small", 1.0, flops=0.0), option("large", 2.0, flops=0.0)
    paid = option("paid", 1e6)
    assert choose([small, large, paid], resource="flops", price=1e9).chosen == "large"
    assert choose([option("loss", -1.0, flops=0.0)], resource="flops").chosen is None


def test_an_unknown_cost_never_wins():
    unpriced = Option("a", Estimate(5.0, 0.0, "nats/token", "prior"), Cost(flops=1, dollars=None))
    assert choose([unpriced], resource="flops").chosen == "a"
    assert choose([unpriced], resource="dollars").chosen is None


def test_an_unbounded_error_wins_only_as_the_incumbent():
    a = option("a", 1.0, math.inf)
    assert choose([a], resource="flops").chosen is None
    assert choose([a], resource="flops", incumbent="a").chosen == "a"
    assert choose([a], resource="flops", z=0).chosen == "a"


@pytest.mark.parametrize(
    ("options", "how", "message"),
    [
        ([option("a", 1), option("b", 1, unit="points")], {}, "nats/token and points cannot be"),
        ([option("a", 1), option("a", 2)], {}, "the same name"),
        ([option("a", 1)], {"resource": "flop"}, "no resource 'flop'"),
        ([option("a", 1)], {"price": math.nan}, "a price and a z"),
        ([option("a", 1)], {"price": -1.0}, "a price and a z"),
        ([option("a", 1)], {"z": -1.0}, "a price and a z"),
    ],
)
def test_refuses(options, how, message):
    with pytest.raises(ValueError, match=message) as refusal:
        choose(options, **{"resource": "flops", **how})
    assert "\nhint: " in str(refusal.value)


@pytest.mark.parametrize(("mean", "stderr"), [(math.nan, 0), (math.inf, 0), (1, -1), (1, math.nan)])
def test_an_estimate_is_a_number_with_an_error(mean, stderr):
    with pytest.raises(ValueError, match="\nhint: "):
        Estimate(mean, stderr, "nats/token", "prior")


def test_a_record_of_another_rule_is_not_replayed():
    record = {**choose([option("a", 1)], resource="flops").to_dict(), "rule_version": 99}
    with pytest.raises(ValueError, match=r"version 99 of the rule.*\nhint: "):
        replay(record)


def test_the_reason_names_the_numbers():
    options = [option("a", 2e-15), option("b", 1e-15)]
    choice = choose(options, resource="flops", price=0.5e-15)
    assert choice.reason == ("a at 2 nats/token a PFLOP, above the price of 0.5; next best 1")
    none = choose([option("a", 0.1e-15)], resource="flops", price=0.5e-15)
    assert none.reason.endswith("not above the price of 0.5")
