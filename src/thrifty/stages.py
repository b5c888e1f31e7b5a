"""The stages of a run, each resumable, each charged to the ledger, none done twice."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from thrifty import (
    checkpoints,
    disk_space,
    publication,
    ranks,
    refreshes,
    selection,
    training,
    training_rows,
)
from thrifty.core import sums
from thrifty.core.budget import Budget, Cost
from thrifty.core.contracts import Rows
from thrifty.core.ledger import BudgetExceeded, Ledger, Stage
from thrifty.core.plan import Plan, Training
from thrifty.core.plan_refresh import Refresh
from thrifty.core.resolve import parse_spec, resolve
from thrifty.evaluation import Measured
from thrifty.floors import Floors
from thrifty.holdings import (
    choosing_flops,
    dearest_step,
    last_merge,
    memory_switch_of,
    settings_of_others,
)
from thrifty.memory_plan import Techniques, dtype_of, trained_name
from thrifty.open_run import Branch, Work, at_work
from thrifty.pair_evaluation import PairLosses, log_probs_of, share_likelier, share_right
from thrifty.predictions import setting_of
from thrifty.report.words import in_targets
from thrifty.scoring_engines import Engine, on_ranks
from thrifty.sharded_test import ShardedTest
from thrifty.signals.model_folder import ADAPTER
from thrifty.signals.models import load_model, local_device, locate, weights_sha256
from thrifty.signals.peak_memory import peak_noted, release_free_memory
from thrifty.training_phase import Phase

__all__ = ["Branch", "Work", "at_work", "control", "select", "test", "train"]

# -- select -------------------------------------------------------------------------------------


def select(work: Work, branch: Branch, engine: Engine | None = None) -> None:
    """Leave the chosen rows in the branch's ``selected`` folder."""
    plan = branch.plan
    folder = work.run.selected(branch.folder)
    if selection.is_done(folder, selection.settings_mark(plan, work.pool)):
        return
    method = parse_spec("scorer", plan.selection.scorer)[0]
    predicted = work.planned("select") if branch is work.main else Cost()
    name = branch.stage_name("select")
    work.say(f"{name}: scoring {len(work.pool):,} rows with {method}")
    with work.ledger.stage(
        name, method, predicted=predicted, account=branch.account, limit=branch.limit
    ) as stage:
        engine = on_ranks if engine is None and ranks.world() > 1 else engine
        scores = work.run.scores(branch.folder)
        needs = partial(disk_space.selection_needs, plan, work.pool, work.shape, scores)
        with disk_space.room(work.run.path, "selecting", needs):
            selection.select(selection_job(work, branch, predicted, engine), stage)
        stage.detail = json.loads((folder / selection.MANIFEST).read_text(encoding="utf-8"))
    detail = stage.detail
    work.say(
        f"{name}: kept {detail['num_selected']:,} of {detail['num_candidates']:,} rows, "
        f"{detail['num_tokens']:,} tokens"
    )
    if told := in_targets(detail.get("in_targets", {})):
        work.say(f"{name}: {told}")


def selection_job(
    work: Work, branch: Branch, predicted: Cost | None = None, engine: Engine | None = None
) -> selection.SelectionJob:
    """What a choice of the branch's rows is given."""
    plan = branch.plan
    return selection.SelectionJob(
        plan=plan,
        pool=work.pool,
        signals=work.rows("signal"),
        held=work.held,
        models=work.models,
        names=work.score_names,
        base_sha256=work.base_sha256,
        predicted=predicted or Cost(),
        load=work.predicted(plan).load,
        predicted_vectors=work.predicted_vectors(plan),
        scores=work.run.scores(branch.folder),
        selected=work.run.selected(branch.folder),
        engine=engine,
    )


# -- train --------------------------------------------------------------------------------------


