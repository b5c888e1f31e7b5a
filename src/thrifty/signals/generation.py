"""Answers of a model to prompts: token after token with a KV cache, in batches.

    x_t = argmax p(. | x_<t)            greedy, the default
    x_t ~ p(. | x_<t)^(1 / T)           at a temperature T, by the prompt's own random numbers

Prompts of like lengths are batched and padded on the left. A row leaves its batch with its end
token or at its limit, so that what is computed is what is generated: with W the longest prompt of
a row's batch and n the tokens of its answer, the end token included,

    FLOPs = sum over rows of decode_flops(W, n)         (costs/flops.py: the prompt, then n - 1)

Another batch pads otherwise, which may change the last bits of a logit, and with luck a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Meter
from thrifty.costs.flops import decode_flops
from thrifty.costs.memory import kv_cache_bytes
from thrifty.costs.time import forward_seconds
from thrifty.data.packing import padded_batches
from thrifty.signals.forward import batch_tokens

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape

Prompt = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are generated."""

    max_new_tokens: int
    end_ids: frozenset[int] = frozenset()
    """Tokens that end an answer."""
    temperature: float = 0.0
    """0: greedy."""
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt."""

    ids: NDArray[np.int32]  # without the end token
    num_tokens: int
    """Generated, the end token included."""

    @property
    def ended(self) -> bool:
        """By an end token, rather than for want of room."""
        return self.num_tokens > len(self.ids)


def generate(
    model: Any,
    shape: ModelShape,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    meter: Meter,
    max_tokens: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[Answer | None]:
    """An answer to each prompt, in evaluation mode, whatever mode the model was in.

    A batch has at most ``max_tokens`` (one prompt at least), those to be generated included. Ticks
    ``meter`` before every pass. ``share`` (1, 4): every fourth batch from the second on; None
    stands for the others' answers. A prompt that fills the model's context has an empty answer.
    """
    import torch

    answers: list[Answer | None] = [None] * len(prompts)
    for place, prompt in enumerate(prompts):
        if share[0] == 0 and not _limit(shape, len(prompt), decoding):
            answers[place] = Answer(np.zeros(0, dtype=np.int32), 0)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            number, of = share
            lengths = [len(prompt) for prompt in prompts]
            for batch in _batches(shape, lengths, decoding, max_tokens)[number::of]:
                found = _Batch(model, shape, [prompts[i] for i in batch], decoding, batch)
                for place, answer in zip(batch, found.answers(meter), strict=True):
                    answers[place] = answer
    finally:
        model.train(training)
    return answers


class _Batch:
    """Prompts that are answered together."""

    def __init__(
        self,
        model: Any,
        shape: ModelShape,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        places: Sequence[int],
    ) -> None:
        import torch
        from transformers import DynamicCache

        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._model, self._shape, self._decoding = model, shape, decoding
        self._takes = inspect.signature(type(inner).forward).parameters
        device = next(model.parameters()).device
        self.width = max(len(prompt) for prompt in prompts)
        ids = np.zeros((len(prompts), self.width), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, self.width - len(prompt) :] = prompt
            mask[row, self.width - len(prompt) :] = 1
        self._ids, self._mask = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        self._cache = DynamicCache(config=inner.config)
        self._limits = np.array([_limit(shape, len(prompt), decoding) for prompt in prompts])
        self._random = [np.random.default_rng([decoding.seed, place]) for place in places]

    def answers(self, meter: Meter) -> list[Answer]:
        import torch

        rows = np.arange(len(self._ids))  # of those that have not ended
        said: list[list[int]] = [[] for _ in rows]
        counts = np.zeros(len(rows), dtype=np.int64)
        for number in range(1, self._limits.max() + 1):
            meter.tick(Cost(flops=len(rows) * self._flops(number)))
            chosen = self._chosen(self._logits(), rows)
            counts[rows] = number
            speaks = np.array([token not in self._decoding.end_ids for token in chosen.tolist()])
            for row, token in zip(rows[speaks], chosen[speaks].tolist(), strict=True):
                said[row].append(token)
            going = speaks & (number < self._limits[rows])
            if not going.any():
                break
            kept = torch.from_numpy(np.flatnonzero(going)).to(self._mask.device)
            if not going.all():
                self._cache.batch_select_indices(kept)
                self._mask = self._mask[kept]
            rows = rows[going]
            self._ids = torch.from_numpy(chosen[going]).to(self._mask.device)[:, None]
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(rows), 1)], dim=1)
        return [
            Answer(np.array(ids, dtype=np.int32), int(count))
            for ids, count in zip(said, counts, strict=True)
        ]

    def _flops(self, number: int) -> float:
        """Of a row's pass for its token of that number."""
        whole = decode_flops(self._shape, 1, self.width, number)
        return whole - decode_flops(self._shape, 1, self.width, number - 1)

    def _logits(self) -> Any:
        """[rows, vocab] in float32, of the token to come."""
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -self._ids.shape[1] :]
        given = {"position_ids": positions, "logits_to_keep": 1}
        outputs = self._model(
            input_ids=self._ids,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **{name: value for name, value in given.items() if name in self._takes},
        )
        return outputs.logits[:, -1].float()

    def _chosen(self, logits: Any, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        if not self._decoding.temperature:
            return logits.argmax(-1).cpu().numpy()  # type: ignore[no-any-return]
        shares = (logits.double() / self._decoding.temperature).softmax(-1).cumsum(-1).cpu().numpy()
        drawn = [self._random[row].random() for row in rows]
        found = [np.searchsorted(s, u * s[-1], "right") for s, u in zip(shares, drawn, strict=True)]
        return np.minimum(np.array(found, dtype=np.int64), logits.shape[-1] - 1)


def _limit(shape: ModelShape, length: int, decoding: Decoding) -> int:
    """Tokens that an answer to a prompt of ``length`` may have."""
    return max(0, min(decoding.max_new_tokens, shape.max_position_embeddings - length))


def _batches(
    shape: ModelShape, lengths: Sequence[int], decoding: Decoding, max_tokens: int | None
) -> list[list[int]]:
    """Places of the prompts that have room for an answer."""
    places = [i for i, length in enumerate(lengths) if _limit(shape, length, decoding)]
    whole = [lengths[i] + decoding.max_new_tokens for i in places]
    most = max(max_tokens or batch_tokens(shape.vocab_size), *whole, 1)
    return [[places[i] for i in batch] for batch in padded_batches(whole, most)]


def answers_flops(
    shape: ModelShape,
    lengths: Sequence[int],
    decoding: Decoding,
    max_tokens: int | None = None,
    num_tokens: Sequence[int] | None = None,
) -> float:
    """Exactly what ``generate`` takes on prompts of these lengths where the answers have
    ``num_tokens``; without them the most that it can take."""
    total = 0.0
    for batch in _batches(shape, lengths, decoding, max_tokens):
        width = max(lengths[i] for i in batch)
        total += sum(
            decode_flops(
                shape,
                1,
                width,
                num_tokens[i] if num_tokens else _limit(shape, lengths[i], decoding),
            )
            for i in batch
        )
    return total


def answers_cost(
    shape: ModelShape,
    stats: PoolStats,
    device: Any,
    dtype: str,
    max_new_tokens: int,
    max_tokens: int,
) -> Cost:
    """Predicted cost of ``generate`` for the prompts of rows like ``stats``, as if every answer had
    all that it may have: an upper bound but for the spread of lengths, which is not known here."""
    if not stats.num_examples or not max_new_tokens:
        return Cost()
    mean = (stats.num_tokens - stats.num_loss_tokens) / stats.num_examples
    prompt = max(1, min(round(mean), shape.max_position_embeddings - 1))
    new = min(max_new_tokens, shape.max_position_embeddings - prompt)
    rows = max(1, min(stats.num_examples, max_tokens // (prompt + new)))
    # A token's pass reads all that the cache holds, half of its end on average.
    cached = kv_cache_bytes(shape, rows, prompt + new // 2, dtype) / device.bytes_per_second
    token = forward_seconds(shape, rows, 1, dtype, device) + cached
    seconds = forward_seconds(shape, rows, prompt, dtype, device) + (new - 1) * token
    return Cost(
        flops=decode_flops(shape, stats.num_examples, prompt, new),
        seconds=seconds * stats.num_examples / rows,
    )
