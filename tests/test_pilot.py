"""A pilot: who enters, what it takes, that it ends within its share, and what follows from it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import runs
from thrifty import pilot, pipeline, plan_options, stages, training
from thrifty.core.budget import CONSUMED, Budget
from thrifty.core.contracts import Evaluation
from thrifty.core.marginal import Estimate, replay
from thrifty.core.plan import Plan, Target
from thrifty.interruption import Interrupted
from thrifty.pilot_gains import Trial, gain_of, weigh
from thrifty.report.summary import summarize, text_summary
from thrifty.run_folder import RunFolder

OPEN = {
    "selection.scorer": "auto",
    "training.eval_steps": "auto",
    "training.save_steps": "auto",
    "training.max_steps": 60,
}
BUDGET = Budget(flops=4e10)


def plan_of(folder: Path, model: Path, data: dict[str, Path], **changes: Any) -> Plan:
    fixed = {**OPEN, **changes.pop("fixed", {})}
    return runs.planned(folder, model, data, **{"budget": BUDGET, "fixed": fixed, **changes})


@pytest.fixture(scope="module")
def piloted(tmp_path_factory, tiny_model, tiny_data):
    """A finished run with a pilot, and its plan."""
    folder = tmp_path_factory.mktemp("piloted") / "run"
    plan = plan_of(folder, tiny_model, tiny_data)
    pipeline.run(folder, runs.silent)
    return folder, plan


@pytest.mark.long
def test_it_goes_by_rows_of_its_own_which_are_kept_apart(tmp_path, tiny_model, tiny_data):
    """Fewer rows are cheaper to ask, and the dev rows stay unseen until training."""
    folder, few = tmp_path / "run", tmp_path / "few.jsonl"
    few.write_text("\n".join(tiny_data["test"].read_text().splitlines()[:4]), encoding="utf-8")
    target = Target(signal=(str(tiny_data["signal"]),), dev=(str(tiny_data["dev"]),))
    plan_of(folder, tiny_model, tiny_data, targets={"sums": replace(target, pilot=(str(few),))})
    with stages.at_work(RunFolder(folder), runs.silent) as work:
        pilot.pilot(work)
        once = work.yardstick(work.plan).flops(work.rows("pilot"))
        assert once < 0.5 * work.yardstick(work.plan).flops(work.dev)
        assert any(name.startswith("pilot rows") for name in work.held.fingerprints)
    charges = [c for c in runs.ledger(folder).charges() if c["activity"] == "evaluate"]
    assert {c["stage"] for c in charges} == {"pilot"}
    assert all(c["flops"] == pytest.approx(once) for c in charges)


# -- planned ------------------------------------------------------------------------------------


@pytest.mark.long
def test_it_is_predicted_within_its_share_and_reserved(piloted):
    _, plan = piloted
    assert plan.pilot.share == 0.1
    assert [each.name for each in plan.pilot.candidates][:2] == ["uniform", "bm25"]
    predicted = plan.predicted
    assert 0 < predicted["pilot"]["flops"] <= 0.1 * BUDGET.flops
    assert predicted["pilot"]["peak_memory_bytes"] >= predicted["train"]["peak_memory_bytes"]
    assert sum(cost["flops"] or 0.0 for cost in predicted.values()) <= BUDGET.flops
    assert plan.pilot.rungs[-1].steps <= 30  # half of the run at most


def test_what_it_takes_is_what_was_predicted_and_never_above_its_share(piloted):
    folder, plan = piloted
    with runs.ledger(folder) as ledger:
        spent = ledger.spent(stage="pilot")
        total = ledger.spent()
    assert spent.flops == pytest.approx(plan.predicted["pilot"]["flops"], rel=0.1)
    assert spent.flops <= plan.pilot.share * BUDGET.flops
    assert total.flops <= BUDGET.flops


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fixed": {"selection.scorer": "bm25"}}, "the scorer was named"),
        ({"fixed": {"pilot.share": 0}}, "none, as asked"),
        ({"budget": Budget(memory_bytes=8 * 2**30)}, "nothing is limited"),
        ({"budget": Budget(flops=4e9)}, "does not buy"),
    ],
)
def test_there_is_none_where_it_could_tell_nothing(
    tmp_path, tiny_model, tiny_data, changes, reason
):
    plan = plan_of(
        tmp_path / "run",
        tiny_model,
        tiny_data,
        **{**changes, "fixed": {**OPEN, **changes.get("fixed", {})}},
    )
    assert plan.pilot.share == 0
    assert reason in plan.why["pilot"]
    assert "pilot" not in plan.predicted


@pytest.mark.parametrize("share", [1.5, 0.6, -0.1])
def test_one_that_is_larger_than_the_budget_is_refused(tmp_path, tiny_model, tiny_data, share):
    with pytest.raises(ValueError, match="share must be in"):
        plan_of(tmp_path / "run", tiny_model, tiny_data, fixed={"pilot.share": share})
    assert not (tmp_path / "run").exists()


def test_the_command_line_asks_for_one():
    parser = argparse.ArgumentParser()
    plan_options.add_to(parser)
    options = parser.parse_args(["--model", "m", "--pilot", "0.2"])
    assert plan_options.asked(options).fixed["pilot.share"] == 0.2
    assert "pilot.share" not in plan_options.asked(parser.parse_args(["--model", "m"])).fixed


def test_candidates_are_scorers_by_pickers_shares_and_proxies(tmp_path, tiny_model, tiny_data):
    plan = plan_of(
        tmp_path / "run",
        tiny_model,
        tiny_data,
        budget=Budget(flops=4e11),
        fixed={
            "selection.scorer": "embedding",
            "training.max_steps": 600,
            "pilot.share": 0.2,
            "pilot.proxies": [str(tiny_model)],
            "pilot.keeps": [0.05],
        },
    )
    found = {each.name: each for each in plan.pilot.candidates}
    assert {"uniform", "uniform 5%", "bm25", "bm25 5%", "embedding", "embedding 5%"} <= set(found)
    proxies = [name for name in found if name.startswith("embedding model=")]
    assert len(proxies) == 2
    kept = [found[name].settings["selection.max_tokens"] for name in ("bm25 5%", "embedding 5%")]
    assert kept[0] == kept[1] == pytest.approx(0.05 * 47_577, rel=0.01)


@pytest.mark.slow
def test_a_dear_scorer_is_tried_on_the_sample_and_its_price_taken_off(
    tmp_path, tiny_model, tiny_data
):
    plan = plan_of(
        tmp_path / "run",
        tiny_model,
        tiny_data,
        budget=Budget(flops=6e10),
        fixed={"selection.scorer": "loss", "pilot.share": 0.3, "training.max_steps": 10_000},
    )
    found = {each.name: each for each in plan.pilot.candidates}
    dear = found["loss"]
    assert not dear.whole_pool
    assert found["bm25"].whole_pool
    assert dear.scoring["flops"] < 0.5 * dear.to_come["flops"]
    steps = {name: each.settings["training.max_steps"] for name, each in found.items()}
    assert steps["loss"] < steps["uniform"]
    pipeline.run(tmp_path / "run", runs.silent)
    with runs.ledger(tmp_path / "run") as ledger:
        assert ledger.spent(stage="pilot").flops <= 0.3 * 6e10
        assert ledger.spent(stage="pilot", activity="score").flops == pytest.approx(
            dear.scoring["flops"], rel=0.25
        )


# -- what follows -------------------------------------------------------------------------------


@pytest.mark.long
def test_the_choice_is_in_the_ledger_and_replays(piloted):
    folder, plan = piloted
    with runs.ledger(folder) as ledger:
        (decision,) = [d for d in ledger.decisions() if d["name"] == pilot.DECISION]
    again = replay(decision["choice"])
    assert (again.chosen, list(again.rates)) == (
        decision["choice"]["chosen"],
        decision["choice"]["rates"],
    )
    assert {o["name"] for o in decision["choice"]["options"]} == {
        each.name for each in plan.pilot.candidates
    }
    assert all(o["gain"]["source"] == "pilot" for o in decision["choice"]["options"])


def test_the_report_tells_winner_and_losers(piloted):
    folder, plan = piloted
    summary = summarize(RunFolder(folder))
    found = summary["pilot"]
    assert {each["name"] for each in found["candidates"]} == {
        each.name for each in plan.pilot.candidates
    }
    assert 0 < found["share_of_flops"] <= plan.pilot.share
    (line,) = [line for line in text_summary(summary).splitlines() if line.startswith("pilot")]
    for each in found["candidates"]:
        assert f"{each['name']} {each['gain']:.4f} ± {each['stderr']:.4f}" in line
    assert f"The rest went to {found['chosen']}" in line
    assert line.removeprefix("pilot").strip() in (folder / "report.html").read_text()


def test_the_run_goes_by_the_winner(piloted):
    folder, _ = piloted
    choice = yaml.safe_load((folder / "pilot" / "choice.yaml").read_text())
    followed = RunFolder(folder).plan()
    assert followed.selection.scorer == choice["settings"]["selection.scorer"]
    assert followed.training.max_steps == choice["settings"]["training.max_steps"]
    with runs.ledger(folder) as ledger:
        (select,) = [s for s in ledger.stages() if s["name"] == "select"]
    assert select["method"] == choice["settings"]["selection.scorer"]
    before = (folder / "pilot" / "choice.yaml").read_bytes()
    with runs.ledger(folder) as ledger:
        spent = ledger.spent().flops
    pipeline.run(folder, runs.silent)  # a finished run does nothing
    with runs.ledger(folder) as ledger:
        assert ledger.spent().flops == spent
    assert (folder / "pilot" / "choice.yaml").read_bytes() == before


@pytest.mark.long
def test_another_winner_is_followed_by_every_command(tmp_path, tiny_model, tiny_data, monkeypatch):
    """Whatever the losses: the rule is made to see one ahead that the plan did not choose."""
    plan = plan_of(tmp_path / "run", tiny_model, tiny_data)
    other = "uniform" if plan.selection.scorer == "bm25" else "bm25"

    def other_wins(trial: Trial, unit: str) -> Estimate:
        found = gain_of(trial, unit)
        assert found is not None
        return replace(found, mean=found.mean + 100.0 * (trial.name == other))

    with monkeypatch.context() as patch:
        patch.setattr(pilot, "gain_of", other_wins)
        pipeline.select(tmp_path / "run", runs.silent)
    pipeline.run(tmp_path / "run", runs.silent)
    assert RunFolder(tmp_path / "run").plan().selection.scorer == other
    with runs.ledger(tmp_path / "run") as ledger:
        assert [s["method"] for s in ledger.stages() if s["name"] == "select"] == [other]
        activities = {c["activity"] for c in ledger.charges() if c["stage"] == "select"}
    assert "score" not in activities  # kept from the pilot


@pytest.mark.long
def test_interrupted_and_killed_it_goes_on_bit_for_bit(
    piloted, tmp_path, tiny_model, tiny_data, monkeypatch
):
    whole, _ = piloted
    folder = tmp_path / "run"
    plan_of(folder, tiny_model, tiny_data)
    with monkeypatch.context() as patch:  # a signal in the midst of the first candidate
        runs.interrupt_at(patch, 3)
        with pytest.raises(Interrupted):
            pipeline.run(folder, runs.silent)
    plain, calls = training.train, []

    def killed(job: Any, stage: Any) -> None:
        calls.append(job)
        if len(calls) == 2:  # the second candidate's rows are chosen, none trained on
            raise KeyboardInterrupt
        plain(job, stage)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(folder, runs.silent)
    pipeline.run(folder, runs.silent)
    assert (folder / "pilot" / "choice.yaml").read_text() == (
        whole / "pilot" / "choice.yaml"
    ).read_text()
    ours, theirs = runs.weights(folder / "model"), runs.weights(whole / "model")
    assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.mark.slow
def test_without_room_it_ends_early_and_the_first_named_wins(tmp_path, tiny_model, tiny_data):
    """A share cut by hand after planning: nothing passes it, and the run goes on."""
    folder = tmp_path / "run"
    plan_of(folder, tiny_model, tiny_data)
    file = folder / "plan.yaml"
    values = yaml.safe_load(file.read_text())
    values["pilot"]["share"] = 0.004
    file.write_text(yaml.safe_dump(values))
    pipeline.run(folder, runs.silent)
    with runs.ledger(folder) as ledger:
        assert ledger.spent(stage="pilot").flops <= 0.004 * BUDGET.flops
    assert RunFolder(folder).plan().selection.scorer == "uniform"


# -- what it makes of losses ----------------------------------------------------------------------


def curve(scale: float, steps: int = 40, noise: float = 0.0) -> list[Evaluation]:
    return [
        Evaluation(
            step=step,
            flops=1e6 * step,
            loss=3.0 + scale * (1 + step) ** -0.5 + noise * (-1) ** step,
            stderr=0.01,
        )
        for step in range(0, steps + 1, 5)
    ]


def test_a_better_curve_gains_more_and_a_tie_is_uniforms():
    def gains(**scales: float) -> dict[str, Any]:
        trials = [Trial(name=n, history=curve(s), flops=4e8) for n, s in scales.items()]
        return {trial.name: gain_of(trial, "nats/token") for trial in trials}

    left = pilot.Cost(flops=1e9)
    won = weigh(gains(uniform=2.0, bm25=1.2), {}, left, "flops")
    assert won.chosen == "uniform"  # that begins higher: the base model is one and the same

    def lower(scale: float) -> list[Evaluation]:
        base = curve(2.0)[0]
        return [base, *curve(scale)[1:]]

    def chosen(bm25: float) -> str | None:
        scales = {"uniform": 2.0, "bm25": bm25}
        trials = [Trial(name=n, history=lower(s), flops=4e8) for n, s in scales.items()]
        return weigh({t.name: gain_of(t, "x") for t in trials}, {}, left, "flops").chosen

    assert chosen(0.5) == "bm25"
    assert chosen(1.999) == "uniform"


def test_too_little_to_tell_is_no_gain():
    assert gain_of(Trial(name="a", history=curve(1.0)[:1], flops=1e9), "x") is None
    assert gain_of(Trial(name="a", history=[], flops=1e9), "x") is None


def test_every_limit_is_shared():
    budget = Budget(flops=1e12, seconds=100.0, dollars=5.0, memory_bytes=2**30)
    part = pilot.part_of(budget, 0.1)
    assert [part.limit(name) for name in CONSUMED if budget.limit(name)] == [1e11, 10.0, 0.5]
    assert part.memory_bytes == 2**30
