"""Which policy is meant by what was typed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import yaml

from thrifty.core.contracts import AnswerForm, DecodingPolicy
from thrifty.core.resolve import Spec, resolve
from thrifty.core.sampling import Outcome


def choose_policy(
    models: Sequence[str],
    readable: bool,
    rewarded: bool,
    fit_on: Sequence[Outcome] = (),
    samples_each: float = math.inf,
    price: float = 0.0,
) -> tuple[Spec, str]:
    """For a task, by what is at hand: the policy, and why that one.

    ``readable``: answers can be read and compared; ``rewarded``: texts can be scored; ``fit_on``:
    outcomes with gold answers; ``samples_each``: of a question, that the budget buys at most;
    ``price``: what a unit of the resource must bring.
    """
    fitted = {outcome.model for outcome in fit_on}
    if samples_each <= 1:
        return "first", f"the budget buys {samples_each:.3g} samples a question: none to compare"
    if readable and len(models) > 1 and fitted.issuperset(models):
        return (
            "cascade",
            "several models, and outcomes of each to say when the cheaper one is right",
        )
    if readable:
        why = "answers can be compared, and one budget goes where a vote can still become right"
        if len(models) > 1:
            why += f"; of {models[0]} alone, for no outcomes say how the models compare"
        return "marginal", why
    if rewarded and price > 0:
        return "pandora", "texts can be scored, not compared: the best of as many as pay"
    if rewarded:
        return "best_of", "texts can be scored, not compared, and no price says when to stop"
    return "first", "open texts, and nothing that tells a better one: more samples change nothing"


def policy_named(text: str) -> DecodingPolicy:
    """``marginal``, or ``{fixed: {samples: 8}}``. Raises ValueError where there is none."""
    policy: DecodingPolicy = resolve("policy", _spec("--policy", text))
    return policy


def answer_form_named(text: str) -> AnswerForm:
    """``number``, or ``{exact: {...}}``. Raises ValueError where there is none."""
    form: AnswerForm = resolve("answer", _spec("--answer", text))
    return form


def _spec(option: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{option} {text!r} is no name and no mapping\n"
            f"hint: {option} '{{fixed: {{samples: 8}}}}'"
        ) from error
