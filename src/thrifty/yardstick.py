"""What a run's models are measured by: the objective on the targets' rows, and beside it what may
not get worse or is nearly free to know.

    by_target   the objective: nats a token, or 1 - score of generated answers
    beside      ``nats NAME``: a target's nats a token, where the objective is a score: one pass,
                where an answer takes many, and what maps one unit to the other
                (scaling/unit_map.py)
                ``guard``: nats a token of the guard's rows
                ``vote ...``: what votes over samples of the answers are worth, where the budget is
                to answer questions (vote_evaluation.py)

All of it is charged to the evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thrifty.answer_evaluation import AnswerEvaluation
from thrifty.core.contracts import Meter, Rows
from thrifty.core.objective import Objective
from thrifty.costs.shape import ModelShape
from thrifty.evaluation import Measured, checked, losses_of, measure_flops
from thrifty.vote_evaluation import VoteEvaluation

NATS = "nats "
GUARD = "guard"
GUARD_ROWS = "\0guard"
"""A name that no target has."""


def in_nats(found: Measured) -> Measured:
    """The losses beside the scores; ``found`` itself where it is of losses."""
    losses = {
        name.removeprefix(NATS): each
        for name, each in found.beside.items()
        if name.startswith(NATS)
    }
    return Measured(losses, found.weights) if losses else found


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """One for all evaluations of a run, and for its test."""

    objective: Objective
    shape: ModelShape
    """Of what is measured, under its adapter."""
    tokenizer: Any
    max_tokens: int
    """Of a batch."""
    guard: Rows | None = None

    def measure(
        self,
        model: Any,
        rows: Mapping[str, Rows],
        weights: Mapping[str, float],
        meter: Meter,
        *,
        guarded: bool = False,
        together: bool = False,
    ) -> Measured:
        """On every target's rows. Where ``guarded``, as while training, on the guard's too, and
        with samples of the answers where questions are to be answered. Raises Diverged where a loss
        is not finite. ``together`` as for ``losses_of``."""
        given = self.shape, self._sets(rows, guarded), meter, self.max_tokens
        losses = losses_of(model, *given, together=together)
        beside = {GUARD: losses.pop(GUARD_ROWS)} if guarded and self.guard is not None else {}
        checked(Measured(losses, weights))
        if (answers := self._answers) is None:
            return Measured(losses, weights, beside)
        scored, _ = answers.measured(
            model, self.shape, rows, meter, self.max_tokens, together=together
        )
        beside |= {f"{NATS}{name}": found for name, found in losses.items()}
        if guarded and (votes := self._votes) is not None:
            beside |= votes.measured(model, self.shape, rows, meter, self.max_tokens)
        return Measured(scored, weights, beside)

    def flops(self, rows: Mapping[str, Rows], *, guarded: bool = False) -> float:
        """What ``measure`` takes: exactly where no answers are generated, else at most."""
        if not rows:
            return 0.0
        found = measure_flops(self.shape, self._sets(rows, guarded), self.max_tokens)
        if (answers := self._answers) is not None:
            found += answers.flops(self.shape, rows, self.max_tokens)
        if guarded and (votes := self._votes) is not None:
            found += votes.flops(self.shape, rows, self.max_tokens)
        return found

    def _sets(self, rows: Mapping[str, Rows], guarded: bool) -> Mapping[str, Rows]:
        if not guarded or self.guard is None:
            return rows
        return {**rows, GUARD_ROWS: self.guard}

    @property
    def _answers(self) -> AnswerEvaluation | None:
        metric = self.objective.answers
        if metric is None:
            return None
        return AnswerEvaluation(metric, self.objective.max_new_tokens, self.tokenizer)

    @property
    def _votes(self) -> VoteEvaluation | None:
        serving, answers = self.objective.serving, self._answers
        return None if serving is None or answers is None else VoteEvaluation(answers, serving)
