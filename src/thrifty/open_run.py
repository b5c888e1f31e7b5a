"""A run folder at work: its lock and ledger held, what its stages share loaded once.

Whatever can be told to be wrong with the plan or the folder is refused before the lock is taken, so
that a refusal leaves the folder as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from thrifty import notes, ranks
from thrifty.asked_rows import POOL_AS_TARGET, stats_together
from thrifty.core import contracts, sums
from thrifty.core.budget import PRICED, Budget, Cost, Rates
from thrifty.core.contracts import Held, Rows
from thrifty.core.ledger import Ledger
from thrifty.core.plan import Plan
from thrifty.costs.hardware import Device, load_device
from thrifty.costs.shape import ModelShape, read_shape
from thrifty.data.store import Store, open_store
from thrifty.data.tokens import load_tokenizer
from thrifty.frontier_price import frontier_price
from thrifty.memory_plan import dtype_of
from thrifty.origins import LARGE_BYTES, check_origins, weights_size
from thrifty.pair_evaluation import log_probs_flops
from thrifty.predictions import Predictions, check_others_trained, predictions, setting_of
from thrifty.preparation import Say, what_was_read
from thrifty.run_folder import RunFolder
from thrifty.score_names import ScoreNames
from thrifty.signals.embeddings import embedding_cost
from thrifty.signals.energy import energy_counter
from thrifty.signals.models import (
    LoadedModels,
    local_device,
    locate,
    model_sha256,
    read_by_sha256,
    weights_sha256,
)
from thrifty.signals.token_ratio import token_ratios
from thrifty.yardstick import Yardstick


@contextmanager
def at_work(
    run: RunFolder, say: Say, overrides: tuple[str, ...] = (), *, trains: bool = True
) -> Iterator[Work]:
    """Hold the run's lock and ledger. Raises ValueError for a run that cannot be worked on."""
    plan = run.plan(overrides)
    if ranks.world() > 1 or trains:
        _check_ranks(run, plan.training.devices)
    work = Work(run, plan, say, overrides)
    work.check()
    with run.working() as work.ledger:
        for note in notes.of_device(work.device, plan.budget):
            say(note)
        work.ledger.set_budget(plan.budget)
        work.ledger.energy = energy_counter()
        price = plan.dollars_per_hour
        if price is not None and work.device.kind != "cpu":  # whose processes share one
            price *= plan.training.devices
        work.ledger.set_rates(Rates.hourly(price, work.ledger.rates.watts))
        yield work


@dataclass(frozen=True)
class Branch:
    """Where a job's spending goes and what it is trained on."""

    account: str
    plan: Plan
    limit: Budget | None = None
    place: str = ""
    """Its folder in the run's; empty: as the account says."""

    @property
    def folder(self) -> str:
        return self.place or self.account

    def stage_name(self, name: str) -> str:
        return name if self.account == "budget" else f"{self.account}-{name}"


