"""What a request to the proxy may ask for, and the most that it can take.

A request is read before anything of it is spent: its JSON, the types of the fields that decide what
it costs, and an upper bound of its tokens. A tokenizer that knows all bytes makes at most one token
of a byte, so that the bytes of the body bound the tokens of the prompt, with room for what a chat
template puts around each message. Fields that would make a server do more than was counted under
another name (``n_predict``, ``chat_template``) or that are billed apart (``service_tier``) are
refused. All others are passed on as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from thrifty.backends.payload import PATHS, Kind
from thrifty.backends.usage import Usage
from thrifty.core.quantities import format_bytes, show
from thrifty.data.faults import Fault
from thrifty.data.json_text import parse
from thrifty.serving.errors import Refused

TEMPLATE_TOKENS = 512
"""That a chat template puts before the first message: some write a system prompt of their own."""
MESSAGE_TOKENS = 32
"""That it puts around each one, at most."""
_MAX_LISTED = 4096
"""Messages, prompts and stops; more is no conversation."""
_MAX_LOGPROBS = 20
"""Of a token, as OpenAI has it."""

_MORE_THAN_COUNTED = (
    "n_predict",
    "num_predict",
    "max_new_tokens",
    "max_length",
    "generation_config",
    "chat_template",
    "use_beam_search",
)
_BILLED_APART = ("web_search_options", "audio")


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """Of one request, whoever asks."""

    max_body_bytes: int = 4 * 2**20
    max_tokens: int = 4096
    """Of a completion: asked for or, where a request does not say, set."""
    max_choices: int = 16
    """Completions, of all its prompts together."""
    context: int | None = None
    """Tokens that the upstream takes as a prompt at the most; None: as many as the body has bytes.
    Pictures and sound, whose bytes say nothing, are refused without it."""


@dataclass(kw_only=True)
class Wanted:
    """A request that was read, and may be served."""

    kind: Kind
    body: dict[str, Any]
    """As it came, its max_tokens set."""
    stream: bool
    usage_asked: bool
    """Whether the client wants a chunk with the usage at the end of the stream."""
    choices: int
    """Completions that it asks for, of all prompts."""
    max_tokens: int
    """Of each."""
    most: Usage
    """Tokens that it can take, of all prompts and all completions."""
    prompt_bytes: int
    """Of the texts in it."""

    @property
    def model(self) -> str:
        return self.body.get("model") or ""


def read_request(raw: bytes, kind: Kind, limits: RequestLimits) -> Wanted:
    """Raises Refused, 400, where it is no request or asks for more than ``limits``."""
    body = _parsed(raw)
    for name in (*_MORE_THAN_COUNTED, *_BILLED_APART):
        if body.get(name) is not None:
            raise _wrong(name, f"{name} is not taken here", "leave it out; max_tokens is the limit")
    if body.get("service_tier") not in (None, "auto", "default", "flex"):
        raise _wrong("service_tier", "a dearer service_tier is not taken here", "leave it out")
    modalities = _typed(body, "modalities", list, "a list")
    if modalities is not None and modalities != ["text"]:
        raise _wrong("modalities", "answers are text here", "leave modalities out")
    _typed(body, "model", str, "text", _short)
    stream = bool(_typed(body, "stream", bool, "true or false"))
    options = _typed(body, "stream_options", Mapping, "an object")
    if options is not None and not stream:
        raise _wrong("stream_options", "stream_options without stream", "add stream: true")
    other = "prompt" if kind == "chat" else "messages"
    if body.get(other) is not None:
        raise _wrong(other, f"{other} is not of {PATHS[kind]}", f"ask another route, or no {other}")
    prompts, only_text = (1, _messages(body)) if kind == "chat" else (_prompts(body), True)
    choices = prompts * max(_count(body, "n"), _count(body, "best_of"))
    if choices > limits.max_choices:
        raise _wrong(
            "n",
            f"{choices:,} completions were asked for; the limit is {limits.max_choices}",
            "ask several times",
        )
    _logprobs(body, kind)
    _sampling(body)
    max_tokens = _max_tokens(body, limits)
    least = _integer(body, "min_tokens", 0)
    if least is not None and least > max_tokens:
        raise _wrong("min_tokens", "min_tokens is more than max_tokens", "lower it")
    return Wanted(
        kind=kind,
        body=body,
        stream=stream,
        usage_asked=bool(options and options.get("include_usage")),
        choices=choices,
        max_tokens=max_tokens,
        most=Usage(
            prompt=_max_prompt_tokens(body, prompts, only_text, limits, len(raw)),
            generated=choices * max_tokens,
        ),
        prompt_bytes=sum(len(text.encode()) for text in texts_of(body)),
    )


def texts_of(body: Mapping[str, Any]) -> list[str]:
    """Of the prompts, of the messages, of the messages' parts."""
    pieces: list[Any] = [message.get("content") for message in body.get("messages") or ()]
    prompt = body.get("prompt")
    pieces += prompt if isinstance(prompt, list) else [prompt]
    for piece in list(pieces):
        if isinstance(piece, list):
            pieces += [part.get("text") for part in piece if isinstance(part, Mapping)]
    return [piece for piece in pieces if isinstance(piece, str)]


def written(body: Mapping[str, Any]) -> bytes:
    """As JSON. Raises Refused for what JSON cannot say: half a surrogate pair, 10^400."""
    try:
        return orjson.dumps(body)
    except TypeError as error:
        raise Refused(400, f"the body cannot be passed on: {error}", "mend it") from None


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        body = parse(raw)
    except Fault as fault:
        raise Refused(400, f"the body is no JSON object: {fault.reason}", "send one") from None
    written(body)
    return body


def _wrong(param: str, message: str, hint: str) -> Refused:
    return Refused(400, message, hint, param=param)