def train(work: Work, branch: Branch) -> None:
    """Leave the best evaluated model in the branch's ``model`` folder."""
    plan = branch.plan
    predicted = work.planned("train") if branch is work.main else Cost()
    name, folder = branch.stage_name("train"), work.run.model(branch.folder)
    mark = _training_mark(work, branch)
    done = training.is_done(folder, mark)
    if done and _is_closed(work.ledger, name):
        return
    method = trained_name(plan.training.memory)
    costs = work.predicted(plan)
    work.say(f"{name}: {method}, {_steps(plan.training, predicted, costs.step.tokens)}")
    with work.ledger.stage(
        name, method, predicted=predicted, account=branch.account, limit=branch.limit
    ) as stage:
        if done:  # killed between leaving the model and saying so
            return
        with disk_space.room(work.run.path, "training", partial(_disk_needs, work, branch)):
            job = training_job(work, branch, stage, predicted)
            work.models.release()  # training loads its own
            training.train(job, stage)
        if plan.training.online != Training().online:
            each = job.choosing_flops * plan.training.gradient_accumulation_steps
            training_rows.note_savings(stage, job.rounds, costs.step, each)


def _disk_needs(work: Work, branch: Branch) -> tuple[float, str]:
    """Of the training that is still to be done."""
    settings, saved = branch.plan.training, work.run.checkpoints(branch.folder)
    setting = setting_of(settings, work.shape, work.device)
    others = settings_of_others(work, settings)
    return disk_space.training_needs(settings, work.shape, setting, work.base, saved, others)


def training_job(work: Work, branch: Branch, stage: Stage, predicted: Cost) -> training.TrainingJob:
    """What a training on the rows that the branch selected is given. Charges what its online method
    prepares."""
    plan, mark = branch.plan, _training_mark(work, branch)
    costs = work.predicted(plan)
    chosen = training_rows.chosen_rows(work, branch)
    rounds = training_rows.rounds_of(work, branch, chosen, stage, mark, predicted)
    refresher = refreshes.refresher_of(
        work, branch, stage, rounds, predicted, partial(selection_job, work, branch)
    )
    switch = memory_switch_of(work, plan)
    return training.TrainingJob(
        training=plan.training,
        base=work.base,
        base_sha256=work.base_sha256,
        tokenizer=work.tokenizer,
        data=training_rows.read_by_training(plan.training, rounds),
        rounds=rounds,
        dev=work.dev,
        weights=work.weights(work.dev),
        rule=resolve("stopping", plan.stopping),
        objective=plan.objective,
        yardstick=work.yardstick(plan),
        floors=Floors.of(plan),
        setting=setting_of(plan.training, work.shape, work.device),
        predicted_step=dearest_step(work, plan, costs.step),
        choosing_flops=choosing_flops(work, plan),
        predicted_evaluation=costs.evaluation,
        predicted_checkpoint=costs.checkpoint,
        predicted_load=costs.load,
        predicted_reference=training_rows.predicted_reference(work, branch, chosen),
        predicted_renewal=training_rows.predicted_renewal(work, branch, chosen, rounds.method),
        signals=work.rows("signal") if rounds.method.renewals else {},
        holding=None if switch is None else switch.holding_of(plan.training),
        switch=switch,
        refresher=refresher,
        mark=mark,
        phase=Phase(trained=plan.training.memory.trained if switch is not None else None),
        reserved=costs.test + costs.serving + last_merge(work, plan),
        answering=costs.serving,
        checkpoints=work.run.checkpoints(branch.folder),
        model=work.run.model(branch.folder),
        device=local_device(),
        device_name=plan.device,
        say=work.say,
    )


def _steps(settings: Training, predicted: Cost, per_step: float) -> str:
    """How many steps there will be, as predicted; a plan allows for more where a clock ends it."""
    most = settings.max_steps
    likely = min(most, round(predicted.tokens / per_step))
    if not 0 < likely < most:
        return f"up to {most:,} steps"
    return f"about {likely:,} steps, as planned, and up to {most:,} if they turn out faster"


def _is_closed(ledger: Ledger, name: str) -> bool:
    return any(s["name"] == name and s["state"] == "done" for s in ledger.stages())


