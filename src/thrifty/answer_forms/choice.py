"""Choice: the letter of the option that the text settles on.

Looked for, the last one of the first way that finds any:

1. ``\\boxed{B}``;
2. behind words that announce it: ``the answer is (B)``, ``Answer: B``, ``correct option is B``;
3. an option's text behind those words, where the prompt lists options: ``the answer is Paris``;
4. a line that is a letter, or begins with one as options do: ``B``, ``(B) Paris``, ``B. Paris``;
5. a letter in brackets, or that is called an option, anywhere: ``so (B) it is``, ``option B``;
6. the one option whose text stands in the last line;
7. a capital letter by itself: ``I choose B``.

Options are those of the prompt's last list, ``A) ... B) ...`` or ``(a) ... (b) ...``; a letter that
is none of them is no answer. Where the prompt lists none they are ``letters``. ``a`` and ``I`` are
words, unless they stand as an answer does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from thrifty.core.answer_text import normalised
from thrifty.core.contracts import AnswerForm

_MOST_CHARACTERS = 20_000
"""Of the ends of text and prompt that are looked at."""
_ANNOUNCED = re.compile(
    r"\b(?:answers?|options?|choices?)\b[*_`\"' ]{0,4}(?:(?:is|are|would be|will be|must be|=|:)"
    r"[*_`\"': ]{0,6}(?:(?:the|option|choice|letter|answer)[*_`\"': ]{1,4}){0,2})",
    re.IGNORECASE,
)
_LETTER = r"[(\[{*_`\"']{0,4}([A-Za-z])(?![A-Za-z0-9])"
_ANNOUNCED_LETTER = re.compile(r"(?:\\text\{)?" + _LETTER + r"(.{0,2})", re.DOTALL)
_BOXED = re.compile(r"\\boxed\{(?:\\[a-z]{1,8}\{)?[(\[ ]{0,2}([A-Za-z])(?![A-Za-z0-9])")
_LINE = re.compile(r"^[ >#*_`-]{0,6}[(\[]?([A-Za-z])(?:[*_`]{0,2}$|[)\].:](?![A-Za-z0-9]))", re.M)
_NAMED = re.compile(r"[(\[]([A-Za-z])[)\]]|\b(?:[Oo]ption|[Cc]hoice) +([A-Z])(?!\w)")
_ALONE = re.compile(r"(?<![\w'])([B-HJ-Z])(?![\w'])|(?<![\w'])A(?=[.,;:!)\]*\s]{0,3}$)", re.M)
# Line ends are sometimes written as two characters.
_LISTED = re.compile(r"(?:(?<![\w(\[])|(?<=\\n))[(\[]?([A-Za-z])[)\].:]")


@dataclass(frozen=True, kw_only=True)
class ChoiceForm(AnswerForm):
    """The letter of the option that the text settles on."""

    letters: str = "ABCDE"
    """Of the options, where the prompt lists none."""

    source: ClassVar[str] = "arXiv:2009.03300"

    def __post_init__(self) -> None:
        if not (self.letters.isascii() and self.letters.isalpha() and self.letters.isupper()):
            raise ValueError(
                f"letters must be capital letters from A to Z, not {self.letters!r:.60}\n"
                "hint: the default is ABCDE"
            )

    def read(self, text: str, prompt: str = "") -> str | None:
        text = text[-_MOST_CHARACTERS:]
        options = options_of(prompt[-_MOST_CHARACTERS:])
        letters = "".join(options) or self.letters

        def last(found: list[str]) -> str | None:
            known = [letter.upper() for letter in found if letter and letter.upper() in letters]
            return known[-1] if known else None

        line = text.rstrip().rpartition("\n")[2]
        return (
            last(_BOXED.findall(text))
            or last(_announced(text))
            or last(_announced_options(text, options))
            or last(_LINE.findall(text))
            or last([match[1] or match[2] for match in _NAMED.finditer(text)])
            or last(_only(_within(line, options)))
            or last([match[1] or "A" for match in _ALONE.finditer(text)])
        )


@lru_cache(maxsize=1 << 10)
def options_of(prompt: str) -> Mapping[str, str]:
    """Letter -> text, normalised, of the last list of options from A on; empty: there is none."""
    run: list[re.Match[str]] = []
    lists: list[list[re.Match[str]]] = []
    for match in _LISTED.finditer(prompt):
        letter = match[1].upper()
        if letter == "A":
            run = [match]
        elif run and ord(letter) == ord("A") + len(run):
            run.append(match)
            if len(run) == 2:
                lists.append(run)
    if not lists:
        return {}
    found = lists[-1]
    ends = [*(match.start() for match in found[1:]), len(prompt)]
    texts = [
        prompt[match.end() : end].strip().removesuffix("\\n")
        for match, end in zip(found, ends, strict=True)
    ]
    texts[-1] = texts[-1].partition("\n")[0]
    return {match[1].upper(): _plain(text) for match, text in zip(found, texts, strict=True)}


def _announced(text: str) -> list[str]:
    found = []
    for announced in _ANNOUNCED.finditer(text):
        letter = _ANNOUNCED_LETTER.match(text, announced.end())
        # "the answer is a car"
        if letter and not (letter[1].islower() and re.match(r"\s\w", letter[2])):
            found.append(letter[1])
    return found


def _announced_options(text: str, options: Mapping[str, str]) -> list[str]:
    found = []
    for announced in _ANNOUNCED.finditer(text) if options else ():
        said = _plain(text[announced.end() : announced.end() + 200].partition("\n")[0])
        begun = [letter for letter, option in options.items() if option and _begins(said, option)]
        if begun:
            found.append(max(begun, key=lambda letter: len(options[letter])))
    return found


def _begins(said: str, option: str) -> bool:
    return said.startswith(option) and not said[len(option) : len(option) + 1].isalnum()


def _within(line: str, options: Mapping[str, str]) -> list[str]:
    said = f" {_plain(line[-500:])} "
    return [letter for letter, option in options.items() if option and f" {option} " in said]


def _only(found: list[str]) -> list[str]:
    return found if len(found) == 1 else []


def _plain(text: str) -> str:
    return normalised(text).strip(" .,;:!*_`\"'()[]")
