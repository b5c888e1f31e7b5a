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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Meter
from thrifty.costs.decoding import decode_seconds
from thrifty.costs.flops import decode_flops
from thrifty.data.packing import padded_batches
from thrifty.signals.forward import batch_tokens
from thrifty.signals.generation_batch import answered
from thrifty.signals.generation_rows import Answer, Prompt, Wanted

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are generated."""

    max_new_tokens: int
    end_ids: frozenset[int] = frozenset()
    """Tokens that end an answer."""
    temperature: float = 0.0
    """0: greedy."""
    seed: int = 0


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
                wanted = [_wanted(shape, prompts[place], place, decoding) for place in batch]
                found, _ = answered(model, shape, wanted, meter)
                for place, (answer,) in zip(batch, found, strict=True):
                    answers[place] = answer
    finally:
        model.train(training)
    return answers


def _wanted(shape: ModelShape, prompt: Prompt, place: int, decoding: Decoding) -> Wanted:
    return Wanted(
        ids=prompt,
        max_new_tokens=_limit(shape, len(prompt), decoding),
        end_ids=decoding.end_ids,
        temperature=decoding.temperature,
        random=(np.random.default_rng([decoding.seed, place]),),
    )


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
    seconds = decode_seconds(shape, rows, prompt, new, dtype, device)
    return Cost(
        flops=decode_flops(shape, stats.num_examples, prompt, new),
        seconds=seconds * stats.num_examples / rows,
    )
