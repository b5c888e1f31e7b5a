"""What votes over samples of a checkpoint's answers are worth, on the dev rows, where the run's
budget is to answer questions (``objective.serving``).

    vote K NAME     of each row 1 - P(the vote over K samples is right), scaling/vote_accuracy.py
    vote flops      of the rows' samples, each answered by itself, and how many there were
    vote tokens     that were generated for them

They stand beside the objective in ``Measured``, so that their changes too have paired error bars
and survive a resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from thrifty.answer_evaluation import AnswerEvaluation, Said
from thrifty.core.contracts import Meter, Rows
from thrifty.core.plan_serving import Serving
from thrifty.core.sampling import Outcome
from thrifty.costs.flops import decode_flops
from thrifty.costs.shape import ModelShape
from thrifty.evaluation import Measured
from thrifty.scaling.vote_accuracy import vote_accuracy, vote_sizes
from thrifty.signals.forward import Losses

VOTE = "vote "
_FLOPS, _TOKENS = "vote flops", "vote tokens"


@dataclass(frozen=True)
class VoteEvaluation:
    """How samples are drawn, and what is made of them."""

    answers: AnswerEvaluation
    serving: Serving

    def measured(
        self,
        model: Any,
        shape: ModelShape,
        rows: Mapping[str, Rows],
        meter: Meter,
        max_tokens: int | None = None,
    ) -> dict[str, Losses]:
        """Of each set of rows; how answers spread is learnt from all of them together."""
        said: list[list[Said]] = []
        names: list[str] = []
        for name, some in rows.items():
            drawn = self.answers.samples(
                model,
                shape,
                some,
                meter,
                max_tokens,
                times=self.serving.dev_samples,
                temperature=self.serving.temperature,
            )
            said += drawn
            names += [name] * len(drawn)
        sizes = vote_sizes(self.serving.max_samples)
        wrong = 1.0 - vote_accuracy([self._outcome(samples) for samples in said], sizes)
        of = np.array(names)
        ones = {name: np.ones(int((of == name).sum()), dtype=np.int64) for name in rows}
        found = {
            f"{VOTE}{size} {name}": Losses(wrong[of == name, place], ones[name])
            for place, size in enumerate(sizes)
            for name in rows
        }
        counts = np.array([len(samples) for samples in said])
        flops = [sum(self._flops(shape, each) for each in samples) for samples in said]
        tokens = [float(sum(each.num_tokens for each in samples)) for samples in said]
        return found | {
            _FLOPS: Losses(np.array(flops), counts),
            _TOKENS: Losses(np.array(tokens), counts),
        }

    def flops(
        self, shape: ModelShape, rows: Mapping[str, Rows], max_tokens: int | None = None
    ) -> float:
        """The most that ``measured`` can take."""
        return self.answers.flops(shape, rows, max_tokens, self.serving.dev_samples)

    def _outcome(self, samples: list[Said]) -> Outcome:
        return Outcome(
            id="",
            model="",
            answers=tuple(self.answers.metric.read(each.text) for each in samples),
            correct=tuple(each.score for each in samples),
        )

    def _flops(self, shape: ModelShape, said: Said) -> float:
        tokens = said.num_tokens if self.serving.tokens is None else round(self.serving.tokens)
        return decode_flops(shape, 1, said.prompt_tokens, tokens)


def votes_of(found: Measured, before: Measured | None) -> dict[str, Any] | None:
    """What the ledger keeps of them: over samples a question the vote's accuracy, weighted like the
    objective, and the standard error of its change since ``before``. None where there are none."""
    if _FLOPS not in found.beside:
        return None
    sizes = sorted({int(name.split(" ")[1]) for name in found.beside if _is_vote(name)})
    curves = [_of_size(found, size) for size in sizes]
    earlier = [None if before is None else _of_size(before, size) for size in sizes]
    return {
        "samples": sizes,
        "accuracy": [1.0 - curve.objective for curve in curves],
        "stderr": [
            _finite(curve.stderr(then if then is not None and then.by_target else None))
            for curve, then in zip(curves, earlier, strict=True)
        ],
        "flops_a_sample": found.beside[_FLOPS].objective,
        "tokens_a_sample": found.beside[_TOKENS].objective,
        "drawn": int(found.beside[_FLOPS].num_tokens.sum()),
    }


def _finite(stderr: float) -> float | None:
    """None: of a single row nobody knows."""
    return stderr if np.isfinite(stderr) else None


def _is_vote(name: str) -> bool:
    return name.startswith(VOTE) and name not in (_FLOPS, _TOKENS)


def _of_size(found: Measured, size: int) -> Measured:
    prefix = f"{VOTE}{size} "
    of = {name: found.beside.get(f"{prefix}{name}") for name in found.weights}
    return Measured({name: each for name, each in of.items() if each is not None}, found.weights)
