"""Quality: how good a classifier finds a row. By default a linear one on hashed n-grams between
good rows and others, as fastText's (arXiv:1607.01759; as a filter of pretraining data
arXiv:2005.14165, arXiv:2406.11794).

    score(z) = w . f(z) + b,   f(z) = c(z) / |c(z)|,
    (w, b) minimise   mean log(1 + exp(-y (w . f + b))) + decay |w|^2 / 2

c are counts of hashed 1- and 2-grams, y = 1 for good rows and -1 for others. Good are the rows of
``good``, or the target's; the others those of ``bad``, or as many drawn from the pool. With
``model`` it is a ``transformers`` classifier instead, which is not trained (``classifier.py`` of
``signals``; as FineWeb-Edu's, arXiv:2406.17557).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Work, Worth
from thrifty.core.ranges import check_ranges
from thrifty.signals.classifier import Classifier, classifier_cost, no_classifier
from thrifty.signals.ngrams import hashed_ngrams, ngrams_cost
from thrifty.signals.some_rows import drawn

_FEWEST_OTHERS = 1000


@dataclass(frozen=True, kw_only=True)
class Quality(Scorer):
    """How good a classifier finds a row: one of words, of good rows and bad, or your own model."""

    model: str = ""
    """Folder or hub name of a transformers classifier; empty: one is trained on words."""
    label: str = ""
    """Its label that stands for good, a name or a number; empty: the only one, the second of two.
    """
    good: tuple[str, ...] = ()
    """Files of good rows, which then need no target; none: the target's rows."""
    bad: tuple[str, ...] = ()
    """Files of bad rows; none: rows of the pool, drawn at random."""
    buckets: int = 20_000
    decay: float = 1e-4
    seed: int = 0

    needs_model: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued", "preference")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]] = "text"
    source: ClassVar[str] = "arXiv:1607.01759; as a data filter arXiv:2406.11794"
    worth: ClassVar[Worth] = Worth(
        1.8, 1.0, "the best filter of DataComp-LM by far, arXiv:2406.11794; of pretraining data"
    )

    def __post_init__(self) -> None:
        check_ranges(self, buckets=(2, inf), decay=(0, inf), seed=(0, 2**32 - 1))
        if self.model and (self.good or self.bad):
            raise ValueError(
                "quality has both a model and good or bad rows\n"
                "hint: a model is trained already; leave out one of the two"
            )
        if self.label and not self.model:
            raise ValueError("quality has a label but no model\nhint: a label is one of a model's")

    @property
    def needs_target(self) -> bool:  # type: ignore[override]
        """Not where rows of the user's, or a model, say what is good."""
        return not (self.good or self.model)

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.good, *self.bad)

    def cost(self, work: Work) -> Cost:
        if self.model:
            return classifier_cost(work, work.pool, self.model)
        # Of the pool one pass, of the rows that it is fitted on two: counted, and fitted to. Files
        # of good and bad rows are not read for a price, and taken for as many as are drawn.
        good = [target.num_examples for target in work.targets.values()]
        if not self.needs_target:
            good = [_FEWEST_OTHERS]
        others = min(max([_FEWEST_OTHERS, *good]), work.pool.num_examples)
        fitted = sum(count + others for count in good)
        return ngrams_cost(work, passes=1) * (1 + 2 * fitted / max(work.pool.num_examples, 1))

    def prepare(self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter) -> Any:
        """The classifier, the place of its label and the number of targets; or, of words,
        [buckets + 1, num_targets]: weights and, last, the intercept."""
        if self.model:
            classifier = models.other(self.model)
            if not isinstance(classifier, Classifier):
                raise no_classifier(self.model)
            return classifier, classifier.place_of(self.label), max(len(targets), 1)
        own = self._texts(self.good)
        asked = [own or list(rows.texts) for rows in targets.values()] or [own]
        wanted = max(_FEWEST_OTHERS, *(len(texts) for texts in asked))
        bad = self._texts(self.bad) or _drawn(pool, wanted, self.seed)
        columns = [_fit(texts, bad, self.buckets, self.decay) for texts in asked]
        return np.stack(columns, axis=1)

    @staticmethod
    def _texts(sources: Sequence[str]) -> list[str]:
        from thrifty.data.pool import Row, read_rows

        return [row.text for row in read_rows(sources) if isinstance(row, Row)] if sources else []

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        if self.model:
            classifier, place, columns = state
            scores = classifier.scores(shard.texts, place, meter).astype(np.float32)
            return np.repeat(scores[:, None], columns, axis=1)
        return (_features(shard.texts, self.buckets) @ state[:-1] + state[-1]).astype(np.float32)


def _features(texts: Sequence[str], buckets: int) -> Any:
    """Counts of length one a row, sparse."""
    from scipy.sparse import diags_array

    counts = hashed_ngrams(texts, buckets)
    lengths = np.sqrt(counts.multiply(counts).sum(axis=1))
    return diags_array(1 / np.maximum(lengths, 1e-12)) @ counts


def _drawn(pool: Pool, count: int, seed: int) -> list[str]:
    return [text for shard in drawn(pool, count, seed).shards() for text in shard.texts]


def _fit(
    good: Sequence[str], bad: Sequence[str], buckets: int, decay: float
) -> NDArray[np.float64]:
    """Logistic regression, both classes weighing half: convex, so there is one answer."""
    from scipy.optimize import minimize

    features = _features([*good, *bad], buckets)
    sign = np.repeat([1.0, -1.0], [len(good), len(bad)])
    weight = np.where(sign > 0, 0.5 / len(good), 0.5 / len(bad))

    def objective(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        w, b = parameters[:-1], parameters[-1]
        margin = sign * (features @ w + b)
        slope = -weight * sign / (1 + np.exp(np.clip(margin, -500, 500)))
        loss = float(weight @ np.logaddexp(0, -margin) + decay / 2 * w @ w)
        return loss, np.append(features.T @ slope + decay * w, slope.sum())

    start = np.zeros(buckets + 1)
    return minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
