"""One reading of a run's ledger: what its stages cost, what its losses were, what was decided.

gain of a training stage   dev loss before it - dev loss of the model that it leaves
gain of the selection      loss of the control - loss of this run, on the same rows
gain_per                   gain / what the stage was charged, lost work included
gb_second                  peak memory / 1e9 * seconds: memory held while the stage ran
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from thrifty.core.budget import RESOURCES, Budget, Cost
from thrifty.core.ledger import Ledger, Rates
from thrifty.core.marginal import Estimate
from thrifty.core.plan import Plan
from thrifty.core.resolve import parse_spec
from thrifty.memory_plan import trained_name
from thrifty.own_units import own_unit_map
from thrifty.sampling_price import curve_of, flops_a_sample
from thrifty.scaling.joint_stop import samples_left

TENTH = 0.1
PILOT = "which rows to choose"
"""The name of a pilot's decision."""
_ENDING = "train on or stop"
"""The name of the governor's decisions."""


class Facts:
    """The ledger's rows, read once, and what follows from them."""

    def __init__(self, plan: Plan, ledger: Ledger) -> None:
        self.plan = plan
        self.budget: Budget = ledger.budget
        self.rates: Rates = ledger.rates
        self.reserved: Cost = ledger.reserved()
        self._rows = ledger.stages()
        self._charges = ledger.charges()
        self._evaluations = {
            account: ledger.evaluations(account=account)
            for account in ("budget", *{row["account"] for row in self._rows})
        }
        self._accounts = {row["id"]: row["account"] for row in self._rows}
        self.decisions = [self._decision(row) for row in ledger.decisions()]
        _mark_undone(self.decisions)

    @property
    def state(self) -> str:
        """planned, open (running, or killed), stopped (by an error or a signal), or done."""
        if not self._rows:
            return "planned"
        last = {(row["account"], row["name"]): row["state"] for row in self._rows}
        for state in ("open", "stopped"):
            if state in last.values():
                return state
        return "done" if ("budget", "train") in last else "open"

    # -- costs ------------------------------------------------------------------------------------

    def spent(self, account: str, *, lost: bool | None = None) -> Cost:
        return self._sum(
            c for c in self._charges if c["account"] == account and lost in (None, c["lost"])
        )

    def _sum(self, charges: Iterable[Mapping[str, Any]]) -> Cost:
        costs = [Cost.from_dict(charge) for charge in charges]
        # Nothing spent at an unknown price is not $0: the price is not known to be zero.
        return sum(costs, Cost()) if costs else self.rates.of(Cost())

    def _priced(self, values: Mapping[str, float | None]) -> Cost:
        known = {k: v for k, v in values.items() if v is not None}
        return self.rates.of(Cost.from_dict(known))

    def predicted(self) -> dict[str, float | None]:
        """The whole run's, as the plan has it."""
        if not self.plan.predicted:
            return dict.fromkeys(RESOURCES)
        return sum(map(self._priced, self.plan.predicted.values()), Cost()).to_dict()

    def stages(self, control: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        """Those that began, in order, then those that the plan has and that did not."""
        began = {row["name"] for row in self._rows if row["account"] == "budget"}
        planned = [name for name in self.plan.predicted if name not in began]
        return [self._begun(row, control) for row in self._rows] + [
            self._not_begun(name) for name in planned
        ]

    def _begun(self, row: Mapping[str, Any], control: Mapping[str, Any] | None) -> dict[str, Any]:
        charges = [c for c in self._charges if c["stage_id"] == row["id"]]
        measured = self._sum(charges)
        loss = self.dev_loss(row["account"], row["id"])
        gain = difference(loss["before"], loss["after"])
        if row["name"] == "select" and row["state"] == "done" and control:
            gain = control["gain_over_control"]
        return {
            "name": row["name"],
            "method": row["method"],
            "state": row["state"],
            "account": row["account"],
            "reason": row["detail"].get("reason") if row["state"] == "stopped" else None,
            "started_at": row["started_at"],
            "ended_at": row["ended_at"],
            "predicted": self._stage_predicted(row),
            "measured": amounts(measured),
            "lost": amounts(self._sum(c for c in charges if c["lost"])),
            "gain": gain,
            "gain_per": gain_per(gain, measured),
        }

    def _not_begun(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "method": self._planned_method(name),
            "state": "planned",
            "account": "budget",
            "reason": None,
            "started_at": None,
            "ended_at": None,
            "predicted": amounts(self._priced(self.plan.predicted[name])),
            "measured": dict.fromkeys(RESOURCES),
            "lost": dict.fromkeys(RESOURCES),
            "gain": None,
            "gain_per": gain_per(None, Cost()),
        }

    def _planned_method(self, name: str) -> str:
        if name == "select":
            return parse_spec("scorer", self.plan.selection.scorer)[0]
        return trained_name(self.plan.training.memory) if name == "train" else name

    def _stage_predicted(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        """A stage that was opened without a prediction has none; that is not a prediction of 0."""
        values = row["predicted"]
        if not any(values.values()) and row["name"] not in self.plan.predicted:
            return dict.fromkeys(RESOURCES)
        return amounts(self._priced(values))

    def activities(self) -> list[dict[str, Any]]:
        """What each stage was charged, by activity."""
        groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
        for charge in self._charges:
            key = (charge["account"], charge["stage"], charge["activity"])
            groups.setdefault(key, []).append(charge)
        return [
            {
                "account": account,
                "stage": stage,
                "activity": activity,
                **amounts(self._sum(charges)),
                "lost": amounts(self._sum(c for c in charges if c["lost"])),
            }
            for (account, stage, activity), charges in groups.items()
        ]

    # -- losses -----------------------------------------------------------------------------------

    def evaluations(self, account: str) -> list[dict[str, Any]]:
        """Of the account's latest training."""
        rows = self._evaluations.get(account, [])
        if not rows:
            return []
        return self._of_stage(account, rows[-1]["stage_id"])

    def _of_stage(self, account: str, stage_id: int) -> list[dict[str, Any]]:
        return [
            {
                "step": row["step"],
                "flops": row["flops"],
                "loss": row["objective"],
                "stderr": row["stderr"],
                "by_target": row["by_target"],
                "beside": row["beside"],
            }
            for row in self._evaluations.get(account, [])
            if row["stage_id"] == stage_id
        ]

    def dev_loss(self, account: str, stage_id: int | None = None) -> dict[str, Any]:
        """Before training, and of the model that is kept: the best evaluated, as the trainer says
        or, while it is not done, so far."""
        if stage_id is None:
            ids = [row["stage_id"] for row in self._evaluations.get(account, [])]
            stage_id = ids[-1] if ids else -1
        history = self._of_stage(account, stage_id)
        before = next((e["loss"] for e in history if e["step"] == 0), None)
        detail: dict[str, Any] = next(
            (row["detail"] for row in self._rows if row["id"] == stage_id), {}
        )
        if detail.get("best_step") == 0:  # the base was kept
            return {"before": before, "after": before, "step": 0}
        later = [e for e in history if e["step"] > 0]
        kept = [e for e in later if e["step"] == detail.get("best_step")] or later
        best = min(kept, key=lambda e: (e["loss"], -e["step"]), default=None)
        return {
            "before": before,
            "after": best["loss"] if best else None,
            "step": best["step"] if best else None,
        }

    def test_loss(self) -> dict[str, Any]:
        detail = self._detail("budget", "test")
        before, after = detail.get("before"), detail.get("after")
        return {
            "before": before,
            "after": after,
            "gain": difference(before, after),
            "stderr": detail.get("change_stderr"),
            "by_target": detail.get("by_target"),
            "by_target_before": detail.get("by_target_before"),
        }

    def floors(self) -> list[dict[str, Any]]:
        """Of the model that is kept: by how much it is worse than the base where it must not be, on
        test rows where those were measured. Nothing while none is kept."""
        history, step = self.evaluations("budget"), self.dev_loss("budget")["step"]
        kept = [e["beside"].get("floors", ()) for e in history if e["step"] == step]
        found = [{**standing, "on": "dev"} for standing in (kept[-1] if kept else ())]
        detail = self._detail("budget", "test")
        for standing in found:
            name, limit = standing["name"], standing["limit"]
            stderr = detail.get("by_target_stderr", {}).get(name)
            if standing["kind"] == "target" and stderr is not None:
                worse = detail["by_target"][name] - detail["by_target_before"][name]
                standing |= {"worse": worse, "stderr": stderr, "broken": worse > limit}
                standing["on"] = detail["rows"]
        return found

    def unit_map(self) -> dict[str, Any] | None:
        """What a tenth of a nat is worth in the score, where the run's own evaluations tell."""
        if not self.plan.objective.answers:
            return None
        try:
            found = own_unit_map(self.evaluations("budget"), self.plan.objective.unit)
        except ValueError as error:
            return {"refused": str(error).partition("\n")[0]}
        loss = self.evaluations("budget")[-1]["beside"]["loss"]
        gain = found.gain(Estimate(TENTH, 0.0, found.nats, "history"), loss)
        return {
            "nats": found.nats,
            "unit": found.unit,
            "a": found.a,
            "b": found.b,
            "num_points": found.num_points,
            "loss": loss,
            "gain_of_a_tenth": {"mean": gain.mean, "stderr": gain.stderr},
        }

    def serving(self) -> dict[str, Any] | None:
        """What the FLOPs that training left pay for, of the kept model's answers to the questions
        that the budget is to answer, by its evaluation; None where there are none, or before the
        first."""
        serving, step = self.plan.objective.serving, self.dev_loss("budget")["step"]
        history = self.evaluations("budget")
        kept = [each for each in history if each["step"] == step and "votes" in each["beside"]]
        if serving is None or not kept or self.budget.flops is None:
            return None
        votes = kept[-1]["beside"]["votes"]
        each, curve = flops_a_sample(votes), curve_of(votes)
        own = [c for c in self._charges if c["account"] == "budget" and c["stage"] != "decode"]
        left = max(self.budget.flops - self._sum(own).flops, 0.0)
        samples = samples_left(left, serving.questions, each, serving.max_samples)
        told = [d["detail"] for d in self.decisions if d["name"] == _ENDING and not d["undone"]]
        return {
            "questions": serving.questions,
            "flops_left": left,
            "flops_a_sample": each,
            "tokens_a_sample": votes["tokens_a_sample"],
            "samples": samples,
            "accuracy": curve.at(samples),
            "accuracy_of_one": curve.at(1),
            "most_useful_samples": curve.most_useful,
            "decided": next((d["serving"] for d in reversed(told) if "serving" in (d or {})), None),
        }

    def _detail(self, account: str, name: str) -> dict[str, Any]:
        """What the last finished stage of that name left; nothing where there is none."""
        for row in reversed(self._rows):
            if (row["account"], row["name"], row["state"]) == (account, name, "done"):
                return row["detail"]
        return {}

    def control(self, own: Mapping[str, Any]) -> dict[str, Any] | None:
        """The same job on a uniform choice; None where none was begun."""
        rows = [row for row in self._rows if row["account"] == "control"]
        if not rows:
            return None
        dev, test = self.dev_loss("control"), self._detail("control", "control-test")
        last = {row["name"]: row["state"] for row in rows}
        gain, stderr, on = test.get("difference"), test.get("difference_stderr"), None
        if gain is not None:
            on = test.get("rows", "test")
        elif last.get("control-train") == "done":
            gain = difference(dev["after"], own["after"])
            on = None if gain is None else "dev"
        methods = [row["method"] for row in rows if row["name"] == "control-select"]
        return {
            "method": methods[-1] if methods else None,
            "state": "done" if set(last.values()) == {"done"} else "open",
            "spent": amounts(self.spent("control")),
            "lost": amounts(self.spent("control", lost=True)),
            "evaluations": self.evaluations("control"),
            "dev_loss": dev,
            "test_loss": {"after": test.get("after") if on != "dev" else None},
            "gain_over_control": gain,
            "gain_over_control_stderr": stderr,
            "measured_on": on,
        }

    # -- decisions --------------------------------------------------------------------------------

    def _decision(self, row: Mapping[str, Any]) -> dict[str, Any]:
        kept = ("stage", "step", "name", "chosen", "reason", "choice", "detail", "decided_at")
        account = self._accounts.get(row["stage_id"], "budget")
        return {"account": account, **{name: row[name] for name in kept}}

    def prior_gain(self) -> dict[str, Any] | None:
        """What the planner took the chosen plan to gain when it weighed it against others."""
        for decision in self.decisions:
            choice = decision["choice"]
            if choice and decision["stage"] is None:
                for option in choice["options"]:
                    if option["name"] == decision["chosen"]:
                        return dict(option["gain"])
        return None

    def pilot(self) -> dict[str, Any] | None:
        """What short trainings found of each choice of data; None where there were none, or not
        all yet."""
        decision = next((d for d in reversed(self.decisions) if d["name"] == PILOT), None)
        if decision is None:
            return None
        gains = {o["name"]: o["gain"] for o in (decision["choice"] or {}).get("options", ())}
        spent = self._sum(c for c in self._charges if c["stage"] == "pilot")
        limit, used = self.budget.flops, spent.flops
        return {
            "chosen": decision["chosen"],
            "reason": decision["reason"],
            "ended_early": decision["detail"]["ended_early"],
            "spent": amounts(spent),
            "share_of_flops": used / limit if limit else None,
            "candidates": [
                {
                    "name": name,
                    "gain": gains[name]["mean"] if name in gains else None,
                    "stderr": gains[name]["stderr"] if name in gains else None,
                    **found,
                }
                for name, found in decision["detail"]["candidates"].items()
            ],
        }

    def ended(self) -> dict[str, Any] | None:
        """The decision that ended training, if one did: none where it went its planned length."""
        for decision in reversed(self.decisions):
            ends = decision["name"] == _ENDING and decision["chosen"] != "train on"
            ends = ends and decision["stage"] != "pilot"
            if ends and decision["account"] == "budget" and not decision["undone"]:
                return {name: decision[name] for name in ("step", "chosen", "reason")}
        return None

    def cooldown(self) -> dict[str, Any] | None:
        """Where the learning rate began to fall: by decision, else as planned."""
        history = self.evaluations("budget")
        training = self.plan.training
        steps = [
            d["step"]
            for d in self.decisions
            if (d["account"], d["chosen"]) == ("budget", "cool down and stop") and not d["undone"]
        ]
        planned = training.max_steps - training.cooldown_steps
        step = steps[-1] if steps else planned
        if step is None or len(history) < 2 or not (steps or training.cooldown_steps):
            return None
        if not history[0]["step"] <= step <= history[-1]["step"]:
            return None
        flops = np.interp(step, [e["step"] for e in history], [e["flops"] for e in history])
        return {"step": step, "flops": float(flops)}


def _mark_undone(decisions: Sequence[dict[str, Any]]) -> None:
    """A decision is undone where its stage decided the same again at its step or an earlier one: it
    was resumed from before."""
    earliest: dict[tuple[Any, ...], float] = {}
    for decision in reversed(decisions):
        key = (decision["account"], decision["stage"], decision["name"])
        step = decision["step"]
        decision["undone"] = step is not None and step >= earliest.get(key, math.inf)
        if step is not None:
            earliest[key] = min(step, earliest.get(key, math.inf))


def amounts(cost: Cost) -> dict[str, float | None]:
    """What was measured, or predicted, by resource. A peak of zero bytes is one that nobody looked
    at."""
    return {**cost.to_dict(), "peak_memory_bytes": cost.peak_memory_bytes or None}


def gain_per(gain: float | None, cost: Cost) -> dict[str, float | None]:
    seconds, peak = cost.seconds, cost.peak_memory_bytes
    amounts = {
        "pflop": cost.flops and cost.flops / 1e15,
        "device_second": seconds,
        "dollar": cost.dollars,
        "gb_second": seconds and peak and seconds * peak / 1e9,
    }
    return {k: gain / v if gain is not None and v else None for k, v in amounts.items()}


def difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before - after
