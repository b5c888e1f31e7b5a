"""A run's own map from nats to the score that is its objective: its evaluations measure both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from thrifty.core.marginal import Estimate
from thrifty.scaling.unit_map import UnitMap, calibrate

NATS = "nats/token"


def own_unit_map(evaluations: Sequence[Mapping[str, Any]], unit: str) -> UnitMap:
    """Of the ledger's evaluations, with their ``beside``. Raises ValueError where they tell of
    none."""
    both = [row for row in evaluations if "loss" in row["beside"]]
    losses = [row["objective"] if "objective" in row else row["loss"] for row in both]
    return calibrate(
        [row["beside"]["loss"] for row in both],
        [1.0 - loss for loss in losses],
        [row["stderr"] for row in both],
        nats=NATS,
        unit=unit,
    )


def in_unit(gain: Estimate, evaluations: Sequence[Mapping[str, Any]], unit: str) -> Estimate:
    """A gain from where the run stands, in ``unit``: as it is, or by the run's own map. Raises
    ValueError where it is in another unit and there is no map."""
    if gain.unit == unit:
        return gain
    return own_unit_map(evaluations, unit).gain(gain, evaluations[-1]["beside"]["loss"])
