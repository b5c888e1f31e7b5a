"""Answers as they grow: of each row of a batch what was said, and whether it goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thrifty.signals.next_token import log_probability, pick, shares

if TYPE_CHECKING:
    from numpy.random import Generator

Prompt = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt."""

    ids: NDArray[np.int32]  # without the end token
    num_tokens: int
    """Generated, the end token included."""
    log_probability: float = 0.0
    """Of all of them, as the model gives it at temperature 1; nats."""
    flops: float = 0.0
    """What they took, reading the prompt left out."""
    stopped: bool = False
    """By what was said, as ``Wanted.stops`` has it."""

    @property
    def ended(self) -> bool:
        """By an end token, rather than for want of room."""
        return self.num_tokens > len(self.ids)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The answers that one prompt is to have."""

    ids: Prompt
    max_new_tokens: int
    random: Sequence[Generator]
    """Of each answer its own: as many answers as there are."""
    end_ids: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_p: float = 1.0
    stops: Callable[[Sequence[int]], bool] | None = None
    """Whether an answer ends with what was said so far."""


class Rows:
    """The answers of a batch; ``going`` are the numbers of those that have not ended, in the order
    of the model's rows."""

    def __init__(self, wanted: Sequence[tuple[Wanted, Generator]], device: Any) -> None:
        import torch

        self._wanted = [each for each, _ in wanted]
        self._random = [random for _, random in wanted]
        self._said: list[list[int]] = [[] for _ in wanted]
        self._stopped = [False] * len(wanted)
        self._counts = np.zeros(len(wanted), dtype=np.int64)
        self._log_probabilities = np.zeros(len(wanted))
        self.flops = np.zeros(len(wanted))
        self.going = np.arange(len(wanted))
        self._temperature = torch.tensor(
            [each.temperature for each in self._wanted], dtype=torch.float64, device=device
        )
        self._top_p = torch.tensor(
            [each.top_p for each in self._wanted], dtype=torch.float64, device=device
        )

    @property
    def left(self) -> NDArray[np.int64]:
        """Tokens that each one going may still say."""
        limits = np.array([self._wanted[row].max_new_tokens for row in self.going])
        return limits - self._counts[self.going]

    def random(self, count: int) -> Any:
        """[rows going, count] numbers in [0, 1), each row's own."""
        import torch

        drawn = np.array([self._random[row].random(count) for row in self.going])
        return torch.from_numpy(drawn).to(self._temperature.device)

    def shares(self, logits: Any) -> Any:
        """Of the rows going, [rows, ..., vocab]: with what probability each token is said next."""
        return shares(logits, self._temperature[self.going], self._top_p[self.going])

    def draw(self, logits: Any) -> tuple[Any, Any]:
        """A token for each row going, [rows], and its log-probability; of [rows, vocab]."""
        if not bool(self._temperature[self.going].any()):
            chosen = logits.argmax(-1)
        else:
            chosen = pick(self.shares(logits), self.random(1)[:, 0])
        return chosen, log_probability(logits, chosen)

    def say(self, row: int, token: int, log_probability: float) -> bool:
        """Whether the row goes on after this token."""
        wanted, said = self._wanted[row], self._said[row]
        self._counts[row] += 1
        self._log_probabilities[row] += log_probability
        if token in wanted.end_ids:
            return False
        said.append(token)
        if wanted.stops is not None and wanted.stops(said):
            self._stopped[row] = True
            return False
        return bool(self._counts[row] < wanted.max_new_tokens)

    def answers(self) -> list[Answer]:
        """Of all rows, in their order."""
        return [
            Answer(np.array(said, dtype=np.int32), int(count), float(own), float(flops), stopped)
            for said, count, own, flops, stopped in zip(
                self._said,
                self._counts,
                self._log_probabilities,
                self.flops,
                self._stopped,
                strict=True,
            )
        ]
