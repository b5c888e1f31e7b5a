"""Losses of examples from one forward pass: the loop behind every evaluation and loss scorer.

    nll(z) = - sum_t m_t log p(z_t | z_<t),    m_1 = 0: the first token has no prediction

Examples are batched by length and padded on the right; attention is causal, so that padding
changes nothing for the tokens before it and no mask is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Meter, Tokens, Work
from thrifty.costs.flops import forward_flops
from thrifty.costs.memory import forward_account
from thrifty.costs.shape import read_shape
from thrifty.costs.time import forward_seconds
from thrifty.data.packing import padded_batches
from thrifty.signals.models import locate
from thrifty.signals.sharded import without_gradients

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape

_LOGITS_BYTES = 2**28
"""Logits of a batch in fp32 stay below this: a large vocabulary gets smaller batches."""
_MAX_BATCH_TOKENS = 8192
_MOST_PADDING = 0.075
"""Of ``padded_batches``: no row is shorter than 0.85 of its batch's longest."""


@dataclass(frozen=True)
class Losses:
    """Of n examples: summed negative log-likelihood and the number of tokens that carry it."""

    nll: NDArray[np.float64]  # [n]
    num_tokens: NDArray[np.int64]  # [n]
    least_change: float = 0.0
    """Of an example: 1 where it is right or wrong. That no example changed does not make the change
    certain: a standard error is at least that of one example."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """[n], nats a token; NaN where no token carries loss."""
        with np.errstate(invalid="ignore"):
            return self.nll / np.where(self.num_tokens > 0, self.num_tokens, np.nan)

    @property
    def objective(self) -> float:
        """Nats a token over all examples."""
        return float(self.nll.sum() / max(int(self.num_tokens.sum()), 1))

    def stderr(self, before: Losses | None = None) -> float:
        """Standard error of ``objective``, or of its change since ``before`` (paired by example).

        Of a ratio of sums over examples: sd of nll_i - L n_i, times sqrt(N) / sum n (delta method).
        """
        residual = self.nll - self.objective * self.num_tokens
        if before is not None:
            residual = residual - (before.nll - before.objective * before.num_tokens)
        if len(residual) < 2:
            return float("inf")
        spread = max(float(residual.std(ddof=1)), self.least_change / len(residual) ** 0.5)
        return spread * len(residual) ** 0.5 / max(int(self.num_tokens.sum()), 1)


def batch_tokens(vocab_size: int) -> int:
    """Padded tokens of a forward batch."""
    return max(1, min(_MAX_BATCH_TOKENS, _LOGITS_BYTES // (4 * vocab_size)))


def example_losses(
    model: Any,
    shape: ModelShape,
    examples: Sequence[Tokens],
    meter: Meter,
    max_tokens: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Losses:
    """Each example's loss under ``model``, in evaluation mode, whatever mode it was in.

    Ticks ``meter`` with the FLOPs of every batch as padded; a batch has at most ``max_tokens``
    (one example at least), by default as many as keep its logits small. ``share`` (1, 4): every
    fourth batch from the second on; zeros stand for the others' examples.
    """
    nll = np.zeros(len(examples))
    count = np.zeros(len(examples), dtype=np.int64)

    def visit(batch: list[int], ids: Any, keep: Any) -> None:
        losses = _losses(model, shape, ids, meter)
        nll[batch] = (losses.double() * keep).sum(1).cpu().numpy()
        count[batch] = keep.sum(1).cpu().numpy()

    each_batch(model, shape, examples, visit, max_tokens, share)
    return Losses(nll, count)


@dataclass(frozen=True)
class Sums:
    """Of n examples: a statistic summed over the tokens that carry loss, and how many do."""

    sums: NDArray[np.float64]  # [n]
    num_tokens: NDArray[np.int64]  # [n]

    @property
    def mean(self) -> NDArray[np.float64]:
        """[n]; NaN where no token carries loss."""
        return Losses(self.sums, self.num_tokens).mean


def token_statistics(
    model: Any,
    shape: ModelShape,
    examples: Sequence[Tokens],
    meter: Meter,
    statistic: Callable[..., Any],
    *,
    max_tokens: int | None = None,
) -> Sums:
    """``statistic(nll, logits, ids)`` summed over each example's tokens that carry loss.

    It is given, for a padded batch, the losses ``[batch, sequence - 1]``, the logits they come from
    ``[batch, sequence - 1, vocab]`` in float32 and the ids predicted ``[batch, sequence - 1]``, and
    returns ``[batch, sequence - 1]``. The model is in evaluation mode, whatever mode it was in.
    """
    sums = np.zeros(len(examples))
    count = np.zeros(len(examples), dtype=np.int64)

    def visit(batch: list[int], ids: Any, keep: Any) -> None:
        meter.tick(Cost(flops=forward_flops(shape, *ids.shape)))
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        values = statistic(next_token_losses(logits, ids), logits, ids[:, 1:])
        sums[batch] = (values.double() * keep).sum(1).cpu().numpy()
        count[batch] = keep.sum(1).cpu().numpy()

    each_batch(model, shape, examples, visit, max_tokens)
    return Sums(sums, count)


def token_losses(
    model: Any, shape: ModelShape, examples: Sequence[Tokens], meter: Meter
) -> list[NDArray[np.float32]]:
    """Each token's negative log-likelihood, one array an example as long as it is; the first token
    has no prediction: 0. Ticks ``meter`` like ``example_losses``."""
    found = [np.zeros(len(example.input_ids), dtype=np.float32) for example in examples]

    def visit(batch: list[int], ids: Any, keep: Any) -> None:
        losses = _losses(model, shape, ids, meter).cpu().numpy()
        for i, row in zip(batch, losses, strict=True):
            found[i][1:] = row[: len(found[i]) - 1]

    each_batch(model, shape, examples, visit)
    return found


def _losses(model: Any, shape: ModelShape, ids: Any, meter: Meter) -> Any:
    """[batch, sequence - 1] of ids ``[batch, sequence]``; of few logits at a time where the model
    is held so (``holding/chunked_loss.py``)."""
    meter.tick(Cost(flops=forward_flops(shape, *ids.shape)))
    of_few_logits = getattr(model, "token_losses", None)
    if of_few_logits is not None:
        return of_few_logits(ids.roll(-1, 1), input_ids=ids)[:, :-1]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return next_token_losses(logits, ids)


def next_token_losses(logits: Any, ids: Any) -> Any:
    """[batch, sequence - 1] of logits ``[batch, sequence - 1, vocab]``, the last token's left out,
    and ids ``[batch, sequence]``: the negative log-likelihood of every token but the first."""
    import torch

    following = ids[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), following.flatten(), reduction="none"
    )
    return losses.view(following.shape)


def each_batch(
    model: Any,
    shape: ModelShape,
    examples: Sequence[Tokens],
    visit: Callable[[list[int], Any, Any], None],
    max_tokens: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> None:
    """``visit(places, ids, keep)`` a padded batch of examples of like lengths at a time, without
    gradients and in evaluation mode: ids ``[batch, sequence]``, and which of the tokens after the
    first carry loss ``[batch, sequence - 1]``. ``share``: of so many the number whose batches."""

    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with without_gradients(model):
            lengths = [len(e.input_ids) for e in examples]
            number, of = share
            for batch in _batches(shape, lengths, max_tokens)[number::of]:
                visit(batch, *padded([examples[i] for i in batch], device))
    finally:
        model.train(training)


def losses_flops(
    shape: ModelShape,
    lengths: Sequence[int],
    max_tokens: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> float:
    """Exactly what ``example_losses`` takes over examples of these lengths."""
    number, of = share
    return sum(
        forward_flops(shape, len(batch), lengths[batch[0]])
        for batch in _batches(shape, lengths, max_tokens)[number::of]
    )


def num_passes(
    shape: ModelShape, lengths: Sequence[int], max_tokens: int | None, share: tuple[int, int]
) -> int:
    """That ``example_losses`` makes over examples of these lengths."""
    number, of = share
    return len(_batches(shape, lengths, max_tokens)[number::of])


def _batches(shape: ModelShape, lengths: Sequence[int], max_tokens: int | None) -> list[list[int]]:
    most = max(max_tokens or batch_tokens(shape.vocab_size), max(lengths, default=1))
    return padded_batches(lengths, most)


def padded(examples: Sequence[Tokens], device: Any) -> tuple[Any, Any]:
    """ids [batch, sequence], padded with 0, and which of tokens 1.. carry loss [batch, seq - 1]."""
    import torch

    longest = max(len(e.input_ids) for e in examples)
    ids = np.zeros((len(examples), longest), dtype=np.int64)
    keep = np.zeros((len(examples), longest), dtype=bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.input_ids)] = example.input_ids
        keep[row, : len(example.loss_mask)] = example.loss_mask
    return torch.from_numpy(ids).to(device), torch.from_numpy(keep[:, 1:]).to(device)


def forward_cost(
    shape: ModelShape,
    stats: PoolStats,
    device: Any,
    dtype: str,
    max_length: int,
    max_tokens: int | None = None,
) -> Cost:
    """Predicted cost of ``example_losses`` over rows like ``stats``: their time as if all had their
    mean length, their FLOPs with the padding of batches of like lengths."""
    if not stats.num_examples:
        return Cost()
    length = max(1, min(round(stats.mean_tokens), max_length))
    examples = max(1, (max_tokens or batch_tokens(shape.vocab_size)) // length)
    batches = stats.num_examples / examples
    longest = min(stats.max_tokens, max_length)
    peak = max(examples * length, longest)
    flops = mean_flops(lambda tokens: forward_flops(shape, 1, tokens), stats, length)
    return Cost(
        flops=flops * stats.num_examples * padding(stats, longest, examples),
        seconds=forward_seconds(shape, examples, length, dtype, device) * batches,
        peak_memory_bytes=_peak(shape, max(1, peak // longest), longest, dtype, device),
    )


def padding(stats: PoolStats, longest: int, batch: int) -> float:
    """Padded over real tokens: sorted rows span ``batch / num_examples`` of all lengths in a batch,
    and half of that is padding."""
    span = longest / max(stats.mean_tokens, 1.0) * batch / stats.num_examples
    return 1.0 + min(_MOST_PADDING, 0.5 * span)


def mean_flops(flops: Callable[[int], float], stats: PoolStats, length: int) -> float:
    """Of an example, where ``flops`` of one are a t + b t^2 of its tokens t: the mean of the
    squares is not the square of the mean ``length``."""
    one, two = flops(length), flops(2 * length)
    quadratic = (two - 2 * one) / 2 * (stats.mean_squared_tokens / length**2 - 1)
    return one + max(quadratic, 0.0)


def _peak(shape: ModelShape, batch: int, sequence: int, dtype: str, device: Any) -> float:
    account = forward_account(shape, batch, sequence, dtype, masked=False, device_kind=device.kind)
    return account.peak_memory_bytes


def scoring_cost(work: Work, stats: PoolStats, model: str = "") -> Cost:
    """Of one forward pass over rows like ``stats``, under the base model or another."""
    stats = as_read(work, stats, model)
    return forward_cost(shape_of(work, model), stats, work.device, work.dtype, work.max_length)


def as_read(work: Work, stats: PoolStats, model: str) -> PoolStats:
    """``stats`` of rows in the tokens of the model that reads them, and cut by its context, as near
    as sums can tell."""
    stats = stats.in_tokens(work.token_ratio(model))
    most = shape_of(work, model).max_position_embeddings
    if stats.max_tokens <= most:
        return stats
    mean = min(stats.mean_tokens, most)
    squares = min(stats.mean_squared_tokens, mean * most)
    return replace(
        stats,
        max_tokens=most,
        num_tokens=round(mean * stats.num_examples),
        num_squared_tokens=round(squares * stats.num_examples),
    )


def shape_of(work: Work, model: str) -> ModelShape:
    """Of the model that a scorer looks at: the base model's for ``""``."""
    return read_shape(locate(model, weights=False)[0]) if model else work.shape
