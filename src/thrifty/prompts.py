"""Questions to be answered: JSON lines with a prompt each, and the gold answer where it is known.

{"id": optional, "prompt" or "question": text, or "messages": [{"role", "content"}, ...],
 optional "gold", "answer" or "completion": the right answer}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thrifty.backends.backend import Message
from thrifty.data.faults import Fault
from thrifty.json_lines import each_row

MAX_TOLD = 5
_GOLD = ("gold", "answer", "completion")
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    id: str
    content: str | tuple[Message, ...]
    gold: str | None = None

    @property
    def text(self) -> str:
        """All that is said in it."""
        if isinstance(self.content, str):
            return self.content
        return "\n\n".join(message["content"] for message in self.content)


def read_prompts(path: Path) -> list[Prompt]:
    """Raises ValueError naming the first faults, file and line."""
    rows, faults = [], []
    for number, row in each_row(path):
        try:
            rows.append(_prompt(row, number))
        except ValueError as error:
            faults.append(f"{path}:{number}: {error}")
    found = {prompt.id: prompt for prompt in rows}
    if len(found) < len(rows):
        ids = [prompt.id for prompt in rows]
        twice = next(each for each in ids if ids.count(each) > 1)
        faults.append(f"{path}: the id {twice!r:.60} is there twice")
    if faults:
        more = f"\nand {len(faults) - MAX_TOLD} more" if len(faults) > MAX_TOLD else ""
        raise ValueError(
            "\n".join(faults[:MAX_TOLD]) + f'{more}\nhint: a line is {{"prompt": "What is 6 x 7?"}}'
        )
    if not rows:
        raise ValueError(f'{path} has no prompt\nhint: a line is {{"prompt": "What is 6 x 7?"}}')
    return rows


def prompts_of(values: Sequence[str | Mapping[str, Any] | Prompt]) -> list[Prompt]:
    """From Python: texts, or mappings as the lines of a file are. Raises ValueError."""
    found = []
    for number, value in enumerate(values, 1):
        if isinstance(value, Prompt):
            found.append(value)
        else:
            row = {"prompt": value} if isinstance(value, str) else dict(value)
            found.append(_prompt(row, number))
    return found


def _prompt(row: dict[str, Any] | Fault, number: int) -> Prompt:
    if isinstance(row, Fault):
        raise ValueError(row.reason)
    content: Any = row.get("messages", row.get("prompt", row.get("question")))
    if isinstance(content, list):
        content = tuple(_message(message) for message in content)
    elif not isinstance(content, str):
        raise ValueError('"prompt", "question" or "messages" must be there')
    if not content or (isinstance(content, str) and not content.strip()):
        raise ValueError("an empty prompt")
    gold = next((row[key] for key in _GOLD if row.get(key) is not None), None)
    return Prompt(
        id=str(row.get("id", number)), content=content, gold=None if gold is None else str(gold)
    )


def _message(message: Any) -> Message:
    if (
        not isinstance(message, dict)
        or message.get("role") not in _ROLES
        or not isinstance(message.get("content"), str)
    ):
        raise ValueError(f'a message has "role", one of {", ".join(_ROLES)}, and "content", text')
    return {"role": message["role"], "content": message["content"]}
