"""BM25: rows that share rare words with the target's rows (Robertson and Zaragoza, 2009).

    score(row, target) = mean over q in target of  sum over w in q of
        idf(w) * tf(w, row) (k1 + 1) / (tf(w, row) + k1 (1 - b + b |row| / mean |row|))

with idf(w) = ln(1 + (N - n(w) + 0.5) / (n(w) + 0.5)), as in Lucene. Only words of the target can
count, so that two passes over the pool (frequencies, then scores) hold a shard and those words, and
no index of the pool. The hard baseline of compute-constrained selection: at FLOPs of next to
nothing it is on the front of most budgets in arXiv:2410.16208.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Work, Worth
from thrifty.core.ranges import check_ranges

# Splits snake_case and CamelCase too: in code the parts of a name are the words.
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_]+")
_TOKENS_PER_SECOND = 1.5e6
"""Of splitting into words, a pass."""
_SHARD_ROWS = 4096
_BYTES_PER_TOKEN = 60.0
"""Of a shard: its text as Python strings, and the words found in it."""


def words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


@dataclass(frozen=True, kw_only=True)
class BM25(Scorer):
    """Rows that share rare words with the target; no model, next to no cost."""

    k1: float = 1.5
    b: float = 0.75
    max_queries: int = 256
    """Target rows used as queries, the first so many."""

    needs_target: ClassVar[bool] = True
    needs_model: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("sft", "continued", "preference")
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient"]] = "text"
    source: ClassVar[str] = "Robertson and Zaragoza 2009; arXiv:2410.16208"
    worth: ClassVar[Worth] = Worth(
        2.5, 0.8, "7B, 5% of the pool: equals 2 (MMLU) to 4 (BBH) times the random rows, 2410.16208"
    )

    def __post_init__(self) -> None:
        check_ranges(self, k1=(0, inf), b=(0, 1), max_queries=(1, inf))

    def cost(self, work: Work) -> Cost:
        shard = min(work.pool.num_examples, _SHARD_ROWS) * work.pool.mean_tokens
        return Cost(
            seconds=2 * work.pool.num_tokens / _TOKENS_PER_SECOND,
            peak_memory_bytes=shard * _BYTES_PER_TOKEN,
        )

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> _Statistics:
        """How often the target's words stand in the target, and in how many rows of the pool."""
        asked = [
            [Counter(words(text)) for text in target.texts[: self.max_queries]]
            for target in targets.values()
        ]
        known = {word for queries in asked for query in queries for word in query}
        vocabulary = {word: place for place, word in enumerate(sorted(known))}
        rows, length, seen = 0, 0, np.zeros(len(vocabulary))
        for shard in pool.shards():
            for text in shard.texts:
                found = words(text)
                rows += 1
                length += len(found)
                seen[[vocabulary[word] for word in known.intersection(found)]] += 1
        weights = np.zeros((len(vocabulary), len(asked)))
        for column, queries in enumerate(asked):
            for query in queries:
                for word, count in query.items():
                    weights[vocabulary[word], column] += count / len(queries)
        weights *= np.log1p((rows - seen + 0.5) / (seen + 0.5))[:, None]
        return _Statistics(vocabulary, weights, length / max(rows, 1))

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        vocabulary, weights, mean_length = state
        num_words = np.zeros(len(shard))
        stands: list[int] = []  # row * len(vocabulary) + word, once for each time that it stands
        for place, text in enumerate(shard.texts):
            found = words(text)
            num_words[place] = len(found)
            base = place * len(vocabulary)
            stands += [base + vocabulary[word] for word in found if word in vocabulary]
        places, often = np.unique(np.asarray(stands, dtype=np.int64), return_counts=True)
        row, word = np.divmod(places, max(len(vocabulary), 1))
        length = self.k1 * (1 - self.b + self.b * num_words / max(mean_length, 1e-9))
        scores = np.zeros((len(shard), weights.shape[1]))
        np.add.at(scores, row, (often / (often + length[row]))[:, None] * weights[word])
        return scores.astype(np.float32)


class _Statistics(NamedTuple):
    vocabulary: Mapping[str, int]
    weights: NDArray[np.float64]  # [num_words, num_targets]: idf(w) times the mean count in a query
    mean_length: float  # of a row, in words
