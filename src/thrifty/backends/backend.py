"""What is asked of whoever answers, and what comes back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from thrifty.core.budget import Cost

Message = Mapping[str, str]
"""``{"role": "user", "content": "..."}``"""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """One request: a prompt, and how it is to be continued."""

    prompt: str | Sequence[Message]
    """A text is one message of the user's, unless the backend says otherwise."""
    count: int = 1
    """Independent completions."""
    prefix: str = ""
    """The beginning of the answer, which is to be continued; not part of what comes back."""
    max_tokens: int = 512
    """Of each completion."""
    temperature: float = 0.7
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further ones that this backend knows, ``settings_known`` lists them."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    text: str
    tokens: float
    """Generated."""
    ended: bool = True
    """By the model itself, rather than at a limit."""
    confidence: float | None = None
    """exp(mean log-probability of its tokens); None: unknown."""
    reward: float | None = None
    """What a reward model said of it; None: nothing."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What a request brought."""

    completions: tuple[Completion, ...]
    """At least one, at most ``Asking.count``."""
    cost: Cost
    """Of the whole request: tokens are prompt and completions together, of one prompt a request."""
    trusted: bool = True
    """Whether the cost is as measured; else what was told was missing or absurd, and it is the
    most that it can have been."""


class AskingFailed(Exception):
    """A request brought nothing, after all that was tried. ``cost`` is what it may have taken
    nevertheless; ``fatal`` where every other request would fail alike (a wrong key, no such
    model)."""

    def __init__(self, message: str, cost: Cost | None = None, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.cost = cost or Cost()
        self.fatal = fatal


class Backend(ABC):
    """One model that answers."""

    model: str
    """The name that policies know it by."""

    @property
    def settings_known(self) -> frozenset[str]:
        """Names of the ``Asking.settings`` that it takes."""
        return frozenset()

    @property
    def notes(self) -> tuple[str, ...]:
        """What should be known of how it answered, each once."""
        return ()

    @abstractmethod
    def upper(self, asking: Asking) -> Cost:
        """The most that it can take: what is held until it is answered."""

    @abstractmethod
    async def ask(self, asking: Asking) -> Answered:
        """Raises AskingFailed."""

    async def close(self) -> None:
        """Let go of connections and memory."""
        return None
