"""FLOPs of training, scoring, evaluating and decoding, counted product by product.

Only matrix products count, 2 FLOPs a multiply-add. A linear of ``in x out`` over T tokens takes

    forward 2 T in out;  its input's gradient the same again;  its weight's the same again

so that a trained layer costs 3 times its forward, a frozen one 2, and one below the lowest trained
weight 1: its backward never runs. Attention is dense, T x S, as eager attention executes it and as
``torch.utils.flop_counter.FlopCounterMode`` counts it; ``causal=True`` counts half of it, what an
ideal causal kernel needs. Lengths are those executed, padding included.

Recomputation (``torch.utils.checkpoint``, not reentrant, one decoder layer at a time, which is what
transformers sets up) runs a layer's forward again up to its last saved tensor: the product after
that, usually the layer's last linear, is skipped, and the head is never recomputed. Under it
transformers makes the embedding's output require a gradient, so the backward reaches the first
layer whatever is frozen. Selective recomputation keeps what products put out and runs none again.

Exact for the products counted; norms, activations, softmax and the optimizer are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

from thrifty.costs.adapted import regularising_flops
from thrifty.costs.blocks import mean_turns
from thrifty.costs.layer import Setup, embedding, head, layers
from thrifty.costs.operations import Adapter, Operation, Product, recomputed
from thrifty.costs.setting import MemorySetting, at_turn, parts_of, takes_turns
from thrifty.costs.shape import ModelShape

__all__ = [
    "Adapter",
    "dearest_step_flops",
    "decode_flops",
    "forward_flops",
    "gradient_score_flops",
    "score_flops",
    "step_coefficients",
    "step_flops",
    "train_flops",
]


def forward_flops(shape: ModelShape, batch: int, sequence: int, *, causal: bool = False) -> float:
    """A forward pass over ``[batch, sequence]`` tokens with logits at every position."""
    return score_flops(shape, batch, sequence, causal=causal)


def score_flops(
    shape: ModelShape, batch: int, sequence: int, *, logits: bool = True, causal: bool = False
) -> float:
    """A forward pass, with or without the head: losses need it, hidden states do not."""
    linear, attention, head_linear, fixed = _forward(shape)
    linear += head_linear if logits else 0.0
    return _count(linear, attention, batch, sequence, causal) + fixed


def train_flops(
    shape: ModelShape,
    batch: int,
    sequence: int,
    *,
    adapter: Adapter | None = None,
    recompute: int = 0,
    causal: bool = False,
) -> float:
    """Forward and backward of one micro-batch; all weights, or an adapter on frozen ones."""
    setting = MemorySetting(
        adapter=adapter, recompute=recompute, micro_batch=batch, sequence=sequence
    )
    return step_flops(shape, setting, causal=causal)


def step_flops(shape: ModelShape, setting: MemorySetting, *, causal: bool = False) -> float:
    """Forward and backward of one micro-batch, in whatever way it is run."""
    flops = 0.0
    for part in parts_of(setting):
        linear, attention = step_coefficients(shape, part)
        flops += _count(linear, attention, part.micro_batch, part.sequence, causal)
        flops += fixed_flops(shape, part)
    return flops


def dearest_step_flops(shape: ModelShape, setting: MemorySetting) -> float:
    """The most that a micro-batch can take, where what is trained changes from step to step."""
    if blocks := takes_turns(setting):
        turns = blocks.cycle(shape.num_layers, shape.tie_word_embeddings)
        return max(step_flops(shape, at_turn(setting, block)) for block in turns)
    return step_flops(shape, setting)


def gradient_score_flops(
    shape: ModelShape,
    batch: int,
    sequence: int,
    *,
    adapter: Adapter | None = None,
    last_layers: int | None = None,
    causal: bool = False,
) -> float:
    """Forward and backward for the gradient of an adapter, of the last layers, or of everything."""
    if last_layers is not None and not 0 < last_layers <= shape.num_layers:
        raise ValueError(
            f"last_layers must be from 1 to {shape.num_layers}, not {last_layers}\n"
            "hint: leave it out for the gradient of all weights"
        )
    only = None
    if last_layers is not None:
        only = frozenset(range(shape.num_layers - last_layers, shape.num_layers))
    setting = MemorySetting(adapter=adapter, only_layers=only, micro_batch=batch, sequence=sequence)
    return step_flops(shape, setting, causal=causal)


def decode_flops(
    shape: ModelShape, batch: int, prompt: int, generated: int, *, causal: bool = False
) -> float:
    """``generated`` tokens after ``prompt`` with a KV cache: the prompt in one pass, whose last
    position gives the first token, then a pass a token over what the cache holds."""
    if generated < 1:
        return 0.0
    linear, attention, head_linear, _ = _forward(shape)
    prefill = _count(linear, attention, batch, prompt, causal) + batch * head_linear
    steps = generated - 1
    # Keys seen by step i, the token itself included: prompt + i, or the window.
    keys = _sum_keys(prompt, steps, 0) * (shape.num_layers - shape.num_sliding_layers)
    keys += _sum_keys(prompt, steps, shape.sliding_window) * shape.num_sliding_layers
    # A cache of latents is expanded again at every step; the token itself is in ``linear``.
    again = 2.0 * shape.expansion_parameters * (keys - steps * shape.num_layers)
    per_layer = attention / shape.num_layers
    return prefill + batch * (steps * (linear + head_linear) + per_layer * keys + again)


def _sum_keys(prompt: int, steps: int, window: int) -> int:
    growing = steps if not window else max(0, min(steps, window - prompt))
    return growing * prompt + growing * (growing + 1) // 2 + (steps - growing) * window


def _count(linear: float, attention: float, batch: int, sequence: int, causal: bool) -> float:
    keys = (sequence + 1) / 2 if causal else sequence
    return batch * sequence * (linear + attention * keys)


@lru_cache(maxsize=512)
def _forward(shape: ModelShape) -> tuple[float, float, float, float]:
    """FLOPs of the layers per token, of attention per token and key, of the head per token, and
    those whatever the batch; of the adapter too that the model runs under."""
    worn = shape.adapter
    setup = Setup(eager=True, adapter=worn, backward=worn is not None)
    # The last product is the head's own; what comes before it belongs to the hidden states.
    *body, logits = _products(embedding(shape, setup), *layers(shape, setup), head(shape, setup))
    linear, attention, fixed = _sum(body)
    return linear, attention, _sum([logits])[0], fixed


def step_coefficients(shape: ModelShape, setting: MemorySetting) -> tuple[float, float]:
    """FLOPs of a step per token, and per token and key; those of ``fixed_flops`` come on top. Of
    one of ``parts_of``, where there are several."""
    linear, attention, _ = _whole_step(shape, setting)
    if setting.reference:
        own, keyed, head_linear, _ = _forward(shape)
        linear, attention = linear + own + head_linear, attention + keyed
    return linear, attention


def fixed_flops(shape: ModelShape, setting: MemorySetting) -> float:
    """FLOPs of a step whatever its batch: what some adapters make of weights alone."""
    return _whole_step(shape, setting)[2]


def _whole_step(shape: ModelShape, setting: MemorySetting) -> tuple[float, float, float]:
    """Of blocks that take turns, the mean over a cycle."""
    if blocks := takes_turns(setting):
        turns = mean_turns(shape, blocks)
        each = [_whole_step(shape, at_turn(setting, block)) for block, _ in turns]
        weights = [weight for _, weight in turns]
        linear, attention, fixed = (
            sum(weight * of[kind] for weight, of in zip(weights, each, strict=True))
            for kind in range(3)
        )
        return linear, attention, fixed
    return _step(
        shape,
        setting.adapter,
        setting.only_layers,
        setting.with_embedding,
        setting.with_head,
        setting.only_head,
        setting.zeroth_order,
        int(setting.recompute),
        setting.selective,
        setting.loss_chunk > 0 and not setting.loss_fused,
        setting.mlp_chunk > 0,
    )


@lru_cache(maxsize=4096)
def _step(
    shape: ModelShape,
    adapter: Adapter | None,
    only_layers: frozenset[int] | None,
    with_embedding: bool,
    with_head: bool,
    only_head: bool,
    zeroth_order: bool,
    recompute: int,
    selective: bool,
    chunked: bool,
    sliced: bool,
) -> tuple[float, float, float]:
    if zeroth_order:  # the loss on both sides of a random direction
        linear, attention, head_linear, _ = _forward(shape)
        return 2 * (linear + head_linear), 2 * attention, 0.0
    setup = Setup(
        eager=True,
        adapter=adapter,
        only_layers=only_layers,
        with_embedding=with_embedding,
        with_head=with_head,
        only_head=only_head,
        recompute=bool(recompute),
        mlp_share=float(sliced),
    )
    setup, beside = _under(shape, setup)
    body, top = tuple(layers(shape, setup)), head(shape, setup)
    products = _products(embedding(shape, setup), *body, top, backward=True)
    if recompute and not selective:
        products += _products(*(recomputed(operations) for operations in body[::recompute]))
    if chunked:  # a chunk's logits are made again for its backward
        products += _products(top)[-1:]
    linear, attention, fixed = _sum(products)
    return linear + beside[0], attention, fixed + beside[1] + regularising_flops(shape, adapter)


def _under(shape: ModelShape, setup: Setup) -> tuple[Setup, tuple[float, float]]:
    """Of a step on a model that runs under an adapter: asked for are the adapter's weights too,
    where those of the layers are; elsewhere it runs forward alone, FLOPs per token and whatever the
    batch."""
    worn, chosen = shape.adapter, setup.only_layers
    if worn is None:
        return setup, (0.0, 0.0)
    if setup.adapter is None and setup.trains_all:
        chosen = frozenset(range(shape.num_layers))
        setup = replace(setup, only_layers=chosen, with_embedding=True, with_head=True)
    if setup.adapter is None and chosen is not None:
        own = range(shape.num_layers) if worn.layers is None else worn.layers
        asked = replace(worn.unfrozen, layers=tuple(sorted(chosen.intersection(own))))
        setup = replace(setup, adapter=asked)
    whole, asked_for = _forward(shape), _forward(replace(shape, adapter=setup.adapter))
    return setup, (whole[0] - asked_for[0], whole[3] - asked_for[3])


def _products(*pieces: Sequence[Operation], backward: bool = False) -> list[Product]:
    return [
        product
        for operations in pieces
        for each in operations
        for product in (*each.forward, *(each.backward if backward else ()))
    ]


def _sum(products: Iterable[Product]) -> tuple[float, float, float]:
    """FLOPs per token, per token and key, and whatever the batch."""
    linear = attention = fixed = 0.0
    for product in products:
        if product.heads:
            attention += 2.0 * product.heads * product.inner
        elif product.rows:
            fixed += 2.0 * product.rows * product.inner * product.columns
        else:
            linear += 2.0 * product.inner * product.columns
    return linear, attention, fixed
