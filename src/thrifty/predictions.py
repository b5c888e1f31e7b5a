"""What the recurring parts of a run cost: a step, an evaluation, a checkpoint, a load, the test;
and the memory at the peak of training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import OnlineMethod
from thrifty.core.plan import Training
from thrifty.core.plan_serving import Serving
from thrifty.core.plan_switch import others_trained, trained_as
from thrifty.core.resolve import name_of, resolve
from thrifty.costs.allocator import device_memory
from thrifty.costs.flops import step_flops
from thrifty.costs.hardware import Device
from thrifty.costs.job import job_account
from thrifty.costs.memory import MemorySetting, checkpoint_bytes, weight_bytes
from thrifty.costs.operations import Adapter
from thrifty.costs.shape import ModelShape
from thrifty.costs.time import step_seconds
from thrifty.memory_plan import Techniques
from thrifty.pair_costs import LOGITS_AT_A_TIME, SIDES, as_sequences, on_average, why_no_pairs
from thrifty.signals.forward import forward_cost
from thrifty.signals.generation import answers_cost

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
    serving: Cost = field(default_factory=Cost)
    """Of a sample of each question that the budget is to answer."""

    def watching(self, evaluations: int, saves: int) -> Cost:
        return self.evaluation * evaluations + self.checkpoint * saves


def setting_of(training: Training, shape: ModelShape, device: Device) -> MemorySetting:
    """How a plan's ``training`` holds a step. Packs have several documents, so that attention gets
    its mask."""
    techniques = Techniques.of(training.memory)
    if reason := techniques.refuses_model(shape, device.kind):
        raise ValueError(f"training.memory.{reason}\nhint: another technique, or another option")
    cycle = techniques.trained.cycle_steps(shape)
    if training.max_steps < cycle:
        raise ValueError(
            f"training.memory.trained: {training.memory.trained} takes {cycle:,} steps to come "
            f"round once, and training.max_steps is {training.max_steps:,}\n"
            "hint: a shorter turn (its options), or another technique"
        )
    pairs, (num_devices, replicas) = training.preference, training.layout
    setting = techniques.setting(
        MemorySetting(
            micro_batch=training.per_device_train_batch_size * (1 if pairs is None else SIDES),
            sequence=training.max_length,
            masked=True,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            device_kind=device.kind,
            num_devices=num_devices,
            replicas=replicas,
            reference=pairs is not None and not pairs.precompute_ref_log_probs,
        )
    )
    if pairs is None:
        return setting
    if reason := why_no_pairs(setting):
        raise ValueError(f"task preference: {reason}\nhint: other techniques, training.memory")
    return replace(setting, loss_chunk=LOGITS_AT_A_TIME)


def check_others_trained(training: Training, shape: ModelShape, device: Device) -> None:
    """Raise ValueError where something that may be trained on the way does not go with the rest."""
    for trained in others_trained(training):
        try:
            setting = setting_of(trained_as(training, trained), shape, device)
            if why := why_unsuited(resolve("online", training.online), shape, setting):
                raise ValueError(f"training.online {training.online} does not do there: {why}")
        except ValueError as error:
            raise ValueError(f"training.switch.trained: {trained}: {error}") from None


def predictions(
    training: Training,
    shape: ModelShape,
    device: Device,
    dev: PoolStats | None,
    test: PoolStats | None,
    pool: PoolStats | None = None,
    *,
    guard: PoolStats | None = None,
    max_new_tokens: int = 0,
    serving: Serving | None = None,
) -> Predictions:
    """What a step, an evaluation, a checkpoint and the test (of two models) take. The step's FLOPs
    and tokens are exact; tokens are positions, the padding of packs included. On pairs they are
    those of pairs like ``pool``'s on average, without it of the longest. Evaluations are as if
    every answer had ``max_new_tokens``."""
    setting = setting_of(training, shape, device)
    context = generated_context(setting.sequence, max_new_tokens)
    account = job_account(shape, setting, generated_context=context)
    peak = device_memory(account.peak_memory_bytes, device.kind).device
    micro = Cost(
        flops=step_flops(shape, setting) * setting.num_ranks,
        seconds=step_seconds(shape, setting, device),
        tokens=float(setting.micro_batch * setting.row_tokens * setting.num_ranks),
        peak_memory_bytes=peak,
    )
    if training.preference is not None:
        dev, test = (stats and as_sequences(stats) for stats in (dev, test))
        micro = on_average(micro, shape, setting, pool)
    predictor = Predictor(
        shape, device, dev, test, guard=guard, max_new_tokens=max_new_tokens, serving=serving
    )
    costs = predictor.of(setting, micro)
    online: OnlineMethod = resolve("online", training.online)
    if why := why_unsuited(online, shape, setting):
        raise ValueError(f"training.online: {training.online} does not do here: {why}")
    if training.grad_freeze is not None and (why := _no_gradients(setting)):
        raise ValueError(f"training.grad_freeze: {why}\nhint: leave it out, or full with adamw")
    micro = online.step_cost(micro, shape, setting)
    return replace(costs, step=micro * training.gradient_accumulation_steps)


def _no_gradients(setting: MemorySetting) -> str | None:
    """Why there is no moment at which every matrix's gradient can be looked at; None where is."""
    if setting.zeroth_order:
        return "a zeroth-order step makes no gradients"
    if setting.in_backward:
        return "the optimizer lets go of each gradient as it is made"
    if setting.blocks is not None:
        return "blocks that take turns are never trained all at once"
    return None


