"""What a run's model answered, as `thrifty decode RUN` left it in RUN/decode.

The answers are read a line at a time, however many there are; a line that is none is no reason to
have no report. Texts of answers are a model's: the page makes them inert.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from thrifty.answer_totals import totals
from thrifty.asked_questions import Answer
from thrifty.core import typed
from thrifty.core.quantities import FORMATS
from thrifty.data.faults import Fault
from thrifty.data.inert import visible
from thrifty.json_lines import each_row

SHOWN = 10
"""Questions of each kind that a page has."""
KINDS = 12
"""Reasons that are told apart; the rest are counted together."""
_NUMBER = re.compile(r"(?<![\w.-])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)")
"""No digit of a model's name."""


class Answers:
    """Of one folder; ``faulty`` counts lines that are no answers."""

    def __init__(self, folder: Path, asked: Mapping[str, Any]) -> None:
        """``asked``: what decode.json says."""
        self._file = folder / "answers.jsonl"
        self._samples = folder / "samples.jsonl"
        self._asked = asked
        self.faulty = 0

    def summary(self) -> dict[str, Any]:
        """What was asked, of whom, what came of it and why it ended."""
        asked = self._asked
        models = asked.get("models")
        facts = {
            "policy": _name(asked.get("policy")),
            "answer": _name(asked.get("answer")),
            "models": [str(m) for m in models[:5]] if isinstance(models, list) else [],
            "finished": self._file.is_file(),
        }
        if not facts["finished"]:  # its answers are written at the end
            return {**facts, "samples": _count_lines(self._samples)}
        reasons: Counter[str] = Counter()

        def told() -> Iterator[Answer]:
            for answer in self._each():
                reasons[_NUMBER.sub("…", answer.reason)[:200]] += 1
                yield answer

        found = totals(told())
        ended = dict(reasons.most_common(KINDS))
        if rest := sum(reasons.values()) - sum(ended.values()):
            ended["for other reasons"] = rest
        return {**facts, **found, "ended": ended, "faulty": self.faulty}

    def shown(self) -> dict[str, list[Answer]]:
        """Those that are wrong, the surest first, and those that took most samples."""
        if not self._file.is_file():
            return {"wrong": [], "dearest": []}
        wrong = (a for a in self._each() if a.correct is False and a.answer is not None)
        return {
            "wrong": heapq.nlargest(SHOWN, wrong, key=lambda a: a.confidence),
            "dearest": heapq.nlargest(SHOWN, self._each(), key=lambda a: a.samples),
        }

    def _each(self) -> Iterator[Answer]:
        self.faulty = 0
        for _, row in each_row(self._file):
            answer = None if isinstance(row, Fault) else typed.read_fields(Answer, row, "", [])
            if answer is None:
                self.faulty += 1
            else:
                yield answer


def _name(spec: Any) -> str | None:
    """Of a method, whatever its options."""
    if isinstance(spec, Mapping):
        spec = next(iter(spec), None)
    return spec if isinstance(spec, str) else None


def _count_lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as stream:
        return sum(1 for _ in stream)


# -- in words -------------------------------------------------------------------------------------


def answers_told(summary: Mapping[str, Any]) -> str:
    """What was left for answering, and what was answered; empty where nothing was asked for."""
    return " ".join(filter(None, (_left(summary["serving"]), _answered(summary["decoding"]))))


def _left(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    left = FORMATS["flops"](found["flops_left"])
    return (
        f"Training left {left} for {found['questions']:,} questions: "
        f"{found['samples']:.1f} samples each, of whose votes {found['accuracy']:.4f} are right by "
        f"the dev rows ({found['accuracy_of_one']:.4f} of single samples; more than "
        f"{found['most_useful_samples']} bring nothing)."
    )


def _answered(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    policy = visible(found["policy"] or "an unknown policy", 60)
    if not found["finished"]:
        return f"Answering by {policy} is not finished: {found['samples']:,} samples so far."
    count = found["num_questions"]
    if not count:
        return "The answers could not be read."
    right, known = "", found["with_gold"]
    if known:
        right = f" {found['accuracy']:.1%} of the {known:,} with a gold answer are right."
    return (
        f"By {policy}, {found['answered']:,} of {count:,} questions are answered, "
        f"{found['given_up']:,} given up, {found['without_an_answer']:,} without an answer: "
        f"{found['samples']:,} samples, {found['samples'] / count:.2f} each.{right}"
    )
