"""Callable: a function of yours, ``package.module:name``, called for every text.

    name(text: str, prompt: str) -> str or None, the answer in a form in which equal ones are equal

It is looked for among what is installed and in the working directory, and is imported by name:
whoever names one runs its code. It should say the same whenever it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from thrifty.core.contracts import AnswerForm
from thrifty.core.named_function import named_function

_HINT = "{callable: {function: 'package.module:name'}}"


@dataclass(frozen=True, kw_only=True)
class CallableForm(AnswerForm):
    """What your own function reads in a text."""

    function: str = ""
    """``package.module:name``."""

    source: ClassVar[str] = "the user's own"

    def check(self) -> None:
        self._found()

    def read(self, text: str, prompt: str = "") -> str | None:
        try:
            answer = self._found()(text, prompt)
        except Exception as error:  # other people's code: anything can go wrong
            raise ValueError(
                f"{self.function} raised {type(error).__name__}: {error}\n"
                f"hint: it was called with text {text[:60]!r} and prompt {prompt[:60]!r}"
            ) from error
        if answer is not None and not isinstance(answer, str):
            raise ValueError(
                f"{self.function} must return a text, or None, not {answer!r:.80}\n"
                f"hint: str(...) of it; it was called with text {text[:60]!r}"
            )
        return answer

    def _found(self) -> Callable[..., Any]:
        return named_function("answer callable", self.function, _HINT)
