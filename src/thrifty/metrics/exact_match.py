"""Exact match: whether the answer is the gold answer, once both are normalised.

Normalised: Unicode NFKC, letters in one case, runs of white space as one space, none around.
Punctuation counts unless it is to be ignored, for without it 1.5 would be 15. The rule of SQuAD
(arXiv:1606.05250), less its articles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.answer_text import normalised
from thrifty.core.contracts import AnswerMetric


@dataclass(frozen=True, kw_only=True)
class ExactMatch(AnswerMetric):
    """1 where the answer is the gold one but for case and white space, else 0."""

    ignore_case: bool = True
    ignore_punctuation: bool = False

    source: ClassVar[str] = "arXiv:1606.05250"
    compares: ClassVar[bool] = True

    @property
    def unit(self) -> str:
        return "exact_match"

    def read(self, answer: str) -> str | None:
        return self._normalised(answer) or None

    def score(self, prompt: str, answer: str, gold: str) -> float:
        return float(self._normalised(answer) == self._normalised(gold))

    def _normalised(self, text: str) -> str:
        return normalised(
            text, ignore_case=self.ignore_case, ignore_punctuation=self.ignore_punctuation
        )
