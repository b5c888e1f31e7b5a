"""One training step on the meta device: its bytes for any number of rows, and its FLOPs, at once.

Tensors there have a shape and nothing else, so that a batch may hold any number of rows. It holds
``ROWS``, a prime larger than any size in a model: what a buffer holds of it grows with the rows,
what is left is there once. Each instant's bytes are then known for every number of rows.

Against ``fake_step``, whose model, tape and device it takes, an operation costs a third, and three
things are left out: a batch of one row that shares what many rows copy; what the fused AdamW and
the clipping of gradients allocate, a few numbers; and the way that operations differ by device
without being told (a CPU's norms keep their statistics in bfloat16, two bytes a token).

FLOPs are those of matrix products and convolutions as ``torch.utils.flop_counter`` has them. It
knows no grouped product, and of attention in a fused kernel here are counted the six products of
the eager one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from thrifty.costs.setting import MemorySetting
from thrifty.fake_device import as_on_the_device
from thrifty.fake_step import (
    Buffer,
    Instant,
    Tape,
    batch_of,
    forward,
    mark_layers,
    materialise,
)
from thrifty.signals.models import layers_of

ROWS = 1_000_003
"""Of a batch: a prime, and beyond any size in a model."""
MEASURED = (
    "micro_batch",
    "sequence",
    "dtype",
    "masked",
    "device_kind",
    "adapter",
    "adapter_dtype",
    "only_layers",
    "only_head",
    "recompute",
    "selective",
    "holds_logits",
)
"""The fields of a setting that are followed, the micro-batch aside; the others must be at their
defaults."""


@dataclass(frozen=True)
class Step:
    """What a step takes. Bytes are [ones, rows] lines: constant + slope x rows."""

    levels: Mapping[Instant, np.ndarray]
    """[events, 2 of what is alive and its part that is gradients, 2]: after each event."""
    weights: int
    """Bytes, with the adapter's and the buffers'."""
    states: int
    """Bytes of the optimizer's states."""
    flops: int
    """Of one row."""

    def highest(self, rows: int) -> dict[Instant, np.ndarray]:
        """The most bytes alive in each instant and, of them, gradients."""
        found = {}
        for instant, levels in self.levels.items():
            sizes = levels @ np.array([1.0, rows])
            found[instant] = sizes[np.argmax(sizes[:, 0])]
        return found


def run_step(model: Any, setting: MemorySetting) -> Step:
    """Forward and backward of ``fake_step.skeleton``'s model; what they leave is what the update
    by AdamW starts from. Raises ValueError for a setting that is not followed, and whatever a
    model's own code raises on tensors without data."""
    _check(setting)
    tape = _CountingTape()
    with torch.device("meta"), tape, as_on_the_device(setting, meta=True):
        materialise(model, setting)
        batch = batch_of(ROWS, setting.sequence)
        marks = mark_layers(layers_of(model), tape)
        try:
            tape.instant = Instant("loss")
            out = forward(model, batch)
            loss = out.loss
            if not setting.holds_logits:
                del out
            loss.backward()
            del loss  # and with it the graph, whose leaves may be activations with a gradient
        finally:
            for mark in marks:
                mark.remove()
    events = list(tape.events)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = None
    states = 2 * sum(parameter.nbytes for parameter in trained)
    return Step(
        levels=_levels(events, states),
        weights=sum(each.nbytes for each in (*model.parameters(), *model.buffers())),
        states=states,
        flops=tape.flops // ROWS,
    )


def _check(setting: MemorySetting) -> None:
    for field in fields(setting):
        value = getattr(setting, field.name)
        if field.name not in MEASURED and value != field.default:
            raise ValueError(
                f"a step with {field.name} {value} is not measured\n"
                "hint: fake_step.record follows more"
            )


def num_kernels(model: Any, setting: MemorySetting, rows: int, sequence: int) -> int:
    """Of a forward."""

    class Counter(TorchDispatchMode):
        kernels = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            self.kernels += 1
            return func(*args, **(kwargs or {}))

    counter = Counter()
    with torch.device("meta"), torch.no_grad(), counter, as_on_the_device(setting, meta=True):
        forward(model, batch_of(rows, sequence))
    return counter.kernels


# -- bytes --------------------------------------------------------------------------------------


def _levels(
    events: Sequence[tuple[Instant, int, Buffer]], states: int
) -> dict[Instant, np.ndarray]:
    left = {}
    for _, size, buffer in events:
        left[id(buffer)] = buffer if size > 0 else None
    # What the passes leave to the optimizer.
    gradients = {key for key, born in left.items() if born and born.instant.phase != "setup"}
    level = np.array([[states, 0.0], [0.0, 0.0]])
    levels: dict[Instant, list[np.ndarray]] = {}
    for instant, size, buffer in events:
        # What is alive as an instant begins counts in it, also where its first event is an end.
        seen = levels.setdefault(instant, [level])
        line = np.array(_line(size, buffer.shape))
        level = level + np.array([line, line * (id(buffer) in gradients)])
        seen.append(level)
    del levels[Instant("setup")]
    levels[Instant("optimizer")] = [level]
    return {instant: np.array(seen) for instant, seen in levels.items()}


def _line(size: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """Bytes that are there once, and those of each row."""
    sign, size = (1, size) if size > 0 else (-1, -size)
    if size % ROWS and max(shape, default=0) < ROWS:
        return sign * size, 0
    slope, once = divmod(size, ROWS)
    if slope and slope % ROWS == 0:
        raise ValueError("what it holds grows with the square of the rows in a batch")
    return sign * once, sign * slope


# -- FLOPs --------------------------------------------------------------------------------------


class _CountingTape(Tape):
    """Counts the FLOPs of what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    """Scores and their product with the values, whatever is masked."""
    return 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return 2 * _attention(query, key, value)


def _grouped_product(one: torch.Tensor, other: torch.Tensor, *_: Any, **__: Any) -> int:
    """Rows in groups, each by a matrix of its own; or groups of a long inner size."""
    groups = one.shape[0] if one.dim() == other.dim() == 3 else 1
    return 2 * groups * one.shape[-2] * one.shape[-1] * other.shape[-1]


_ATEN = torch.ops.aten
_FORMULAS: dict[Any, Callable[..., int]] = flop_registry | {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _ATEN._scaled_dot_product_efficient_attention: _attention,
    _ATEN._scaled_dot_product_efficient_attention_backward: _attention_backward,
    _ATEN._grouped_mm: _grouped_product,
}
