"""Number: whether the last number of the answer is the gold answer's.

The usual rule of GSM8K (arXiv:2110.14168): what stands behind the last ``####`` if there is one,
else all of the text; of that the last number, commas left out. ``18``, ``18.0`` and ``$18.`` are
equal. A gold answer without a number matches nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.answer_text import last_number
from thrifty.core.contracts import AnswerMetric


@dataclass(frozen=True, kw_only=True)
class Number(AnswerMetric):
    """1 where the answer's last number is the gold answer's last number, else 0."""

    source: ClassVar[str] = "arXiv:2110.14168"
    compares: ClassVar[bool] = True

    @property
    def unit(self) -> str:
        return "number"

    def read(self, answer: str) -> str | None:
        found = last_number(answer)
        return None if found is None else f"{found + 0.0:.9g}"  # no -0

    def score(self, prompt: str, answer: str, gold: str) -> float:
        found, wanted = last_number(answer), last_number(gold)
        if found is None or wanted is None:
            return 0.0
        return float(math.isclose(found, wanted, rel_tol=1e-9, abs_tol=1e-9))
