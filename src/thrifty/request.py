"""What is to be planned for: all that the planner may not choose itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from thrifty.core.budget import Budget, PoolStats
from thrifty.core.contracts import Scorer
from thrifty.core.given import same_tokens
from thrifty.core.ledger import Rates
from thrifty.core.plan import Preference, put
from thrifty.core.plan_serving import Serving
from thrifty.costs.allocator import allocatable
from thrifty.costs.hardware import Device
from thrifty.costs.shape import ModelShape

MEMORY_MARGIN = 1.05


def never_before(scorer: Scorer, dtype: str) -> bool:
    """Of rows that no earlier run has scored."""
    return False


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to plan for: everything that the planner may not choose itself."""

    shape: ModelShape
    budget: Budget
    device: Device
    rates: Rates
    pool: PoolStats | None = None
    targets: Mapping[str, PoolStats] = field(default_factory=dict)
    dev: PoolStats | None = None
    """All dev rows together."""
    tried: PoolStats | None = None
    """All rows that a pilot goes by; None: the dev rows."""
    test: PoolStats | None = None
    task: Literal["sft", "continued", "preference"] = "sft"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """plan.yaml keys that the user set: ``training.method``, ``selection.scorer``, ..."""
    techniques: tuple[str, ...] = ()
    """Memory techniques that the user named."""
    num_devices: int = 1
    """At most; those of a run."""
    guard: PoolStats | None = None
    """Rows that are measured beside the dev rows."""
    max_new_tokens: int = 0
    """Of an answer that evaluations generate; 0 where none is."""
    serving: Serving | None = None
    """Questions that the budget is to answer after training."""
    generated_context: int = 0
    """Tokens a row that an evaluation's generation holds in its cache; a loss takes none."""
    token_ratio: Callable[[str], float] = same_tokens
    """Path of a model -> tokens that it makes of the pool's rows, over those of their own."""
    is_scored: Callable[[Scorer, str], bool] = never_before
    """Whether an earlier run left the pool's scores by a method, its models read in that dtype."""

    def on(self, num_devices: int) -> Request:
        """The same, paid for so many devices; processes on a CPU share one."""
        if self.device.kind == "cpu":
            return self
        dollars, watts = self.rates.dollars_per_second, self.rates.watts
        rates = Rates(
            dollars_per_second=None if dollars is None else dollars * num_devices,
            watts=None if watts is None else watts * num_devices,
        )
        return replace(self, rates=rates)

    @property
    def preference(self) -> Preference | None:
        """How pairs are trained on, as far as the user set it; None where the task is another."""
        if self.task != "preference":
            return None
        given: dict[str, Any] = {"training": {}}
        for key, value in self.fixed.items():
            if key.startswith("training.preference"):
                put(given, key, value)
        return Preference(**given["training"].get("preference") or {})

    @property
    def asks_reference(self) -> bool:
        """Whether every step of pairs asks the reference."""
        return self.preference is not None and not self.preference.precompute_ref_log_probs

    @property
    def memory_limit(self) -> float:
        """A GPU holds no more than it has, whatever the budget allows; a machine's memory without a
        GPU stands for any other's."""
        asked = self.budget.memory_bytes or self.device.memory_bytes
        return min(asked, self.device.memory_bytes) if self.device.kind == "cuda" else asked

    @property
    def most_allocated(self) -> float:
        """Bytes that tensors may take on the device."""
        return allocatable(self.memory_limit / self.memory_margin, self.device.kind)

    @property
    def memory_margin(self) -> float:
        """Times a predicted peak that has to fit."""
        return MEMORY_MARGIN * self.device.memory_factor
