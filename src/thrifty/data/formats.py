"""The row formats of the field, brought to the four that TRL trains on.

Canonical, and kept as they are: ``{"text"}``, ``{"prompt", "completion"}``, ``{"messages"}``,
``{"prompt", "chosen", "rejected"}``; prompt, completion, chosen and rejected are strings or lists
of messages. Converted:

| from | to |
| --- | --- |
| Alpaca ``{"instruction", "input"?, "output"}``, ``system`` too | prompt, completion |
| pairs: prompt-response, question-answer, problem-solution... (``PAIRS``) | the same |
| ShareGPT ``{"conversations": [{"from", "value"}]}``, ``system`` too | messages |
| ShareGPT with ``chosen`` and ``rejected`` turns | prompt, chosen, rejected |

An Alpaca prompt is system, instruction and input joined by blank lines. TRL joins a prompt and its
completion with nothing between, so a converted prompt ends with a blank line (``SEPARATOR``) where
neither side brings white space; rows that are canonical already are left alone.

What is not used stays in ``extra`` where it is a scalar; other columns are left behind. A tool
call or an Alpaca ``history`` would change what the answer answers to: such rows are set aside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import orjson

from thrifty.data.faults import Fault, check_text

Kind = Literal["text", "prompt_completion", "messages", "preference"]
Task = Literal["sft", "continued", "preference"]
TASKS: tuple[str, ...] = get_args(Task)
KINDS: Mapping[str, tuple[str, ...]] = {
    "sft": ("messages", "prompt_completion", "text"),
    "continued": ("text",),
    "preference": ("preference",),
}
"""task -> the kinds of rows it trains on."""

SEPARATOR = "\n\n"
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("instruction", "answer"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("prompt", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("problem", "solution"),
    ("input", "output"),
    ("input", "target"),
    ("input", "answer"),
    ("inputs", "targets"),
)
"""Field names that mean prompt and answer; the first pair that a row has counts."""
QUESTIONS = ("prompt", "question", "instruction")
"""Field names of a preference row's prompt."""

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("tool", "observation", "function_response", "function"), "tool"),
}
"""ShareGPT's names of who speaks -> the roles of chat templates."""

Message = dict[str, str]
Content = dict[str, Any]


def convert(record: Mapping[str, Any], task: str, max_bytes: int) -> tuple[Kind, Content, Content]:
    """kind, canonical content and extra columns of one record, or a ``Fault``."""
    fields = {name: value for name, value in record.items() if value is not None}
    kind, content, used = _recognise(fields, task)
    if kind not in KINDS[task]:
        raise Fault("wrong_kind", f"a {kind} row in a pool for task {task}", _first(content))
    for side in (content.get("text"), content.get("completion"), content.get("chosen")):
        if side is not None and is_blank(side):
            what = "text" if kind == "text" else "answer"
            raise Fault("empty", f"the {what} is empty", _first(content))
    if kind == "messages" and is_blank(_answers(content["messages"])):
        raise Fault("empty", "every assistant turn is empty", _first(content))
    extra = {name: _scalar(name, value) for name, value in record.items() if _is_extra(name, value)}
    for name in used:
        extra.pop(name, None)
    if (length := _length(content)) > max_bytes:
        raise Fault("over_long", f"{length:,} characters; the limit is {max_bytes:,}")
    return kind, content, extra


def is_blank(side: str | Sequence[Message]) -> bool:
    return not flat(side).strip()


def flat(side: str | Sequence[Message]) -> str:
    """A string as it is; messages as their contents, a line each."""
    return side if isinstance(side, str) else "\n".join(turn["content"] for turn in side)


def _recognise(fields: Mapping[str, Any], task: str) -> tuple[Kind, Content, set[str]]:
    """kind, content, and the names of the fields that went into it."""
    if task == "continued":
        return _as_text(fields)
    if (
        "chosen" in fields
        and "rejected" in fields
        and (task == "preference" or not ("messages" in fields or "completion" in fields))
    ):
        return "preference", *_preference(fields)
    if "messages" in fields or "conversations" in fields:
        name = "messages" if "messages" in fields else "conversations"
        turns = _system(fields) + messages(fields[name], name)
        if not any(turn["role"] == "assistant" for turn in turns):
            raise Fault("no_assistant", raw=flat(turns))
        used = {name, "system"} if "conversations" in fields else {name}
        return "messages", {"messages": turns}, used
    pair = _pair(fields)
    if pair is not None:
        content, used = pair
        return "prompt_completion", content, used
    if "text" in fields:
        return "text", {"text": check_text(fields["text"], "text")}, {"text"}
    raise _missing(fields)


def _as_text(fields: Mapping[str, Any]) -> tuple[Kind, Content, set[str]]:
    """For continued pre-training: the text, or a pair's two halves as one text."""
    for name in ("text", "content"):
        if name in fields:
            return "text", {"text": check_text(fields[name], name)}, {name}
    pair = _pair(fields)
    if pair is None:
        if "messages" in fields or "conversations" in fields or "chosen" in fields:
            raise Fault("wrong_kind", "a chat or preference row in a pool for task continued")
        raise _missing(fields)
    content, used = pair
    if not all(isinstance(side, str) for side in content.values()):
        raise Fault("wrong_kind", "a chat row in a pool for task continued")
    return "text", {"text": content["prompt"] + content["completion"]}, used


