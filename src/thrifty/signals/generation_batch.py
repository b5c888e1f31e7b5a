"""Prompts that are answered together: each is read once, then all their answers grow at once.

A row leaves the batch when its answer ends, so that what is computed is what is generated. How a
row's next tokens are made is the one thing that differs: by a whole pass, by a part of one
(``early_exit.py``), or by checking what a draft model says (``speculative.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter
from thrifty.costs.decoding import prompt_flops
from thrifty.signals.generation_rows import Answer, Rows, Wanted
from thrifty.signals.reader import Reader

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape
    from thrifty.costs.token_settings import KVCache


class Way(Protocol):
    """How answers grow once their prompts were read."""

    kept: KVCache | None

    def readers(self, model: Any, shape: ModelShape) -> list[Reader]:
        """All that have to read the prompts; the first gives the logits of the answers' first
        tokens."""

    def grow(self, readers: list[Reader], rows: Rows, logits: Any, meter: Meter) -> None:
        """To their ends. ``logits`` [rows, vocab]: of the first tokens. Counts the FLOPs of every
        row, and ticks them before they are spent where they are known by then."""


class WholePasses:
    """A token a pass, ``kept`` as it says."""

    def __init__(self, kept: KVCache | None = None) -> None:
        self.kept = kept

    def readers(self, model: Any, shape: ModelShape) -> list[Reader]:
        return [Reader(model, shape, self.kept)]

    def grow(self, readers: list[Reader], rows: Rows, logits: Any, meter: Meter) -> None:
        (reader,) = readers
        while (ids := said(rows, logits, reader)) is not None:
            flops = reader.token_flops
            rows.flops[rows.going] += flops
            meter.tick(Cost(flops=len(rows.going) * flops))
            logits = reader.read(ids)[:, -1]


def said(rows: Rows, logits: Any, *readers: Reader) -> Any:
    """Each row says a token of its ``logits`` [rows, vocab]: of those that go on, [rows, 1]. None
    where all have ended."""
    chosen, own = rows.draw(logits)
    each = zip(rows.going.tolist(), chosen.tolist(), own.tolist(), strict=True)
    going = np.array([rows.say(*of_row) for of_row in each])
    keep_going(rows, going, *readers)
    return chosen[_places(going, chosen.device)][:, None] if going.any() else None


def keep_going(rows: Rows, going: NDArray[np.bool_], *readers: Reader) -> None:
    """Those rows alone."""
    rows.going = rows.going[going]
    if going.any() and not going.all():
        for reader in readers:
            reader.select(_places(going, reader.device))


def _places(going: NDArray[np.bool_], device: Any) -> Any:
    import torch

    return torch.from_numpy(np.flatnonzero(going)).to(device)


def answered(
    model: Any,
    shape: ModelShape,
    wanted: Sequence[Wanted],
    meter: Meter,
    way: Way | None = None,
    max_rows: int | None = None,
) -> tuple[list[list[Answer]], float]:
    """The answers to each prompt, and the FLOPs of reading one of them: all are as wide as the
    longest.

    At most ``max_rows`` answers grow at once; each prompt is read once nevertheless.
    """
    import torch

    way = way or WholePasses()
    readers = way.readers(model, shape)
    ids, own = _padded([each.ids for each in wanted], readers[0].device)
    flops = sum(prompt_flops(reader.shape, ids.shape[1]) for reader in readers)
    meter.tick(Cost(flops=len(wanted) * flops))
    logits, *_ = [reader.read(ids, own)[:, -1] for reader in readers]
    owners = [place for place, each in enumerate(wanted) for _ in each.random]
    drawn = [(each, random) for each in wanted for random in each.random]
    most = max_rows or len(owners)
    found: list[Answer] = []
    for start in range(0, len(owners), most):
        chunk = owners[start : start + most]
        if chunk == list(range(len(wanted))):  # one answer each, all at once
            theirs = readers
        else:
            index = torch.tensor(chunk, device=logits.device)
            theirs = [reader.of(index) for reader in readers]
        rows = Rows(drawn[start : start + most], logits.device)
        way.grow(theirs, rows, logits[chunk], meter)
        found += rows.answers()
    each_answer = iter(found)
    return [[next(each_answer) for _ in each.random] for each in wanted], flops


def _padded(prompts: Sequence[Any], device: Any) -> tuple[Any, Any]:
    """Ids and mask [prompts, width], padded on the left."""
    import torch

    width = max(len(prompt) for prompt in prompts)
    ids = np.zeros((len(prompts), width), dtype=np.int64)
    own = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        own[row, width - len(prompt) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(own).to(device)
