"""What a method is worth before anything was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Worth:
    """A prior on a scorer: a token that it picks is worth ``mean`` tokens picked at random.

    An editable number with its source, used by the planner until a pilot or a history replaces it.
    """

    mean: float
    stderr: float
    source: str