def _pair(fields: Mapping[str, Any]) -> tuple[Content, set[str]] | None:
    if "prompt" in fields and "completion" in fields:
        prompt = _side(fields["prompt"], "prompt")
        completion = _side(fields["completion"], "completion")
        _same_form(prompt, completion)
        return {"prompt": prompt, "completion": completion}, {"prompt", "completion"}
    for question, answer in PAIRS:
        if question in fields and answer in fields:
            break
    else:
        return None
    parts = [question]
    if question == "instruction":
        if fields.get("history"):
            raise Fault("wrong_type", "an Alpaca history; convert the row to messages")
        parts = ["system", "instruction", "input"]
    texts = [check_text(fields[name], name) for name in parts if name in fields]
    prompt = SEPARATOR.join(text for text in texts if text.strip())
    completion = check_text(fields[answer], answer)
    if prompt and not prompt[-1].isspace() and not completion[:1].isspace():
        prompt += SEPARATOR
    return {"prompt": prompt, "completion": completion}, {*parts, answer}


def _preference(fields: Mapping[str, Any]) -> tuple[Content, set[str]]:
    in_turns = "conversations" in fields
    read = messages if in_turns else _side  # a ShareGPT answer is one turn, or the JSON of one
    chosen, rejected = (read(fields[name], name) for name in ("chosen", "rejected"))
    name = "conversations" if in_turns else next((n for n in QUESTIONS if n in fields), None)
    prompt: str | list[Message]
    if in_turns:
        prompt = _system(fields) + messages(fields["conversations"], "conversations")
    elif isinstance(chosen, list) and not isinstance(fields.get(name or ""), list):
        # TRL's implicit prompt: the turns that both answers begin with.
        prompt = []
        while min(len(chosen), len(rejected)) > 1 and chosen[0] == rejected[0]:
            prompt, chosen, rejected = [*prompt, chosen[0]], chosen[1:], rejected[1:]
    elif name is not None:
        prompt = _side(fields[name], name)
    else:
        raise Fault("missing_fields", "chosen and rejected, but no prompt", flat(chosen))
    _same_form(prompt, chosen)
    _same_form(prompt, rejected)
    if is_blank(rejected):
        raise Fault("empty", "the rejected answer is empty", flat(prompt))
    used = {name, "system"} if in_turns else {name}
    return (
        {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        {"chosen", "rejected", *(field for field in used if field)},
    )


def _side(value: Any, field: str) -> str | list[Message]:
    return messages(value, field) if isinstance(value, list) else check_text(value, field)


def _same_form(prompt: str | list[Message], answer: str | list[Message]) -> None:
    if isinstance(prompt, str) != isinstance(answer, str):
        raise Fault("wrong_type", "one of prompt and answer is text, the other messages")
    if isinstance(answer, list) and not any(turn["role"] == "assistant" for turn in answer):
        raise Fault("no_assistant", raw=flat(answer))


def messages(value: Any, field: str) -> list[Message]:
    """Turns as ``{"role", "content"}``, from a list, one turn, or the JSON text of either."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = orjson.loads(value)
        except (orjson.JSONDecodeError, RecursionError):
            raise Fault("wrong_type", f"{field} is text that is not JSON", value) from None
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise Fault("wrong_type", f"{field} is no list of messages", repr(value)[:1000])
    if not value:
        raise Fault("empty", f"{field} is an empty list")
    return [_message(turn, f"{field}[{i}]") for i, turn in enumerate(value)]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise Fault("wrong_type", f"{where} is not an object", repr(turn)[:1000])
    if turn.get("tool_calls"):
        raise Fault("wrong_type", f"{where} has tool_calls, which are not supported")
    role, content = turn.get("role"), turn.get("content")
    if role is None and "from" in turn:
        role, content = turn["from"], turn.get("value")
        role = ROLES.get(role) if isinstance(role, str) else role
        if role is None:
            speaker = repr(turn["from"])[:200]
            raise Fault("wrong_type", f"{where} is from an unknown speaker", speaker)
    if role is None:
        raise Fault("missing_fields", f"{where} has no role", repr(turn)[:1000])
    return {
        "role": check_text(role, f"{where} role"),
        "content": check_text(content, f"{where} content"),
    }


def _system(fields: Mapping[str, Any]) -> list[Message]:
    """ShareGPT's ``system`` column as the first turn."""
    if "conversations" not in fields or not fields.get("system"):
        return []
    return [{"role": "system", "content": check_text(fields["system"], "system")}]


def _answers(turns: list[Message]) -> str:
    return "".join(turn["content"] for turn in turns if turn["role"] == "assistant")


def _missing(fields: Mapping[str, Any]) -> Fault:
    names = ", ".join(repr(str(name)[:30]) for name in list(fields)[:8]) or "none"
    return Fault("missing_fields", f"no known set of fields among {names}"[:300])


def _first(content: Content) -> str:
    return next((flat(side)[:500] for side in content.values()), "")


def _length(content: Content) -> int:
    return sum(len(flat(side)) for side in content.values())


def _is_extra(name: str, value: Any) -> bool:
    if isinstance(value, (dict, list, tuple, bytes)):
        return False
    return not name.startswith("__index_level_")  # pandas' index in a parquet file


def _scalar(name: str, value: Any) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return check_text(value if isinstance(value, str) else str(value), name[:40])
