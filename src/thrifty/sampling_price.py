"""What the FLOPs left bring as samples of the answers that a run's budget is to pay for: one of the
governor's alternatives (``scaling/joint_stop.py``), by the votes of its own dev evaluations.

    price     accuracy of the vote that the next interval's FLOPs would take away, a FLOP
    history   the evaluations by the accuracy of the vote over as many samples as are left now, so
              that what training brings is told in the same thing

Of what the plan still reserves the cool-down, and the test with what follows, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from thrifty.core.budget import Cost
from thrifty.core.contracts import Evaluation
from thrifty.core.plan_serving import Serving
from thrifty.scaling.joint_stop import (
    JointChoice,
    VoteCurve,
    Way,
    best_way,
    samples_left,
    sampling_price,
)
from thrifty.scaling.saturation import LEAST_CHECKPOINTS, Saturation, fit_saturation


class SamplingPrice:
    """Of one run of training."""

    def __init__(
        self,
        serving: Serving,
        rows: Callable[[], Sequence[Mapping[str, Any]]],
        left: Callable[[], float],
    ) -> None:
        """``rows``: the run's evaluations, as the ledger has them; ``left``: FLOPs for answers,
        were training to cool down now."""
        self._serving, self._rows, self._left = serving, rows, left

    def _measured(self) -> list[Mapping[str, Any]]:
        return [row for row in self._rows() if "votes" in row["beside"]]

    def __call__(self, resource: str, interval: Cost) -> float:
        """Accuracy that a unit of ``resource`` brings, were ``interval`` not trained for."""
        rows, amount = self._measured(), interval.of(resource)
        if not rows or not amount or not interval.flops:
            return 0.0
        price = sampling_price(
            curve_of(rows[-1]["beside"]["votes"]),
            left=self._left(),
            interval=interval.flops,
            questions=self._serving.questions,
            flops_a_sample=flops_a_sample(rows[-1]["beside"]["votes"]),
            max_samples=self._serving.max_samples,
        )
        return price * interval.flops / amount

    def history(self) -> list[Evaluation]:
        """1 - accuracy of the vote over the samples that are left for now."""
        rows = self._measured()
        if not rows:
            return []
        samples = max(self.samples(), 1.0)
        return [
            Evaluation(
                step=row["step"],
                flops=row["flops"],
                loss=1.0 - curve_of(row["beside"]["votes"]).at(samples),
                stderr=_stderr_at(row["beside"]["votes"], samples),
            )
            for row in rows
        ]

    def samples(self, less: float = 0.0) -> float:
        """A question, of what is left but for ``less``."""
        rows = self._measured()
        if not rows:
            return 0.0
        each = flops_a_sample(rows[-1]["beside"]["votes"])
        serving = self._serving
        return samples_left(self._left() - less, serving.questions, each, serving.max_samples)

    def told(self, interval: Cost) -> dict[str, Any]:
        """What a decision rests on: sampling now, and an interval later, and the best way from here
        by the curves of the run's votes; nothing before the first evaluation."""
        rows = self._measured()
        if not rows:
            return {}
        votes, samples = rows[-1]["beside"]["votes"], self.samples()
        later = self.samples(interval.flops)
        curve = curve_of(votes)
        return {
            "questions": self._serving.questions,
            "flops_left": self._left(),
            "flops_a_sample": flops_a_sample(votes),
            "samples": samples,
            "accuracy": curve.at(samples),
            "samples_after_interval": later,
            "accuracy_after_interval": curve.at(later),
            "most_useful_samples": curve.most_useful,
            "jointly": self._jointly(rows),
        }

    def _jointly(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """By a saturating curve of the vote over each number of samples; None while there are too
        few evaluations for one, or not enough is left."""
        if len({row["flops"] for row in rows}) < LEAST_CHECKPOINTS:
            return None
        last, curves = rows[-1]["beside"]["votes"], _curves(rows)
        each, spent = flops_a_sample(last), rows[-1]["flops"]
        choice = best_way(
            lambda flops, size: curves[size].at(flops),
            budget=spent + self._left(),
            questions=self._serving.questions,
            sizes=last["samples"],
            flops_a_sample=lambda flops: each,
            spent=spent,
        )
        return None if choice is None else _facts(choice)


def curve_of(votes: Mapping[str, Any]) -> VoteCurve:
    """Of what an evaluation keeps in the ledger."""
    return VoteCurve(tuple(votes["samples"]), tuple(votes["accuracy"]))


def flops_a_sample(votes: Mapping[str, Any]) -> float:
    """At least one: where nothing could be generated nothing is divided by nothing."""
    return max(float(votes["flops_a_sample"]), 1.0)


def _stderr_at(votes: Mapping[str, Any], samples: float) -> float:
    """That of the nearest number of samples that was worked out."""
    place = min(range(len(votes["samples"])), key=lambda i: abs(votes["samples"][i] - samples))
    found = votes["stderr"][place]
    return math.inf if found is None else float(found)


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[int, Saturation]:
    """Number of samples -> accuracy of its vote over FLOPs."""
    flops = [row["flops"] for row in rows]
    found = {}
    for size in rows[-1]["beside"]["votes"]["samples"]:
        all_of = [row["beside"]["votes"] for row in rows]
        accuracies = [curve_of(votes).at(size) for votes in all_of]
        errors = [_stderr_at(votes, size) for votes in all_of]
        found[size] = fit_saturation(flops, accuracies, errors)
    return found


def _facts(choice: JointChoice) -> dict[str, Any]:
    found: dict[str, Way] = {"best": choice.best, "longest": choice.longest}
    shown: dict[str, Any] = {name: asdict(way) for name, way in found.items()}
    even = choice.break_even()
    return shown | {"break_even_questions": even if math.isfinite(even) else None}
