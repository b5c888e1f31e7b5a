"""Exact: the whole text, normalised as for the metric ``exact_match``.

Unicode NFKC, letters in one case, runs of white space as one space, none around. A text with
nothing in it is no answer, nor is one of more than 100,000 characters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.answer_text import normalised
from thrifty.core.contracts import AnswerForm

_MOST_CHARACTERS = 100_000


@dataclass(frozen=True, kw_only=True)
class Exact(AnswerForm):
    """The whole text, but for case and white space."""

    ignore_case: bool = True
    ignore_punctuation: bool = False

    source: ClassVar[str] = "arXiv:1606.05250"

    def read(self, text: str, prompt: str = "") -> str | None:
        if len(text) > _MOST_CHARACTERS:
            return None
        found = normalised(
            text, ignore_case=self.ignore_case, ignore_punctuation=self.ignore_punctuation
        )
        return found or None
