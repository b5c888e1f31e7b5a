"""A run as one JSON-able object: what was allowed, spent, decided and gained.

``summarize`` reads plan.yaml, the ledger and the files of a run folder, and changes nothing. What
is not there yet, or was never measured, is null: a run in progress, no control, an unknown price.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thrifty.core.budget import HELD, RESOURCES, Budget, Cost
from thrifty.core.contracts import MEMORY_KINDS
from thrifty.core.plan import Plan
from thrifty.core.redaction import redact
from thrifty.core.resolve import parse_spec
from thrifty.costs.shape import read_shape
from thrifty.memory_plan import dtype_of, trained_name
from thrifty.report.facts import Facts, amounts, difference, gain_per
from thrifty.report.files import Files
from thrifty.report.words import text_summary
from thrifty.run_folder import RunFolder

__all__ = ["summarize", "text_summary"]


def summarize(run: RunFolder) -> dict[str, Any]:
    """Everything that the ledger and the files of ``run`` say, in plain values.

    Raises ValueError where the folder holds no plan or no ledger that can be used.
    """
    plan = run.plan()
    with run.reading() as ledger:
        facts = Facts(plan, ledger)
    files = Files(run)
    answers = files.answers()
    spent = facts.spent("budget")
    dev = facts.dev_loss("budget")
    gain = difference(dev["before"], dev["after"])
    control = facts.control(dev)
    values = {
        "run": run.path.resolve().name,
        "state": facts.state,
        "task": plan.task,
        "model": {"path": plan.model.path, "num_parameters": _num_parameters(plan)},
        "pool": {"sources": list(plan.pool.sources)},
        "targets": {name: target.weight for name, target in plan.targets.items()},
        "objective": {
            "metric": parse_spec("metric", plan.objective.metric)[0],
            "name": plan.objective.name,
            "unit": plan.objective.unit,
            "more_is_better": plan.objective.answers is not None,
        },
        "method": _method(plan),
        "budget": {name: facts.budget.limit(name) for name in RESOURCES},
        "spent": amounts(spent),
        "lost": amounts(facts.spent("budget", lost=True)),
        "reserved": facts.reserved.to_dict(),
        "left": _left(facts.budget, spent),
        "predicted": facts.predicted(),
        "binding": _binding(facts.budget, spent),
        "stages": facts.stages(control),
        "activities": facts.activities(),
        "gain": gain,
        "prior_gain": facts.prior_gain(),
        "pilot": facts.pilot(),
        "gain_per": gain_per(gain, spent),
        "decisions": facts.decisions,
        "ended": facts.ended(),
        "cooldown": facts.cooldown(),
        "evaluations": [
            {**each, "score": None if each["loss"] is None else _shown(each["loss"], plan)}
            for each in facts.evaluations("budget")
        ],
        "dev_loss": {**dev, "unit": plan.objective.unit},
        "test_loss": facts.test_loss(),
        "dev_score": _score(dev, plan),
        "test_score": _score(facts.test_loss(), plan),
        "floors": facts.floors(),
        "unit_map": facts.unit_map(),
        "serving": facts.serving(),
        "decoding": None if answers is None else answers.summary(),
        "control": control,
        "control_wanted": plan.control,
        "selection": files.selection(),
        "quarantine": files.quarantine(),
        "why": dict(plan.why),
        "unreadable": files.unreadable,
    }
    return _plain(values)


def _shown(loss: float, plan: Plan) -> float | None:
    """The score that goes with a loss; None where the objective is a loss."""
    return plan.objective.shown(loss) if plan.objective.answers else None


def _score(loss: Mapping[str, Any], plan: Plan) -> dict[str, Any] | None:
    """``loss`` in the user's own number; None where that is the loss. A gain is the same."""
    if not plan.objective.answers:
        return None
    shown = {
        name: {target: _shown(value, plan) for target, value in loss[name].items()}
        for name in ("by_target", "by_target_before")
        if loss.get(name)
    }
    before, after = (
        None if loss[name] is None else _shown(loss[name], plan) for name in ("before", "after")
    )
    return {**loss, **shown, "before": before, "after": after, "unit": plan.objective.unit}


def _left(budget: Budget, spent: Cost) -> dict[str, float | None]:
    left: dict[str, float | None] = dict.fromkeys(RESOURCES)
    for name in RESOURCES:
        limit, used = budget.limit(name), spent.of(name)
        if limit is not None and used is not None:
            left[name] = limit - used
    return left


def _binding(budget: Budget, spent: Cost) -> dict[str, Any] | None:
    """The limit of which the largest share is spent. Memory is held, not spent."""
    shares = {
        name: used / limit
        for name in RESOURCES
        if name not in HELD
        and (limit := budget.limit(name)) is not None
        and (used := spent.of(name)) is not None
    }
    if not shares:
        return None
    resource = max(shares, key=lambda name: shares[name])
    return {"resource": resource, "share": shares[resource]}


def _method(plan: Plan) -> dict[str, Any]:
    """What training was set to."""
    training = plan.training
    return {
        "method": trained_name(training.memory),
        "dtype": dtype_of(training.memory),
        "memory": {
            kind: parse_spec(kind, getattr(training.memory, kind))[0] for kind in MEMORY_KINDS
        },
        "sequences_per_step": training.step_sequences,
        "max_length": training.max_length,
        "max_steps": training.max_steps,
        "epochs": training.epochs,
        "scorer": parse_spec("scorer", plan.selection.scorer)[0],
        "picker": parse_spec("picker", plan.selection.picker)[0],
        "stopping": parse_spec("stopping", plan.stopping)[0],
    }


def _num_parameters(plan: Plan) -> int | None:
    """Where the model is a folder that is still there."""
    folder = Path(plan.model.path)
    try:
        return read_shape(folder).num_parameters if folder.is_dir() else None
    except (ValueError, OSError):
        return None


def _plain(value: Any) -> Any:
    """Values that JSON has: what is not finite is null, text is UTF-8 and holds no password."""
    if isinstance(value, Mapping):
        return {_text(str(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return _text(value) if isinstance(value, str) else value


def _text(value: str) -> str:
    return redact(value).encode("utf-8", "backslashreplace").decode("utf-8")
