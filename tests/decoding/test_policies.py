"""Which policy is taken unasked, and why; what a typed one means."""

from __future__ import annotations

import pytest

from thrifty.core.resolve import resolve
from thrifty.core.sampling import Outcome
from thrifty.policies import answer_form_named, choose_policy, policy_named

OF_BOTH = [
    Outcome(id="1", model=model, answers=("a",), correct=(1.0,)) for model in ("small", "large")
]


@pytest.mark.parametrize(
    ("models", "readable", "rewarded", "fit_on", "samples", "policy", "because"),
    [
        (["m"], True, False, [], 40, "marginal", "vote can still become right"),
        (["m"], True, True, [], 40, "marginal", "vote"),
        (["m"], False, True, [], 40, "best_of", "no price"),
        (["m"], False, False, [], 40, "first", "nothing that tells"),
        (["m"], True, False, [], 1, "first", "1 samples a question"),
        (["m"], True, False, [], 0.5, "first", "0.5 samples a question"),
        (["small", "large"], True, False, OF_BOTH, 40, "cascade", "outcomes"),
        (["small", "large"], True, False, OF_BOTH[:1], 40, "marginal", "of small alone"),
    ],
)
def test_by_what_is_at_hand(
    models: list[str],
    readable: bool,
    rewarded: bool,
    fit_on: list[Outcome],
    samples: float,
    policy: str,
    because: str,
) -> None:
    found, why = choose_policy(models, readable, rewarded, fit_on, samples)
    assert found == policy
    assert because in why
    assert resolve("policy", found)


def test_a_price_stops_the_search_for_a_better_text() -> None:
    assert choose_policy(["m"], False, True, [], 40, price=0.01)[0] == "pandora"


def test_what_is_typed() -> None:
    assert policy_named("{fixed: {samples: 8}}") == resolve("policy", {"fixed": {"samples": 8}})
    assert answer_form_named("number") == resolve("answer", "number")
    for wrong in ("{", "[1]", "3", "fixd", "{fixed: {samples: many}}"):
        with pytest.raises(ValueError, match="hint:"):
            policy_named(wrong)
