"""Stochastic gradient descent, no state at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thrifty.core.contracts import OptimizerStates, Worth
from thrifty.costs.setting import MemorySetting, States
from thrifty.costs.shape import ModelShape

STATES = States(name="sgd", step_casts=2.0, moved=5.0)


@dataclass(frozen=True, kw_only=True)
class SGD(OptimizerStates):
    """Stochastic gradient descent, no state at all."""

    makes = "fit"
    runs = True
    source = "Robbins and Monro, 1951"
    learning_rate = 300.0
    worth = Worth(0.3, 0.2, "transformers need adaptive steps, arXiv:1912.03194")

    def refuses(self, setting: MemorySetting) -> str | None:
        return (
            "addax uses up its gradients in the backward, as lomo does" if setting.short else None
        )

    def rewrite(self, setting: MemorySetting) -> MemorySetting:
        return setting.changed(states=STATES)

    def optimizer(self, groups: list[dict[str, Any]], shape: ModelShape) -> Any:
        from thrifty.holding import sgd

        return sgd.SGD(groups)