def why_unsuited(online: OnlineMethod, shape: ModelShape, setting: MemorySetting) -> str | None:
    """Why an online method cannot run on steps that are held like this; None where it can."""
    blockwise = setting.blocks is not None
    if online.chooses and (setting.zeroth_order or setting.in_backward or blockwise):
        return "it chooses by the gradients of all that is trained, which this step never has whole"
    if setting.short and name_of(online) not in ("shuffled", "ordered"):
        return "short and long rows go through epochs of their own: use shuffled or ordered"
    if (online.chooses or online.watches or online.weighs_tokens) and setting.loss_chunk:
        return "it looks at every token's logits, which a loss in chunks does not keep"
    return online.refuses(shape, setting)


def generated_context(max_length: int, max_new_tokens: int) -> int:
    """Tokens a row that an evaluation's cache may hold, in a batch of a training pass's rows: it
    has no more tokens than the pass, but for one prompt that fills it."""
    return max_length + max_new_tokens if max_new_tokens else 0


class Predictor:
    """Predictions of one model on one device, for many settings."""

    def __init__(
        self,
        shape: ModelShape,
        device: Device,
        dev: PoolStats | None,
        test: PoolStats | None,
        *,
        guard: PoolStats | None = None,
        max_new_tokens: int = 0,
        serving: Serving | None = None,
    ) -> None:
        """``guard``: rows that are measured beside the dev rows; ``max_new_tokens``: of an answer
        that is generated to each of the others, 0 where none is; ``serving``: what the budget is to
        answer after training."""
        self.shape, self.device, self.dev, self.test = shape, device, dev, test
        self.guard, self.max_new_tokens, self.serving = guard, max_new_tokens, serving
        self._rows: dict[tuple[PoolStats, str, int, int, Adapter | None], Cost] = {}

    def of(self, setting: MemorySetting, micro: Cost) -> Predictions:
        """With ``micro`` the cost of a micro-batch."""
        save = checkpoint_bytes(self.shape, setting) / DISK_BYTES_PER_SECOND + 0.1
        load = Cost(seconds=self.load_seconds(setting))
        tested = Cost()
        if self.test:
            plain = replace(setting, adapter=None, storage=None)  # the base
            both = self._measuring(self.test, setting) + self._measuring(self.test, plain)
            tested = both + load * 2
        return Predictions(
            step=micro,
            evaluation=self._measuring(self.dev, setting)
            + self._cost_of_rows(self.guard, setting)
            + self._sampling(setting),
            checkpoint=Cost(seconds=save),
            load=load,
            test=tested,
            serving=self._serving(setting),
        )

    def load_seconds(self, setting: MemorySetting) -> float:
        """Of the base model."""
        return weight_bytes(self.shape, setting) / DISK_BYTES_PER_SECOND + BUILD_SECONDS

    def _measuring(self, stats: PoolStats | None, setting: MemorySetting) -> Cost:
        """Of the objective on rows: their loss, and an answer to each where it is a score."""
        if stats is None or not self.max_new_tokens:
            return self._cost_of_rows(stats, setting)
        return self._cost_of_rows(stats, setting) + self._answers(
            stats, setting, self.max_new_tokens
        )

    def _sampling(self, setting: MemorySetting) -> Cost:
        """Several answers to each dev row, at an evaluation."""
        if self.serving is None or self.dev is None:
            return Cost()
        drawn = self.dev.part(self.serving.dev_samples)
        return self._answers(drawn, setting, self.max_new_tokens)

    def _serving(self, setting: MemorySetting) -> Cost:
        """One answer to each question."""
        if self.serving is None or self.dev is None:
            return Cost()
        asked = self.dev.part(self.serving.questions / self.dev.num_examples)
        return self._answers(asked, setting, round(self.serving.tokens or self.max_new_tokens))

    def _answers(self, stats: PoolStats, setting: MemorySetting, max_new_tokens: int) -> Cost:
        shape = self.shape.under(setting.adapter)
        return answers_cost(
            shape, stats, self.device, setting.dtype, max_new_tokens, setting.tokens
        )

    def _cost_of_rows(self, stats: PoolStats | None, setting: MemorySetting) -> Cost:
        """Of evaluating rows in batches no larger than a training pass, inside whose peak it
        stays."""
        if stats is None:
            return Cost()
        key = stats, setting.dtype, setting.sequence, setting.tokens, setting.adapter
        if key not in self._rows:
            shape = self.shape.under(setting.adapter)
            cost = forward_cost(
                shape, stats, self.device, setting.dtype, setting.sequence, setting.tokens
            )
            self._rows[key] = replace(cost, peak_memory_bytes=0.0)
        return self._rows[key]
