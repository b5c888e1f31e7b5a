"""One way to hold a step, priced whole: scoring, training, evaluations, checkpoints, test.

What its tokens are worth is in ``effective_tokens.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from thrifty.affordable import accumulation as accumulation_of
from thrifty.affordable import affordable, ceiling, minus, reserved, watch, watched_apart
from thrifty.core.budget import Cost, PoolStats
from thrifty.core.contracts import Filter, OnlineMethod, Picker, Scorer, Work, Worth
from thrifty.core.marginal import Estimate
from thrifty.core.plan import Training
from thrifty.core.plan_refresh import looking_in
from thrifty.core.resolve import Spec, name_of, resolve
from thrifty.costs.allocator import DeviceMemory, device_memory
from thrifty.costs.job import job_account, scoring_beside
from thrifty.costs.memory import MemoryAccount, MemorySetting
from thrifty.costs.setting import read_in
from thrifty.costs.shape import ModelShape
from thrifty.effective_tokens import best_repetition, prior_gain
from thrifty.held import PACKING_FILL, Held
from thrifty.pair_costs import SIDES, on_average, reference_cost, why_no_pairs
from thrifty.predictions import Predictor, why_unsuited
from thrifty.priors import load_priors
from thrifty.request import Request
from thrifty.signals.embeddings import embedding_cost

PICK_SECONDS = 2.5e-5
"""Of filtering and picking, a row."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to hold a step with one scorer, priced."""

    shape: ModelShape
    held: Held
    setting: MemorySetting
    scorer: str
    scorer_spec: Spec
    is_scored: bool
    """By an earlier run, whose scores are taken over."""
    scoring_bytes: float
    looking_bytes: float
    """The same of scorers that look at the model in training."""
    generated_context: int
    peak_memory_bytes: float
    """On the device, of all phases of the job."""
    sides: int
    """Sequences of a row: two of a pair."""
    step: Cost
    """Of an optimizer step."""
    max_steps: int
    """As predicted to fit."""
    ceiling: int
    """Steps to allow for: where a clock ends the run, it may turn out faster than predicted."""
    num_evaluations: int
    epochs: float
    keep_tokens: float
    by_stage: Mapping[str, Cost]
    binding: str
    gain: Estimate

    @property
    def techniques(self) -> Mapping[str, str]:
        """Kind -> name."""
        return self.held.technique_names

    @property
    def quality(self) -> Worth:
        return self.held.quality

    @property
    def runs(self) -> bool:
        return self.held.runs

    @property
    def method(self) -> str:
        return self.techniques["trained"]

    @property
    def dtype(self) -> str:
        return self.setting.dtype

    @property
    def activation_checkpointing(self) -> bool:
        return bool(self.setting.recompute)

    @property
    def per_device_train_batch_size(self) -> int:
        return self.setting.micro_batch // self.sides

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.setting.gradient_accumulation_steps

    @property
    def max_length(self) -> int:
        return self.setting.sequence

    @property
    def name(self) -> str:
        batch = f"{self.per_device_train_batch_size}x{self.gradient_accumulation_steps}"
        return f"{self.scorer}, {self.held.describe(batch)}"

    @property
    def total(self) -> Cost:
        return sum(self.by_stage.values(), Cost())

    @cached_property
    def account(self) -> MemoryAccount:
        """Allocated bytes of every phase of the job, by term."""
        return job_account(
            self.shape,
            self.setting,
            scoring_bytes=self.scoring_bytes,
            looking_bytes=self.looking_bytes,
            generated_context=self.generated_context,
        )

    @property
    def memory(self) -> Mapping[str, float]:
        """Bytes by term at the peak, what a device needs beside them included."""
        device = self.device_memory
        allocator = device.reserved - device.allocated
        beside = {"runtime": device.device - device.reserved}
        return {**self.account.by_term, **({"allocator": allocator} if allocator else {}), **beside}

    @property
    def device_memory(self) -> DeviceMemory:
        return device_memory(self.account.peak_memory_bytes, self.setting.device_kind)

    @property
    def useful_tokens(self) -> float:
        """Of a step: those that are no padding."""
        return self.step.tokens * PACKING_FILL

    @property
    def seconds_per_useful_token(self) -> float:
        return self.step.seconds / self.useful_tokens

    @property
    def flops_per_useful_token(self) -> float:
        return self.step.flops / self.useful_tokens


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Why a way does not fit: the least that it would take of everything."""

    name: str
    least: Cost
    setting: MemorySetting
    scoring_bytes: float
    looking_bytes: float

    def account(self, request: Request) -> MemoryAccount:
        """Allocated bytes of every phase of the job, by term."""
        return job_account(
            request.shape,
            self.setting,
            scoring_bytes=self.scoring_bytes,
            looking_bytes=self.looking_bytes,
            generated_context=request.generated_context,
        )


class Pricing:
    """Prices of one request; what several ways share is worked out once."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.priors = load_priors()
        self.predictor = Predictor(
            request.shape,
            request.device,
            request.dev,
            request.test,
            guard=request.guard,
            max_new_tokens=request.max_new_tokens,
            serving=request.serving,
        )
        self._scoring: dict[tuple[Any, str, int], Cost] = {}
        self.too_short = ""
        self.unsuited = ""
        """Why the online method cannot run on steps held in some way."""
        """Why a run of what was priced last would end too early, where one would."""
        named = request.fixed.get("training.online", Training().online)
        self.online: OnlineMethod = resolve("online", named)
        self.preference = request.preference
        self.sides = 1 if self.preference is None else SIDES

    def price(self, held: Held, scorer: Scorer, spec: Spec) -> Candidate | Refused | None:
        """The candidate at the micro-batch that takes least time a token; or what it lacks; or None
        where no micro-batch makes a step that the pool fills."""
        refusal: Refused | None = None
        fastest, most = held.fastest_first(), self.request.most_allocated
        for index in sorted(fastest, key=lambda each: held.peak(each, False) > most):
            found = self._at(held, index, scorer, spec)
            if isinstance(found, Candidate):
                return found
            if found is not None and (
                refusal is None or _excess(self.request, found) < _excess(self.request, refusal)
            ):
                refusal = found
        return refusal

    def _at(self, held: Held, index: int, scorer: Scorer, spec: Spec) -> Candidate | Refused | None:
        request, num_ranks = self.request.on(held.num_ranks), held.num_ranks
        micro_batch = held.micro_batches[index]
        pool_tokens = float(request.pool.num_tokens) if request.pool else math.inf
        setting = held.setting(index)
        if why := why_unsuited(self.online, request.shape, setting):
            self.unsuited = why
            return None
        plain = held.micro(index)
        if self.preference is not None:
            if why_no_pairs(setting):
                return None
            plain = on_average(plain, request.shape, setting, request.pool)
        micro = self.online.step_cost(plain, request.shape, setting)
        costs = self.predictor.of(setting, micro)
        scoring = self.scoring(scorer, setting)
        once = scoring + costs.load * (1 + self._loads(scorer, setting)) + costs.test
        once += costs.serving
        # Steps without watching first, for how much watching a share of them pays; then with it.
        left = minus(request, once + costs.watching(2, 1))
        wanted, binding = affordable(request, costs.step, left, pool_tokens)
        _, kept, _ = self._repetition(scorer, wanted * costs.step.tokens * PACKING_FILL)
        online = self._online(setting, kept) + self._reference(setting, kept)
        once += online
        rows = micro_batch * num_ranks
        smallest = int(micro_batch == self.sides)
        trained: Any = held.techniques[0]
        cycle = trained.cycle_steps(request.shape)
        accumulation = accumulation_of(
            request, wanted * rows, rows, least=smallest, steps=2 * cycle
        )
        if accumulation < 1:
            return None
        accumulation = min(accumulation, held.most_accumulated)
        looked = max(scoring.peak_memory_bytes, online.peak_memory_bytes)
        chosen = micro.peak_memory_bytes - plain.peak_memory_bytes
        peak = max(held.peak(index, accumulation > 1) + chosen, looked)
        again = [self.scoring_bytes(each, setting) for each in looking_in(request.fixed, scorer)]
        if looking := max(again, default=0.0):
            peak = max(peak, held.resident + scoring_beside(request.shape, setting, looking))
        kind = request.device.kind
        peak = device_memory(peak, kind).device
        scored = device_memory(scoring.peak_memory_bytes, kind).device if request.pool else 0.0
        step = costs.step * accumulation
        evaluations, saves = watch(request, costs, step, wanted / accumulation)
        each = step  # with its share of what was asked to come at fixed distances
        if apart := request.fixed.get("training.eval_steps"):
            each = each + (costs.evaluation + costs.checkpoint) * (1 / apart)
            evaluations, saves = 2, 1
        left = minus(request, once + costs.watching(evaluations, saves))
        possible, binding = affordable(request, each, left, pool_tokens)
        steps = int(possible)
        if apart:
            steps = watched_apart(request, costs, step, once, pool_tokens, int(apart), steps)
        evaluations, saves = watch(request, costs, step, steps)
        if request.fixed.get("training.max_steps"):
            steps = min(steps, int(request.fixed["training.max_steps"]))
        if steps < 1 and binding == "epochs":
            return None
        if 0 < steps < cycle:
            self.too_short = (
                f"{name_of(trained)} takes {cycle:,} steps to come round once, and {steps:,} fit\n"
                "hint: a shorter turn (its options), another technique, or a larger budget"
            )
            return None
        if steps < 1 or peak * request.memory_margin > request.memory_limit:
            least = reserved(request, once + costs.watching(evaluations, saves) + step)
            return Refused(
                name=held.describe(f"{micro_batch}x{accumulation}"),
                least=replace(least, peak_memory_bytes=peak * request.memory_margin),
                setting=setting.changed(gradient_accumulation_steps=accumulation),
                scoring_bytes=scoring.peak_memory_bytes,
                looking_bytes=looking,
            )
        tokens = steps * step.tokens * PACKING_FILL
        epochs, keep, effective = self._repetition(scorer, tokens)
        training = online + costs.load + step * steps + costs.watching(evaluations, saves)
        stages = {
            "select": replace(
                scoring + costs.load * self._loads(scorer, setting), peak_memory_bytes=scored
            ),
            "train": replace(training, peak_memory_bytes=peak),
            "test": costs.test,
        }
        if request.serving is not None:
            stages["decode"] = costs.serving
        return Candidate(
            shape=request.shape,
            held=held,
            setting=setting.changed(gradient_accumulation_steps=accumulation),
            sides=self.sides,
            scorer=name_of(scorer),
            scorer_spec=spec,
            is_scored=self._is_scored(scorer, setting),
            scoring_bytes=scoring.peak_memory_bytes,
            looking_bytes=looking,
            generated_context=request.generated_context,
            peak_memory_bytes=peak,
            step=request.rates.of(step),
            max_steps=steps,
            ceiling=ceiling(request, each, left, pool_tokens, steps, binding),
            num_evaluations=evaluations,
            epochs=epochs,
            keep_tokens=keep,
            by_stage={name: request.rates.of(cost) for name, cost in stages.items()},
            binding=binding,
            gain=prior_gain(effective, held.quality, self.priors.of(scorer)),
        )

    def _repetition(self, scorer: Scorer, tokens: float) -> tuple[float, float, float]:
        """Epochs, tokens to keep and effective tokens, where training takes ``tokens``."""
        pool, fixed = self.request.pool, self.request.fixed
        return best_repetition(
            self.priors.of(scorer),
            tokens,
            float(pool.num_tokens) if pool else math.inf,
            float(pool.max_tokens) if pool else 0.0,
            fixed.get("selection.max_tokens"),
            fixed.get("training.epochs"),
        )

    def _online(self, setting: MemorySetting, tokens: float) -> Cost:
        """What the online method that the user named does beside the steps, on ``tokens`` of the
        pool."""
        pool = self.request.pool
        if pool is None or not pool.num_tokens:
            return Cost()
        work = self._work(pool.part(min(1.0, tokens / pool.num_tokens)), setting)
        cost = self.online.cost(work)
        if cost.flops:
            cost += Cost(seconds=self.predictor.load_seconds(setting))
        return cost + self.online.renewal_cost(work) * self.online.renewals

    def _reference(self, setting: MemorySetting, tokens: float) -> Cost:
        """Of asking the reference once, for the pairs that ``tokens`` of the pool are."""
        pool, pairs = self.request.pool, self.preference
        if pool is None or pairs is None or not pairs.precompute_ref_log_probs:
            return Cost()
        kept = pool.part(min(1.0, tokens / pool.num_tokens))
        return reference_cost(self.request.shape, kept, setting, self.request.device)

    def scoring_bytes(self, scorer: Scorer, setting: MemorySetting) -> float:
        """Of a scorer's pass with the model that it asks."""
        return self.scoring(scorer, setting).peak_memory_bytes

    @cached_property
    def _named(self) -> list[Filter | Picker]:
        """Those of the user's own that may look at the model."""
        fixed = self.request.fixed
        named = [("filter", spec) for spec in fixed.get("selection.filters", ())]
        named += [("picker", spec) for key, spec in fixed.items() if key == "selection.picker"]
        return [resolve(kind, spec) for kind, spec in named]

    @cached_property
    def _needs_vectors(self) -> bool:
        return any(each.needs_vectors for each in self._named)

    @cached_property
    def _looks(self) -> bool:
        """Whether they do, for vectors or for anything else."""
        pickers = (each for each in self._named if isinstance(each, Picker))
        return self._needs_vectors or any(picker.needs_pairs for picker in pickers)

    def _is_scored(self, scorer: Scorer, setting: MemorySetting) -> bool:
        return self.request.is_scored(scorer, read_in(setting))

    def _loads(self, scorer: Scorer, setting: MemorySetting) -> int:
        """Models that have to be loaded to choose rows: the scorer's, and the one to be trained
        where vectors are asked of it."""
        scores = scorer.needs_model and not self._is_scored(scorer, setting)
        is_there = scores and not scorer.model
        return int(scores) + int(self._looks and not is_there)

    def scoring(self, scorer: Scorer, setting: MemorySetting) -> Cost:
        """Of scoring the pool, where that has not been paid for, and of picking."""
        request = self.request
        if request.pool is None:
            return Cost()
        key = scorer, setting.dtype, setting.sequence
        if key not in self._scoring:
            work = self._work(request.pool, setting)
            cost = Cost() if self._is_scored(scorer, setting) else scorer.cost(work)
            if self._needs_vectors:
                cost += embedding_cost(work, request.pool)
            if spec := request.fixed.get("selection.picker"):
                cost += resolve("picker", spec).cost(work)
            self._scoring[key] = replace(
                cost, seconds=cost.seconds + PICK_SECONDS * request.pool.num_examples
            )
        return self._scoring[key]

    def _work(self, pool: PoolStats, setting: MemorySetting) -> Work:
        request = self.request
        return Work(
            pool=pool,
            targets=request.targets,
            shape=request.shape,
            device=request.device,
            dtype=read_in(setting),
            max_length=setting.sequence,
            adapter=setting.adapter,
            token_ratio=request.token_ratio,
        )


def excesses(request: Request, least: Cost) -> dict[str, float]:
    """Resource -> how many times its limit would be needed, of those that do not suffice."""
    found = {}
    limits = {name: request.budget.limit(name) for name in request.budget.limited}
    for name, limit in {**limits, "peak_memory_bytes": request.memory_limit}.items():
        needed = least.of(name)
        times = math.inf if needed is None else needed / (limit or math.inf)
        if times > 1.0:
            found[name] = times
    return found


def _excess(request: Request, refusal: Refused) -> tuple[int, float]:
    """How far a refused way is from fitting: how many limits it passes, and by how much."""
    found = excesses(request, refusal.least)
    return len(found), float(np.prod(list(found.values()))) if found else 0.0
