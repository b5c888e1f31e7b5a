"""BM25: rows that share rare words with the target's rows (Robertson and Zaragoza, 2009).

    score(row, target) = mean over q in target of  sum over w in q of
        idf(w) * tf(w, row) (k1 + 1) / (tf(w, row) + k1 (1 - b + b |row| / mean |row|))

through bm25s (Lucene's idf). The hard baseline of compute-constrained selection: at FLOPs of next
to nothing it is on the front of most budgets in arXiv:2410.16208.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter, Models, Pool, Rows, Scorer, Work, Worth
from thrifty.core.ranges import check_ranges

# Splits snake_case and CamelCase too: in code the parts of a name are the words.
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_]+")
_TOKENS_PER_SECOND = 1.5e6
_BYTES_PER_TOKEN = 24.0


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
        tokens = work.pool.num_tokens
        queries = sum(min(t.num_examples, self.max_queries) for t in work.targets.values())
        pairs = queries * work.pool.num_examples
        return Cost(
            seconds=tokens / _TOKENS_PER_SECOND + pairs * 4e-9,
            peak_memory_bytes=tokens * _BYTES_PER_TOKEN,
        )

    def prepare(
        self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> dict[int, NDArray[np.float32]]:
        """Every row's scores, by its place in the index: the statistics need the whole pool, and
        with them known the scores are too."""
        import bm25s

        ids: list[NDArray[np.int64]] = []
        documents: list[list[str]] = []
        for shard in pool.shards():
            ids.append(shard.ids)
            documents.extend(words(text) for text in shard.texts)
        index = bm25s.BM25(k1=self.k1, b=self.b, method="lucene")
        # An index of nothing but empty documents cannot be built; such rows score zero anyway.
        empty = not any(documents)
        if not empty:
            index.index(documents, show_progress=False)
        scores = np.zeros((len(documents), len(targets)), dtype=np.float32)
        for column, target in enumerate(targets.values()):
            queries = [words(text) for text in target.texts[: self.max_queries]]
            for query in queries:
                if query and not empty:
                    scores[:, column] += index.get_scores(query)
            scores[:, column] /= max(len(queries), 1)
        order = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int64)
        return dict(zip(order.tolist(), scores, strict=True))

    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        return np.stack([state[i] for i in shard.ids.tolist()]).astype(np.float32)
