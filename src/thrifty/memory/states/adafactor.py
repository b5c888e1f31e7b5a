"""A second moment factored into rows and columns, no first.

A float32 mean square a row and a column of each matrix; its step works in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.core.contracts import OptimizerStates, Worth
from thrifty.costs.setting import MemorySetting, States, needs_a_gradient
from thrifty.costs.shape import ModelShape

STATES = States(
    name="adafactor",
    edge=4.0,
    vector=4.0,
    step_largest=8.0,
    step_casts=2.0,
    moved=9.0,
    cpu_factor=13.0,
)


@dataclass(frozen=True, kw_only=True)
class Adafactor(OptimizerStates):
    """A second moment factored into rows and columns, no first."""

    makes = "fit"
    runs = True
    source = "arXiv:1804.04235"
    worth = Worth(0.9, 0.1, "no momentum; arXiv:1804.04235 section 9")

    def refuses(self, setting: MemorySetting) -> str | None:
        return needs_a_gradient(setting)

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(states=STATES)

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape) -> Any:
        from transformers.optimization import Adafactor as Factored

        from thrifty.holding.tensor_by_tensor import keep_dtypes

        optimizer = Factored(groups, scale_parameter=False, relative_step=False)
        keep_dtypes(optimizer)
        return optimizer
