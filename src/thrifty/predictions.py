"""What the recurring parts of a run cost: a step, an evaluation, a checkpoint, a load, the test;
and the memory at the peak of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.plan import Training
from thrifty.costs.flops import Adapter, train_flops
from thrifty.costs.hardware import Device
from thrifty.costs.memory import RUNTIME_BYTES, MemorySetting, account, checkpoint_bytes
from thrifty.costs.shape import ModelShape
from thrifty.costs.time import step_seconds
from thrifty.signals.forward import forward_cost

BUILD_SECONDS = 0.5
"""Building a model and what drives it, besides reading its weights."""
DISK_BYTES_PER_SECOND = 4e8


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The recurring costs of a training run, and the memory at its peak by term."""

    memory: Mapping[str, float]
    step: Cost
    evaluation: Cost
    checkpoint: Cost
    load: Cost
    """Of the base model."""
    test: Cost
    """Of the base and of the trained model, loading both included."""

    def watching(self, evaluations: int, saves: int) -> Cost:
        return self.evaluation * evaluations + self.checkpoint * saves


def predictions(
    training: Training,
    shape: ModelShape,
    device: Device,
    dev: PoolStats | None,
    test: PoolStats | None,
) -> Predictions:
    """What a step, an evaluation, a checkpoint and the test (of two models) take. The step's FLOPs
    and tokens are exact; tokens are positions, the padding of packs included."""
    adapter = None
    if training.method == "lora":
        adapter = Adapter(
            rank=training.lora.rank, targets=training.lora.targets or shape.lora_targets
        )
    setting = MemorySetting(
        micro_batch=training.per_device_train_batch_size,
        sequence=training.max_length,
        dtype=training.dtype,
        adapter=adapter,
        recompute=training.activation_checkpointing,
        masked=True,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        device_kind=device.kind,
    )
    terms = account(shape, setting).by_term
    memory = {**terms, "runtime": float(RUNTIME_BYTES[device.kind])}
    batch, sequence = training.per_device_train_batch_size, training.max_length
    micro = Cost(
        flops=train_flops(
            shape, batch, sequence, adapter=adapter, recompute=training.activation_checkpointing
        ),
        seconds=step_seconds(shape, setting, device),
        tokens=float(batch * sequence),
        peak_memory_bytes=sum(memory.values()),
    )
    save = checkpoint_bytes(shape, setting) / DISK_BYTES_PER_SECOND + 0.1
    load = Cost(seconds=terms["weights"] / DISK_BYTES_PER_SECOND + BUILD_SECONDS)
    tested = (_rows_cost(shape, device, test, training) + load) * 2 if test else Cost()
    return Predictions(
        memory=memory,
        step=micro * training.gradient_accumulation_steps,
        evaluation=_rows_cost(shape, device, dev, training),
        checkpoint=Cost(seconds=save),
        load=load,
        test=tested,
    )


def _rows_cost(
    shape: ModelShape, device: Device, stats: PoolStats | None, training: Training
) -> Cost:
    """Of evaluating rows in batches no larger than a training pass, inside whose peak it stays."""
    if stats is None:
        return Cost()
    most, length = training.micro_batch_tokens, training.max_length
    cost = forward_cost(shape, stats, device, training.dtype, length, most)
    return replace(cost, peak_memory_bytes=0.0)
