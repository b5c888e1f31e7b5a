"""From what the user asked to a planned run folder: read and check everything, then plan.

All of it happens before a FLOP is spent, and in a draft folder that is renamed at the end: a
mistake leaves nothing half-written.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from thrifty import notes, origins, planned_before, planner
from thrifty.asked_rows import Stores, check_masked, check_nothing_aside, read_asked, stats_together
from thrifty.choices import sequence_of
from thrifty.core import plan as plans
from thrifty.core import quantities, sums
from thrifty.core.budget import Budget
from thrifty.core.durable import make_folder, rename_durably, sync_folder
from thrifty.core.ledger import Ledger, Rates
from thrifty.core.plan import ModelSource, Objective, Plan, PoolSource, Target
from thrifty.core.redaction import redact
from thrifty.core.resolve import resolve
from thrifty.core.target_names import check_target_name
from thrifty.costs.hardware import Device, dollars_per_hour, load_device
from thrifty.costs.shape import ModelShape, read_config, read_shape
from thrifty.in_sequence import in_sequence
from thrifty.pilot_plan import with_pilot
from thrifty.predictions import check_others_trained, generated_context
from thrifty.run_folder import RunFolder
from thrifty.signals.models import locate
from thrifty.signals.weight_files import check_weights

# Imported where data are read: a plan of a config alone answers before pyarrow would have loaded.
if TYPE_CHECKING:
    from thrifty.core.contracts import Scorer


Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the user asked for, as the command line or a caller gives it."""

    model: str
    pool: tuple[str, ...] = ()
    targets: Mapping[str, Target] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)
    task: Literal["sft", "continued", "preference"] = "sft"
    revision: str | None = None
    device: str | None = None
    dollars_per_hour: float | None = None
    control: bool = False
    strict: bool = False
    """Whether a row that cannot be used is an error; else it is set aside."""
    techniques: tuple[str, ...] = ()
    """Memory techniques that the plan must have."""
    num_devices: int = 1
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """plan.yaml keys that the planner must take as they are; ``auto`` leaves one to it."""

    def __post_init__(self) -> None:
        price = self.dollars_per_hour
        if price is not None and not 0 < price < math.inf:
            raise ValueError(f"--price must be more than zero, not {price}\nhint: like 2.50")
        left = {key: value for key, value in self.fixed.items() if value != "auto"}
        limits = {key: left.pop(key) for key in list(left) if key.startswith("budget.")}
        object.__setattr__(self, "fixed", left)
        if limits:  # a limit set as a key is a limit all the same
            values = self.budget.to_dict()
            values |= {key.removeprefix("budget."): value for key, value in limits.items()}
            object.__setattr__(self, "budget", plans.read_budget(values))


def quick_plan(
    asked: Asked, say: Say = lambda line: None
) -> tuple[planner.Planned, planner.Request]:
    """Plan from the model's config alone: no pool, no tokenizer, no weights, nothing written."""
    if asked.targets:
        raise ValueError("a target without a pool steers nothing\nhint: add --pool ROWS")
    _check_fixed(asked)
    folder, _ = locate(asked.model, asked.revision, weights=False)
    shape = read_shape(folder)
    check_weights(folder, shape)
    for note in notes.of_config(read_config(folder)):
        say(note)
    request = _request(asked, shape)
    return planner.search(request), request


