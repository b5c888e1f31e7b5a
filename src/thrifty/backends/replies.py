"""What a server's reply says, as far as it makes sense: completions, and what it took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.backends.payload import Kind
from thrifty.backends.retries import AttemptFailed
from thrifty.core.quantities import show
from thrifty.data.faults import Fault
from thrifty.data.json_text import parse

_LIMITS = frozenset(("length", "max_tokens"))
"""What ``finish_reason`` says of an answer that was cut off."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One completion of a reply."""

    text: str
    ended: bool
    confidence: float | None
    """exp(mean log-probability of its tokens)."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    choices: tuple[Choice, ...]
    """At least one, in the order of the reply: the numbers that they bear may be anything."""
    usage: Any
    """As it is: nobody has looked at it."""
    model: str
    """Who answered, as it says; empty where it does not."""


def read_reply(body: bytes, kind: Kind) -> Reply:
    """Raises AttemptFailed where no completion is in it."""
    try:
        said = parse(body)
    except Fault as fault:
        raise _unreadable(fault.reason) from None
    choices = said.get("choices")
    if not isinstance(choices, list):
        raise _unreadable(f"it has {_what(said, 'error', 'choices')}")
    found = [_choice(choice, kind) for choice in choices]
    readable = tuple(choice for choice in found if choice is not None)
    if not readable:
        raise _unreadable(f"none of its {len(found)} choices has a text")
    model = said.get("model")
    return Reply(
        choices=readable,
        usage=said.get("usage"),
        model=model if isinstance(model, str) else "",
    )


def read_models(body: bytes) -> list[str]:
    """The names of the models in a list of them. Raises AttemptFailed."""
    try:
        data = parse(body).get("data")
    except Fault as fault:
        raise _unreadable(fault.reason) from None
    if not isinstance(data, list):
        raise _unreadable("it has no list of models")
    names = [entry.get("id") for entry in data if isinstance(entry, dict)]
    return [name for name in names if isinstance(name, str)]


def _choice(choice: Any, kind: Kind) -> Choice | None:
    if not isinstance(choice, dict):
        return None
    if kind == "completions":
        text = _text(choice.get("text"))
    else:
        message = choice.get("message")
        # No content is an empty answer: a refusal, or a thought that came to no end.
        text = _text(message.get("content") or "") if isinstance(message, dict) else None
    if text is None:
        return None
    return Choice(
        text=text,
        ended=not is_cut_off(choice.get("finish_reason")),
        confidence=_confidence(choice.get("logprobs")),
    )


def is_cut_off(reason: Any) -> bool:
    """Whether a completion ended at its limit, by its ``finish_reason``."""
    return isinstance(reason, str) and reason in _LIMITS


def _text(content: Any) -> str | None:
    """Of a text or of a list of parts; without half surrogate pairs, which no file takes."""
    if isinstance(content, list):
        parts = [part.get("text", "") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    return content.encode("utf-8", "replace").decode() if isinstance(content, str) else None


def _confidence(logprobs: Any) -> float | None:
    if not isinstance(logprobs, dict):
        return None
    values = logprobs.get("token_logprobs")
    if isinstance(content := logprobs.get("content"), list):
        values = [entry.get("logprob") if isinstance(entry, dict) else None for entry in content]
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        return None
    if not all(type(value) in (int, float) and value <= 1e-3 for value in values):  # NaN too
        return None
    return min(math.exp(math.fsum(max(value, -1e9) for value in values) / len(values)), 1.0)


def _what(said: dict[str, Any], *names: str) -> str:
    there = [f"{name} {show(said[name])}" for name in names if name in said]
    return ", ".join(there) or "no choices"


def _unreadable(why: str) -> AttemptFailed:
    return AttemptFailed(
        f"its reply cannot be read: {why}",
        "is an OpenAI-compatible server at that URL?",
        computed=True,
    )
