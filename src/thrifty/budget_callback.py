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
as in TRL), otherwise by the longest so far. A step's seconds are bounded by the slowest of the last
few with a margin, since no clock tells the future.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thrifty.core import quantities
from thrifty.core.budget import Budget, Cost
from thrifty.core.ledger import BudgetExceeded, Lease, Ledger, Rates, Stage
from thrifty.costs.time import SECONDS_MARGIN
from thrifty.signals.metering import PassMeter
from thrifty.signals.models import local_device
from thrifty.signals.peak_memory import peak_memory_bytes, reset_peak

MEAN_MARGIN = 1.1
"""How much slower than the recent mean several steps together may be."""
HICCUP_SECONDS = 0.05
"""What the machine may always take for something else."""
_RECENT_STEPS = 16
_LEASE_STEPS = 50
_FIRST_LEASE_STEPS = 4
"""The first lease is short: until a step was timed, its seconds are unknown."""


class NonFiniteGradient(RuntimeError):
    """A loss or gradient became infinite or not a number; raised before the optimizer step."""

    @classmethod
    def at(cls, step: int, what: str = "gradient") -> NonFiniteGradient:
        return cls(
            f"the {what} at step {step} is not finite; nothing was updated\n"
            "hint: the last checkpoint is good; go on from it at a lower learning rate, or look at "
            "the batch"
        )


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
        self._owned = ExitStack()
        self._meter: PassMeter | None = None
        self._lease: Lease | None = None
        self._lease_steps = 0
        self._spent_before = Cost()
        self._step_upper = predicted_step or Cost()
        self._seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._predicted_seconds = self._step_upper.seconds
        self._last_seconds = 0.0
        self._device = "cpu"
        self._leads = True
        self._evaluation: Lease | None = None
        self._last_evaluation: Cost | None = None
        self._all_finite: Any = None
        self._hook: Any = None

    # -- the trainer's events --------------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        self._device = local_device() if args.device.type != "cpu" else "cpu"
        self._meter = PassMeter(model)
        self._meter.attach()
        self._hook = model.register_forward_hook(self._see_output)
        self._leads = state.is_world_process_zero
        if not self._leads:
            return
        if self._stage is None:
            self._stage = self._open_stage(Path(args.output_dir), state.global_step)
        if not self._step_upper.flops:
            self._step_upper = self._bound(args)
        reset_peak(self._device)
        if state.global_step < state.max_steps:
            self._refuse_if_nothing_fits(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not self._leads:
            return
        # The lease stays open between steps, so that logging and saving are on its clock too.
        if self._lease is not None and self._lease_steps <= 0:
            self._end_lease()
        if self._lease is None:
            self._begin_lease(args, state)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        import torch

        step = state.global_step + 1
        if self._all_finite is not None and not bool(self._all_finite):
            raise NonFiniteGradient.at(step, "loss")
        self._all_finite = None
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if gradients and not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
            raise NonFiniteGradient.at(step)

    def _see_output(self, module: Any, args: Any, output: Any) -> None:
        """Remember whether a training loss was finite, without waiting for the device."""
        import torch

        loss = getattr(output, "loss", None)
        if module.training and loss is not None:
            finite = torch.isfinite(loss.detach()).all()
            self._all_finite = finite if self._all_finite is None else self._all_finite & finite

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self._meter is not None
        used = self._meter.take()
        if args.world_size > 1:
            used = _summed(used, args.device)
        if self._leads:
            self._book(used, state, control)
        if args.world_size > 1:
            control.should_training_stop = _told(control.should_training_stop, args.device)

    def _book(self, used: Cost, state: TrainerState, control: TrainerControl) -> None:
        """Charge a step, and look whether the next one may start."""
        lease = self._lease
        assert lease is not None
        lease.tick(used, steps=1)
        self._step_upper = replace(
            self._step_upper,
            flops=max(self._step_upper.flops, used.flops),
            tokens=max(self._step_upper.tokens, used.tokens),
        )
        self._seconds.append(lease.used.seconds - self._last_seconds)
        self._last_seconds = lease.used.seconds
        self._lease_steps -= 1
        step = state.global_step
        if control.should_evaluate:
            self._allow_evaluation(control)
        if step >= state.max_steps:
            self._finish(control)
            return
        self._look_ahead(step, control)

    # -- the trainer's own evaluations (thrifty's are an ``activity``) -----------------------------

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._leads and control.should_evaluate:
            self._allow_evaluation(control)

    def _allow_evaluation(self, control: TrainerControl) -> None:
        """An evaluation as dear as the last one must fit, or the run ends without it."""
        last = self._last_evaluation
        if self._governor is None and last is not None:
            assert self._stage is not None
            upper = replace(last, seconds=last.seconds * SECONDS_MARGIN + HICCUP_SECONDS)
            upper = self._stage.ledger.rates.of(upper)
            if self._stage.budget.exceeded_by(self._spent() + upper) is not None:
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
        if not self._leads or self._stage is None or self._meter is None:
            return
        used = self._meter.take()
        used = replace(used, flops=used.flops * max(args.world_size, 1))
        if self._evaluation is None:
            clock = self._lease.used.seconds - self._last_seconds if self._lease else 0.0
            self._end_lease()
            batches = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else 1
            upper = Cost(flops=used.flops * batches, seconds=clock * (batches - 1))
            self._evaluation = self._stage.lease("evaluate", upper, step=state.global_step)
        self._evaluation.tick(used)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._evaluation is None:
            return
        self._last_evaluation = self._evaluation.settle()
        self._evaluation = None
        self._spent_before = self._stage.spent() if self._stage else Cost()
        if self._fits(1, Cost()) is not None:
            control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # A charge must not straddle a checkpoint: what is before it is kept, what is after is not.
        self._end_lease()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.close()

    def close(self, error: BaseException | None = None) -> None:
        """Settle what is open. Called at the end of training; harmless to call again."""
        self._end_lease()
        if self._evaluation is not None:
            self._evaluation.settle()
            self._evaluation = None
        if self._meter is not None:
            self._meter.detach()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._owned.close()

    # -- activities other than training ----------------------------------------------------------

    @contextmanager
    def activity(self, name: str, upper: Cost, *, step: int) -> Iterator[Lease]:
        """Spend on ``name`` (an evaluation, a checkpoint) on a lease of its own, between steps."""
        assert self._stage is not None
        self._end_lease()
        with self._stage.spending(name, upper, step=step) as lease:
            yield lease
            self._note_peak(lease)
        if self._meter is not None:
            self._meter.take()  # counted by the activity itself

    # -- leases and looking ahead ----------------------------------------------------------------

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

    def _bound(self, args: TrainingArguments) -> Cost:
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

    def _next_step(self) -> Cost:
        """Upper bound of one step."""
        seconds = max(self._seconds, default=self._predicted_seconds) * SECONDS_MARGIN
        seconds += HICCUP_SECONDS
        assert self._stage is not None
        return self._stage.ledger.rates.of(replace(self._step_upper, seconds=seconds))

    def step_cost(self, predicted: Cost) -> Cost:
        """A step as measured so far (its seconds a mean), as ``predicted`` before the first."""
        upper = self._step_upper if self._step_upper.flops else predicted
        assert self._stage is not None
        return self._stage.ledger.rates.of(replace(upper, seconds=self._mean_seconds()))

    def _mean_seconds(self) -> float:
        if not self._seconds:
            return self._predicted_seconds
        return sum(self._seconds) / len(self._seconds)

    def _spent(self) -> Cost:
        used = self._lease.used if self._lease is not None else Cost()
        assert self._stage is not None
        return self._spent_before + self._stage.ledger.rates.of(used)

    def _fits(self, steps: int, tail: Cost) -> str | None:
        """The resource that ``steps`` more and ``tail`` would exhaust, or None."""
        assert self._stage is not None
        following = replace(self._step_upper, seconds=self._mean_seconds() * MEAN_MARGIN)
        ahead = self._next_step() + self._stage.ledger.rates.of(following * (steps - 1))
        return self._stage.budget.exceeded_by(self._spent() + ahead + tail)

    def _look_ahead(self, step: int, control: TrainerControl) -> None:
        """After a step: may the next one start? If not, the run ends the governor's way."""
        governor = self._governor
        if governor is None:
            if self._fits(1, Cost()) is not None:
                control.should_training_stop = True
            return
        if governor.is_over(step):
            self._finish(control)
            return
        cooldown, after = governor.tail(step)
        if not governor.is_cooling(step):
            over = self._fits(1 + cooldown, after)
            if over is None:
                return
            governor.end_run(step, f"the {over} left suffice for the cool-down and no further step")
            if governor.is_over(step):
                self._finish(control)
                return
        # Inside the cool-down step by step: a slow machine shortens it rather than skips it.
        over = self._fits(1, after)
        if over is not None:
            governor.cut_short(step, f"the {over} left no longer cover the cool-down")
            self._finish(control)

    def _finish(self, control: TrainerControl) -> None:
        control.should_training_stop = True
        if self._governor is not None:
            control.should_evaluate = True
            control.should_save = True

    def _refuse_if_nothing_fits(self, step: int) -> None:
        assert self._stage is not None
        self._spent_before = self._stage.spent()
        after = self._governor.tail(step)[1] if self._governor else Cost()
        over = self._fits(1, after)
        if over is not None:
            least = (self._spent_before + self._next_step() + after).of(over) or 0.0
            least *= 1.005  # so that the printed three digits suffice
            raise BudgetExceeded(
                f"not one training step fits the {over} that is left\n"
                f"hint: the least that would do is {quantities.FORMATS[over](least)}",
                over,
            )

    def _begin_lease(self, args: TrainingArguments, state: TrainerState) -> None:
        """Lease steps up to the next evaluation or checkpoint, as many as surely fit."""
        assert self._stage is not None
        self._spent_before = self._stage.spent()
        step = state.global_step
        upper = self._next_step()
        after = self._governor.tail(step)[1] if self._governor else Cost()
        wanted = _LEASE_STEPS if self._seconds else _FIRST_LEASE_STEPS
        wanted = min(wanted, max(state.max_steps - step, 1))
        for every in (args.eval_steps, args.save_steps):
            if every and every >= 1:
                wanted = min(wanted, int(every) - step % int(every))
        _, possible = self._stage.budget.binding(self._spent_before + after, upper)
        self._lease_steps = max(1, int(min(wanted, possible)))
        self._lease = self._stage.lease("train", upper * self._lease_steps, step=step)
        self._last_seconds = 0.0

    def _end_lease(self) -> None:
        if self._lease is not None:
            self._note_peak(self._lease)
            self._lease.settle()
            self._lease = None

    def _note_peak(self, lease: Lease) -> None:
        lease.tick(Cost(peak_memory_bytes=peak_memory_bytes(self._device)))


def _summed(used: Cost, device: Any) -> Cost:
    """FLOPs and tokens over all ranks."""
    import torch

    both = torch.tensor([used.flops, used.tokens], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(both)
    return replace(used, flops=both[0].item(), tokens=both[1].item())


def _told(stop: bool, device: Any) -> bool:
    """What rank 0 decided."""
    import torch

    flag = torch.tensor([int(stop)], device=device)
    torch.distributed.broadcast(flag, 0)
    return bool(flag.item())
