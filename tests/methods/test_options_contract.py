"""Bad options of any method are one clear error, from plan.yaml and from Python alike."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import pytest

from thrifty.core.contracts import KINDS
from thrifty.core.resolve import all_names, method_class, resolve

METHODS = [(kind, name) for kind in KINDS for name in all_names(kind)]
NUMBERS = [
    (kind, name, field.name)
    for kind, name in METHODS
    for field in dataclasses.fields(method_class(kind, name))
    if get_type_hints(method_class(kind, name))[field.name] in (int, float, int | None)
]


def refusal(kind: str, name: str, options: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"\nhint: ") as error:
        resolve(kind, {name: options})
    return str(error.value)


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_an_option_that_there_is_not(kind, name):
    assert f"unknown key {kind}.{name}.no_such" in refusal(kind, name, {"no_such": 1})


@pytest.mark.parametrize(("kind", "name", "option"), NUMBERS)
def test_no_number_of_a_method_may_be_negative_or_no_number(kind, name, option):
    assert f"{option} must be " in refusal(kind, name, {option: -3})
    assert f"{kind}.{name}.{option} must be a" in refusal(kind, name, {option: "many"})
    assert f"{option} must be a" in refusal(kind, name, {option: float("nan")})
    with pytest.raises(ValueError, match=rf"{option} must be .*not -3\nhint: the default is "):
        method_class(kind, name)(**{option: -3})


@pytest.mark.parametrize(
    ("kind", "spec", "says"),
    [
        ("stopping", {"plateau": {"patience": 0}}, "patience must be at least 1, not 0"),
        ("scorer", {"perplexity": {"center": 1.5}}, "center must be from 0 to 1, not 1.5"),
        ("scorer", {"bm25": {"b": 1.01}}, "b must be from 0 to 1, not 1.01"),
        ("scorer", {"perplexity": {"band": "top"}}, "band must be one of low, middle, high"),
    ],
)
def test_the_ends_of_a_range(kind, spec, says):
    with pytest.raises(ValueError, match=says):
        resolve(kind, spec)
