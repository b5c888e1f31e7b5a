"""Dev and test rows that a metric on generated answers can be measured on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from thrifty.core.contracts import AnswerMetric
from thrifty.data.pool import BadRow, Row


def check_answerable(rows: Sequence[Row | BadRow], metric: AnswerMetric) -> None:
    """Raise ValueError where a row has nothing before its answer: no prompt, only a text."""
    for row in rows:
        if isinstance(row, Row) and not row.prompt.strip():
            raise ValueError(
                f"{row.file}:{row.number} has no prompt that could be answered, and "
                f"{metric.unit} scores answers\n"
                "hint: rows with prompt and completion, or messages; or --metric dev_loss"
            )


def own_rows(metric: AnswerMetric, part: Literal["dev", "test"]) -> list[Row]:
    """The metric's own questions as rows."""
    return [
        Row(
            id=number,
            file=metric.unit,
            number=number + 1,
            kind="prompt_completion",
            content={"prompt": question.prompt, "completion": question.gold},
            extra={},
        )
        for number, question in enumerate(metric.questions(part))
    ]
