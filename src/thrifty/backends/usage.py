"""What a request took: as its ``usage`` says where that can be, else the most that it can be.

    0 < prompt tokens <= bytes of the request + those of the template
    0 <= completion tokens <= choices max_tokens,  some where there is text

No tokenizer makes more tokens than there are bytes, nor has a token more than some hundred bytes.
Of several completions some servers (llama.cpp's) tell the tokens of one: fewer than there are
words, or than those have that were cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thrifty.core.budget import Cost
from thrifty.core.ranges import check_ranges
from thrifty.costs.flops import decode_flops

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape

_TOKEN_BYTES = 512
"""More than any token of a public vocabulary has."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a request."""

    prompt: int
    """Of one prompt, however many completions it has."""
    generated: int
    """Of all completions together."""


@dataclass(frozen=True, kw_only=True)
class Tariff:
    """What tokens take."""

    prompt_price: float | None = None
    """Dollars per million tokens; None: unknown, and so are the dollars of a request."""
    completion_price: float | None = None
    shape: ModelShape | None = None
    """Of the model that answers; None: its FLOPs are unknown, and counted as none."""

    def __post_init__(self) -> None:
        check_ranges(self, prompt_price=(0, 1e9), completion_price=(0, 1e9))

    def cost(self, usage: Usage, completions: int) -> Cost:
        """Of one request. The completions share one pass over the prompt, and its tokens evenly."""
        return Cost(
            flops=self._flops(usage, completions),
            tokens=usage.prompt + usage.generated,
            joules=None,
            dollars=self._dollars(usage),
        )

    def _dollars(self, usage: Usage) -> float | None:
        if self.prompt_price is None or self.completion_price is None:
            return None
        prices = usage.prompt * self.prompt_price + usage.generated * self.completion_price
        return prices / 1e6

    def _flops(self, usage: Usage, completions: int) -> float:
        if self.shape is None:
            return 0.0
        each = max(-(-usage.generated // completions), 1)
        first = decode_flops(self.shape, 1, usage.prompt, 1)
        return first + completions * (decode_flops(self.shape, 1, usage.prompt, each) - first)


def believed(
    said: Any, most: Usage, prompt_bytes: int, texts: Sequence[str], cut_off: int = 0
) -> Usage | None:
    """What ``usage`` of a reply says; None where that is missing or cannot be. ``texts``: of all
    completions that came; ``cut_off``: tokens of those that ended at their limit."""
    if not isinstance(said, dict):
        return None
    prompt, generated = _count(said.get("prompt_tokens")), _count(said.get("completion_tokens"))
    if prompt is None or generated is None:
        return None
    spoken = sum(-(-len(text.encode()) // _TOKEN_BYTES) for text in texts)
    if len(texts) > 1:
        words = sum(len(text.split()) for text in texts)
        spoken = max(spoken, words, cut_off)
    least = max(-(-prompt_bytes // _TOKEN_BYTES), 1)
    if not (least <= prompt <= most.prompt and spoken <= generated <= most.generated):
        return None
    return Usage(prompt=prompt, generated=generated)


def shares(total: int, texts: Sequence[str]) -> list[float]:
    """Of the tokens generated, each text's, by their lengths: servers tell only the sum."""
    lengths = [len(text.encode()) + 1 for text in texts]
    return [total * length / sum(lengths) for length in lengths]


def _count(value: Any) -> int | None:
    """A whole number as it is or as some servers write it, 12.0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e15:
        return None
    return int(value) if value == int(value) else None
