"""What of a measured model fits: the largest micro-batch of each way to train it, its memory by
phase and term, its FLOPs and its time.

Bytes are known for every micro-batch. Time is a plain roofline: FLOPs over the device's rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from thrifty.core import quantities
from thrifty.core.budget import Budget
from thrifty.costs.allocator import allocatable, device_memory
from thrifty.costs.flops import step_coefficients
from thrifty.costs.hardware import Device, dollars_per_hour, load_device
from thrifty.costs.memory import MemoryAccount, account
from thrifty.costs.operations import Adapter
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape, read_config
from thrifty.costs.time import rate
from thrifty.measured import Flops, Measured, MeasuredStep, NotTraced
from thrifty.planner import NoPlanFits
from thrifty.preparation import Asked
from thrifty.request import MEMORY_MARGIN
from thrifty.signals.models import locate

DEFAULT_LENGTH = 1024
DTYPE = "bfloat16"
LORA = Adapter(rank=16)
"""On every linear of the layers, in float32, as PEFT does where nothing else is said."""
WAYS = ((None, 0), (None, 1), (LORA, 0), (LORA, 1))
"""Adapter and recomputation."""
LARGEST_BATCH = 1024


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to train the model: what it takes, or why that cannot be measured."""

    trained: str
    recompute: bool
    limit: float
    """Bytes that tensors may take."""
    sequence: int
    step: MeasuredStep | None = None
    failed: str = ""
    closed_form: tuple[float, float] | None = None
    """Bytes at ``micro_batch`` and FLOPs a token, of a known architecture."""

    @property
    def name(self) -> str:
        return f"{self.trained} {'recompute' if self.recompute else 'keep'}"

    @cached_property
    def _largest(self) -> int:
        return self.measured.largest(self.limit, LARGEST_BATCH)

    @property
    def measured(self) -> MeasuredStep:
        """The step, where it did not fail."""
        assert self.step is not None, self.failed
        return self.step

    @property
    def fits(self) -> bool:
        return not self.failed and self._largest > 0

    @property
    def micro_batch(self) -> int:
        """The largest that fits; 1 where none does."""
        return max(1, self._largest)

    @cached_property
    def account(self) -> MemoryAccount:
        return self.measured.account(self.micro_batch)

    @property
    def flops(self) -> Flops:
        return self.measured.flops

    @property
    def flops_per_token(self) -> float:
        return self.flops.per_token(self.sequence)


@dataclass(frozen=True, kw_only=True)
class MeasuredPlan:
    """A model, counted, and the ways to train it under a budget."""

    model: Measured
    path: str
    revision: str | None
    ways: tuple[Way, ...]
    failed: str
    """Why no step could be measured at all."""
    sequence: int
    device: Device
    budget: Budget
    dollars_per_hour: float | None
    seconds: float
    """What measuring took."""

    @property
    def memory_limit(self) -> float:
        return self.budget.memory_bytes or self.device.memory_bytes

    def seconds_of(self, flops: float) -> float:
        return flops / float(rate(self.device, DTYPE, self.model.hidden_size))

    def tokens(self, way: Way) -> float | None:
        """What the budget pays for; None where it limits none of it."""
        budget, price = self.budget, self.dollars_per_hour
        seconds = [] if budget.seconds is None else [budget.seconds]
        if budget.dollars is not None and price:
            seconds.append(3600.0 * budget.dollars / price)
        found = [each / self.seconds_of(way.flops_per_token) for each in seconds]
        found += [] if budget.flops is None else [budget.flops / way.flops_per_token]
        found += [] if budget.tokens is None else [budget.tokens]
        return min(found, default=None)


