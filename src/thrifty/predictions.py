"""What the recurring parts of a run cost: a step, an evaluation, a checkpoint, a load, the test;
and the memory at the peak of training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.plan import Training
from thrifty.core.resolve import resolve
from thrifty.costs.allocator import device_memory
from thrifty.costs.flops import Adapter, step_flops
from thrifty.costs.hardware import Device
from thrifty.costs.job import job_account
from thrifty.costs.memory import MemorySetting, checkpoint_bytes, weight_bytes
from thrifty.costs.shape import ModelShape
from thrifty.costs.time import step_seconds
from thrifty.signals.forward import forward_cost

BUILD_SECONDS = 0.5
"""Building a model and what drives it, besides reading its weights."""
DISK_BYTES_PER_SECOND = 4e8


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The recurring costs of a training run."""

    step: Cost
    evaluation: Cost
    checkpoint: Cost
    load: Cost
    """Of the base model."""
    test: Cost
    """Of the base and of the trained model, loading both included."""

    def watching(self, evaluations: int, saves: int) -> Cost:
        return self.evaluation * evaluations + self.checkpoint * saves


def setting_of(training: Training, shape: ModelShape, device: Device) -> MemorySetting:
    """How a plan's ``training`` holds a step. Packs have several documents, so that attention gets
    its mask."""
    return MemorySetting(
        micro_batch=training.per_device_train_batch_size,
        sequence=training.max_length,
        dtype=training.dtype,
        adapter=adapter_of(training, shape),
        recompute=int(training.activation_checkpointing),
        masked=True,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        device_kind=device.kind,
    )


def adapter_of(training: Training, shape: ModelShape) -> Adapter | None:
    """That a plan's ``training`` puts on the model; None where it trains all weights."""
    if training.method != "lora":
        return None
    return Adapter(rank=training.lora.rank, targets=training.lora.targets or shape.lora_targets)


def predictions(
    training: Training,
    shape: ModelShape,
    device: Device,
    dev: PoolStats | None,
    test: PoolStats | None,
) -> Predictions:
    """What a step, an evaluation, a checkpoint and the test (of two models) take. The step's FLOPs
    and tokens are exact; tokens are positions, the padding of packs included."""
    setting = setting_of(training, shape, device)
    peak = device_memory(job_account(shape, setting).peak_memory_bytes, device.kind).device
    micro = Cost(
        flops=step_flops(shape, setting),
        seconds=step_seconds(shape, setting, device),
        tokens=float(setting.tokens),
        peak_memory_bytes=peak,
    )
    costs = Predictor(shape, device, dev, test).of(setting, micro)
    online = resolve("online", training.online)
    if why := online.refuses(shape, setting):
        raise ValueError(f"training.online: {training.online} does not do here: {why}")
    micro = online.step_cost(micro, shape, setting)
    return replace(costs, step=micro * training.gradient_accumulation_steps)


class Predictor:
    """Predictions of one model on one device, for many settings."""

    def __init__(
        self, shape: ModelShape, device: Device, dev: PoolStats | None, test: PoolStats | None
    ) -> None:
        self.shape, self.device, self.dev, self.test = shape, device, dev, test
        self._rows: dict[tuple[PoolStats, str, int, int], Cost] = {}

    def of(self, setting: MemorySetting, micro: Cost) -> Predictions:
        """With ``micro`` the cost of a micro-batch."""
        save = checkpoint_bytes(self.shape, setting) / DISK_BYTES_PER_SECOND + 0.1
        load = Cost(seconds=self.load_seconds(setting))
        tested = (self._cost_of_rows(self.test, setting) + load) * 2 if self.test else Cost()
        return Predictions(
            step=micro,
            evaluation=self._cost_of_rows(self.dev, setting),
            checkpoint=Cost(seconds=save),
            load=load,
            test=tested,
        )

    def load_seconds(self, setting: MemorySetting) -> float:
        """Of the base model."""
        return weight_bytes(self.shape, setting) / DISK_BYTES_PER_SECOND + BUILD_SECONDS

    def _cost_of_rows(self, stats: PoolStats | None, setting: MemorySetting) -> Cost:
        """Of evaluating rows in batches no larger than a training pass, inside whose peak it
        stays."""
        if stats is None:
            return Cost()
        key = stats, setting.dtype, setting.sequence, setting.tokens
        if key not in self._rows:
            cost = forward_cost(
                self.shape, stats, self.device, setting.dtype, setting.sequence, setting.tokens
            )
            self._rows[key] = replace(cost, peak_memory_bytes=0.0)
        return self._rows[key]