class Work:
    """What the stages of a run share."""

    ledger: Ledger
    """While the run's lock is held."""

    def __init__(
        self, run: RunFolder, plan: Plan, say: Say, overrides: tuple[str, ...] = ()
    ) -> None:
        self.run = run
        self.plan = plan
        self.say = say
        self.overrides = overrides
        self.main = Branch("budget", plan)

    def follow_pilot(self) -> None:
        """Go on under the plan that a pilot has just chosen."""
        self.plan = self.run.plan(self.overrides)
        self.main = Branch("budget", self.plan)

    def check(self) -> None:
        """Raise ValueError for what no stage could get past. Writes nothing."""
        plan = self.plan
        if plan.task == "preference" and find_spec("trl") is None:
            raise ValueError(
                "training on pairs takes TRL's DPOTrainer, and trl is not installed\n"
                "hint: pip install 'thrifty[trl]'"
            )
        if plan.budget.dollars is not None and plan.dollars_per_hour is None:
            raise ValueError(
                "the budget limits dollars but the device's price is unknown\n"
                "hint: dollars_per_hour: 2.50 in plan.yaml, or --set dollars_per_hour=2.50"
            )
        frontier_price(plan.objective, plan.budget)
        if plan.training.report_to:
            from thrifty.reporters import check_reporters

            check_reporters(plan.training.report_to)
        marks = _check_prepared(self.run, plan)
        _check_size(plan, self.pool)
        for part in ("signal", "dev", "pilot", "test"):
            self.stores(part)
        if plan.guard is not None:
            open_store(self.run.guard)
        if (metric := plan.objective.answers) is not None:
            metric.check()
        if plan.training.replay_share:
            open_store(self.run.replay)
        check_others_trained(plan.training, self.shape, self.device)
        check_origins(self.run, self.base, marks, self.say)

    @cached_property
    def base(self) -> Path:
        return locate(self.plan.model.path, self.plan.model.revision, weights=True)[0]

    @cached_property
    def base_sha256(self) -> str:
        """Of the base weights. Raises ValueError where they are not those the run began with."""
        if weights_size(self.base) > LARGE_BYTES:
            self.say("hashing the base model's weights ...")
        found = weights_sha256(self.base)
        known_file = self.run.base_file
        known = self.plan.model.sha256
        if known is None and known_file.is_file():
            sums.check(known_file, "put it back as it was, or plan a new run")
            known = known_file.read_text(encoding="utf-8").strip()
        if known is None:
            sums.write(known_file, found + "\n")
        elif known != found:
            raise ValueError(
                f"the weights in {self.base} have changed since this run began: {known[:12]}... "
                f"then, {found[:12]}... now\nhint: put the old ones back, or plan a new run"
            )
        return found

    @cached_property
    def shape(self) -> ModelShape:
        return read_shape(self.base)

    @cached_property
    def device(self) -> Device:
        return load_device(None if self.plan.device == "local" else self.plan.device)

    @cached_property
    def pool(self) -> Store:
        store = open_store(self.run.pool)
        if self.plan.pool.fingerprint not in (None, store.manifest.fingerprint):
            raise ValueError(
                f"plan.yaml is for another pool than {self.run.pool} holds\n"
                "hint: `thrifty plan` again for another pool"
            )
        length = self.plan.training.max_length
        if store.manifest.max_tokens > length:
            raise ValueError(
                f"training.max_length {length} is shorter than the longest prepared example "
                f"({store.manifest.max_tokens} tokens)\n"
                f"hint: `thrifty plan ... --set training.max_length={length}` cuts examples to it"
            )
        return store

    def stores(self, part: str) -> dict[str, Store]:
        """Target name -> its prepared rows of a part; only targets that have it."""
        targets = self.plan.targets
        given = ("signal", "dev")  # by every target, or made of what it gives
        names = [name for name, each in targets.items() if part in given or getattr(each, part)]
        if not targets and part == "dev":
            names = [POOL_AS_TARGET]
        return {name: open_store(self.run.target(name, part)) for name in names}

    def rows(self, part: str) -> dict[str, Rows]:
        return {name: store.whole() for name, store in self.stores(part).items()}

    @cached_property
    def dev(self) -> dict[str, Rows]:
        return self.rows("dev")

    @property
    def has_test(self) -> bool:
        return bool(self.stores("test"))

    def weights(self, names: Mapping[str, Any]) -> dict[str, float]:
        targets = self.plan.targets
        return {name: targets[name].weight if name in targets else 1.0 for name in names}

    @cached_property
    def guard(self) -> Rows | None:
        return None if self.plan.guard is None else open_store(self.run.guard).whole()

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(str(self.base))

    def yardstick(self, plan: Plan) -> Yardstick:
        """What models under ``plan`` are measured by."""
        setting = setting_of(plan.training, self.shape, self.device)
        return Yardstick(
            objective=plan.objective,
            shape=self.shape.under(setting.adapter),
            tokenizer=self.tokenizer,
            max_tokens=plan.training.micro_batch_tokens,
            guard=self.guard,
        )

    @cached_property
    def held(self) -> Held:
        prints = {}
        for part in ("dev", "pilot", "test"):
            for name, rows in self.rows(part).items():
                prints[f"{part} rows of {name}"] = frozenset(map(bytes, rows.fingerprints))
        if self.guard is not None:
            prints["guard rows"] = frozenset(map(bytes, self.guard.fingerprints))
        return Held(prints)

    @cached_property
    def models(self) -> LoadedModels:
        return LoadedModels(
            self.base,
            dtype_of(self.plan.training.memory),
            local_device(),
            self.say,
            max_length=self.plan.training.max_length,
        )

    @cached_property
    def score_names(self) -> ScoreNames:
        def model(path: str) -> str:
            return model_sha256(path) if path else self.base_sha256 + read_by_sha256(self.base)

        signals = {name: store.manifest for name, store in self.stores("signal").items()}
        return ScoreNames(signals=signals, model=cache(model))

    @cached_property
    def token_ratio(self) -> Callable[[str], float]:
        return token_ratios(self.pool)

    def predicted_vectors(self, plan: Plan) -> Cost:
        """Of a pass that makes a vector of every row."""
        pool = self.pool.manifest.stats
        asked = contracts.Work(
            pool=pool,
            targets={},
            shape=self.shape,
            device=self.device,
            dtype=dtype_of(plan.training.memory),
            max_length=plan.training.max_length,
        )
        return self.ledger.rates.of(embedding_cost(asked, pool))

    def planned(self, stage: str) -> Cost:
        """A stage's cost as planned, at the price that there is now."""
        values = self.plan.predicted.get(stage, {})
        amounts = {k: v for k, v in values.items() if v is not None and k not in PRICED}
        return self.ledger.rates.of(Cost.from_dict(amounts))

    def predicted(self, plan: Plan) -> Predictions:
        """As planned, but the FLOPs of evaluations exactly, or where answers are generated the most
        that they can be, for no limit may be passed."""
        dev, test = (
            stats_together([store.manifest for store in self.stores(part).values()])
            for part in ("dev", "test")
        )
        pool = self.pool.manifest.stats
        guard = None if plan.guard is None else open_store(self.run.guard).manifest.stats
        costs = predictions(
            plan.training,
            self.shape,
            self.device,
            dev,
            test,
            pool,
            guard=guard,
            max_new_tokens=plan.objective.generated_tokens,
            serving=plan.objective.serving,
        )
        yardstick, tested = self.yardstick(plan), self.rows("test")
        shapes = self.shape, self.left(plan)  # the test is of both
        if plan.training.preference is None:
            once = yardstick.flops(self.dev, guarded=True)
            twice = sum(replace(yardstick, shape=each).flops(tested) for each in shapes)
        else:
            most = plan.training.micro_batch_tokens
            once = log_probs_flops(yardstick.shape, self.dev, most)
            twice = sum(log_probs_flops(each, tested, most) for each in shapes)
        return replace(
            costs,
            evaluation=replace(costs.evaluation, flops=once),
            test=replace(costs.test, flops=twice),
        )

    def left(self, plan: Plan) -> ModelShape:
        """The model that a run under ``plan`` leaves, with its adapter."""
        adapter = setting_of(plan.training, self.shape, self.device).adapter
        return self.shape.under(adapter and adapter.saved)


