"""Training under a plan, as a stage: from the newest whole checkpoint to the best evaluated model.

What the stock Trainer does not do, and this one does: count every FLOP in a ledger and stop before
a limit, cooling down first; evaluate the run's objective with error bars; commit checkpoints by a
manifest and resume from the newest whole one, weights and data order exact; refuse a changed base
model; stop on gradients that are not finite; shrug off a reporter that raises.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from thrifty import checkpoints, ranks
from thrifty.core.budget import Budget
from thrifty.core.ledger import BudgetExceeded, Ledger, Stage
from thrifty.divergence import NonFiniteGradient
from thrifty.in_pieces import ran_out
from thrifty.interruption import Interrupted, signals_asking
from thrifty.memory_plan import Techniques, dtype_of, trained_name
from thrifty.publication import is_done, publish
from thrifty.rewinding import NOT_FINITE, rewind, skipped_steps
from thrifty.signals.peak_memory import memory_bytes, release_free_memory
from thrifty.trainer import BudgetedTrainer
from thrifty.training_job import TrainingJob
from thrifty.training_phase import Phase, as_left, publish_merged

__all__ = ["Interrupted", "TrainingJob", "is_done", "train"]


def train(job: TrainingJob, stage: Stage) -> None:
    """Train, or go on from the newest whole checkpoint; leave the best evaluated model in
    ``job.model``, unless it is to pause on the way.

    Raises Interrupted after a signal, BudgetExceeded where not one step fits, NonFiniteGradient and
    Diverged after more than ``training.rewinds``, OutOfMemory where no smaller pass fits either.
    """
    newest, torn = checkpoints.newest_whole(job.checkpoints)
    for note in torn:
        job.say(f"set aside a checkpoint that is not whole: {note}")
    if newest is not None and newest.manifest.get("base_sha256") != job.base_sha256:
        raise ValueError(
            f"{newest.path} was trained from another base model than {job.base}\n"
            f"hint: its hash was {newest.manifest.get('base_sha256')}, it is now {job.base_sha256}"
        )
    if newest is not None and "last_charge" in newest.manifest:
        stage.ledger.require_charge(newest.manifest["last_charge"], str(newest.path))
    if newest is not None and newest.manifest.get("settings") != job.mark:
        raise ValueError(
            f"the checkpoints in {job.checkpoints} were trained under other settings, or on other "
            "rows, than plan.yaml now has\n"
            f"hint: delete {job.checkpoints} to train anew, or undo the edit; of what decides the "
            "weights training.learning_rate alone may change on the way, and training.devices if "
            "gradient_accumulation_steps makes up for it"
        )
    there = newest is not None and (newest.manifest.get("over") or newest.step == job.pause_at)
    while not there:
        there = _go_on(replace(job, skipped=skipped_steps(stage)), stage, newest)
        newest = checkpoints.newest_whole(job.checkpoints)[0]
    if job.pause_at is None:
        _keep_the_best(job, stage)


def _go_on(job: TrainingJob, stage: Stage, newest: checkpoints.Checkpoint | None) -> bool:
    """Train from ``newest``, held as that says, and say whether the run came to its end; or else it
    goes on from the checkpoint that was left, otherwise."""
    # Without a checkpoint nothing is kept, what was measured at step 0 neither.
    step = newest.step if newest else -1
    goes_on = f"training goes on from step {step}" if newest else "training starts over"
    lost = stage.roll_back(step, goes_on)
    if newest is not None:
        job.say(f"resuming from step {step}")
    elif lost.flops:
        job.say("no whole checkpoint is left: training starts over from the base model")
    if lost.flops:
        job.say(f"lost with the interruption, and charged: {lost}")
    try:
        job = as_left(job, stage, newest)
    except BudgetExceeded as refusal:
        _end_here(job, stage, refusal, step)
        return True
    job.say("  loading the model ...")
    ranks.tell(SameTraining(replace(job, say=_unsaid, refresher=None), newest))
    with stage.spending("load", job.predicted_load, step=max(step, 0)):
        release_free_memory()
        trainer = _trainer_of(job)(job, stage, newest)
        stage.detail["level_bytes"] = memory_bytes(job.device)  # training's rise is above it
    try:
        _take_steps(trainer, newest)
    except NOT_FINITE as error:
        saved, most = _last_step(job), job.training.rewinds
        if rewind(stage, error, trainer.state.global_step, saved, most):
            job.say(f"not finite: {str(error).partition(chr(10))[0]}")
            return False
        if isinstance(error, FloatingPointError):  # of an optimizer that is shown no gradient first
            raise NonFiniteGradient(str(error)) from error
        raise
    except BudgetExceeded as refusal:
        _end_here(job, stage, refusal, step)
    except Exception as error:
        if not ran_out(error):
            raise
        # Not where its passes are made, which begin anew by themselves: in an update, say.
        trainer.shrink(f"step {trainer.state.global_step + 1}", str(error), even_so=True)
        return False
    finally:
        trainer.close()
    if trainer.pause.asked and not trainer.over:
        raise Interrupted(
            f"stopped after step {trainer.state.global_step}, which is saved\n"
            "hint: the same command goes on from there"
        )
    return trainer.next_holding is None


def _end_here(job: TrainingJob, stage: Stage, refusal: BudgetExceeded, step: int) -> None:
    """Lost work used up what the rest of the run needed: end with what there is; raises ``refusal``
    where that is nothing."""
    if all(c.dev_loss is None for c in checkpoints.committed(job.checkpoints)):
        raise refusal
    stage.decide("train on or stop", "stop now", str(refusal).partition("\n")[0], step=step)


def _trainer_of(job: TrainingJob) -> type[BudgetedTrainer]:
    if job.training.preference is None:
        return BudgetedTrainer
    from thrifty.preference_trainer import PreferenceTrainer

    return PreferenceTrainer


def _last_step(job: TrainingJob) -> int:
    """Of the last checkpoint; 0 where there is none."""
    found = checkpoints.committed(job.checkpoints)
    return found[-1].step if found else 0


def _take_steps(trainer: BudgetedTrainer, newest: checkpoints.Checkpoint | None) -> None:
    with signals_asking(trainer.pause):
        trainer.train(resume_from_checkpoint=str(newest.path) if newest else None)


@dataclass(frozen=True)
class SameTraining:
    """What a rank that follows does of a training: all its steps, on books that nobody reads."""

    job: TrainingJob
    newest: checkpoints.Checkpoint | None

    def follow(self) -> None:
        method = trained_name(self.job.training.memory)
        with (
            TemporaryDirectory() as folder,
            Ledger.create(Path(folder) / "ledger.sqlite", Budget()) as ledger,
            ledger.stage("train", method) as stage,
        ):
            trainer = _trainer_of(self.job)(self.job, stage, self.newest)
            try:
                _take_steps(trainer, self.newest)
            except NOT_FINITE:
                pass  # as on rank 0, which says how to go on
            finally:
                trainer.close()


def _unsaid(line: str) -> None:
    """Rank 0 says it."""


def _keep_the_best(job: TrainingJob, stage: Stage) -> None:
    """Leave the model with the lowest dev loss that breaks no floor in ``job.model``: a
    checkpoint's, or the base."""
    best = checkpoints.best(job.checkpoints)
    last = checkpoints.committed(job.checkpoints)[-1]
    before = [e for e in stage.ledger.evaluations(account=stage.account) if e["step"] == 0]
    folder, step, loss = job.base, 0, before[-1]["objective"] if before else None
    chosen = "the base model, which no step improved"
    if best is None:
        assert last.manifest.get("broken"), "training ends with an evaluated checkpoint"
        chosen = "the base model, for every checkpoint breaks a floor"
        job.say(f"kept {chosen}: {'; '.join(last.manifest['broken'])}")
    elif loss is None or not loss < best.dev_loss:
        folder, step, loss, chosen = best.path, best.step, best.dev_loss, f"step {best.step}"
    if step != last.step:
        name, shown = job.objective.name, job.objective.shown
        ended = "not evaluated" if last.dev_loss is None else f"{shown(last.dev_loss):.4f}"
        measured = "not measured" if loss is None else f"{shown(loss):.4f}"
        reason = f"dev {name} {measured} at step {step}, {ended} at step {last.step}"
        if broken := last.manifest.get("broken"):
            reason += f", where {'; '.join(broken)}"
        stage.decide("which model to keep", chosen, reason, step=last.step)
    stage.detail.update(steps=last.step, best_step=step)
    release_free_memory()  # the model that was trained is needed no more
    phase = Phase(**best.manifest.get("phase", {})) if best is not None else Phase()
    if best is not None and folder == best.path and phase.base:
        job.say(
            f"the model's adapter is merged into the weights of step {phase.since}, in "
            f"{dtype_of(job.training.memory)}"
        )
        publish_merged(job, stage, best, phase)
        return
    trained = Techniques.of(job.training.memory).trained
    make = None if folder == job.base else partial(trained.publish, base=job.base)
    publish(folder, job.model, mark=job.mark, step=step, make=make)