def _training_mark(work: Work, branch: Branch) -> str:
    """A hash of what decides the weights. The learning rate may be lowered on the way, and the
    sequences of a step may be dealt to other devices."""
    plan = branch.plan.training
    dealt = ("devices", "parallel", "gradient_accumulation_steps")
    free = ("learning_rate", "report_to", "rewinds", *dealt)
    settings = {**asdict(plan), **dict.fromkeys(free), "step_sequences": plan.step_sequences}
    chosen = json.loads(
        (work.run.selected(branch.folder) / selection.MANIFEST).read_text(encoding="utf-8")
    )
    parts = [settings, chosen["settings"], work.base_sha256]
    if branch.plan.selection.refresh.when != "never":
        parts.append(asdict(branch.plan.selection.refresh))
    if told := _told_of_objective(branch.plan):
        parts.append(told)
    if other := resolve("online", branch.plan.training.online).model:
        parts.append(weights_sha256(locate(other, weights=True)[0]))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _told_of_objective(plan: Plan) -> dict[str, Any]:
    """What decides which model is kept, where it is more than the lowest dev loss."""
    values: dict[str, Any] = {"floors": plan.floors, "guard": plan.guard and asdict(plan.guard)}
    if plan.objective.answers:
        values["metric"] = [plan.objective.metric, plan.objective.max_new_tokens]
    return {name: value for name, value in values.items() if value}


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
            num_rows = sum(len(store) for store in work.stores(part).values())
            needs = partial(disk_space.testing_needs, num_rows)
            with disk_space.room(work.run.path, "testing", needs):
                _test(work, branch, stage, part, upper)
    except BudgetExceeded as refusal:  # the stage stays open: with a larger budget it is done
        line = str(refusal).partition("\n")[0]
        work.ledger.decide("test or not", "not", f"what is left does not pay for it: {line}")
        work.say(f"not tested: {line}")