def measured_plan(asked: Asked, say: Callable[[str], None]) -> MeasuredPlan:
    """Raises ValueError for what cannot be asked together, or built."""
    _refuse(asked)
    device = load_device(asked.device)
    price = asked.dollars_per_hour or dollars_per_hour(device)
    if asked.budget.dollars is not None and price is None:
        raise ValueError(
            f"the budget limits dollars but the price of {device.name} is unknown\n"
            "hint: --price DOLLARS_PER_HOUR, or put it into your prices.yaml"
        )
    start = time.perf_counter()
    folder, revision = locate(asked.model, asked.revision, weights=False)
    model = Measured(read_config(folder))
    sequence = _sequence(asked, model)
    say(f"building and tracing {asked.model} on the meta device ...")
    plan = MeasuredPlan(
        model=model,
        path=asked.model,
        revision=revision,
        ways=(),
        failed="",
        sequence=sequence,
        device=device,
        budget=asked.budget,
        dollars_per_hour=price,
        seconds=0.0,
    )
    limit = allocatable(plan.memory_limit / MEMORY_MARGIN, device.kind)
    base = MemorySetting(sequence=sequence, dtype=DTYPE, device_kind=device.kind)
    try:
        assert model.depths
        ways = tuple(
            _way(model, replace(base, adapter=adapter, recompute=recompute), limit)
            for adapter, recompute in WAYS
        )
        # The same reason four times is one.
        reasons = {way.failed for way in ways}
        failed = reasons.pop() if len(reasons) == 1 else ""
    except NotTraced as error:
        ways, failed = (), str(error)
    ways = tuple(sorted(ways, key=_rank))
    return replace(plan, ways=ways, failed=failed, seconds=time.perf_counter() - start)


def _rank(way: Way) -> tuple[bool, bool, float]:
    return bool(way.failed), not way.fits, 0.0 if way.failed else way.flops.token


def check(plan: MeasuredPlan) -> None:
    """Raises ValueError where no step was measured, NoPlanFits where none fits the memory."""
    kind = plan.model.config["model_type"]
    measured = [way for way in plan.ways if not way.failed]
    if not measured:
        raise ValueError(
            f"the parameters of {plan.path} are counted, but a step of {kind} cannot be measured: "
            f"{plan.failed or _reasons(plan)}\nhint: measure a real step of it on a device"
        )
    if not any(way.fits for way in measured):
        least = min(measured, key=lambda way: way.account.peak_memory_bytes)
        size = device_memory(least.account.peak_memory_bytes, plan.device.kind).device
        needed = quantities.format_bytes(1.005 * MEMORY_MARGIN * size)
        raise NoPlanFits(
            f"no way that was measured fits {quantities.format_bytes(plan.memory_limit)}: "
            f"the smallest, {least.name}, needs {needed} with rows of {plan.sequence:,} tokens\n"
            f"hint: --memory {needed.replace(' ', '')}, or shorter rows: "
            "--set training.max_length=512"
        )


def _reasons(plan: MeasuredPlan) -> str:
    return "; ".join(f"{way.name}: {way.failed}" for way in plan.ways)


def _refuse(asked: Asked) -> None:
    if asked.pool:
        raise ValueError(
            "--measure plans no run: the stages of a run are priced by a closed form\n"
            "hint: leave out --pool to see what fits"
        )
    keys = sorted(set(asked.fixed) - {"training.max_length"})
    for given, what in (
        (asked.targets, "--target"),
        (asked.techniques, "--using"),
        (asked.num_devices > 1, "--devices"),
        (asked.control, "--control"),
        (asked.task == "preference", "--task preference"),
        (keys, f"--set {keys[0]}" if keys else ""),
    ):
        if given:
            raise ValueError(
                f"--measure does not know {what}\n"
                "hint: it measures full training and LoRA in bfloat16 on one device; of the plan's "
                "values it takes training.max_length"
            )


def _sequence(asked: Asked, model: Measured) -> int:
    """Tokens of a row: as asked, else a thousand, at most the model's context."""
    assert model.model
    context = model.context or math.inf
    wished = asked.fixed.get("training.max_length")
    if wished is not None and wished > context:
        raise ValueError(
            f"training.max_length {wished} is longer than the model's context of {context}\n"
            f"hint: at most {context}"
        )
    return int(min(DEFAULT_LENGTH, context) if wished is None else wished)


def _way(model: Measured, setting: MemorySetting, limit: float) -> Way:
    way = Way(
        trained="full" if setting.adapter is None else "lora",
        recompute=bool(setting.recompute),
        limit=limit,
        sequence=setting.sequence,
    )
    try:
        way = replace(way, step=model.step(setting))
    except NotTraced as error:
        return replace(way, failed=str(error))
    try:
        shape = ModelShape.from_config(model.config)
    except ValueError:
        return way
    setting = replace(setting, micro_batch=way.micro_batch)
    token, pair = step_coefficients(shape, setting)
    closed = account(shape, setting).peak_memory_bytes, token + pair * setting.sequence
    return replace(way, closed_form=closed)
