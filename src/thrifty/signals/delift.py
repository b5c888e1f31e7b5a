"""How much one row as an example in context helps with another (DELIFT, arXiv:2411.04425).

    UF_ij = d(y_i, p(. | x_i)) - d(y_i, p(. | x_j, y_j, x_i)),
    d(y, p) = | 1 - p(y) |_2 / sqrt(number of tokens of y)

p(y) are the probabilities of the answer's own tokens. Row j stands before row i as it is tokenised;
of an example that does not fit the model's context beside row i the end is kept. Of m rows that are
m + m^2 answers, a forward pass each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Meter, Work
from thrifty.data.tokens import Tokens
from thrifty.signals.forward import forward_cost, losses_flops, token_statistics

if TYPE_CHECKING:
    from thrifty.core import contracts
    from thrifty.costs.shape import ModelShape


def pairwise_utility(
    model: Any, shape: ModelShape, examples: Sequence[contracts.Tokens], meter: Meter
) -> NDArray[np.float32]:
    """[n, n] of UF_ij; 0 for a row i without a token that is predicted."""
    alone = _distances(model, shape, examples, meter)
    columns = [
        alone - _distances(model, shape, behind(example, examples, shape), meter)
        for example in examples
    ]
    found = np.stack(columns, axis=1) if columns else np.zeros((0, 0))
    return np.nan_to_num(found, nan=0.0).astype(np.float32)


def behind(
    example: contracts.Tokens, rows: Sequence[contracts.Tokens], shape: ModelShape
) -> list[Tokens]:
    """Each of ``rows`` behind ``example``, with the loss on the tokens that it has alone."""
    pairs = []
    before = np.asarray(example.input_ids)
    for row in rows:
        room = max(shape.max_position_embeddings - len(row.input_ids), 0)
        kept = before[max(len(before) - room, 0) :]
        mask = np.concatenate([np.zeros(len(kept), dtype=bool), np.asarray(row.loss_mask)])
        mask[len(kept)] = False  # alone nothing predicts it
        pairs.append(Tokens(np.concatenate([kept, row.input_ids]), mask))
    return pairs


def _distances(
    model: Any, shape: ModelShape, examples: Sequence[contracts.Tokens], meter: Meter
) -> NDArray[np.float64]:
    """[n] of d(y, p); NaN where no token is predicted."""
    found = token_statistics(model, shape, examples, meter, lambda nll, *_: (1 - (-nll).exp()) ** 2)
    return np.sqrt(found.mean)


def pairwise_utility_flops(shape: ModelShape, lengths: Sequence[int]) -> float:
    """Exactly what ``pairwise_utility`` takes over rows of these lengths."""
    most = shape.max_position_embeddings
    return losses_flops(shape, lengths) + sum(
        losses_flops(shape, [max(min(one + other, most), other) for other in lengths])
        for one in lengths
    )


def pairwise_utility_cost(work: Work, num_rows: int) -> Cost:
    """Predicted, of so many rows of ``work.pool``."""
    if not work.pool.num_examples:
        return Cost()
    rows = work.pool.part(num_rows / work.pool.num_examples)
    mean = rows.mean_tokens
    pairs = PoolStats(
        num_examples=num_rows,
        num_tokens=round(2 * mean * num_rows),
        max_tokens=2 * rows.max_tokens,
        num_squared_tokens=round(2 * (rows.mean_squared_tokens + mean**2) * num_rows),
    )

    def once(stats: PoolStats, most: int) -> Cost:
        return forward_cost(work.shape, stats, work.device, work.dtype, most)

    # Every row as the example before all others.
    each = once(pairs, work.shape.max_position_embeddings)
    return once(rows, work.max_length) + each * num_rows
