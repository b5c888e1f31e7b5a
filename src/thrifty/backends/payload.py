"""A question as the JSON that an OpenAI-compatible server takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from thrifty.backends.backend import Asking

Kind = Literal["chat", "completions"]
PATHS: Mapping[Kind, str] = {"chat": "/chat/completions", "completions": "/completions"}

RESERVED = frozenset(
    (
        *("model", "messages", "prompt", "n", "best_of", "stream", "stream_options"),
        *("max_tokens", "max_completion_tokens"),
    )
)
"""Fields that nobody may set beside: the budget was held for what they say."""
SETTINGS = frozenset(
    (
        *("temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "logit_bias"),
        *("frequency_penalty", "presence_penalty", "repetition_penalty", "stop_token_ids"),
        *("ignore_eos", "response_format", "reasoning_effort", "thinking_token_budget"),
        *("chat_template_kwargs", "skip_special_tokens"),
    )
)
"""Fields that some server or other takes."""


@dataclass(frozen=True, kw_only=True)
class Payload:
    """How one model on one server is asked."""

    model: str
    kind: Kind = "chat"
    logprobs: bool = False
    limit_name: str = "max_tokens"
    """Of the field that limits an answer; hosted reasoning models have max_completion_tokens."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further ones of every request; None leaves one out that would be sent."""

    def __post_init__(self) -> None:
        if self.kind not in PATHS:
            raise ValueError(f"kind {self.kind!r} is unknown\nhint: {' or '.join(PATHS)}")
        if self.limit_name not in ("max_tokens", "max_completion_tokens"):
            raise ValueError(
                f"limit_name {self.limit_name!r} is unknown\n"
                "hint: max_tokens or max_completion_tokens"
            )
        _refuse_reserved(self.fields)

    @property
    def path(self) -> str:
        return PATHS[self.kind]

    def content(self, asking: Asking) -> bytes:
        """Raises ValueError where it cannot be put."""
        _refuse_reserved(asking.settings)
        if asking.count < 1 or asking.max_tokens < 1:
            raise ValueError(
                f"{asking.count} answers of {asking.max_tokens} tokens cannot be asked for\n"
                "hint: at least one of each"
            )
        put: dict[str, Any] = {"model": self.model, **self._prompt(asking)}
        put[self.limit_name] = asking.max_tokens
        put |= {"temperature": asking.temperature, "top_p": asking.top_p}
        if asking.count > 1:
            put["n"] = asking.count
        if asking.stop:
            put["stop"] = list(asking.stop)
        if asking.seed is not None:
            put["seed"] = asking.seed
        if self.logprobs:
            put["logprobs"] = True if self.kind == "chat" else 1
        put |= {**self.fields, **asking.settings}
        put = {name: value for name, value in put.items() if value is not None}
        try:
            return json.dumps(put, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"the question cannot be written as JSON: {error}\n"
                "hint: look for NaN, half a surrogate pair, or a setting that is no plain value"
            ) from None

    def _prompt(self, asking: Asking) -> dict[str, Any]:
        prompt = asking.prompt
        if self.kind == "completions":
            if not isinstance(prompt, str):
                raise ValueError(
                    "messages cannot be asked of /completions, which takes a text\n"
                    "hint: kind: chat, or give the prompt as one text"
                )
            return {"prompt": prompt + asking.prefix}
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        messages = [dict(message) for message in prompt]
        if not asking.prefix:
            return {"messages": messages}
        return {
            "messages": [*messages, {"role": "assistant", "content": asking.prefix}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        }


def prompt_bytes(asking: Asking) -> int:
    """Of its texts, what they are wrapped in left out."""
    prompt = asking.prompt
    texts = [prompt] if isinstance(prompt, str) else [m.get("content", "") for m in prompt]
    return sum(len(str(text).encode("utf-8", "replace")) for text in [*texts, asking.prefix])


def _refuse_reserved(fields: Mapping[str, Any]) -> None:
    taken = sorted(RESERVED & fields.keys())
    if taken:
        raise ValueError(
            f"{', '.join(taken)} cannot be set beside what is asked\n"
            "hint: the budget is held for it; say so in the question itself"
        )
