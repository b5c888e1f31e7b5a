"""Recorded samples: a line a question, JSON, from files that may be compressed.

    {"id", "gold", "answers": [...], "correct": [0/1, ...], "tokens" or "chars": [...],
     optional "model", "question" or "prompt", "rewards": [...], "confidences": [...]}

Answers are compared as they stand: numbers as numbers, texts as texts; null, an empty text or a
NaN is an answer that could not be read. Where there is none at all, the question has no answer.
Lines of one id and several models belong together. A file's name is the model where a line names
none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thrifty.core.quantities import show
from thrifty.core.sampling import Outcome
from thrifty.data.faults import Fault
from thrifty.json_lines import each_row

CHARS_PER_TOKEN = 4.0
"""Where only characters were recorded: of English text, roughly."""
MAX_TOLD = 5


def read_outcomes(paths: Sequence[str | Path]) -> list[Outcome]:
    """All lines of all files. Raises ValueError naming the first faults, file and line."""
    found: list[Outcome] = []
    faults: list[str] = []
    seen: set[tuple[str, str]] = set()
    for path in map(Path, paths):
        for number, row in each_row(path):
            where = f"{path}:{number}"
            try:
                outcome = _outcome(row, default_model=path.name.partition(".jsonl")[0])
                if (outcome.id, outcome.model) in seen:
                    raise ValueError(f"question {outcome.id} of {outcome.model} is there twice")
                seen.add((outcome.id, outcome.model))
                found.append(outcome)
            except ValueError as error:
                faults.append(f"{where}: {error}")
    if faults:
        more = f"\nand {len(faults) - MAX_TOLD} more" if len(faults) > MAX_TOLD else ""
        raise ValueError(
            "\n".join(faults[:MAX_TOLD]) + f"{more}\nhint: a line is "
            '{"id": 1, "gold": "7", "answers": ["7", "8"], "correct": [1, 0], "tokens": [90, 120]}'
        )
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))}: no question\nhint: a line each, as JSON")
    return found


def _outcome(row: dict[str, Any] | Fault, default_model: str) -> Outcome:
    if isinstance(row, Fault):
        raise ValueError(row.reason)
    if "id" not in row or not isinstance(row.get("answers"), list):
        raise ValueError('"id" and "answers", a list, must be there')
    answers = tuple(_answer(value) for value in row["answers"])
    count = len(answers)
    correct = _numbers(row, "correct", count)
    if correct is None:
        raise ValueError('"correct", 0 or 1 of each answer, must be there')
    if not all(0 <= value <= 1 for value in correct):
        raise ValueError('"correct" must be from 0 to 1')
    costs = _numbers(row, "tokens", count)
    if costs is None and (chars := _numbers(row, "chars", count)) is not None:
        costs = tuple(value / CHARS_PER_TOKEN for value in chars)
    if costs and min(costs) < 0:
        raise ValueError('"tokens" and "chars" must be at least 0')
    gold = _answer(row.get("gold"))
    return Outcome(
        id=str(row["id"]),
        model=str(row.get("model", default_model)),
        answers=answers,
        correct=correct,
        costs=costs or (),
        rewards=_numbers(row, "rewards", count) or (),
        confidences=_numbers(row, "confidences", count) or (),
        prompt=str(row.get("question", row.get("prompt", ""))),
        gold=gold or "",
    )


def _answer(value: Any) -> str | None:
    """As a text that equal answers share."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).strip() or None
    return repr(float(value)) if abs(value) < 1e300 else str(value)


def _numbers(row: dict[str, Any], key: str, count: int) -> tuple[float, ...] | None:
    values = row.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f'"{key}" must be a list of {count}, one of each answer')
    for value in values:
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f'"{key}" must be numbers, not {show(value)}')
    return tuple(float(value) for value in values)
