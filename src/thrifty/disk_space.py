"""Whether the disk has room for what a stage writes, asked before it spends anything.

    training   the checkpoints that are there at once, the one being written among them; or those
               that are kept and the model that is published
    scoring    a file of scores a shard, vectors where a method looks at them, the rows chosen
    a pilot    both of each candidate, which all stay, and the rows among which they choose
    the test   the losses of its rows

A checkpoint is what is trained, its optimizer's states, the tokenizer's files and what a Trainer
leaves beside them. Sizes are as priced (``costs/held.py``); within 10% of real ones, measured.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from thrifty.checkpoints import KEPT, committed
from thrifty.core import quantities
from thrifty.core.plan import Plan, Training
from thrifty.core.plan_pilot import Pilot
from thrifty.core.resolve import resolve
from thrifty.costs.adapted import FORMS
from thrifty.costs.held import checkpoint_bytes
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ITEMSIZE, ModelShape
from thrifty.costs.trained import trained
from thrifty.data.store import Store
from thrifty.disk_fault import DiskFault, free_bytes, prune, size_of, told

_TRAINER_BYTES = 40 * 1024
"""Of a checkpoint's random states, arguments, history and manifest."""
_TENSOR_BYTES = 1024
"""Of a trained tensor, what PyTorch and safetensors write around it and its states."""
_TOKENIZER_FILES = ("token*", "vocab*", "merges*", "special*", "added*", "*.model", "*.jinja")
_SHARD_BYTES = 4096
_ID_BYTES, _SCORE_BYTES, _VECTOR_ITEM_BYTES = 8, 4, 2
_LOSS_BYTES = 16
"""Of a row of the test: its loss and how many tokens it is of."""


@contextmanager
def room(folder: Path, what: str, needs: Callable[[], tuple[float, str]]) -> Iterator[None]:
    """For what writes to ``folder``: refused where its disk has none, and a fault of the disk in
    the midst is told as one. ``needs``: bytes, and in words what they are."""
    with told(folder, what, needs):
        require(folder, *needs())
        yield


def require(folder: Path, needs: float, what: str) -> None:
    """Raise DiskFault where ``folder``'s disk has less than ``needs`` bytes free, though what an
    earlier process left half written has been deleted."""
    if needs <= free_bytes(folder):
        return
    prune(folder)
    free, show = free_bytes(folder), quantities.format_bytes
    if needs <= free:
        return
    raise DiskFault(
        errno.ENOSPC,
        f"{what}, and the disk of {folder} has {show(free)} free\n"
        f"hint: make {show(needs - free)} of room there; the same command then goes on",
    )


def training_needs(
    training: Training,
    shape: ModelShape,
    setting: MemorySetting,
    base: Path,
    checkpoints: Path,
    others: Sequence[MemorySetting] = (),
) -> tuple[float, str]:
    """Bytes beside the checkpoints that are there already, and what they are in words. ``others``:
    how else a step may come to be held, where something else is trained then."""
    found = committed(checkpoints)
    each = max(checkpoint_size(shape, way, base) for way in (setting, *others))
    model = max(model_size(shape, way, base) for way in (setting, *others))
    show = quantities.format_bytes
    if found and found[-1].manifest.get("over"):
        return model, f"the model takes {show(model)} on the disk"
    saves = 1 + training.max_steps // min(training.save_steps, training.eval_steps)
    kept = min(saves, KEPT + 1)  # with the best one
    at_once = min(saves, KEPT + 2)
    # The model is a copy of a checkpoint's, made once the last one is written.
    whole = max(at_once * each, kept * each + model)
    beside = ""
    if others:  # the weights that the last adapter was on, and those of going over again
        twice = 2 * model_size(shape, replace(setting, adapter=None), base)
        whole, beside = whole + twice, f", {show(twice)} of whole weights on the way"
    needs = max(whole - sum(size_of(each.path) for each in found), 0.0)
    return (
        needs,
        f"training takes {show(needs)} more on the disk: {at_once} checkpoints of {show(each)} at "
        f"a time{beside}, then the model of {show(model)}",
    )


def checkpoint_size(shape: ModelShape, setting: MemorySetting, base: Path) -> float:
    """Bytes of a checkpoint's folder."""
    found = trained(shape, setting)
    tensors = sum(sum(each.values()) for each in (found.matrices, found.embeddings, found.heads))
    beside = float(_TRAINER_BYTES + _TENSOR_BYTES * tensors + _tokenizer_bytes(base))
    beside += _adapter_bytes(shape, setting, frozen=True)
    if setting.adapter is not None and setting.adapter.start == "pissa":
        # As stock libraries load it, an adapter of twice its rank.
        beside += 2 * _adapter_bytes(shape, setting)
    return checkpoint_bytes(shape, setting) + beside


