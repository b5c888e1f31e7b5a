"""thrifty: spend a fixed budget of data, memory and compute where each unit buys the most.

Public names load on first use, so that ``import thrifty`` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Budget": "thrifty.core.budget",
    "Cost": "thrifty.core.budget",
    "Ledger": "thrifty.core.ledger",
    "BudgetExceeded": "thrifty.core.ledger",
    "Estimate": "thrifty.core.marginal",
    "Option": "thrifty.core.marginal",
    "choose": "thrifty.core.marginal",
    "Plan": "thrifty.core.plan",
    "BudgetCallback": "thrifty.budget_callback",
    "Request": "thrifty.planner",
    "make_plan": "thrifty.pipeline",
    "run": "thrifty.pipeline",
    "select": "thrifty.pipeline",
    "train": "thrifty.pipeline",
    "decode": "thrifty.decode_pool",
    "decode_async": "thrifty.decode_pool",
    "Endpoint": "thrifty.backends.endpoint",
    "Local": "thrifty.backends.local",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'thrifty' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
