"""What a decoding policy also is that has a model of its own look at questions first.

hold = purse.hold(policy.reading(prompts))     # the most that it takes
policy.read(prompts, meter)                    # what it took; decisions look at nothing anew
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from thrifty.core.budget import Cost
from thrifty.core.given import Meter


class ReadsQuestions(ABC):
    """Is asked to read before it decides on any, and charged."""

    @abstractmethod
    def reading(self, prompts: Sequence[str]) -> Cost:
        """The most that ``read`` takes; nothing where all was read before."""

    @abstractmethod
    def read(self, prompts: Sequence[str], meter: Meter) -> None:
        """Ticks what it takes."""
