"""What the stages of a cascade say of a question, and how sure they are of it.

A stage is one model or several whose samples vote together. Its answer is the one given most often,
of equals the one that came first; an answer that could not be read is a vote for none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from thrifty.core.sampling import Outcome

Said = Sequence[tuple[str | None, float | None]]
"""The answers of a stage's samples, each with its token confidence."""
Stages = Sequence[Sequence[str]]
"""The models of each stage."""

MOST_BLOCKS = 8
FOLDS = 5


class Verdict(NamedTuple):
    """What a stage makes of a question."""

    answer: str | None
    """That stands when it is done: its own, or that of the stages before where it has none."""
    score: float
    """Below 0: it has no answer of its own, or no confidence where one is wanted."""


NOTHING = Verdict(None, -1.0)


def judge(said: Sequence[Said], signal: str) -> Verdict:
    """The last of the stages that were asked, in the light of those before. ``signal``: the share
    of its samples that gave its answer, averaged with the shares which that had in the stages
    before (``agreement``); the mean confidence of those that gave it (``confidence``); ``both``:
    the product."""
    tallies = [Counter(answer for answer, _ in stage if answer is not None) for stage in said]
    if not tallies or not tallies[-1]:
        before = next((tally for tally in reversed(tallies) if tally), None)
        return Verdict(max(before, key=before.__getitem__) if before else None, -1.0)
    answer = max(tallies[-1], key=tallies[-1].__getitem__)
    score = 1.0
    if signal in ("agreement", "both"):
        shares = [
            tally[answer] / len(stage) if stage else 0.0
            for tally, stage in zip(tallies, said, strict=True)
        ]
        score = sum(shares) / len(shares)
    if signal in ("confidence", "both"):
        told = [c for a, c in said[-1] if a == answer and c is not None]
        score = score * sum(told) / len(told) if told else -1.0
    return Verdict(answer, score)


def weighted_vote(said: Sequence[Said], weights: Sequence[float]) -> str | None:
    """The answer with most votes, where a stage's weight is shared out among its samples. None:
    nothing of weight was said. Of equals the later stage's."""
    votes: dict[str, float] = {}
    for stage, weight in zip(reversed(said), reversed(weights), strict=True):
        for answer, _ in stage:
            if answer is not None:
                votes[answer] = votes.get(answer, 0.0) + weight / len(stage)
    leader = max(votes, key=votes.__getitem__, default=None)
    return leader if leader is not None and votes[leader] > 0 else None


class RecordedQuestion:
    """A question with gold answer as all stages saw it."""

    def __init__(
        self,
        of: Mapping[str, Outcome],
        stages: Stages,
        starts: Mapping[str, int],
        counts: Mapping[str, int],
        signal: str,
    ) -> None:
        """``starts``, ``counts``: which of each model's samples."""
        self.id = next(iter(of.values())).id
        self._correct: dict[str, float] = {}
        self.said: list[Said] = []
        self.verdicts: list[Verdict] = []
        for stage in stages:
            mine: list[tuple[str | None, float | None]] = []
            for model in stage:
                outcome = of[model]
                if signal != "agreement" and not outcome.confidences:
                    raise ValueError(
                        f"no token confidence of {model!r} was recorded\nhint: signal: agreement"
                    )
                for i in range(starts[model], starts[model] + counts[model]):
                    answer = outcome.answers[i]
                    mine.append((answer, outcome.confidences[i] if outcome.confidences else None))
                    if answer is not None:
                        self._correct.setdefault(answer, outcome.correct[i])
            self.said.append(mine)
            self.verdicts.append(judge(self.said, signal))
        self.right = [self.right_of(verdict.answer) for verdict in self.verdicts]

    def right_of(self, answer: str | None) -> float:
        return self._correct.get(answer, 0.0) if answer is not None else 0.0

    def right_by(self, weights: Sequence[float]) -> float:
        """Of the weighted vote, the last stage's answer standing where there is none."""
        return self.right_of(weighted_vote(self.said, weights) or self.verdicts[-1].answer)


def vote_weights(questions: Sequence[RecordedQuestion]) -> list[float]:
    """Of each stage: the log-odds of its accuracy on these, with one right and one wrong added; 0
    where it is wrong more often than right."""
    found = []
    for stage in zip(*(question.right for question in questions), strict=True):
        right = sum(stage) + 1
        found.append(max(math.log(right / (len(stage) + 2 - right)), 0.0))
    return found


def gain_of_weights(questions: Sequence[RecordedQuestion]) -> tuple[float, float]:
    """By how much the weighted vote is right more often than the last stage's answer, on folds
    that its weights were not made of; and the standard error. A question that is there several
    times, with other samples, is in one fold and counts once."""
    ids = list(dict.fromkeys(question.id for question in questions))
    fold_of = {id: place % FOLDS for place, id in enumerate(ids)}
    weights = [
        vote_weights([question for question in questions if fold_of[question.id] != fold])
        for fold in range(FOLDS)
    ]
    gains: dict[str, list[float]] = {id: [] for id in ids}
    for question in questions:
        mine = weights[fold_of[question.id]]
        right = question.right_by(mine) if mine else question.right[-1]
        gains[question.id].append(right - question.right[-1])
    mean = sum(map(sum, gains.values())) / len(questions)
    squares = sum((sum(of) - mean * len(of)) ** 2 for of in gains.values())
    return mean, math.sqrt(squares) / len(questions)


def recorded_blocks(
    outcomes: Sequence[Outcome], stages: Stages, counts: Mapping[str, int], signal: str, least: int
) -> tuple[list[list[RecordedQuestion]], int]:
    """The questions as a cascade would see them that draws ``counts`` of each model: once with the
    first samples, again with the next ones where more were recorded; and how many lack a model or
    samples. Raises ValueError where fewer than ``least`` do not."""
    found: dict[str, dict[str, Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.id, {})[outcome.model] = outcome
    for model in counts:
        if not any(model in of for of in found.values()):
            raise ValueError(
                f"no outcome of {model!r} to calibrate on\n"
                "hint: record its answers to the same questions, or leave it out of the stages"
            )
    whole = [
        of
        for of in found.values()
        if all(m in of and len(of[m].answers) >= count for m, count in counts.items())
    ]
    if len(whole) < least:
        wanted = ", ".join(f"{count} samples of {model}" for model, count in counts.items())
        raise ValueError(
            f"{len(whole)} questions with {wanted} are too few to calibrate on\n"
            f"hint: {least} at least, 200 for a bound near 0.02"
        )
    times = {m: min(len(of[m].answers) for of in whole) // c for m, c in counts.items()}
    blocks = []
    for block in range(min(max(times.values()), MOST_BLOCKS)):
        starts = {m: block % times[m] * count for m, count in counts.items()}
        blocks.append([RecordedQuestion(of, stages, starts, counts, signal) for of in whole])
    return blocks, len(found) - len(whole)