def plan_run(asked: Asked, folder: Path, say: Say) -> tuple[planner.Planned, planner.Request, Plan]:
    """Read pool and targets, plan, and leave a run folder at ``folder``.

    Raises ValueError for anything that cannot be used, planner.NoPlanFits where the budget is too
    small; ``folder`` is then as it was. One that holds this very plan already is kept.
    """
    mark = planned_before.digest(asked)
    there = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if there and not planned_before.is_of(RunFolder(folder), mark):
        raise _exists(folder)
    skeleton = _check_fixed(asked)
    objective = skeleton.objective
    asked = _with_own_questions(asked, objective)
    model_folder, revision = locate(asked.model, asked.revision, weights=False)
    shape = read_shape(model_folder)
    if not check_weights(model_folder, shape) and revision is None:
        say(f"{model_folder} has no safetensors weights yet: a run will need them")
    for note in notes.of_config(read_config(model_folder)):
        say(note)
    from thrifty import near_overlap

    folder = folder.absolute()
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    make_folder(folder.parent)
    draft = RunFolder(folder.with_name(f".{folder.name}.draft"))
    killed = folder.with_name(f".{folder.name}.killed")
    _set_aside(draft, killed)
    shutil.rmtree(draft.path, ignore_errors=True)
    draft.path.mkdir()
    try:
        files = origins.files_of_rows(skeleton)
        stores = read_asked(asked, objective, shape, model_folder, draft, say, killed)
        shutil.rmtree(killed, ignore_errors=True)
        origins.note_sources(draft, files, say)
        check_masked(stores.pool, skeleton.pool.most_masked)
        if asked.strict:
            check_nothing_aside(draft)
        for note in near_overlap.of_run(draft):
            say(note)
        if asked.device in (None, "local"):
            from thrifty.calibration import measure_once

            measure_once(say)
        from thrifty.data.store import open_store
        from thrifty.signals.token_ratio import token_ratios

        request = replace(
            _request(asked, shape, stores),
            token_ratio=token_ratios(open_store(draft.pool)),
            is_scored=_kept_scores(stores, model_folder),
        )
        for note in notes.of_device(request.device, request.budget):
            say(note)
        for note in notes.of_objective(objective, request.dev):
            say(note)
        asked, request, found = _searched(asked, request)
        piloted = with_pilot(request, found)
        told = in_sequence(piloted.planned, request).text
        planned = replace(piloted.planned, why={**piloted.planned.why, "joint": told})
        plan = _plan(asked, revision, planned, request, stores, piloted.pilot)
        _check_lengths(plan, draft)
        sums.write(draft.plan_file, plans.dump(plan))
        prepared = {**what_was_read(plan), "training.epochs": plan.training.epochs}
        prepared["model"] = origins.model_marks(model_folder)
        prepared[planned_before.ASKED] = mark
        sums.write(draft.prepared, json.dumps(prepared))
        origins.note_weights(draft, model_folder)
        rates = request.on(plan.training.devices).rates
        with Ledger.create(draft.ledger_file, asked.budget, rates) as ledger:
            _write_decisions(ledger, plan, planned)
        if there:
            _keep(folder, draft, say)
        else:
            if folder.exists():
                folder.rmdir()
            rename_durably(draft.path, folder)
    except BaseException:
        for remains in (draft.path, killed):
            shutil.rmtree(remains, ignore_errors=True)
        with contextlib.suppress(OSError):  # the error itself is what matters
            for parent in new_parents:
                parent.rmdir()
        raise
    return planned, request, plan


def _set_aside(draft: RunFolder, killed: Path) -> None:
    """What a plan that was killed left of the pool, for this one."""
    if draft.pool.is_dir():
        from thrifty.data.unfinished import set_aside

        set_aside(draft.pool, killed)


def _exists(folder: Path) -> ValueError:
    goes_on = f"`thrifty run {folder}` goes on with it; " * (folder / "plan.yaml").is_file()
    return ValueError(
        f"{folder} exists already\nhint: {goes_on}choose another -o, or delete it first"
    )


def _keep(folder: Path, draft: RunFolder, say: Say) -> None:
    """Leave the run as it lies there: the same command made it, and may have been killed as it
    ended. Raises ValueError where it is not what was planned just now."""
    if not planned_before.is_same(RunFolder(folder), draft):
        raise _exists(folder)
    sync_folder(folder.parent)
    shutil.rmtree(draft.path)
    say(f"{folder} holds this very plan already: it is kept as it is")


def _with_own_questions(asked: Asked, objective: Objective) -> Asked:
    """Targets whose dev and test rows are the metric's, where it brings them."""
    if objective.answers is None or not objective.answers.asks_own:
        return asked
    own = (objective.unit,)
    targets = {name: replace(t, dev=own, test=own) for name, t in asked.targets.items()}
    return replace(asked, targets=targets)


