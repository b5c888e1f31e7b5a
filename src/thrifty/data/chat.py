"""Where the answers stand in a conversation that a chat template has rendered.

A template gives one string; the loss must fall on what the assistant would have to write: content
and end-of-turn token, never a header. Three ways, in this order:

1. The template marks its answers (``{% generation %}``): those marks.
2. Prefixes: ``render(turns[:i], add_generation_prompt=True)`` is what the model sees before it
   answers, ``render(turns[:i+1])`` is what stands after it; both must begin the whole rendering.
   Where only the second does not, since the template renders a last turn differently (Qwen 3 drops
   the empty ``<think>`` block of earlier turns), content and end of turn must follow literally.
   Where even that fails, the row is set aside with the reason: a guessed mask trains on the wrong
   tokens without a sound.
3. No template: the plain one below, ``role: content``, a turn a line, the end-of-sequence token
   after each answer; the space before an answer belongs to it, so a prompt ends "assistant:".

A template is a foreign program, and runs in a process of its own (``template_process.py``).

Limits: a template that writes today's date gives other tokens tomorrow. Tools are not rendered.
Marks and prefixes cost 1 and 1 + 2 per answer renderings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from thrifty.data.faults import Fault
from thrifty.data.formats import Message
from thrifty.data.template_process import Template, process

Span = tuple[int, int]

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MAX_TRIES = 100


class Rendering(Protocol):
    """Runs a template (``template_child.py``)."""

    template: Template

    def text(self, turns: list[Message], prompt: bool = False) -> str:
        """``prompt``: with what makes a model answer behind it."""

    def marked(self, turns: list[Message]) -> tuple[str, list[Span]]:
        """And the spans that the template marks."""


def render(
    turns: Sequence[Message], first_answer: int, tokenizer: Any
) -> tuple[str, list[Span], bool]:
    """The text, the spans of the answers from message ``first_answer`` on, and whether the
    tokenizer must add its special tokens (a template writes its own). Raises a ``Fault`` where the
    template has none for it."""
    (found,) = render_all([(turns, first_answer)], tokenizer)
    if isinstance(found, Fault):
        raise found
    return found


def render_all(
    conversations: Sequence[tuple[Sequence[Message], int]], tokenizer: Any
) -> list[tuple[str, list[Span], bool] | Fault]:
    """The same of many, (turns, first_answer) each, at once."""
    if tokenizer.chat_template is None:
        eos = tokenizer.eos_token or ""
        return [(*_plain(turns, first, eos), True) for turns, first in conversations]
    asked = [{"turns": list(turns), "first_answer": first} for turns, first in conversations]
    found: list[tuple[str, list[Span], bool] | Fault] = []
    replies = process.ask_all(_template_of(tokenizer), asked)
    for (turns, _), reply in zip(conversations, replies, strict=True):
        if isinstance(reply, Fault):
            found.append(_of_turns(reply, turns))
        else:
            found.append((reply["text"], [(start, end) for start, end in reply["spans"]], False))
    return found


def prompt(turns: Sequence[Message], tokenizer: Any) -> str:
    """What the tokenizer's template asks a model with."""
    try:
        text: str = process.ask(_template_of(tokenizer), {"turns": list(turns)})["text"]
    except Fault as fault:
        raise _of_turns(fault, turns) from None
    return text


def _of_turns(fault: Fault, turns: Sequence[Message]) -> Fault:
    detail = fault.reason.partition(": ")[2]
    return Fault(fault.code, detail, turns[0]["content"] if turns else "")


def _template_of(tokenizer: Any) -> Template:
    """Gathered once, for a vocabulary takes its time."""
    known = _templates.get(tokenizer)
    if known is None or known[0] != tokenizer.chat_template:
        known = _templates[tokenizer] = tokenizer.chat_template, Template.of(tokenizer)
    return known[1]


_templates: WeakKeyDictionary[Any, tuple[Any, Template]] = WeakKeyDictionary()


def placed(turns: list[Message], first_answer: int, rendering: Rendering) -> tuple[str, list[Span]]:
    """Text and spans, where there is a template."""
    if _MARKED.search(rendering.template.source):
        return _marked(turns, first_answer, rendering)
    return _by_prefixes(turns, first_answer, rendering)


def _plain(turns: Sequence[Message], first_answer: int, eos: str) -> tuple[str, list[Span]]:
    text, spans = "", []
    for i, turn in enumerate(turns):
        text += f"{turn['role']}:"
        start = len(text)
        text += f" {turn['content']}"
        is_answer = turn["role"] == "assistant"
        if is_answer:
            text += eos
        text += "\n"
        if is_answer and i >= first_answer:
            spans.append((start, len(text) - bool(eos)))
    return text, spans


def _marked(
    turns: list[Message], first_answer: int, rendering: Rendering
) -> tuple[str, list[Span]]:
    # ``apply_chat_template`` turns these spans into a token mask itself, but from a span whose
    # first or last character has no token it masks nothing or all of the rest.
    text, spans = rendering.marked(turns)
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if len(spans) != len(answers):
        detail = f"the template marks {len(spans)} answers of {len(answers)}"
        raise Fault("chat_template", detail, turns[0]["content"])
    kept = [(a, b) for i, (a, b) in zip(answers, spans, strict=True) if i >= first_answer]
    return text, kept


def _by_prefixes(
    turns: list[Message], first_answer: int, rendering: Rendering
) -> tuple[str, list[Span]]:
    def rendered(count: int, prompt: bool = False) -> str:
        return rendering.text(turns[:count], prompt)

    full = rendered(len(turns))
    spans: list[Span] = []
    ends = tuple(rendering.template.ends)
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant" or i < first_answer:
            continue
        after = full if i + 1 == len(turns) else rendered(i + 1)
        if i == 0:
            start = after.find(turn["content"])
            if not turn["content"] or after.count(turn["content"]) != 1:
                raise _unclear(turns, i)
            before = after[:start]
        else:
            before = rendered(i, prompt=True)
        start = _shared(before, full)
        if start < len(before):
            # Allowed for what the generation prompt adds (a "<think>"), not for the turns.
            past = rendered(i)
            if not full.startswith(past) or start < len(past):
                raise _unclear(turns, i)
        end = _end(full, start, before, after, turn["content"].strip())
        if end is None or (spans and start < spans[-1][1]):
            raise _unclear(turns, i)
        answer = full[start:end].rstrip()
        # The line break that a template writes behind its end-of-turn token is no answer.
        spans.append((start, start + len(answer) if answer.endswith(ends) else end))
    return full, spans


def _end(full: str, start: int, before: str, after: str, content: str) -> int | None:
    """Where the answer that begins at ``start`` of ``full`` ends."""
    if full.startswith(after) and len(after) > start:
        return len(after)
    answer = after[_shared(before, after) :]
    at = answer.find(content) if content else -1
    for _ in range(_MAX_TRIES):
        if at < 0:
            break
        if full.startswith(answer[at:], start):
            return start + len(answer) - at
        at = answer.find(content, at + 1)
    return None


def _shared(left: str, right: str) -> int:
    """Characters that both begin with."""
    if right.startswith(left):
        return len(left)
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def _unclear(turns: Sequence[Message], i: int) -> Fault:
    detail = f"the template renders turn {i + 1} differently once others follow"
    return Fault("chat_template", detail, turns[i]["content"])
