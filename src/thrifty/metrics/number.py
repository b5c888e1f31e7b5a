"""Number: whether the last number of the answer is the gold answer's.

The usual rule of GSM8K (arXiv:2110.14168): what stands behind the last ``####`` if there is one,
else all of the text; of that the last number, commas left out. ``18``, ``18.0`` and ``$18.`` are
equal. A gold answer without a number matches nothing.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.contracts import AnswerMetric

_MARK = "####"
# A minus between two numbers is a subtraction, or a range.
_NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?\.\d+")


@dataclass(frozen=True, kw_only=True)
class Number(AnswerMetric):
    """1 where the answer's last number is the gold answer's last number, else 0."""

    source: ClassVar[str] = "arXiv:2110.14168"

    @property
    def unit(self) -> str:
        return "number"

    def score(self, prompt: str, answer: str, gold: str) -> float:
        found, wanted = last_number(answer), last_number(gold)
        if found is None or wanted is None:
            return 0.0
        return float(math.isclose(found, wanted, rel_tol=1e-9, abs_tol=1e-9))


def last_number(text: str) -> float | None:
    """Of ``text``, or of what stands behind its last ``####``; None where there is none."""
    numbers = _NUMBER.findall(text.rpartition(_MARK)[2])
    return float(numbers[-1].replace(",", "")) if numbers else None
