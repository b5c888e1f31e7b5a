"""Number: the last number of the text, behind its last ``####`` if there is one.

The usual rule of GSM8K (arXiv:2110.14168), that of the metric ``number``. ``18``, ``18.0`` and
``$18.`` read ``18``. A number beyond what a float can hold is none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.answer_text import last_number
from thrifty.core.contracts import AnswerForm


@dataclass(frozen=True, kw_only=True)
class NumberForm(AnswerForm):
    """The last number of the text."""

    source: ClassVar[str] = "arXiv:2110.14168"

    def read(self, text: str, prompt: str = "") -> str | None:
        number = last_number(text)
        if number is None or not math.isfinite(number):
            return None
        whole = number.is_integer() and abs(number) < 1e15
        return str(int(number)) if whole else f"{number:.12g}"

    def same(self, one: str, other: str) -> bool:
        if one == other:
            return True
        try:
            return math.isclose(float(one), float(other), rel_tol=1e-9, abs_tol=1e-9)
        except ValueError:  # a gold answer that is no number
            return False
