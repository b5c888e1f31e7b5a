"""The one ``Trainer`` subclass of this project."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    PrinterCallback,
    TrainerControl,
    TrainingArguments,
    default_data_collator,
)

from thrifty import checkpoints, evaluation_words, ranks, training_phase
from thrifty.agreement import AgreeingCallback
from thrifty.budget_callback import BudgetCallback
from thrifty.core.budget import Cost
from thrifty.core.contracts import Meter
from thrifty.core.ledger import Lease, Stage
from thrifty.costs.flops import forward_flops
from thrifty.costs.hardware import learn_memory_factor
from thrifty.costs.shape import read_shape
from thrifty.data.packed_attention import attention_of, check_isolation
from thrifty.divergence import NonFiniteGradient
from thrifty.evaluation import Measured
from thrifty.frontier_price import frontier_price
from thrifty.governor import Governor
from thrifty.grad_freeze import freezing
from thrifty.guarding import Guarding
from thrifty.holding.adapters import load_adapter
from thrifty.holding.blockwise import load_on_host
from thrifty.holding.sharded_states import save_whole
from thrifty.in_pieces import OutOfMemory, ran_out
from thrifty.interruption import PauseCallback
from thrifty.larger_batch import LargerBatch
from thrifty.memory_plan import Techniques
from thrifty.memory_switch import Holding
from thrifty.refreshing import Refreshing, go_on
from thrifty.reporters import Fenced, is_reporter
from thrifty.sampling_price import SamplingPrice
from thrifty.schedule import WarmupStableDecay
from thrifty.signals.models import ModelInTraining
from thrifty.signals.peak_memory import peak_memory_bytes, release_free_memory
from thrifty.signals.sharded import let_go
from thrifty.state_check import StatesCallback
from thrifty.step_choice import StepChoice
from thrifty.switching import Switching
from thrifty.training_arguments import arguments_of
from thrifty.training_job import TrainingJob
from thrifty.training_progress import TrainingProgress
from thrifty.turns import TurnCallback
from thrifty.vote_evaluation import votes_of
from thrifty.weighed_loss import weighed_loss
from thrifty.zeroth_order_trainer import ZerothOrderTrainer

ACTIVITY_MARGIN = 1.5
"""Reserved for an evaluation or a checkpoint over what the last one took."""

Found = TypeVar("Found")


class BudgetedTrainer(ZerothOrderTrainer):
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
            anew=job.phase.since,
        )
        self._begins = newest if job.phase.begins_with(newest) else None
        """The checkpoint of what was trained before, from which something else is trained."""
        self.next_holding: Holding | None = None
        """How the steps are to be held from the last checkpoint on, by a trainer of their own."""
        self._seconds = {"evaluate": 0.0, "checkpoint": 0.0}
        self._measured: Measured | None = None
        if newest is not None and (newest.path / "dev_losses.npz").is_file():
            self._measured = Measured.load(newest.path / "dev_losses.npz", job.weights)
        self._guarding = Guarding(job, stage, resumed=newest is not None)
        if newest is not None and job.rounds.remembers:
            job.rounds.load(newest.path)
            go_on(job, newest.step)
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
        self._switching = Switching(job, stage, self.governor, self.budget, self._schedule)
        self.pause = PauseCallback(job.pause_at)
        self._ranks = AgreeingCallback(self._schedule)
        self.progress = TrainingProgress(job.say, self._steps_left)
        self._shape = read_shape(job.base)
        self._trained, seed = self._techniques.trained, job.training.seed
        cut_in_full = job.setting.num_devices > 1 and job.setting.adapter is None
        self._reads_from = newest.path if newest is not None and cut_in_full else None
        """The checkpoint that the weights are read from as they are cut."""
        turns = TurnCallback(self._trained, self._shape, job.setting, self.budget, seed)
        states = StatesCallback(job.setting)
        super().__init__(
            folder=job.checkpoints,
            model=self._techniques.build(
                self._reads_from or job.starts_from,
                self._shape,
                job.device,
                seed,
                job.setting.num_devices,
            ),
            args=self._settings(arguments_of(job, resumed=newest is not None)),
            **self._batches(),
            processing_class=job.tokenizer,
            callbacks=[self.budget, turns, states, *self._freeze, self.pause, self._ranks],
        )
        self.remove_callback(PrinterCallback)
        if ranks.rank() == 0:
            self.add_callback(self.progress)
        self._check()
        job.rounds.renew = self._renew
        handler = self.callback_handler
        handler.callbacks = [
            Fenced(callback, job.say, self._note) if is_reporter(callback) else callback
            for callback in handler.callbacks
        ]

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

    def _note(self, line: str) -> None:
        """What a reporter could not be told, in the ledger."""
        self._stage.decide("reporting", None, line, step=self.state.global_step)

    def close(self) -> None:
        """However training ended: settle what is open, and wait for reporters, within bounds."""
        self.progress.close()
        self.budget.close()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Fenced):
                callback.close()

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
        if self._reads_from is not None or self._begins is not None:
            return  # as it is
        if self._trained.restore(model, Path(resume_from_checkpoint)):
            return
        if not hasattr(model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_adapter(model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As saved, but at the learning rate that the plan has now."""
        if self._begins is None:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            self.lr_scheduler.last_epoch = self._begins.step  # whose states are of something else
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
            return torch.tensor(self.inner_optimizer.norm)
        norm = super()._clip_grad_norm(model)
        if not bool(torch.isfinite(torch.as_tensor(norm))):
            raise NonFiniteGradient.at(self.state.global_step + 1)
        return norm

    def create_optimizer(self, model: Any = None) -> Any:
        """That of the memory plan, on what is trained; weight decay on matrices alone."""
        if self.optimizer is None:
            model = self.model if model is None else model
            let_go(model)
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
            if self.is_cut:
                save_whole(self.optimizer)
            setting = self.job.setting
            if setting.blocks and setting.blocks.parked and not setting.states_offloaded:
                load_on_host(self.optimizer)
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
        """As ever, in as many pieces as it takes; or on the rows of the batch that the online
        method chooses; or not at all where the step is skipped."""
        rounds, step = self.job.rounds, self.state.global_step
        if step + 1 in self.job.skipped:
            return torch.zeros((), device=self.args.device)
        if not rounds.method.chooses:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        if rounds.method.larger > 1:
            inputs, share = LargerBatch(self._inner(), rounds).smaller(inputs, step)
            self.budget.count(Cost(flops=self.job.choosing_flops))
            counted = num_items_in_batch
            return self.make_pass(model, inputs, None if counted is None else counted * share)
        loss = self._choice.step(inputs, num_items_in_batch, step)
        batch, sequence = inputs["input_ids"].shape
        once = self.job.predicted_step.flops / self.args.gradient_accumulation_steps
        # As passes of no training.
        seen = batch * forward_flops(self.job.yardstick.shape, 1, sequence)
        self.budget.count(Cost(flops=once - seen, tokens=float(batch * sequence)))
        return loss

    def begin_anew(self) -> None:
        self.inner_optimizer.zero_grad()
        self.budget.throw_away(self.args, self.state)

    def shrink(self, where: str, why: str, *, even_so: bool = False) -> None:
        """As asked for, and written down; raises OutOfMemory also where other ranks wait for this
        one."""
        job, step = self.job, self.state.global_step
        held, predicted = peak_memory_bytes(job.device), job.predicted_step.peak_memory_bytes
        whole = job.rounds.method.chooses or job.setting.in_backward
        rows = 1 if whole else job.training.per_device_train_batch_size
        release_free_memory()
        self.pieces.again(where, why, rows, even_so=even_so)
        learnt = learn_memory_factor(job.device_name, held, predicted)
        each = -(-rows // self.pieces.count)
        self._stage.decide(
            "in how many pieces to make a pass",
            str(self.pieces.count),
            f"{where} ran out of memory: {why.strip().partition(chr(10))[0]}",
            detail={"held_bytes": held, "predicted_bytes": predicted, "memory_factor": learnt},
            step=step,
        )
        job.say(f"{where} ran out of memory: again, {each} rows at a time")
        if ranks.world() > 1:
            raise OutOfMemory(
                f"rank {ranks.rank()} ran out of memory at {where}, and the others wait for it\n"
                f"hint: the same command goes on from the last checkpoint, {each} rows at a time"
            )

    @cached_property
    def _choice(self) -> StepChoice:
        return StepChoice(self.model, self.job.rounds)

    def _renew(self) -> Mapping[str, Any] | None:
        """What the online method sees of the model as it is, or None where that would cost the run
        its end."""
        rounds, upper, step = self.job.rounds, self._renewal(), self.state.global_step
        if rounds.renewed and not self.budget.allows(upper, step):
            return None
        models = ModelInTraining(self.model, self.job.yardstick.shape)
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
        found = self._spend("evaluate", upper, self._measure)
        before, self._measured = self._measured, found
        stderr = found.stderr(before)
        spent = self._stage.spent()
        beside = dict(self._guarding.compare(step, found))
        if (votes := votes_of(found, before)) is not None:
            beside["votes"] = votes
        self._stage.evaluate(step, spent.flops, found.objective, stderr, found.losses(), beside)
        objective, broken, budget = self.job.objective, self._guarding.broken, self._stage.budget
        line = evaluation_words.line(step, objective, found, stderr, broken, budget, spent)
        self.job.say(line)
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
        self._refreshing.after_evaluation(step, self.model)
        if self.pieces.count == 1:  # or else it is known to hold no more
            self.next_holding = self._switching.after_evaluation(step)
        if self.next_holding is not None:
            self.control.should_training_stop = self.control.should_save = True
        metrics = evaluation_words.reported(objective, found, stderr)
        metrics |= {"spent_flops": spent.flops, "spent_seconds": spent.seconds}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self._ranks.agree(self.control, self.lr_scheduler, step)
        return metrics

    def _spend(self, activity: str, upper: Cost, do: Callable[[Lease], Found]) -> Found:
        """``do`` it on a lease of its own; once more where memory runs out, and what was spent
        until then is lost."""
        step = self.state.global_step
        while True:
            try:
                with self.budget.activity(activity, upper, step=step) as lease:
                    found = do(lease)
                    self._seconds[activity] = lease.used.seconds
                    return found
            except Exception as error:
                if not ran_out(error):
                    raise
                why = str(error)
            self.shrink(f"to {activity} at step {step}", why, even_so=activity == "checkpoint")

    def _measure(self, meter: Meter) -> Measured:
        job = self.job
        yardstick = replace(job.yardstick, max_tokens=self._most_tokens)
        return yardstick.measure(
            self.model, job.dev, job.weights, meter, guarded=True, together=True
        )

    @property
    def _most_tokens(self) -> int:
        """Of a pass of an evaluation, which keeps within one of training."""
        return max(self.job.training.micro_batch_tokens // self.pieces.count, 1)

    def _num_dev(self) -> int:
        return sum(len(rows.ids) for rows in self.job.dev.values())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as the Trainer does, then commit; an uncommitted folder does not count."""
        step = self.state.global_step
        folder = self.job.checkpoints / f"checkpoint-{step}"
        if folder.exists() and ranks.rank() == 0:
            # Left by a run that was rolled back past it; a manifest over mixed files would lie.
            shutil.rmtree(folder)
        ranks.wait()
        upper = self._cost_of("checkpoint", self.job.predicted_checkpoint)
        self._spend("checkpoint", upper, lambda lease: self._commit(folder, model, trial))

    def _commit(self, folder: Path, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        ranks.wait()
        if ranks.rank():
            return
        step = self.state.global_step
        self._trained.save(self.model, folder / checkpoints.FOR_OTHERS)
        details = {
            "step": step,
            "base_sha256": self.job.base_sha256,
            "settings": self.job.mark,
            "over": self.over,
            "last_charge": self._stage.ledger.last_charge,
            "dev_loss": None,
        }
        if (holding := self.next_holding or self.job.holding) is not None:
            details["held"] = holding.facts
            details["phase"] = self.job.phase.facts(self.job.setting)
        if self.job.switch is not None:
            details["measured"] = self.job.switch.remembered
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
        checkpoints.retain(self.job.checkpoints, newest=checkpoints.KEPT)
        training_phase.retain(self.job.checkpoints)
