"""Going over to training something else in the midst of a run: an adapter, then blocks of all
weights, and back.

    a checkpoint of what was trained  ->  whole weights, an adapter merged: checkpoints/base-STEP
                                      ->  what is trained from here on begins on those

The function of the model stays as it was: what was trained is merged (``holding/merging.py``), and
an adapter that is new adds nothing. The optimizer's states begin anew, so that the learning rate
rises again over the plan's warm-up, as where ReLoRA (arXiv:2307.05695) resets them; the schedule
goes on.

The weights are made of a committed checkpoint, by nothing else: after a kill they are made again.
A checkpoint says in which phase it was left, and an adapter's on which weights it is, with their
hash. These are kept as long as a checkpoint needs them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thrifty.checkpoints import MANIFEST, Checkpoint, committed
from thrifty.core import sums
from thrifty.core.budget import Cost
from thrifty.core.ledger import Stage
from thrifty.core.resolve import Spec
from thrifty.costs.memory import weight_bytes
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape, read_shape
from thrifty.holding.merging import write_merged
from thrifty.memory_plan import Techniques
from thrifty.memory_switch import held_as
from thrifty.predictions import DISK_BYTES_PER_SECOND
from thrifty.publication import is_of, publish
from thrifty.signals.model_folder import ADAPTER
from thrifty.signals.models import weights_sha256
from thrifty.signals.peak_memory import release_free_memory

if TYPE_CHECKING:
    from thrifty.training_job import TrainingJob

_PREFIX = "base-"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of a run in which one thing is trained."""

    trained: Spec | None = None
    """None: nothing else may be, and no checkpoint tells."""
    since: int = 0
    """The step at which it began."""
    base: str = ""
    """The folder, beside the checkpoints, of the weights that it begins on; empty: the run's own
    base model, or a checkpoint's."""
    base_sha256: str = ""

    def begins_with(self, newest: Checkpoint | None) -> bool:
        """Whether ``newest`` is of the phase before, and its states are another's."""
        return newest is not None and newest.step == self.since

    def facts(self, setting: MemorySetting) -> dict[str, Any]:
        """What a checkpoint keeps of it, which has all weights itself where no adapter is
        trained."""
        kept = self if setting.adapter is not None else replace(self, base="", base_sha256="")
        return asdict(kept)


def as_left(job: TrainingJob, stage: Stage, newest: Checkpoint | None) -> TrainingJob:
    """``job`` as it goes on from ``newest``: held as that says, on the weights that it needs, which
    are made of it where something else is trained from it on.

    Raises ValueError where the weights that its adapter is on are not those any more,
    BudgetExceeded where making them does not fit what is left.
    """
    if newest is None or job.switch is None or "held" not in newest.manifest:
        return job
    job.switch.recall(newest.manifest.get("measured", {}))
    job = job.held_as(job.switch.holding_of(held_as(job.training, newest.manifest["held"])))
    if "phase" not in newest.manifest:
        return job
    was, trained = Phase(**newest.manifest["phase"]), job.training.memory.trained
    if was.base:
        _check(job.checkpoints / was.base, was.base_sha256, newest)
    if trained == was.trained:
        return replace(job, phase=was)
    whole = _whole(job, stage, newest, was)
    phase = Phase(
        trained=trained,
        since=newest.step,
        base=whole.name,
        base_sha256=weights_sha256(whole),
    )
    return replace(job, phase=phase)


def _check(folder: Path, sha256: str, newest: Checkpoint) -> None:
    found = weights_sha256(folder)[:12] if any(folder.glob("*.safetensors")) else "of nothing"
    if found != sha256[:12]:
        raise ValueError(
            f"{newest.path} holds an adapter on other weights than {folder} has: their hash was "
            f"{sha256[:12]}, it is now {found}\n"
            f"hint: put that folder back, or delete {folder.parent} to train anew"
        )


def _whole(job: TrainingJob, stage: Stage, newest: Checkpoint, was: Phase) -> Path:
    """The folder of the weights that ``newest``, which was left in the phase ``was``, comes to."""
    folder = job.checkpoints / f"{_PREFIX}{newest.step}"
    mark = sums.sha256_of(newest.path / MANIFEST)
    if is_of(folder, mark):
        return folder
    job.say(f"  whole weights of step {newest.step} ...")
    release_free_memory()
    predicted = _predicted(job, was)
    with stage.spending("switch", stage.ledger.rates.of(predicted), step=newest.step) as lease:
        lease.tick(Cost(flops=predicted.flops))
        publish(newest.path, folder, mark=mark, step=newest.step, make=_merging(job, was))
    return folder


def publish_merged(job: TrainingJob, stage: Stage, best: Checkpoint, phase: Phase) -> None:
    """Leave the run's model with whole weights, where it is an adapter on weights of the run's
    own. What that takes was reserved."""
    with stage.spending("merge", Cost(), step=best.step) as lease:
        publish(best.path, job.model, mark=job.mark, step=best.step, make=_merging(job, phase))
        lease.count(Cost(flops=_predicted(job, phase).flops))


def _merging(job: TrainingJob, phase: Phase) -> Callable[[Path, Path], bool]:
    """Merges an adapter, where one was trained in ``phase``."""
    base = job.checkpoints / phase.base if phase.base else job.base
    load = Techniques.of(job.training.memory).weights.load

    def merge(checkpoint: Path, folder: Path) -> bool:
        if found := (checkpoint / ADAPTER).is_file():
            write_merged(load, base, checkpoint, folder)
        return found

    return merge


def _predicted(job: TrainingJob, phase: Phase) -> Cost:
    """Of making whole weights of a checkpoint of ``phase``."""
    assert phase.trained is not None
    memory = replace(job.training.memory, trained=phase.trained)
    adapter = Techniques.of(memory).trained.rewrite(MemorySetting()).adapter
    setting = replace(job.setting, adapter=adapter, blocks=None)
    return turning_cost(read_shape(job.base), setting, job.predicted_load)


def turning_cost(shape: ModelShape, setting: MemorySetting, load: Cost) -> Cost:
    """Of making whole weights of a checkpoint that was trained as ``setting`` says: reading them,
    merging an adapter, writing and hashing them."""
    seconds = 2 * weight_bytes(shape, setting) / DISK_BYTES_PER_SECOND
    if setting.adapter is None:
        return Cost(seconds=seconds)
    linears = setting.adapter.linears(shape)
    flops = sum((2 * setting.adapter.rank + 2) * n.in_features * n.out_features for n in linears)
    return Cost(flops=float(flops), seconds=seconds + load.seconds)


def retain(checkpoints: Path) -> None:
    """Delete the weights that no committed checkpoint's adapter is on."""
    needed = {c.manifest.get("phase", {}).get("base") for c in committed(checkpoints)}
    for folder in (*checkpoints.glob(f"{_PREFIX}*"), *checkpoints.glob(f".{_PREFIX}*")):
        if folder.name not in needed:
            shutil.rmtree(folder)
