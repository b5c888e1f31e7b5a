"""Training under a plan: a Hugging Face ``Trainer`` that cannot pass its budget or lose its work.

What the stock Trainer does not do, and this one does: count every FLOP in a ledger and stop before
a limit, cooling down first; evaluate the run's objective with error bars; commit checkpoints by a
manifest and resume from the newest whole one, weights and data order exact; refuse a changed base
model; stop on gradients that are not finite; shrug off a reporter that raises.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from thrifty import checkpoints
from thrifty.budget_callback import BudgetCallback, NonFiniteGradient
from thrifty.core.budget import Cost
from thrifty.core.contracts import Rows, StoppingRule
from thrifty.core.durable import rename_durably
from thrifty.core.ledger import BudgetExceeded, Stage
from thrifty.core.plan import Objective, Training
from thrifty.costs.shape import ModelShape
from thrifty.data.packed_attention import check_isolation, pack_attention_kwargs
from thrifty.evaluation import Measured, measure
from thrifty.governor import Governor
from thrifty.schedule import WarmupStableDecay
from thrifty.signals.models import load_model
from thrifty.signals.peak_memory import memory_bytes, release_free_memory

ACTIVITY_MARGIN = 1.5
"""Reserved for an evaluation or a checkpoint over what the last one took."""
_KEPT_CHECKPOINTS = 2
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md")
_NOT_MODEL = ("trainer_state.json", checkpoints.MANIFEST)
_NOTE = "thrifty.json"
"""Beside a published model: what it was trained under, and the step it is of."""


class Interrupted(RuntimeError):
    """A signal ended training after a finished step; the run can be resumed."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """Everything that one training run needs, resolved."""

    training: Training
    base: Path
    base_sha256: str
    tokenizer: Any
    data: Any
    """Map-style dataset of packed sequences, in the order they are trained on."""
    dev: Mapping[str, Rows]
    weights: Mapping[str, float]
    rule: StoppingRule
    objective: Objective
    predicted_step: Cost
    predicted_evaluation: Cost
    predicted_checkpoint: Cost
    predicted_load: Cost
    mark: str
    """A hash of all that decides the weights: the settings, the rows, the base model."""
    reserved: Cost
    """What must be left when training ends, for the test."""
    checkpoints: Path
    model: Path
    """Where the best evaluated model is left."""
    device: str
    say: Any
    """Takes a line for the user."""


def train(job: TrainingJob, stage: Stage) -> None:
    """Train, or go on from the newest whole checkpoint; leave the best evaluated model in
    ``job.model``.

    Raises Interrupted after a signal, BudgetExceeded where not one step fits, NonFiniteGradient.
    """
    newest, torn = checkpoints.newest_whole(job.checkpoints)
    for note in torn:
        job.say(f"set aside a checkpoint that is not whole: {note}")
    if newest is not None and newest.manifest.get("base_sha256") != job.base_sha256:
        raise ValueError(
            f"{newest.path} was trained from another base model than {job.base}\n"
            f"hint: its hash was {newest.manifest.get('base_sha256')}, it is now {job.base_sha256}"
        )
    if newest is not None and newest.manifest.get("settings") != job.mark:
        raise ValueError(
            f"the checkpoints in {job.checkpoints} were trained under other settings, or on other "
            "rows, than plan.yaml now has\n"
            f"hint: delete {job.checkpoints} to train anew, or undo the edit; of what decides the "
            "weights training.learning_rate alone may change on the way"
        )
    if newest is None or not newest.manifest.get("over"):
        _go_on(job, stage, newest)
    _keep_the_best(job, stage)


def _go_on(job: TrainingJob, stage: Stage, newest: checkpoints.Checkpoint | None) -> None:
    """Train from ``newest`` to the end of the run."""
    # Without a checkpoint nothing is kept, what was measured at step 0 neither.
    step = newest.step if newest else -1
    goes_on = f"training goes on from step {step}" if newest else "training starts over"
    lost = stage.roll_back(step, goes_on)
    if newest is not None:
        job.say(f"resuming from step {step}")
    if lost.flops:
        job.say(f"lost with the interruption, and charged: {lost}")
    with stage.spending("load", job.predicted_load, step=max(step, 0)):
        release_free_memory()
        trainer = _build(job, stage, newest)
        stage.detail["level_bytes"] = memory_bytes(job.device)  # training's rise is above it
    try:
        with _signals(trainer.pause):
            trainer.train(resume_from_checkpoint=str(newest.path) if newest else None)
    except BudgetExceeded as refusal:
        if checkpoints.best(job.checkpoints) is None:
            raise
        # Lost work used up what the rest of the run needed: end here, with what there is.
        stage.decide("train on or stop", "stop now", str(refusal).partition("\n")[0], step=step)
    finally:
        trainer.budget.close()
    if trainer.pause.asked and not trainer.over:
        raise Interrupted(
            f"stopped after step {trainer.state.global_step}, which is saved\n"
            "hint: the same command goes on from there"
        )


def _keep_the_best(job: TrainingJob, stage: Stage) -> None:
    """Leave the model with the lowest dev loss in ``job.model``: a checkpoint's, or the base."""
    best = checkpoints.best(job.checkpoints)
    assert best is not None, "training ends with an evaluated checkpoint"
    last = checkpoints.committed(job.checkpoints)[-1]
    assert best.dev_loss is not None
    before = [e for e in stage.ledger.evaluations(account=stage.account) if e["step"] == 0]
    folder, step, loss = best.path, best.step, best.dev_loss
    if before and before[-1]["objective"] < best.dev_loss:
        folder, step, loss = job.base, 0, before[-1]["objective"]
    if step != last.step:
        ended = "not evaluated" if last.dev_loss is None else f"{last.dev_loss:.4f}"
        reason = f"dev loss {loss:.4f} at step {step}, {ended} at step {last.step}"
        chosen = f"step {step}" if step else "the base model, which no step improved"
        stage.decide("which model to keep", chosen, reason, step=last.step)
    stage.detail.update(steps=last.step, best_step=step)
    _publish(folder, job.model, {"settings": job.mark, "step": step})


