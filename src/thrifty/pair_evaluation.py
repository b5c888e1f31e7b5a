"""The objective of training on pairs, measured: the DPO loss on the dev or test pairs.

    L = mean over pairs of -log sigmoid(beta d)
    d = [log p(chosen) - log p(rejected)] - [the same under the reference]

in nats a pair, p of a whole answer given its prompt (arXiv:2305.18290, its equation 7). Under the
reference itself it is log 2. A pair is right where d > 0: the model moved towards its better
answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty.core.contracts import Meter, Rows
from thrifty.costs.shape import ModelShape
from thrifty.data.tokens import Tokens
from thrifty.evaluation import Measured, checked
from thrifty.signals.forward import Losses, example_losses, losses_flops

UNIT = "nats/pair"

LogProbs = Mapping[str, NDArray[np.float64]]
"""Target -> [n, 2]: of its pairs' chosen and rejected answers."""


def answer_log_probs(
    model: Any,
    shape: ModelShape,
    pairs: Any,
    meter: Meter,
    max_tokens: int | None = None,
) -> NDArray[np.float64]:
    """[n, 2], of the chosen and the rejected answers of tokenised ``pairs`` given their prompts."""
    found = example_losses(model, shape, _sides(pairs), meter, max_tokens)
    return -found.nll.reshape(-1, 2)


def log_probs_of(
    model: Any,
    shape: ModelShape,
    rows: Mapping[str, Rows],
    meter: Meter,
    max_tokens: int | None = None,
) -> LogProbs:
    """Of every target's rows."""
    return {
        name: answer_log_probs(model, shape, some.tokens, meter, max_tokens)
        for name, some in rows.items()
    }


def log_probs_flops(
    shape: ModelShape, rows: Mapping[str, Rows], max_tokens: int | None = None
) -> float:
    """Exactly what ``log_probs_of`` takes."""
    return sum(answers_flops(shape, some.tokens, max_tokens) for some in rows.values())


def answers_flops(shape: ModelShape, pairs: Any, max_tokens: int | None = None) -> float:
    """Exactly what ``answer_log_probs`` takes."""
    lengths = [len(side.input_ids) for side in _sides(pairs)]
    return losses_flops(shape, lengths, max_tokens)


def _sides(pairs: Any) -> list[Tokens]:
    return [side for pair in pairs for side in pair.sides]


@dataclass(frozen=True)
class PairLosses:
    """The loss against one reference."""

    beta: float
    reference: LogProbs

    def measured(self, found: LogProbs, weights: Mapping[str, float]) -> Measured:
        """Raises Diverged where a loss is not finite."""
        losses = {}
        for name, log_probs in found.items():
            margins = (log_probs - self.reference[name]) @ np.array([1.0, -1.0])
            each = np.logaddexp(0.0, -self.beta * margins)
            losses[name] = Losses(each, np.ones(len(each), dtype=np.int64))
        return checked(Measured(losses, weights))


def share_right(measured: Measured) -> float:
    """Of all pairs, those that the model tells the better answer of, against its reference; half of
    those on which the two do not differ."""
    losses = np.concatenate([each.nll for each in measured.by_target.values()])
    ties = np.isclose(losses, np.log(2.0), rtol=0.0, atol=1e-12)
    return float(np.mean(np.where(ties, 0.5, losses < np.log(2.0))))


def share_likelier(found: LogProbs) -> float:
    """Of all pairs, those whose better answer is the likelier one, whatever the reference says."""
    both = np.concatenate(list(found.values()))
    return float(np.mean(both[:, 0] > both[:, 1]))