def _check_ranks(run: RunFolder, devices: int) -> None:
    """A process for every device."""
    if devices != ranks.world():
        raise ValueError(
            f"plan.yaml has training.devices {devices}, and this is a job of {ranks.world()} "
            f"process{'es' if ranks.world() > 1 else ''}\n"
            f"hint: `thrifty run {run.path}` starts as many as there are devices; to go on with "
            "fewer or more edit training.devices, and training.gradient_accumulation_steps so that "
            "their product stays"
        )


def _check_prepared(run: RunFolder, plan: Plan) -> dict[str, str] | None:
    """The rows that lie in the folder must be those that the plan names. Returns what was noted of
    the model then."""
    sums.check(run.prepared, "put it back as it was, or `thrifty plan` again")
    try:
        prepared = json.loads(run.prepared.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        prepared = None
    if not isinstance(prepared, dict):
        raise ValueError(
            f"{run.path} does not say what rows it was prepared from: another version made it, or "
            f"{run.prepared.name} is damaged\nhint: `thrifty plan` again"
        )
    for key, value in what_was_read(plan).items():
        if prepared.get(key) != json.loads(json.dumps(value)):
            raise ValueError(
                f"plan.yaml's {key} is not what {run.path} was prepared from\n"
                "hint: `thrifty plan` again for other rows, or undo the edit"
            )
    epochs, planned = plan.training.epochs, prepared.get("training.epochs")
    planned = run.pilot_choice().get("training.epochs", planned)
    if planned is not None and epochs != planned:
        raise ValueError(
            f"training.epochs was edited from {planned:g} to {epochs:g}, which would change "
            f"nothing: training.max_steps decides, {plan.training.max_steps:,} here\n"
            "hint: undo that and edit max_steps, or `thrifty plan` again with "
            f"--set training.epochs={epochs:g}"
        )
    marks: dict[str, str] | None = prepared.get("model")
    return marks


def _check_size(plan: Plan, pool: Store) -> None:
    """Some row must fit what is to be kept."""
    most = plan.selection.max_tokens
    longest = pool.manifest.max_tokens * (1 if plan.training.preference is None else 2)
    if most is None or most >= longest:
        return
    shortest = min(int(shard.num_tokens.min()) for shard in pool.shards())
    if most < shortest:
        raise ValueError(
            f"selection.max_tokens {most:g} keeps nothing: the shortest row of the pool has "
            f"{shortest:,} tokens\nhint: raise selection.max_tokens, or `thrifty plan` again"
        )