def _short(value: str) -> bool:
    return len(value) <= 256


def _any(value: Any) -> bool:
    return True


def _typed(
    body: Mapping[str, Any],
    name: str,
    kind: type | tuple[type, ...],
    wanted: str,
    fits: Callable[[Any], bool] = _any,
) -> Any:
    """``body[name]`` where it is of that type; None where it is not there."""
    value = body.get(name)
    is_flag = isinstance(value, bool) and kind is not bool  # a number to Python, to nobody else
    if value is not None and (is_flag or not isinstance(value, kind) or not fits(value)):
        raise _wrong(
            name, f"{name} must be {wanted}, not {show(value)}", "mend it, or leave it out"
        )
    return value


def _integer(body: Mapping[str, Any], name: str, least: int) -> int | None:
    return _typed(body, name, int, f"a whole number, at least {least}", lambda n: n >= least)


def _count(body: Mapping[str, Any], name: str) -> int:
    return _integer(body, name, 1) or 1


def _max_tokens(body: dict[str, Any], limits: RequestLimits) -> int:
    """The larger of the two names where both are given: which one a server goes by differs."""
    named = ("max_tokens", "max_completion_tokens")
    given = {name: n for name in named if (n := _integer(body, name, 1)) is not None}
    if not given:
        for name in named:
            body.pop(name, None)
        body["max_tokens"] = limits.max_tokens
        return limits.max_tokens
    for name, value in given.items():
        if value > limits.max_tokens:
            raise _wrong(
                name, f"{name} is {show(value)}; the limit is {limits.max_tokens:,}", "lower it"
            )
    return max(given.values())


def _messages(body: Mapping[str, Any]) -> bool:
    """Whether they are text alone."""
    messages = _typed(body, "messages", list, "a list of messages", bool)
    if messages is None:
        raise _wrong("messages", "messages are missing", 'send [{"role": "user", ...}]')
    if len(messages) > _MAX_LISTED:
        raise _wrong("messages", f"{len(messages):,} messages; the limit is {_MAX_LISTED:,}", "cut")
    only_text = True
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise _wrong(where, f"{where} must be an object with a role", "give it one")
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
            raise _wrong(
                where, f"the content of {where} must be text or a list of parts", "mend it"
            )
        only_text &= all(part.get("type") in ("text", "refusal") for part in content)
    return only_text


def _prompts(body: Mapping[str, Any]) -> int:
    """How many there are."""
    prompt = body.get("prompt")
    wanted = "text, a list of texts, tokens, or a list of lists of tokens"
    if isinstance(prompt, str):
        return 1
    if not isinstance(prompt, list) or not prompt:
        raise _wrong("prompt", f"prompt must be {wanted}, not {show(prompt)}", "mend it")
    if all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        return 1
    alike = all(isinstance(one, str) for one in prompt) or all(
        isinstance(one, list)
        and one
        and all(isinstance(token, int) and not isinstance(token, bool) for token in one)
        for one in prompt
    )
    if not alike:
        raise _wrong("prompt", f"prompt must be {wanted}", "mend it")
    return len(prompt)


def _logprobs(body: Mapping[str, Any], kind: Kind) -> None:
    if kind == "chat":
        _typed(body, "logprobs", bool, "true or false")
    for name in (
        "top_logprobs",
        "prompt_logprobs",
        *(("logprobs",) if kind == "completions" else ()),
    ):
        wanted = f"a whole number from 0 to {_MAX_LOGPROBS}"
        _typed(body, name, int, wanted, lambda n: 0 <= n <= _MAX_LOGPROBS)


def _sampling(body: Mapping[str, Any]) -> None:
    for name, most in (("temperature", 2), ("top_p", 1)):
        fits = _between(0, most)
        _typed(body, name, (int, float), f"a number from 0 to {most}", fits)
    for name in ("frequency_penalty", "presence_penalty"):
        _typed(body, name, (int, float), "a number from -2 to 2", _between(-2, 2))
    _typed(body, "seed", int, "a whole number", _between(-(2**63), 2**63))
    stop = body.get("stop")
    texts = stop if isinstance(stop, list) else [] if stop is None else [stop]
    if len(texts) > _MAX_LISTED or not all(isinstance(text, str) for text in texts):
        raise _wrong("stop", "stop must be text or a list of texts", "mend it")
    for name, of, wanted in (
        ("tools", list, "a list"),
        ("functions", list, "a list"),
        ("response_format", Mapping, "an object"),
        ("logit_bias", Mapping, "an object"),
        ("echo", bool, "true or false"),
        ("suffix", str, "text"),
    ):
        _typed(body, name, of, wanted)


def _between(least: float, most: float) -> Callable[[Any], bool]:
    return lambda value: least <= value <= most


def _max_prompt_tokens(
    body: Mapping[str, Any], prompts: int, only_text: bool, limits: RequestLimits, num_bytes: int
) -> int:
    if not only_text and limits.context is None:
        raise _wrong(
            "messages",
            "what a picture or a sound takes is not known here",
            "start the proxy with --context, the tokens that the model takes at the most",
        )
    messages: Sequence[Any] = body.get("messages") or ()
    around = TEMPLATE_TOKENS + MESSAGE_TOKENS * (len(messages) + prompts)
    # Characters that JSON escapes take no fewer bytes there than in UTF-8.
    bound = num_bytes + around
    whole = None if limits.context is None else limits.context * prompts
    if whole is None:
        return bound
    return min(bound, whole) if only_text else whole


def too_large(limits: RequestLimits) -> Refused:
    return Refused(
        413,
        f"the body is larger than {format_bytes(limits.max_body_bytes)}",
        "send less at a time, or start the proxy with a larger --max-body",
    )