def model_size(shape: ModelShape, setting: MemorySetting, base: Path) -> float:
    """Bytes of the folder that a run leaves: all weights, or an adapter."""
    adapter = setting.adapter
    if adapter is None or adapter.merged:
        within = adapter.num_parameters(shape) if adapter else 0
        weights = float((shape.num_parameters + within) * setting.itemsize)
    else:
        weights = _adapter_bytes(shape, setting) + _adapter_bytes(shape, setting, frozen=True)
    return weights + _tokenizer_bytes(base)


def _adapter_bytes(shape: ModelShape, setting: MemorySetting, *, frozen: bool = False) -> float:
    """Of an adapter what is trained, or what is not and is saved with it."""
    adapter = setting.adapter
    if adapter is None:
        return 0.0
    form, elements = FORMS[adapter.form], 0
    for linear in adapter.linears(shape):
        if frozen:
            elements += form.frozen(linear, adapter.rank)
        else:
            elements += form.num_trained(shape, linear, adapter.rank)
    return float(elements * ITEMSIZE[setting.adapter_dtype])


def _tokenizer_bytes(base: Path) -> int:
    files = {file for pattern in _TOKENIZER_FILES for file in base.glob(pattern)}
    return sum(size_of(file) for file in files)


def selection_needs(plan: Plan, pool: Store, shape: ModelShape, scores: Path) -> tuple[float, str]:
    """Bytes beside what an earlier process left of scores and vectors, and what they are in
    words."""
    needs = max(_selection_bytes(plan, pool, shape) - size_of(scores), 0.0)
    told = f"selecting takes {quantities.format_bytes(needs)} on the disk, scores of {len(pool):,}"
    return needs, f"{told} rows{' and a vector of each' if _looks(plan) else ''} among it"


def _selection_bytes(plan: Plan, pool: Store, shape: ModelShape, sample: float = 1.0) -> float:
    """Where that share of the pool's rows is scored. The rows that are chosen lie in two forms, at
    least as large as the pool's compressed ones."""
    rows, shards = sample * len(pool), math.ceil(sample * pool.num_shards)
    scorer = resolve("scorer", plan.selection.scorer)
    targets = max(len(plan.targets), 1) if scorer.needs_target else 1
    needs = rows * (_ID_BYTES + _SCORE_BYTES * targets) + shards * _SHARD_BYTES
    if _looks(plan):
        needs += rows * shape.hidden_size * _VECTOR_ITEM_BYTES
    share = min(1.0, (plan.selection.max_tokens or math.inf) / max(pool.manifest.num_tokens, 1))
    return needs + 2 * share * size_of(pool.directory)


def _looks(plan: Plan) -> bool:
    """Whether a method of the selection looks at vectors."""
    filters = [resolve("filter", spec) for spec in plan.selection.filters]
    picker = resolve("picker", plan.selection.picker)
    return picker.needs_vectors or any(each.needs_vectors for each in filters)


def pilot_needs(
    pilot: Pilot,
    plans: Mapping[str, Plan],
    pool: Store,
    shape: ModelShape,
    setting: MemorySetting,
    base: Path,
    folder: Path,
) -> tuple[float, str]:
    """Bytes beside what lies in the pilot's ``folder``, and what they are in words. ``plans``: of
    each candidate by name."""
    each, show = checkpoint_size(shape, setting, base), quantities.format_bytes
    left = [rung.candidates for rung in pilot.rungs[1:]] + [0]
    ended = [rung.candidates - after for rung, after in zip(pilot.rungs, left, strict=True)]
    # A candidate saves at the end of each of its rungs, before which the one before is needed.
    number = sum(count * min(rungs, KEPT + 1) for rungs, count in enumerate(ended, 1))
    number += len(ended) > KEPT + 1
    needs = number * each + pilot.sample * size_of(pool.directory)
    for candidate in pilot.candidates:
        scored = 1.0 if candidate.whole_pool else pilot.sample
        needs += _selection_bytes(plans[candidate.name], pool, shape, scored)
    needs = max(needs - size_of(folder), 0.0)
    return (
        needs,
        f"a pilot takes {show(needs)} more on the disk: {number} checkpoints of {show(each)}, and "
        f"what {len(plans)} candidates choose",
    )


def testing_needs(rows: int) -> tuple[float, str]:
    """Bytes, and what they are in words."""
    needs = float(rows * _LOSS_BYTES + _SHARD_BYTES)
    return needs, f"testing takes {quantities.format_bytes(needs)} on the disk"
