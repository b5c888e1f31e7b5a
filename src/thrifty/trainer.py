"""The one ``Trainer`` subclass of this project."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerControl,
    TrainingArguments,
    default_data_collator,
)

from thrifty import checkpoints, ranks
from thrifty.agreement import AgreeingCallback
from thrifty.budget_callback import BudgetCallback
from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter
from thrifty.core.ledger import Stage
from thrifty.costs.flops import forward_flops
from thrifty.costs.shape import read_shape
from thrifty.data.packed_attention import attention_of, check_isolation
from thrifty.divergence import NonFiniteGradient
from thrifty.evaluation import Measured
from thrifty.frontier_price import frontier_price
from thrifty.governor import Governor
from thrifty.grad_freeze import freezing
from thrifty.guarding import Guarding
from thrifty.interruption import PauseCallback
from thrifty.larger_batch import LargerBatch
from thrifty.memory_plan import Techniques
from thrifty.memory_switch import Holding
from thrifty.refreshing import Refreshing
from thrifty.reporters import Fenced, is_reporter
from thrifty.sampling_price import SamplingPrice
from thrifty.schedule import WarmupStableDecay
from thrifty.signals.models import ModelInTraining
from thrifty.step_choice import StepChoice
from thrifty.switching import Switching
from thrifty.training_arguments import arguments_of
from thrifty.training_job import TrainingJob
from thrifty.training_progress import TrainingProgress
from thrifty.turns import TurnCallback
from thrifty.vote_evaluation import votes_of
from thrifty.weighed_loss import weighed_loss
from thrifty.yardstick import in_nats

ACTIVITY_MARGIN = 1.5
"""Reserved for an evaluation or a checkpoint over what the last one took."""
_KEPT_CHECKPOINTS = 2


class BudgetedTrainer(Trainer):
    """The one Trainer of this project. Its own: the objective, the schedule, committed saves."""

    control: TrainerControl
    lr_scheduler: Any
    optimizer: Any

    def __init__(
        self, job: TrainingJob, stage: Stage, newest: checkpoints.Checkpoint | None
    ) -> None:
        self.job = job
        self._stage = stage
        self._techniques = Techniques.of(job.training.memory)
        self._schedule = WarmupStableDecay(
            max_steps=job.training.max_steps,
            warmup_steps=job.training.warmup_steps,
            cooldown_steps=job.training.cooldown_steps,
        )
        self.next_holding: Holding | None = None
        """How the steps are to be held from the last checkpoint on, by a trainer of their own."""
        self._seconds = {"evaluate": 0.0, "checkpoint": 0.0}
        self._measured: Measured | None = None
        if newest is not None and (newest.path / "dev_losses.npz").is_file():
            self._measured = Measured.load(newest.path / "dev_losses.npz", job.weights)
        self._guarding = Guarding(job, stage, resumed=newest is not None)
        if newest is not None and job.rounds.remembers:
            job.rounds.load(newest.path)
            if job.refresher is not None:
                job.data.restore(job.rounds.tokens, job.rounds.cuts)
                job.refresher.restore(job.rounds.legs)
        self.governor = Governor(
            job.rule,
            self._schedule,
            stage,
            objective=job.objective,
            step_cost=lambda: self.budget.step_cost(),
            evaluation_cost=lambda: self._cost_of("evaluate", job.predicted_evaluation),
            checkpoint_cost=lambda: self._cost_of("checkpoint", job.predicted_checkpoint),
            reserved=self._reserved,
            eval_steps=job.training.eval_steps,
        )
        self.governor.alternatives = frontier_price(job.objective, stage.budget)
        if (serving := job.objective.serving) is not None:
            self.governor.serving = SamplingPrice(
                serving, self.governor.evaluations, self._flops_for_answers
            )
        self.budget = BudgetCallback(
            stage=stage,
            governor=self.governor,
            predicted_step=job.predicted_step,
            setting=job.setting,
        )
        self._freeze = freezing(job.training.grad_freeze, stage, self.budget, newest)
        self._refreshing = Refreshing(job, stage, self.governor, self.budget, self._steps_left)
        self._switching = Switching(
            job,
            stage,
            self.governor,
            self.budget,
            self._steps_left,
            lambda: self._cost_of("checkpoint", job.predicted_checkpoint),
        )
        self.pause = PauseCallback(job.pause_at)
        self._ranks = AgreeingCallback(self._schedule)
        self.progress = TrainingProgress(job.say, self._steps_left)
        self._shape = read_shape(job.base)
        self._trained, seed = self._techniques.trained, job.training.seed
        turns = TurnCallback(self._trained, self._shape, job.setting, self.budget, seed)
        super().__init__(
            model=self._techniques.build(job.base, self._shape, job.device, seed),
            args=self._settings(arguments_of(job, resumed=newest is not None)),
            **self._batches(),
            processing_class=job.tokenizer,
            callbacks=[self.budget, turns, *self._freeze, self.pause, self._ranks],
        )
        self.remove_callback(PrinterCallback)
        if ranks.rank() == 0:
            self.add_callback(self.progress)
        self._check()
        job.rounds.renew = self._renew
        handler = self.callback_handler
        handler.callbacks = [Fenced(c, job.say) if is_reporter(c) else c for c in handler.callbacks]

    def _settings(self, arguments: dict[str, Any]) -> TrainingArguments:
        return TrainingArguments(**arguments)

    def _batches(self) -> dict[str, Any]:
        """What the Trainer is given to read."""
        data = self.job.data
        # The second is asked for by the Trainer; ``evaluate`` measures the dev rows.
        return {
            "train_dataset": data,
            "eval_dataset": data,
            "data_collator": default_data_collator,
        }

    def _check(self) -> None:
        """Raise ValueError where the model does not do for such batches."""
        check_isolation(self._inner())

    @property
    def over(self) -> bool:
        """Whether the run came to its end, rather than being interrupted."""
        return self.governor.is_over(self.state.global_step)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """As ever, but gradients lie in the buckets in which ranks add them up, not beside them."""
        found = super()._build_accelerator_args(**kwargs)
        for handler in found["kwargs_handlers"]:
            handler.gradient_as_bucket_view = True
        return found

    def _steps_left(self, step: int) -> float:
        """By the schedule or by the budget, whichever is less."""
        return min(self._schedule.end - step, self.budget.steps_left(step))

    def _inner(self) -> Any:
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _cost_of(self, activity: str, predicted: Cost) -> Cost:
        """Upper bound of an evaluation, say, or a checkpoint: as it last was, with a margin."""
        seconds = self._seconds.get(activity) or predicted.seconds
        cost = replace(predicted, seconds=seconds * ACTIVITY_MARGIN)
        return self._stage.ledger.rates.of(cost)

    def _reserved(self) -> Cost:
        """What the test will take, at the speed that evaluations here turned out to have."""
        predicted, measured = self.job.predicted_evaluation.seconds, self._seconds["evaluate"]
        slower = measured / predicted if predicted else 1.0
        seconds = self.job.reserved.seconds * max(slower, 1.0) * ACTIVITY_MARGIN
        return self._stage.ledger.rates.of(replace(self.job.reserved, seconds=seconds))

    def _flops_for_answers(self) -> float:
        """That training would leave, were it to cool down now: those set aside for one answer to
        each question, and what else is left."""
        return self.governor.flops_for_answers(self.state.global_step) + self.job.answering.flops

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As ever, but for a tied weight: a checkpoint holds it once, under its other name."""
        tied, missing = self._inner().all_tied_weights_keys, load_result.missing_keys
        lost = [key for key in missing if tied.get(key, key) in missing]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=lost))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As ever; an adapter's weights alone, where the Trainer would begin it anew first, which
        changes what some begin with."""
        model = self.model if model is None else model
        if not hasattr(model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        saved = load_file(Path(resume_from_checkpoint) / "adapter_model.safetensors")
        set_peft_model_state_dict(model, saved)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As saved, but at the learning rate that the plan has now."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.optimizer is None:
            return
        rate = self.job.training.learning_rate
        self.lr_scheduler.base_lrs = [rate] * len(self.optimizer.param_groups)
        for group in self.optimizer.param_groups:
            group["initial_lr"] = rate
            group["lr"] = rate * self._share_of_rate(self.lr_scheduler.last_epoch)

    def _share_of_rate(self, step: int) -> float:
        return self._schedule(self._trained.schedule_step(step, self._shape))

    def _clip_grad_norm(self, model: Any) -> Any:
        """As ever; a norm that overflowed would be clipped to a silent zero."""
        for freeze in self._freeze:
            freeze.watch(self.state.global_step + 1, self.state.max_steps, self.optimizer)
        if self.job.setting.in_backward:  # which clips by the norm of the step before
            return torch.tensor(self._inner_optimizer.norm)
        norm = super()._clip_grad_norm(model)
        if not bool(torch.isfinite(torch.as_tensor(norm))):
            raise NonFiniteGradient.at(self.state.global_step + 1)
        return norm

    def create_optimizer(self, model: Any = None) -> Any:
        """That of the memory plan, on what is trained; weight decay on matrices alone."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed, rate = self.get_decay_parameter_names(model), self.args.learning_rate
            trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            groups = [
                {
                    "params": [(name, p) for name, p in trained if (name in decayed) == decays],
                    "lr": rate,
                    "weight_decay": self.args.weight_decay * decays,
                }
                for decays in (True, False)
            ]
            seed = self.job.training.seed
            groups = [group for group in groups if group["params"]]
            self.optimizer = self._techniques.optimizer(groups, self._shape, seed)
            if self.job.setting.in_backward:
                self.optimizer.max_grad_norm = self.args.max_grad_norm
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        from torch.optim.lr_scheduler import LambdaLR

        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(
                getattr(optimizer, "optimizer", optimizer), self._share_of_rate
            )
            self._created_lr_scheduler = True
            self.governor.scheduler = self.lr_scheduler
        return self.lr_scheduler

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """As ever, with what keeps the packed documents apart; the tokens weighed where the online
        method does."""
        apart = attention_of(self._inner(), inputs["position_ids"])
        if not self.job.rounds.alters_loss:
            return super().compute_loss(
                model, {**inputs, **apart}, return_outputs, num_items_in_batch
            )
        aside = {"labels", "rows", "epoch"}
        shown = {name: value for name, value in inputs.items() if name not in aside}
        outputs = model(**{**shown, **apart})
        loss = weighed_loss(outputs.logits, inputs, num_items_in_batch, self.job.rounds)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """As ever, or on the rows of the batch that the online method chooses."""
        rounds, step = self.job.rounds, self.state.global_step
        if estimate := getattr(self._inner_optimizer, "estimate", None):
            return self._estimated(estimate, self._prepare_inputs(inputs), num_items_in_batch)
        if not rounds.method.chooses:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        if rounds.method.larger > 1:
            inputs, share = LargerBatch(self._inner(), rounds).smaller(inputs, step)
            self.budget.count(Cost(flops=self.job.choosing_flops))
            counted = num_items_in_batch
            return super().training_step(
                model, inputs, None if counted is None else counted * share
            )
        loss = self._choice.step(inputs, num_items_in_batch, step)
        batch, sequence = inputs["input_ids"].shape
        once = self.job.predicted_step.flops / self.args.gradient_accumulation_steps
        seen = batch * forward_flops(self._shape, 1, sequence)  # as passes of no training
        self.budget.count(Cost(flops=once - seen, tokens=float(batch * sequence)))
        return loss

    @property
    def _inner_optimizer(self) -> Any:
        """Without what accelerate puts around it."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _estimated(self, estimate: Any, inputs: Any, num_items: Any) -> Any:
        """A micro-batch of which the optimizer needs losses alone."""
        self.model.eval()  # the same weights drop out on both sides of a direction: none
        loss = estimate(
            lambda: self.compute_loss(self.model, inputs, num_items_in_batch=num_items).detach()
        )
        self.budget.count(Cost(tokens=float(inputs["input_ids"].numel())))
        return loss

    @cached_property
    def _choice(self) -> StepChoice:
        return StepChoice(self.model, self.job.rounds)

    def _renew(self) -> Mapping[str, Any] | None:
        """What the online method sees of the model as it is, or None where that would cost the run
        its end."""
        rounds, upper, step = self.job.rounds, self._renewal(), self.state.global_step
        if rounds.renewed and not self.budget.allows(upper, step):
            return None
        models = ModelInTraining(self.model, self._shape)
        with self.budget.activity("online", upper, step=step) as lease:
            return rounds.method.renew(rounds.chosen, self.job.signals, models, lease)

    def _renewal(self) -> Cost:
        predicted = self.job.predicted_renewal
        cost = replace(predicted, flops=predicted.flops * ACTIVITY_MARGIN)
        return self._stage.ledger.rates.of(replace(cost, seconds=cost.seconds * ACTIVITY_MARGIN))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The objective on the dev rows, charged, journalled, and put to the governor."""
        step = self.state.global_step
        upper = self._cost_of("evaluate", self.job.predicted_evaluation)
        if step == 0:  # the first line of a run that may otherwise be long in coming
            self.job.say(f"  evaluating the base model on {self._num_dev():,} dev rows ...")
        with self.budget.activity("evaluate", upper, step=step) as lease:
            found = self._measure(lease)
            self._seconds["evaluate"] = lease.used.seconds
        before, self._measured = self._measured, found
        stderr = found.stderr(before)
        spent = self._stage.spent()
        beside = dict(self._guarding.compare(step, found))
        if (votes := votes_of(found, before)) is not None:
            beside["votes"] = votes
        self._stage.evaluate(step, spent.flops, found.objective, stderr, found.losses(), beside)
        self.job.say(self._line(step, found, stderr))
        if step > 0:
            # The best evaluated model is kept, so it must be saved: no later step brings it back.
            if self.job.pause_at is None and self._guarding.is_best(found.objective):
                self.control.should_save = True
            if reason := self._guarding.hopeless(self._steps_left(step) / self.args.eval_steps):
                self.governor.end_run(step, reason)
            self.governor.weigh(step)
            if self.governor.is_over(step):
                self.control.should_training_stop = True
                self.control.should_save = True
        self.model.eval()
        self._refreshing.after_evaluation(step, ModelInTraining(self.model, self._shape))
        self.next_holding = self._switching.after_evaluation(step)
        if self.next_holding is not None:
            self.control.should_training_stop = self.control.should_save = True
        metrics = self._reported(found, stderr)
        metrics |= {"spent_flops": spent.flops, "spent_seconds": spent.seconds}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self._ranks.agree(self.control, self.lr_scheduler, step)
        return metrics

    def _reported(self, found: Measured, stderr: float) -> dict[str, float]:
        """What reporters are given."""
        objective, losses = self.job.objective, in_nats(found)
        metrics = {"eval_loss": losses.objective, "eval_loss_stderr": losses.stderr()}
        if losses is found:
            metrics["eval_loss_stderr"] = stderr
        else:
            metrics[f"eval_{objective.name}"] = objective.shown(found.objective)
            metrics[f"eval_{objective.name}_stderr"] = stderr
            for name, loss in found.losses().items():
                metrics[f"eval_{name}_{objective.name}"] = objective.shown(loss)
        return metrics | {f"eval_{name}_loss": loss for name, loss in losses.losses().items()}

    def _measure(self, meter: Meter) -> Measured:
        job = self.job
        return job.yardstick.measure(
            self.model, job.dev, job.weights, meter, guarded=True, together=True
        )

    def _num_dev(self) -> int:
        return sum(len(rows.ids) for rows in self.job.dev.values())

    def _line(self, step: int, found: Measured, stderr: float) -> str:
        spent = self._stage.spent()
        shares = [
            f"{100 * (spent.of(name) or 0.0) / limit:.0f}% of {name}"
            for name in self._stage.budget.limited
            if (limit := self._stage.budget.limit(name))
        ]
        objective = self.job.objective
        line = (
            f"step {step:>5}  dev {objective.name} {objective.shown(found.objective):.4f} "
            f"± {stderr:.4f}"
        )
        if (losses := in_nats(found)) is not found:
            line += f"  loss {losses.objective:.4f}"
        if broken := self._guarding.broken:
            line += f"  NOT TO BE KEPT: {'; '.join(broken)}"
        return f"{line}  spent {', '.join(shares)}" if shares else line

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as the Trainer does, then commit; an uncommitted folder does not count."""
        step = self.state.global_step
        folder = self.job.checkpoints / f"checkpoint-{step}"
        if folder.exists() and ranks.rank() == 0:
            # Left by a run that was rolled back past it; a manifest over mixed files would lie.
            shutil.rmtree(folder)
        ranks.wait()
        upper = self._cost_of("checkpoint", self.job.predicted_checkpoint)
        with self.budget.activity("checkpoint", upper, step=step) as lease:
            super()._save_checkpoint(model, trial)
            ranks.wait()
            if ranks.rank():
                return
            self._trained.save(self.model, folder / checkpoints.FOR_OTHERS)
            details = {
                "step": step,
                "base_sha256": self.job.base_sha256,
                "settings": self.job.mark,
                "over": self.over,
                "dev_loss": None,
            }
            if (holding := self.next_holding or self.job.holding) is not None:
                details["held"] = holding.facts
            if self._measured is not None:
                self._measured.save(folder / "dev_losses.npz")
                history = self.governor.history()
                if history and history[-1].step == step:
                    details["dev_loss"] = self._measured.objective
                    details["broken"] = self._guarding.broken
            if self.job.rounds.remembers:
                self.job.rounds.save(folder)
            for freeze in self._freeze:
                freeze.save(folder)
            checkpoints.commit(folder, details)
            checkpoints.retain(self.job.checkpoints, newest=_KEPT_CHECKPOINTS)
            self._seconds["checkpoint"] = lease.used.seconds