def is_done(model: Path, mark: str) -> bool:
    """Whether ``model`` holds a model trained under the settings of ``mark``.

    Raises ValueError where it holds one trained under others.
    """
    note = model / _NOTE
    if not note.is_file():
        return False
    if json.loads(note.read_text(encoding="utf-8"))["settings"] != mark:
        raise ValueError(
            f"{model} was trained under other settings, or on other rows, than plan.yaml now has\n"
            f"hint: delete {model} and the checkpoints beside it to train anew, or undo the edit"
        )
    return True


def check_reporters(names: tuple[str, ...]) -> None:
    """Raise ValueError for a reporter that is unknown or not installed, before anything is spent.

    ``all`` and ``none`` are the Trainer's own words.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name in ("all", "none"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(
                f"training.report_to names {name!r}, which is no reporter\nhint: one of {known}"
            )
        if name not in get_available_reporting_integrations():
            raise ValueError(
                f"training.report_to names {name}, which is not installed\n"
                f"hint: pip install {name}, or take it out of training.report_to"
            )


def _publish(checkpoint: Path, folder: Path, note: Mapping[str, Any]) -> None:
    """Copy the model's own files, so that transformers or PEFT load the folder as it is."""
    draft = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for pattern in _MODEL_FILES:
        for file in checkpoint.glob(pattern):
            if file.name not in _NOT_MODEL:
                shutil.copy2(file, draft / file.name)
    (draft / _NOTE).write_text(json.dumps(note), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    rename_durably(draft, folder)


def _build(
    job: TrainingJob, stage: Stage, newest: checkpoints.Checkpoint | None
) -> BudgetedTrainer:
    training = job.training
    schedule = WarmupStableDecay(
        max_steps=training.max_steps,
        warmup_steps=training.warmup_steps,
        cooldown_steps=training.cooldown_steps,
    )
    arguments = TrainingArguments(
        output_dir=str(job.checkpoints),
        max_steps=training.max_steps,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch_fused",
        activation_checkpointing=training.activation_checkpointing,
        eval_strategy="steps",
        eval_steps=training.eval_steps,
        eval_on_start=newest is None,
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=None,  # retention is ours, by step: theirs goes by file times
        logging_steps=max(1, training.eval_steps // 4),
        logging_nan_inf_filter=False,  # a loss that is not finite is not to be averaged away
        train_sampling_strategy="sequential",  # the data's own order, the same after a resume
        report_to=list(training.report_to) or "none",
        restore_callback_states_from_checkpoint=False,  # the ledger has them
        disable_tqdm=True,
        dataloader_pin_memory=job.device != "cpu",
        use_cpu=job.device == "cpu",
        seed=training.seed,
        data_seed=training.seed,
    )
    return BudgetedTrainer(job, stage, schedule, newest, arguments)


def build_model(training: Training, base: Path, device: str) -> Any:
    """The base model as the plan trains it: all weights, or LoRA adapters on frozen ones."""
    model = load_model(base, training.dtype, device)
    if training.method == "full":
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=training.lora.rank,
        lora_alpha=training.lora.alpha,
        target_modules=list(training.lora.targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(
            f"no adapter can be put on {', '.join(training.lora.targets)}: {error}\n"
            "hint: training.lora.targets must name linear layers of the model"
        ) from None


class BudgetedTrainer(Trainer):
    """The one Trainer of this project. Its own: the objective, the schedule, committed saves."""

    control: TrainerControl
    lr_scheduler: Any

    def __init__(
        self,
        job: TrainingJob,
        stage: Stage,
        schedule: WarmupStableDecay,
        newest: checkpoints.Checkpoint | None,
        arguments: TrainingArguments,
    ) -> None:
        self.job = job
        self._stage = stage
        self._schedule = schedule
        self._seconds = {"evaluate": 0.0, "checkpoint": 0.0}
        self._measured: Measured | None = None
        if newest is not None and (newest.path / "dev_losses.npz").is_file():
            self._measured = Measured.load(newest.path / "dev_losses.npz", job.weights)
        self.governor = Governor(
            job.rule,
            schedule,
            stage,
            objective=job.objective,
            step_cost=lambda: self.budget.step_cost(job.predicted_step),
            evaluation_cost=lambda: self._cost_of("evaluate", job.predicted_evaluation),
            checkpoint_cost=lambda: self._cost_of("checkpoint", job.predicted_checkpoint),
            reserved=self._reserved,
            eval_steps=job.training.eval_steps,
        )
        self.budget = BudgetCallback(
            stage=stage,
            governor=self.governor,
            predicted_step=job.predicted_step,
        )
        self.pause = PauseCallback()
        super().__init__(
            model=build_model(job.training, job.base, job.device),
            args=arguments,
            train_dataset=job.data,
            eval_dataset=job.data,  # asked for by the Trainer; ``evaluate`` measures the dev rows
            data_collator=default_data_collator,
            processing_class=job.tokenizer,
            callbacks=[self.budget, self.pause],
        )
        self.remove_callback(_printer())
        self._shape = ModelShape.from_config(self._inner().config.to_dict())
        check_isolation(self._inner())
        handler = self.callback_handler
        ours = (BudgetCallback, PauseCallback)
        handler.callbacks = [
            c
            if isinstance(c, ours) or type(c).__module__ == "transformers.trainer_callback"
            else Fenced(c, job.say)
            for c in handler.callbacks
        ]

    @property
    def over(self) -> bool:
        """Whether the run came to its end, rather than being interrupted."""
        return self.governor.is_over(self.state.global_step)

    def _inner(self) -> Any:
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _cost_of(self, activity: str, predicted: Cost) -> Cost:
        """Upper bound of an evaluation or a checkpoint: as it last was, with a margin."""
        seconds = self._seconds[activity] or predicted.seconds
        cost = replace(predicted, seconds=seconds * ACTIVITY_MARGIN)
        return self._stage.ledger.rates.of(cost)

    def _reserved(self) -> Cost:
        """What the test will take, at the speed that evaluations here turned out to have."""
        predicted, measured = self.job.predicted_evaluation.seconds, self._seconds["evaluate"]
        slower = measured / predicted if predicted else 1.0
        seconds = self.job.reserved.seconds * max(slower, 1.0) * ACTIVITY_MARGIN
        return self._stage.ledger.rates.of(replace(self.job.reserved, seconds=seconds))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As saved, but at the learning rate that the plan has now."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.optimizer is None:
            return
        rate = self.job.training.learning_rate
        self.lr_scheduler.base_lrs = [rate] * len(self.optimizer.param_groups)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = rate
            group["lr"] = rate * self._schedule(self.lr_scheduler.last_epoch)

    def _clip_grad_norm(self, model: Any) -> Any:
        """As ever; a norm that overflowed would be clipped to a silent zero."""
        norm = super()._clip_grad_norm(model)
        if not bool(torch.isfinite(torch.as_tensor(norm))):
            raise NonFiniteGradient.at(self.state.global_step + 1)
        return norm

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        from torch.optim.lr_scheduler import LambdaLR

        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(getattr(optimizer, "optimizer", optimizer), self._schedule)
            self._created_lr_scheduler = True
            self.governor.scheduler = self.lr_scheduler
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As ever, with what keeps the packed documents apart."""
        apart = pack_attention_kwargs(
            self._shape.model_type,
            inputs["position_ids"],
            attn_implementation=self._inner().config._attn_implementation or "eager",
            dtype=self._inner().dtype,
        )
        return super().compute_loss(model, {**inputs, **apart}, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The objective on the dev rows, charged, journalled, and put to the governor."""
        step = self.state.global_step
        upper = self._cost_of("evaluate", self.job.predicted_evaluation)
        with self.budget.activity("evaluate", upper, step=step) as lease:
            found = measure(
                self.model,
                self._shape,
                self.job.dev,
                self.job.weights,
                lease,
                self.job.training.micro_batch_tokens,
            )
            self._seconds["evaluate"] = lease.used.seconds
        stderr = found.stderr(self._measured)
        self._measured = found
        spent = self._stage.spent()
        self._stage.evaluate(step, spent.flops, found.objective, stderr, found.losses())
        self.job.say(self._line(step, found, stderr))
        if step > 0:
            # The best evaluated model is kept, so it must be saved: no later step brings it back.
            earlier = [e.loss for e in self.governor.history() if 0 < e.step < step]
            if not earlier or found.objective < min(earlier):
                self.control.should_save = True
            self.governor.weigh(step)
            if self.governor.is_over(step):
                self.control.should_training_stop = True
                self.control.should_save = True
        metrics = {"eval_loss": found.objective, "eval_loss_stderr": stderr}
        metrics |= {f"eval_{name}_loss": loss for name, loss in found.losses().items()}
        metrics |= {"spent_flops": spent.flops, "spent_seconds": spent.seconds}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _line(self, step: int, found: Measured, stderr: float) -> str:
        spent = self._stage.spent()
        shares = [
            f"{100 * (spent.of(name) or 0.0) / limit:.0f}% of {name}"
            for name in self._stage.budget.limited
            if (limit := self._stage.budget.limit(name))
        ]
        line = f"step {step:>5}  dev loss {found.objective:.4f} ± {stderr:.4f}"
        return f"{line}  spent {', '.join(shares)}" if shares else line

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as the Trainer does, then commit; an uncommitted folder does not count."""
        step = self.state.global_step
        folder = self.job.checkpoints / f"checkpoint-{step}"
        if folder.exists():
            # Left by a run that was rolled back past it; a manifest over mixed files would lie.
            shutil.rmtree(folder)
        upper = self._cost_of("checkpoint", self.job.predicted_checkpoint)
        with self.budget.activity("checkpoint", upper, step=step) as lease:
            super()._save_checkpoint(model, trial)
            details = {
                "step": step,
                "base_sha256": self.job.base_sha256,
                "settings": self.job.mark,
                "over": self.over,
                "dev_loss": None,
            }
            if self._measured is not None:
                self._measured.save(folder / "dev_losses.npz")
                history = self.governor.history()
                if history and history[-1].step == step:
                    details["dev_loss"] = self._measured.objective
            checkpoints.commit(folder, details)
            checkpoints.retain(self.job.checkpoints, newest=_KEPT_CHECKPOINTS)
            self._seconds["checkpoint"] = lease.used.seconds


def _printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


class Fenced(TrainerCallback):
    """A reporter inside a fence: what it raises is said once, and training goes on."""

    def __init__(self, inner: TrainerCallback, say: Any) -> None:
        self._inner = inner
        self._say = say
        self._failed = False

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        inner, say = super().__getattribute__("_inner"), super().__getattribute__("_say")

        def event(*args: Any, **kwargs: Any) -> Any:
            try:
                return getattr(inner, name)(*args, **kwargs)
            except Exception as error:  # whatever a reporter raises, the run is worth more
                if not self._failed:
                    self._failed = True
                    say(f"reporting degraded: {type(inner).__name__} raised {error!r}")
                return None

        return event


class PauseCallback(TrainerCallback):
    """Ends training after the present step, saved, when a signal asked for it."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.asked and not control.should_training_stop:
            control.should_save = True
            control.should_training_stop = True


@contextmanager
def _signals(pause: PauseCallback) -> Iterator[None]:
    """SIGINT and SIGTERM finish the step and save; a second SIGINT leaves at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals cannot be handled elsewhere; the caller's own handling stands
        return

    def ask(number: int, frame: Any) -> None:
        if pause.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        pause.asked = True
        print("finishing the step, then saving ...", file=sys.stderr, flush=True)

    names = [signal.SIGINT, signal.SIGTERM]
    before = {name: signal.signal(name, ask) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
