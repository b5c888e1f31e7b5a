"""What an answer says of itself: what it cost, how sure it is, why no more was drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thrifty.core.budget import Cost


@dataclass(frozen=True, kw_only=True)
class Told:
    """The ``thrifty`` object of an answer."""

    policy: str
    model: str
    """That answered."""
    samples: int
    cost: Cost
    measured: bool
    """Whether that is what the upstream counted; else it is the most that it can have been."""
    knows_flops: bool = False
    confidence: float | None = None
    reason: str = ""
    """Why no more was drawn, or why the policy was not asked."""
    left: Mapping[str, float] | None = None
    """Of the key's budget."""

    def facts(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "model": self.model,
            "samples": self.samples,
            "tokens": round(self.cost.tokens),
            "dollars": self.cost.dollars,
            "flops": self.cost.flops if self.knows_flops else None,
            "measured": self.measured,
            "confidence": self.confidence,
            "reason": self.reason,
            "left": dict(self.left or {}),
        }

    def headers(self) -> dict[str, str]:
        """Its numbers, for those who read no bodies."""
        named = ("samples", "tokens", "dollars", "flops", "confidence")
        facts = self.facts()
        numbers = {name: facts[name] for name in named if facts[name] is not None}
        return {
            "x-thrifty-policy": self.policy,
            "x-thrifty-measured": "true" if self.measured else "false",
            **{f"x-thrifty-{name}": f"{value:.12g}" for name, value in numbers.items()},
            **left_headers(self.left or {}),
        }


def left_headers(left: Mapping[str, float]) -> dict[str, str]:
    return {f"x-thrifty-left-{name}": f"{amount:.12g}" for name, amount in left.items()}
