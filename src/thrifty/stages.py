"""The stages of a run, each resumable, each charged to the ledger, none done twice.

A ``Branch`` says on which account and in which folder: the run itself, or its control, the same job
on a uniform choice at the same total FLOPs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from thrifty import checkpoints, selection, training
from thrifty.core.budget import Budget, Cost
from thrifty.core.contracts import Held, Rows, Tokens
from thrifty.core.durable import write_atomically
from thrifty.core.ledger import BudgetExceeded, Ledger, Stage
from thrifty.core.ordering import best_first, fill
from thrifty.core.plan import Plan
from thrifty.core.resolve import parse_spec, resolve
from thrifty.costs.hardware import Device, load_device
from thrifty.costs.shape import ModelShape, read_shape
from thrifty.data.packing import PackedDataset
from thrifty.data.store import Store, open_store
from thrifty.data.tokens import load_tokenizer
from thrifty.evaluation import Measured, measure, measure_flops
from thrifty.predictions import Predictions, predictions
from thrifty.preparation import POOL_AS_TARGET, Say, stats_together, what_was_read
from thrifty.run_folder import RunFolder
from thrifty.signals.models import (
    LoadedModels,
    load_model,
    local_device,
    locate,
    weights_sha256,
)
from thrifty.signals.peak_memory import peak_noted


@dataclass(frozen=True)
class Branch:
    """Where a job's spending goes and what it is trained on."""

    account: str
    plan: Plan
    limit: Budget | None = None

    def stage_name(self, name: str) -> str:
        return name if self.account == "budget" else f"{self.account}-{name}"


class Work:
    """A run folder at work, with everything that its stages share, each thing loaded once."""

    def __init__(self, run: RunFolder, plan: Plan, ledger: Ledger, say: Say) -> None:
        self.run = run
        self.plan = plan
        self.ledger = ledger
        self.say = say
        self.main = Branch("budget", plan)

    @cached_property
    def base(self) -> Path:
        return locate(self.plan.model.path, self.plan.model.revision, weights=True)[0]

    @cached_property
    def base_sha256(self) -> str:
        """Of the base weights. Raises ValueError where they are not those the run began with."""
        found = weights_sha256(self.base)
        known_file = self.run.path / "base.sha256"
        known = self.plan.model.sha256
        if known is None and known_file.is_file():
            known = known_file.read_text(encoding="utf-8").strip()
        if known is None:
            write_atomically(known_file, found + "\n")
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

    def rows(self, part: str) -> dict[str, Rows]:
        """Target name -> rows of a part; only targets that have it."""
        names = list(self.plan.targets) or [POOL_AS_TARGET]
        folders = {name: self.run.target(name, part) for name in names}
        return {
            name: _whole(open_store(folder))
            for name, folder in folders.items()
            if (folder / "manifest.json").is_file()
        }

    @cached_property
    def dev(self) -> dict[str, Rows]:
        return self.rows("dev")

    @property
    def has_test(self) -> bool:
        return bool(self._stores("test"))

    def weights(self, names: Mapping[str, Any]) -> dict[str, float]:
        targets = self.plan.targets
        return {name: targets[name].weight if name in targets else 1.0 for name in names}

    @cached_property
    def held(self) -> Held:
        prints = {}
        for part in ("dev", "test"):
            for name, rows in self.rows(part).items():
                prints[f"{part} rows of {name}"] = frozenset(map(bytes, rows.fingerprints))
        return Held(prints)

    @cached_property
    def models(self) -> LoadedModels:
        return LoadedModels(self.base, self.plan.training.dtype, local_device())

    def predicted(self, plan: Plan) -> Predictions:
        """As planned, but the FLOPs of evaluations exactly, for no limit may be passed."""
        dev = stats_together([open_store(f).manifest for f in self._stores("dev")])
        test = stats_together([open_store(f).manifest for f in self._stores("test")])
        costs = predictions(plan.training, self.shape, self.device, dev, test)
        most = plan.training.micro_batch_tokens
        once, twice = (measure_flops(self.shape, self.rows(p), most) for p in ("dev", "test"))
        return replace(
            costs,
            evaluation=replace(costs.evaluation, flops=once),
            test=replace(costs.test, flops=2 * twice),
        )

    def _stores(self, part: str) -> list[Path]:
        names = list(self.plan.targets) or [POOL_AS_TARGET]
        folders = [self.run.target(name, part) for name in names]
        return [f for f in folders if (f / "manifest.json").is_file()]


@contextmanager
def at_work(run: RunFolder, say: Say, overrides: tuple[str, ...] = ()) -> Iterator[Work]:
    """Hold the run's lock and ledger. Raises ValueError for a run that cannot be worked on."""
    plan = run.plan(overrides)
    if plan.task == "preference":
        raise ValueError(
            "training on preferences is not built yet; the rows were read and validated\n"
            "hint: task: sft trains on prompt and completion rows"
        )
    training.check_reporters(plan.training.report_to)
    _check_prepared(run, plan)
    with run.working() as ledger:
        ledger.set_budget(plan.budget)
        yield Work(run, plan, ledger, say)


