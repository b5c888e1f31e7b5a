"""``BudgetCallback``: holds anybody's ``Trainer`` to a budget, with one line.

    Trainer(..., callbacks=[BudgetCallback(flops="3e15", hours=2)])

No step starts that would pass a limit. Spending is journalled in a ledger (``ledger.sqlite`` in the
output folder, unless one is given), leased some steps at a time, so that it survives a crash and a
resumed run goes on from what was really spent. Gradients that are not finite raise before the
optimizer sees them.

Under ``torchrun`` rank 0 keeps the ledger, for the sums over all ranks, and tells the others when
to stop, so that all stop at the same step.

FLOPs are counted on the shapes that went through the model (``signals/metering.py``). The next
step's are bounded by its longest possible batch where the trainer says what that is (``max_length``
as in TRL), otherwise by the longest so far (``step_cost.py``). What is evaluated after training is
not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thrifty.core import quantities
from thrifty.core.budget import Budget, Cost
from thrifty.core.ledger import BudgetExceeded, Lease, Ledger, Rates, Stage
from thrifty.costs.setting import MemorySetting
from thrifty.divergence import FiniteGuard
from thrifty.ranks import summed, told
from thrifty.signals.metering import PassMeter
from thrifty.signals.models import local_device
from thrifty.step_cost import StepCost, slower
from thrifty.step_leases import StepLeases


class Governor(Protocol):
    """Who is asked how a run ends (``governor.py``); without one it simply stops."""

    def tail(self, step: int) -> tuple[int, Cost]:
        """How many steps the cool-down has left (all of them where it has not begun), and the cost
        of what follows the last step."""
        ...

    def is_cooling(self, step: int) -> bool: ...

    def is_over(self, step: int) -> bool: ...

    def end_run(self, step: int, reason: str) -> None:
        """Begin the cool-down at ``step``."""
        ...

    def cut_short(self, step: int, reason: str) -> None:
        """The cool-down itself no longer fits; the run stops at ``step``."""
        ...


class BudgetCallback(TrainerCallback):
    """Stops a ``Trainer`` before the step that would pass the budget.

    Parameters
    ----------
    flops, tokens, hours, dollars, memory
        The limits, as people write them; ``budget`` gives them as one object.
    dollars_per_hour, watts
        What the devices cost; needed where dollars or joules are limited.
    ledger
        The journal's file. Default: ``ledger.sqlite`` in the trainer's output folder.
    """

    def __init__(
        self,
        budget: Budget | None = None,
        *,
        flops: str | float | None = None,
        tokens: str | float | None = None,
        hours: str | float | None = None,
        dollars: str | float | None = None,
        memory: str | float | None = None,
        dollars_per_hour: float | None = None,
        watts: float | None = None,
        ledger: str | Path | None = None,
        stage: Stage | None = None,
        governor: Governor | None = None,
        predicted_step: Cost | None = None,
        setting: MemorySetting | None = None,
    ) -> None:
        self.budget = budget or Budget(
            flops=None if flops is None else quantities.parse_flops(flops),
            tokens=None if tokens is None else quantities.parse_tokens(tokens),
            seconds=None if hours is None else quantities.parse_hours(hours),
            dollars=None if dollars is None else quantities.parse_dollars(dollars),
            memory_bytes=None if memory is None else quantities.parse_bytes(memory),
        )
        if self.budget.dollars is not None and dollars_per_hour is None and stage is None:
            raise ValueError(
                "the budget limits dollars but the devices' price is unknown\n"
                "hint: BudgetCallback(dollars=5, dollars_per_hour=2.5)"
            )
        self._rates = Rates(
            dollars_per_second=None if dollars_per_hour is None else dollars_per_hour / 3600,
            watts=watts,
        )
        self._ledger_path = ledger
        self._stage = stage
        self._governor = governor
        self._setting = setting
        self._step_cost = StepCost(predicted_step or Cost())
        self._owned = ExitStack()
        """What training opened, closed at its end."""
        self._meter: PassMeter | None = None
        self._guard: FiniteGuard | None = None
        self._steps: StepLeases | None = None
        """While training, where this process keeps the ledger."""
        self._evaluation: Lease | None = None
        self._last_evaluation: Cost | None = None

    # -- the trainer's events --------------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        self._meter = PassMeter(model, self._setting)
        self._meter.attach()
        self._owned.callback(self._meter.detach)
        self._guard = FiniteGuard(model)
        self._owned.callback(self._guard.detach)
        if not state.is_world_process_zero and self._stage is None:
            return
        stage = self._stage or self._open_stage(Path(args.output_dir), state.global_step)
        device = local_device() if args.device.type != "cpu" else "cpu"
        self._steps = StepLeases(stage, self._step_cost, device)
        if not self._step_cost.is_known:
            self._step_cost.raise_to(self._longest(args))
        if state.global_step < state.max_steps:
            self._refuse_if_nothing_fits(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Lease steps up to the next evaluation or checkpoint."""
        if self._steps is None or self._steps.holds_a_step:
            return
        step = state.global_step
        most = max(state.max_steps - step, 1)
        for every in (args.eval_steps, args.save_steps):
            if every and every >= 1:
                most = min(most, int(every) - step % int(every))
        self._steps.begin(step, most, self._after(step))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self._guard is not None
        self._guard.check(state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self._meter is not None
        used = self._meter.take()
        if args.world_size > 1:
            used = summed(used, args.device)
        if self._steps is not None:
            self._steps.book(used)
            if control.should_evaluate:
                self._allow_evaluation(control)
            self._look_ahead(state, control)
        if args.world_size > 1:
            control.should_training_stop = told(control.should_training_stop, args.device)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # A charge must not straddle a checkpoint: what is before it is kept, what is after is not.
        if self._steps is not None:
            self._steps.end()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._meter is not None:
            self._meter.take()  # what was looked at after the last step
        self.close()

    def close(self) -> None:
        """Settle what is open, a step that did not come to its end as lost. Called at the end of
        training; harmless to call again."""
        if self._steps is not None:
            if self._meter is not None and (used := self._meter.take()).flops:
                self._steps.lose(used)
            self._steps.end()
            self._steps = None
        if self._evaluation is not None:
            self._evaluation.settle()
            self._evaluation = None
        self._owned.close()

    # -- the trainer's own evaluations (thrifty's are an ``activity``) -----------------------------

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if control.should_evaluate:
            self._allow_evaluation(control)

    def _allow_evaluation(self, control: TrainerControl) -> None:
        """An evaluation as dear as the last one must fit, or the run ends without it."""
        last = self._last_evaluation
        if self._steps is None or self._governor is not None or last is None:
            return
        upper = self._steps.priced(replace(last, seconds=slower(last.seconds)))
        if self._steps.exceeded_by(upper) is not None:
            control.should_evaluate = False
            control.should_training_stop = True

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """A batch of an evaluation. Before the first evaluation nobody knows its cost: its first
        batch tells, and one that would pass the budget raises BudgetExceeded there."""
        steps = self._steps
        if steps is None or self._meter is None:
            return
        used = self._meter.take()
        used = replace(used, flops=used.flops * max(args.world_size, 1))
        if self._evaluation is None:
            more = (len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else 1) - 1
            upper = Cost(flops=used.flops * (1 + more), seconds=steps.seconds_since_step() * more)
            steps.end()
            self._evaluation = steps.stage.lease("evaluate", upper, step=state.global_step)
        self._evaluation.tick(used)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._steps is None or self._evaluation is None:
            return
        self._last_evaluation = self._evaluation.settle()
        self._evaluation = None
        if self._steps.exceeded_by_steps(1, Cost()) is not None:
            control.should_training_stop = True

    # -- asked by who owns the run ---------------------------------------------------------------

    @contextmanager
    def activity(self, name: str, upper: Cost, *, step: int) -> Iterator[Lease]:
        """Spend on ``name`` (an evaluation, a checkpoint) on a lease of its own, between steps."""
        assert self._steps is not None
        assert self._meter is not None
        with self._steps.spending(name, upper, step=step) as lease:
            yield lease
        self._meter.take()  # counted by the activity itself

    def charge_as(self, setting: MemorySetting) -> None:
        """From now on steps are held like this."""
        assert self._meter is not None
        self._meter.setting = setting

    def spare(self, flops: float) -> None:
        """From now on a position of a training pass takes so much less."""
        assert self._meter is not None
        self._meter.spared = flops

    def count(self, used: Cost) -> None:
        """In the step under way, beside what went through the model in training mode."""
        assert self._meter is not None
        self._meter.add(used)

    def throw_away(self, args: TrainingArguments, state: TrainerState) -> None:
        """What the step under way took so far was for nothing: charged as lost, and the step leased
        anew. Raises BudgetExceeded where it no longer fits."""
        assert self._meter is not None
        used = self._meter.take()
        if self._steps is not None:
            self._steps.lose(used)
            self.on_step_begin(args, state, TrainerControl())

    def allows(self, upper: Cost, step: int) -> bool:
        """Whether ``upper`` leaves enough for the next step and what comes at the end."""
        assert self._steps is not None
        return self._steps.exceeded_by_steps(1, upper + self._after(step)) is None

    def step_cost(self) -> Cost:
        """A step as measured so far, its seconds a mean; as predicted before the first."""
        assert self._steps is not None
        return self._steps.priced(self._step_cost.mean())

    def steps_left(self, step: int) -> float:
        """That the budget still pays for, at the mean so far, with what comes after them."""
        assert self._steps is not None
        spent = self._steps.spent() + self._after(step)
        return self._steps.stage.budget.binding(spent, self.step_cost())[1]

    # -- before the first step -------------------------------------------------------------------

    def _open_stage(self, output_dir: Path, step: int) -> Stage:
        path = Path(self._ledger_path or output_dir / "ledger.sqlite")
        path.parent.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(path) if path.exists() else Ledger.create(path, self.budget, self._rates)
        self._owned.callback(ledger.close)
        ledger.set_budget(self.budget)
        if self._rates != Rates():
            ledger.set_rates(self._rates)
        ledger.recover()
        stage = self._owned.enter_context(ledger.stage("train", "callback", reopen=True))
        stage.roll_back(step, f"training goes on from step {step}")
        return stage

    def _longest(self, args: TrainingArguments) -> Cost:
        """FLOPs and tokens of the largest step that can come; zero where the trainer tells no
        maximum length."""
        assert self._meter is not None
        length = getattr(args, "max_length", None)
        if not length:
            return Cost()
        rows = args.per_device_train_batch_size
        times = args.gradient_accumulation_steps * max(args.world_size, 1)
        return Cost(
            flops=self._meter.step_flops(rows, length) * times, tokens=float(rows * length * times)
        )

    def _refuse_if_nothing_fits(self, step: int) -> None:
        assert self._steps is not None
        after = self._after(step)
        over = self._steps.exceeded_by_steps(1, after)
        if over is not None:
            least = (self._steps.spent() + self._steps.next_step() + after).of(over) or 0.0
            least *= 1.005  # so that the printed three digits suffice
            raise BudgetExceeded(
                f"not one training step fits the {over} that is left\n"
                f"hint: the least that would do is {quantities.FORMATS[over](least)}",
                over,
            )

    # -- after a step: may the next one start? ---------------------------------------------------

    def _after(self, step: int) -> Cost:
        """What is to be kept for after the last step."""
        return self._governor.tail(step)[1] if self._governor else Cost()

    def _look_ahead(self, state: TrainerState, control: TrainerControl) -> None:
        """If not, the run ends the governor's way."""
        assert self._steps is not None
        governor, step = self._governor, state.global_step
        if governor is None:
            if self._steps.exceeded_by_steps(1, Cost()) is not None:
                control.should_training_stop = True
            return
        if step >= state.max_steps or governor.is_over(step):
            self._finish(control)
            return
        cooldown, after = governor.tail(step)
        if not governor.is_cooling(step):
            over = self._steps.exceeded_by_steps(1 + cooldown, after)
            if over is None:
                return
            governor.end_run(step, f"the {over} left suffice for the cool-down and no further step")
            if governor.is_over(step):
                self._finish(control)
                return
        # Inside the cool-down step by step: a slow machine shortens it rather than skips it.
        over = self._steps.exceeded_by_steps(1, after)
        if over is not None:
            governor.cut_short(step, f"the {over} left no longer cover the cool-down")
            self._finish(control)

    def _finish(self, control: TrainerControl) -> None:
        """Nothing comes after this step but its evaluation and its checkpoint."""
        control.should_training_stop = True
        control.should_evaluate = True
        control.should_save = True