def _test(work: Work, branch: Branch, stage: Stage, part: str, upper: Cost) -> None:
    name = branch.stage_name("test")
    if work.ledger.spent(stage=name, account=branch.account).flops:
        stage.roll_back(-1, "measured anew")  # a process that was killed had not said what it found
    rows, most = work.rows(part), branch.plan.training.micro_batch_tokens
    weights, kept = work.weights(rows), work.run.path / "test_losses.npz"
    which = "the base and the trained model" if branch is work.main else "its model"
    num_rows = sum(len(some.ids) for some in rows.values())
    work.say(f"{name}: measuring {which} on {num_rows:,} {part} rows")
    more: dict[str, float] = {}
    release_free_memory()  # what training leaves behind
    with stage.spending("test", upper) as lease, peak_noted(lease, local_device()):
        model = None if branch.plan.training.is_cut else _trained(work, branch)
        if (pairs := branch.plan.training.preference) is not None:
            ask = partial(log_probs_of, rows=rows, meter=lease, max_tokens=most)
            now = ask(model, work.left(branch.plan))
            with _base_of(work, model) as base:
                first = ask(base, work.shape)
            losses = PairLosses(pairs.beta, first)
            after, before = losses.measured(now, weights), losses.measured(first, weights)
            more = {"right": share_right(after)}
            more |= {"likelier": share_likelier(now), "likelier_before": share_likelier(first)}
        else:
            of_base = replace(work.yardstick(branch.plan), shape=work.shape)
            left, folder = work.left(branch.plan), work.run.model(branch.folder)
            merged = left.adapter is not None and left.adapter.merged
            worn = merged or (folder / ADAPTER).is_file()
            of_trained = replace(of_base, shape=left if worn else work.shape)
            if model is None:
                publication.check(folder)
                together = ShardedTest(
                    memory=branch.plan.training.memory,
                    base=work.base,
                    trained=folder,
                    of_trained=of_trained,
                    of_base=of_base if branch is work.main else None,
                    rows=rows,
                    weights=weights,
                )
                after, before = together.measured(lease)
            else:
                after = of_trained.measure(model, rows, weights, lease)
                if branch is work.main:
                    with _base_of(work, model) as base:
                        before = of_base.measure(base, rows, weights, lease)
    stage.detail = {"rows": part, "after": after.objective, "by_target": after.losses(), **more}
    if branch is work.main:
        aside = kept.with_name(f".{kept.name}")
        after.save(aside)
        sums.keep(aside, kept)
        stage.detail |= {
            "before": before.objective,
            "change_stderr": after.stderr(before),
            "by_target_before": before.losses(),
            "by_target_stderr": {
                name: losses.stderr(before.by_target[name])
                for name, losses in after.by_target.items()
            },
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
        sums.check(kept, "put it back as it was; without it the control is measured on no rows")
        return Measured.load(kept, weights)
    best = checkpoints.best(work.run.checkpoints("budget"))
    assert best is not None, "a control follows its run"
    return Measured.load(best.path / "dev_losses.npz", weights)


def _trained(work: Work, branch: Branch) -> Any:
    folder, memory = work.run.model(branch.folder), branch.plan.training.memory
    publication.check(folder)
    techniques, adapter = Techniques.of(memory), work.left(branch.plan).adapter
    if adapter is not None and adapter.merged:  # held as in training, its weights in few bits, say
        base = techniques.weights.load(work.base, local_device())
        model = techniques.trained.prepare(base, work.shape, branch.plan.training.seed)
        techniques.trained.restore(model, folder)
        return model
    if not (folder / ADAPTER).is_file():
        return load_model(folder, dtype_of(memory), local_device())
    from peft import PeftModel

    base = techniques.weights.load(work.base, local_device())
    return PeftModel.from_pretrained(base, str(folder), use_safetensors=True)


@contextmanager
def _base_of(work: Work, model: Any) -> Iterator[Any]:
    """The base model; under an adapter the one that it is on, which is not loaded twice."""
    if not hasattr(model, "disable_adapter"):
        yield work.models.base()
        return
    with model.disable_adapter():
        yield model


# -- control ------------------------------------------------------------------------------------


def control(work: Work) -> Branch:
    """The same job on a uniform choice of fresh rows, at the FLOPs that pilot, selection and
    training took together."""
    stages = ("pilot", "select", "train")
    spent = sum((work.ledger.spent(stage=name) for name in stages), Cost()).flops
    plan, costs = work.plan, work.predicted(work.plan)
    evaluations = sum(each["stage"] == "train" for each in work.ledger.evaluations())
    watching = work.ledger.spent(stage="train", activity="evaluate", lost=False).flops
    round_once = Techniques.of(plan.training.memory).trained.cycle_steps(work.shape)
    steps = max(1, int((spent - watching) / costs.step.flops), round_once)
    settings = replace(
        plan.training,
        max_steps=steps,
        cooldown_steps=min(steps - 1, round(steps * _cooldown_share(work))),
        warmup_steps=min(plan.training.warmup_steps, max(steps // 10, 0)),
        eval_steps=max(1, math.ceil(steps / max(evaluations - 1, 1))),
        save_steps=max(1, math.ceil(steps / max(evaluations - 1, 1))),
        report_to=(),
        online=Training().online,
        switch=replace(plan.training.switch, trained=()),
    )
    tokens = float(steps * costs.step.tokens)
    choice = replace(
        plan.selection,
        scorer="uniform",
        picker="top_k",
        max_tokens=max(tokens, 1.0),
        refresh=Refresh(),
    )
    objective = replace(plan.objective, serving=None)  # it is measured, and answers nobody
    same = replace(plan, objective=objective, selection=choice, training=settings, control=False)
    return Branch("control", same, Budget(flops=spent + costs.test.flops))


def _cooldown_share(work: Work) -> float:
    """Of the run's steps as they were: it may have ended sooner or later than planned."""
    details = [s["detail"] for s in work.ledger.stages() if s["name"] == "train"]
    taken = max(details[-1].get("steps", 0), 1) if details else 1
    return min(1.0, work.plan.training.cooldown_steps / taken)