def what_was_read(plan: Plan) -> dict[str, Any]:
    """The fields of a plan that say which rows lie prepared in its folder, and as what."""
    values = plans.to_dict(plan)
    read = {
        "task": plan.task,
        "pool.sources": values["pool"]["sources"],
        "targets": {name: _rows_of(target) for name, target in values["targets"].items()},
        "training.replay": values["training"]["replay"],
    }
    if plan.guard is not None:
        read["guard.sources"] = values["guard"]["sources"]
    if plan.objective.answers and plan.objective.answers.asks_own:
        read["objective.metric"] = values["objective"]["metric"]
    return read


def _rows_of(target: Mapping[str, Any]) -> dict[str, Any]:
    """Of a target what says which rows are its own."""
    known = {key: value for key, value in target.items() if key not in ("floor", "pilot")}
    pilot = {"pilot": target["pilot"]} if target["pilot"] else {}
    return {**known, **pilot, "weight": None}


def _check_fixed(asked: Asked) -> Plan:
    """The plan as far as the user set it. Raises ValueError for keys that are set to what no plan
    can have, before all else."""
    for name in asked.targets:
        check_target_name(name)
    fixed = dict(asked.fixed)
    fixed.setdefault("training.max_steps", 10**9)
    fixed.setdefault("training.save_steps", fixed.get("training.eval_steps", 1))
    fixed.setdefault("training.devices", asked.num_devices if asked.pool else 1)
    skeleton = Plan(
        task=asked.task,
        model=ModelSource(path=asked.model),
        pool=PoolSource(sources=asked.pool or ("none yet",)),
        targets=dict(asked.targets),
        budget=asked.budget,
    )
    values = plans.to_dict(skeleton)
    values["training"]["memory"] = {}  # of whose techniques options alone may be set
    for key, value in fixed.items():
        plans.put(values, key, value)
    plan = plans.from_dict(values)
    report_to = plan.training.report_to
    if report_to:  # alone needs transformers to be loaded
        from thrifty.reporters import check_reporters

        check_reporters(report_to)
    if plan.objective.answers is not None:
        plan.objective.answers.check()
    return plan


def _request(asked: Asked, shape: ModelShape, stores: Stores | None = None) -> planner.Request:
    device = load_device(asked.device)
    price, objective = _price(asked, device), _check_fixed(asked).objective
    if asked.budget.dollars is not None and price is None:
        raise ValueError(
            f"the budget limits dollars but the price of {device.name} is unknown\n"
            "hint: --price DOLLARS_PER_HOUR, or put it into your prices.yaml"
        )
    request = planner.Request(
        shape=shape,
        budget=asked.budget,
        device=device,
        rates=Rates.hourly(price, device.tdp_watts),
        pool=stats_together([stores.pool]) if stores else None,
        targets={
            name: found
            for name, parts in (stores.targets.items() if stores else ())
            if "signal" in parts and (found := stats_together([parts["signal"]]))
        },
        dev=stores.together("dev", asked.task) if stores else None,
        tried=stores.together("pilot", asked.task) if stores else None,
        test=stores.together("test", asked.task) if stores else None,
        task=asked.task,
        fixed=asked.fixed,
        techniques=asked.techniques,
        num_devices=int(asked.fixed.get("training.devices", asked.num_devices)),
        guard=stats_together([stores.guard]) if stores and stores.guard else None,
        max_new_tokens=objective.generated_tokens,
        serving=objective.serving,
    )
    context = generated_context(sequence_of(request), objective.generated_tokens)
    return replace(request, generated_context=context)


def _searched(
    asked: Asked, request: planner.Request
) -> tuple[Asked, planner.Request, planner.Planned]:
    """The plan. Where nothing fits that leaves room for looking at the model again, and doing so is
    an option, rows are chosen once. Raises NoPlanFits."""
    try:
        return asked, request, planner.search(request)
    except planner.NoPlanFits as refusal:
        if asked.fixed.get("selection.refresh.when") != "governed":
            raise
        once = {"selection.refresh.when": "never"}
        asked = replace(asked, fixed={**asked.fixed, **once})
        request = replace(request, fixed={**request.fixed, **once})
        planned = planner.search(request)
        lacking = str(refusal).partition("\n")[0]
        told = f"rows are chosen once: with another look at the model, {lacking}"
        why = {**planned.why, "selection.refresh.when": told}
        return asked, request, replace(planned, why=why)