def _check_prepared(run: RunFolder, plan: Plan) -> None:
    """The rows that lie in the folder must be those that the plan names."""
    try:
        prepared = json.loads(run.prepared.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(
            f"{run.path} does not say what rows it was prepared from: another version made it\n"
            "hint: `thrifty plan` again"
        ) from None
    for key, value in what_was_read(plan).items():
        if prepared.get(key) != json.loads(json.dumps(value)):
            raise ValueError(
                f"plan.yaml's {key} is not what {run.path} was prepared from\n"
                "hint: `thrifty plan` again for other rows, or undo the edit"
            )


# -- select -------------------------------------------------------------------------------------


def select(work: Work, branch: Branch) -> None:
    """Leave the chosen rows in the branch's ``selected`` folder."""
    plan = branch.plan
    folder = work.run.selected(branch.account)
    if selection.is_done(folder, selection.settings_mark(plan, work.pool)):
        return
    method = parse_spec("scorer", plan.selection.scorer)[0]
    predicted = Cost.from_dict(plan.predicted.get("select", {}))
    if branch is not work.main:
        predicted = Cost()
    name = branch.stage_name("select")
    work.say(f"{name}: scoring {len(work.pool):,} rows with {method}")
    with work.ledger.stage(
        name, method, predicted=predicted, account=branch.account, limit=branch.limit
    ) as stage:
        job = selection.SelectionJob(
            plan=plan,
            pool=work.pool,
            signals=work.rows("signal"),
            held=work.held,
            models=work.models,
            base_sha256=work.base_sha256,
            predicted=predicted,
            load=work.predicted(plan).load,
            scores=work.run.scores(branch.account),
            selected=folder,
        )
        selection.select(job, stage)
        stage.detail = json.loads((folder / selection.MANIFEST).read_text(encoding="utf-8"))
    detail = stage.detail
    work.say(
        f"{name}: kept {detail['num_selected']:,} of {detail['num_candidates']:,} rows, "
        f"{detail['num_tokens']:,} tokens"
    )


# -- train --------------------------------------------------------------------------------------


def train(work: Work, branch: Branch) -> None:
    """Leave the best evaluated model in the branch's ``model`` folder."""
    plan = branch.plan
    predicted = Cost()
    if branch is work.main:
        predicted = Cost.from_dict(plan.predicted.get("train", {}))
    name, folder = branch.stage_name("train"), work.run.model(branch.account)
    mark = _training_mark(work, branch)
    done = training.is_done(folder, mark)
    if done and _is_closed(work.ledger, name):
        return
    work.say(f"{name}: {plan.training.max_steps:,} steps at most, {plan.training.method}")
    with work.ledger.stage(
        name, plan.training.method, predicted=predicted, account=branch.account, limit=branch.limit
    ) as stage:
        if done:  # killed between leaving the model and saying so
            return
        costs = work.predicted(plan)
        job = training.TrainingJob(
            training=plan.training,
            base=work.base,
            base_sha256=work.base_sha256,
            tokenizer=load_tokenizer(str(work.base)),
            data=_training_data(work, branch),
            dev=work.dev,
            weights=work.weights(work.dev),
            rule=resolve("stopping", plan.stopping),
            objective=plan.objective,
            predicted_step=costs.step,
            predicted_evaluation=costs.evaluation,
            predicted_checkpoint=costs.checkpoint,
            predicted_load=costs.load,
            mark=mark,
            reserved=costs.test,
            checkpoints=work.run.checkpoints(branch.account),
            model=folder,
            device=local_device(),
            say=work.say,
        )
        training.train(job, stage)


def _is_closed(ledger: Ledger, name: str) -> bool:
    return any(s["name"] == name and s["state"] == "done" for s in ledger.stages())


def _training_mark(work: Work, branch: Branch) -> str:
    """A hash of what decides the weights. The learning rate may be lowered on the way."""
    settings = {**asdict(branch.plan.training), "learning_rate": None, "report_to": None}
    chosen = json.loads(
        (work.run.selected(branch.account) / selection.MANIFEST).read_text(encoding="utf-8")
    )
    parts = [settings, chosen["settings"], work.base_sha256]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _training_data(work: Work, branch: Branch) -> PackedDataset:
    """Packed sequences for every step that the plan allows, in a fixed order."""
    settings = branch.plan.training
    ids = np.load(work.run.selected(branch.account) / "ids.npy", allow_pickle=False)
    examples: list[Tokens] = list(work.pool.take(ids).tokens)
    if settings.replay_share > 0:
        examples += _replay(work, settings, sum(len(e.input_ids) for e in examples))
    tokens = sum(len(e.input_ids) for e in examples)
    sequences = (
        settings.max_steps
        * settings.per_device_train_batch_size
        * settings.gradient_accumulation_steps
    )
    # A pass packs into at least tokens / length sequences, so these passes are surely enough.
    passes = math.ceil(sequences * settings.max_length / tokens)
    return PackedDataset(examples, settings.max_length, seed=settings.seed, num_epochs=passes)


def _replay(work: Work, settings: Any, tokens: int) -> list[Tokens]:
    """Rows of the replay sources, drawn uniformly, that make up their share of a pass."""
    store = open_store(work.run.replay)
    ids = np.concatenate([shard.ids for shard in store.shards()])
    lengths = np.concatenate([shard.num_tokens for shard in store.shards()])
    order = best_first(np.zeros(len(ids)), ids, settings.seed)
    share = settings.replay_share
    chosen = order[fill(lengths[order], tokens * share / (1 - share))]
    return list(store.take(ids[chosen]).tokens)


# -- test ---------------------------------------------------------------------------------------


def test(work: Work, branch: Branch) -> None:
    """Measure the base and the trained model once on the test rows (the dev rows where there are
    none), and a control against the run's own model, row by row."""
    name, kept = branch.stage_name("test"), work.run.path / "test_losses.npz"
    if _is_closed(work.ledger, name):
        return
    # A control is measured on the rows that its run was.
    part = "test" if work.has_test and (branch is work.main or kept.is_file()) else "dev"
    if branch is work.main and part == "dev":
        return  # training has measured those already
    upper = work.predicted(branch.plan).test if branch is work.main else Cost()
    try:
        with work.ledger.stage(
            name, part, predicted=upper, account=branch.account, limit=branch.limit
        ) as stage:
            _test(work, branch, stage, part, upper)
    except BudgetExceeded as refusal:  # the stage stays open: with a larger budget it is done
        line = str(refusal).partition("\n")[0]
        work.ledger.decide("test or not", "not", f"what is left does not pay for it: {line}")
        work.say(f"not tested: {line}")


def _test(work: Work, branch: Branch, stage: Stage, part: str, upper: Cost) -> None:
    rows, most = work.rows(part), branch.plan.training.micro_batch_tokens
    weights, kept = work.weights(rows), work.run.path / "test_losses.npz"
    with stage.spending("test", upper) as lease, peak_noted(lease, local_device()):
        model = _trained(work, branch)
        after = measure(model, work.shape, rows, weights, lease, most)
        if branch is work.main:
            before = measure(work.models.base(), work.shape, rows, weights, lease, most)
    stage.detail = {"rows": part, "after": after.objective, "by_target": after.losses()}
    if branch is work.main:
        after.save(kept)
        stage.detail |= {
            "before": before.objective,
            "change_stderr": after.stderr(before),
            "by_target_before": before.losses(),
        }
    else:
        own = _own_losses(work, kept, rows, weights)
        stage.detail |= {
            "difference": after.objective - own.objective,
            "difference_stderr": after.stderr(own),
        }


def _own_losses(
    work: Work, kept: Path, rows: Mapping[str, Rows], weights: Mapping[str, float]
) -> Measured:
    """The run's own model's losses on the rows that its control is measured on."""
    if kept.is_file():
        return Measured.load(kept, weights)
    best = checkpoints.best(work.run.checkpoints("budget"))
    assert best is not None, "a control follows its run"
    return Measured.load(best.path / "dev_losses.npz", weights)


def _trained(work: Work, branch: Branch) -> Any:
    folder = work.run.model(branch.account)
    dtype = branch.plan.training.dtype
    if not (folder / "adapter_config.json").is_file():
        return load_model(folder, dtype, local_device())
    from peft import PeftModel

    base = load_model(work.base, dtype, local_device())
    return PeftModel.from_pretrained(base, str(folder), use_safetensors=True)


# -- control ------------------------------------------------------------------------------------


def control(work: Work) -> Branch:
    """The same job on a uniform choice of fresh rows, at the FLOPs that selection and training
    took together."""
    spent = sum((work.ledger.spent(stage=name) for name in ("select", "train")), Cost()).flops
    plan, costs = work.plan, work.predicted(work.plan)
    evaluations = len(work.ledger.evaluations())
    watching = costs.evaluation.flops * evaluations
    steps = max(1, int((spent - watching) / costs.step.flops))
    settings = replace(
        plan.training,
        max_steps=steps,
        cooldown_steps=min(steps - 1, round(steps * _cooldown_share(work))),
        warmup_steps=min(plan.training.warmup_steps, max(steps // 10, 0)),
        eval_steps=max(1, math.ceil(steps / max(evaluations - 1, 1))),
        save_steps=max(1, math.ceil(steps / max(evaluations - 1, 1))),
        report_to=(),
    )
    tokens = float(steps * costs.step.tokens)
    choice = replace(plan.selection, scorer="uniform", picker="top_k", max_tokens=max(tokens, 1.0))
    same = replace(plan, selection=choice, training=settings, control=False)
    return Branch("control", same, Budget(flops=spent + costs.test.flops))


def _cooldown_share(work: Work) -> float:
    """Of the run's steps as they were: it may have ended sooner or later than planned."""
    details = [s["detail"] for s in work.ledger.stages() if s["name"] == "train"]
    taken = max(details[-1].get("steps", 0), 1) if details else 1
    return min(1.0, work.plan.training.cooldown_steps / taken)


def _whole(store: Store) -> Rows:
    ids = np.concatenate([shard.ids for shard in store.shards()])
    return store.take(ids)
