"""Callable: a function of yours, ``package.module:name``, called for every answer.

    name(prompt: str, answer: str, gold: str) -> float in [0, 1], more is better

It is looked for among what is installed and in the working directory, and is imported by name: a
plan that names one runs its code. It should say the same whenever it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from thrifty.core.contracts import AnswerMetric
from thrifty.core.named_function import named_function

_HINT = "objective.metric: {callable: {function: 'package.module:name'}}"


@dataclass(frozen=True, kw_only=True)
class CallableMetric(AnswerMetric):
    """What your own function says of each answer, from 0 to 1."""

    function: str = ""
    """``package.module:name``."""

    source: ClassVar[str] = "the user's own"

    @property
    def unit(self) -> str:
        return self.function.rpartition(":")[2] or "callable"

    def check(self) -> None:
        self._found()

    def score(self, prompt: str, answer: str, gold: str) -> float:
        try:
            return float(self._found()(prompt, answer, gold))
        except Exception as error:  # other people's code: anything can go wrong
            raise ValueError(
                f"{self.function} raised {type(error).__name__}: {error}\n"
                f"hint: it was called with prompt {prompt[:60]!r}, answer {answer[:60]!r} and gold "
                f"{gold[:60]!r}"
            ) from error

    def _found(self) -> Callable[..., Any]:
        return named_function("metric callable", self.function, _HINT)