def _kept_scores(stores: Stores, model: Path) -> Callable[[Scorer, str], bool]:
    """Which scorers' work on these rows an earlier run has done, by the dtype of their models."""
    from thrifty.score_names import ScoreNames
    from thrifty.signals.models import model_sha256

    signals = {name: parts["signal"] for name, parts in stores.targets.items() if "signal" in parts}
    names = ScoreNames(signals=signals, model=cache(lambda path: model_sha256(path or str(model))))
    return cache(lambda scorer, dtype: names.are_kept(scorer, stores.pool, dtype))


def _price(asked: Asked, device: Device) -> float | None:
    """Dollars an hour: as asked, else as listed."""
    price = asked.fixed.get("dollars_per_hour", asked.dollars_per_hour)
    return dollars_per_hour(device) if price is None else quantities.parse_dollars(price)


def _plan(
    asked: Asked,
    revision: str | None,
    planned: planner.Planned,
    request: planner.Request,
    stores: Stores,
    pilot: plans.Pilot,
) -> Plan:
    """The chosen combination with the rest of the rules applied, then the user's own keys."""
    c = planned.chosen
    training = planned.training
    predicted = {name: cost.to_dict() for name, cost in c.by_stage.items()}
    picker = "balanced" if len(asked.targets) > 1 else "top_k"
    whole = c.keep_tokens >= stores.pool.num_tokens
    plan = Plan(
        task=asked.task,
        # A folder's absolute path, so that the run may be gone on with from anywhere.
        model=ModelSource(
            path=asked.model if revision else str(Path(asked.model).expanduser().absolute()),
            revision=revision,
        ),
        pool=PoolSource(sources=asked.pool, fingerprint=stores.pool.fingerprint),
        targets=dict(asked.targets),
        budget=asked.budget,
        selection=plans.Selection(
            scorer=c.scorer_spec, picker=picker, max_tokens=None if whole else c.keep_tokens
        ),
        pilot=pilot,
        training=training,
        control=asked.control,
        device=asked.device or "local",
        dollars_per_hour=_price(asked, request.device),
        predicted=predicted,
        why=dict(planned.why),
    )
    values = plans.to_dict(plan)
    for key, value in asked.fixed.items():
        # Of which the candidates were made, and what a pilot tries.
        if not key.startswith(("training.memory.", "pilot")):
            plans.put(values, key, value)
    plan = plans.from_dict(_without_secrets(values))
    check_others_trained(plan.training, request.shape, request.device)
    return plan


def _check_lengths(plan: Plan, draft: RunFolder) -> None:
    """Raise ValueError where what is trained needs short rows, and there are none."""
    if short := resolve("trained", plan.training.memory.trained).short:
        from thrifty.data.store import open_store
        from thrifty.data.two_lengths import short_ones

        shards = open_store(draft.pool).shards()
        short_ones(np.concatenate([shard.num_tokens for shard in shards]), short)


def _without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """A plan's values with no password in the sources: their rows were read, and are kept."""
    holders = [(values["pool"], "sources"), (values["training"], "replay")]
    holders += [(values["guard"], "sources")] if values.get("guard") else []
    holders += [
        (target, part)
        for target in values["targets"].values()
        for part in ("signal", "dev", "pilot", "test")
    ]
    for holder, key in holders:
        holder[key] = [redact(source) for source in holder[key] or ()]
    return values


def _write_decisions(ledger: Ledger, plan: Plan, planned: planner.Planned) -> None:
    chosen = planned.choice.chosen or planned.chosen.name
    ledger.decide("scorer and technique", chosen, planned.choice.reason, choice=planned.choice)
    for key, why in plan.why.items():
        ledger.decide(key, None, why)


def model_facts(asked: Asked) -> dict[str, Any]:
    """What `plan --json` says of the model."""
    folder, revision = locate(asked.model, asked.revision, weights=False)
    shape = read_shape(folder)
    return {
        "path": asked.model,
        "revision": revision,
        "model_type": shape.model_type,
        "num_parameters": shape.num_parameters,
        "num_parameters_by_part": shape.parameters_by_part,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
    }
