"""What is read in the text of an answer, by metrics and by answer forms alike."""

from __future__ import annotations

import re
import unicodedata

_MARK = "####"
# A minus between two numbers is a subtraction, or a range.
_NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?\.\d+")
_MOST_MARKS = 30


def last_number(text: str) -> float | None:
    """Of ``text``, or of what stands behind its last ``####``; None where there is none."""
    numbers = _NUMBER.findall(text.rpartition(_MARK)[2])
    return float(numbers[-1].replace(",", "")) if numbers else None


def normalised(text: str, *, ignore_case: bool = True, ignore_punctuation: bool = False) -> str:
    """Unicode NFKC, runs of white space as one space, none around."""
    text = unicodedata.normalize("NFKC", _few_marks(text))
    if ignore_case:
        text = text.casefold()
    if ignore_punctuation:
        text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
    return " ".join(text.split())


def _few_marks(text: str) -> str:
    """Without the combining marks on a letter beyond the thirtieth, the bound of stream-safe text
    (Unicode Standard Annex 15): putting them in order takes time quadratic in their number."""
    if text.isascii():
        return text
    kept, run = [], 0
    for character in text:
        run = run + 1 if unicodedata.combining(character) else 0
        if run <= _MOST_MARKS:
            kept.append(character)
    return "".join(kept)
