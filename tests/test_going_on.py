"""Going on with a run: after a kill at an awkward instant, an edit, a budget that was changed."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.runs import finish, ledger, planned, silent, weights
from tests.test_pipeline import interrupt_at
from thrifty import checkpoints, pipeline, stages, training
from thrifty.core.budget import Budget, Cost
from thrifty.core.ledger import BudgetExceeded
from thrifty.core.plan import Objective
from thrifty.governor import Governor
from thrifty.run_folder import RunFolder
from thrifty.schedule import WarmupStableDecay


class Killed(BaseException):
    """As if the process had died here."""


def edit(folder, old: str, new: str) -> None:
    plan = folder / "plan.yaml"
    text = plan.read_text()
    assert old in text
    plan.write_text(text.replace(old, new, 1))


@pytest.mark.long
def test_killed_before_the_first_checkpoint_starts_over(
    tiny_model, tiny_data, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data)

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "commit", killed)
        with pytest.raises(Killed):
            finish(folder)
    finish(folder)
    book = ledger(folder)
    steps = [e["step"] for e in book.evaluations()]
    assert steps[0] == 0
    assert len(steps) == len(set(steps)), "what was measured before counts once"
    assert 0 < book.spent(lost=True).flops < book.spent().flops


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_killed_while_publishing_trains_no_further(
    after, tiny_model, tiny_data, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data)
    publish = training.publish

    def killed(*arguments, **more):
        if after:
            publish(*arguments, **more)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training, "publish", killed)
        with pytest.raises(Killed):
            finish(folder)
    spent = ledger(folder).spent()
    finish(folder)
    book = ledger(folder)
    assert book.spent().flops == spent.flops
    assert [s["state"] for s in book.stages()] == ["done", "done"]
    assert weights(folder / "model")


@pytest.mark.slow
def test_paused_before_anything_was_measured_and_then_too_poor(
    tiny_model, tiny_data, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(training.Interrupted):
            finish(folder)
    spent = ledger(folder).spent().flops
    edit(folder, "flops: 4000000000.0", f"flops: {spent * 1.001}")
    with pytest.raises(BudgetExceeded, match="\nhint: "):
        finish(folder)


@pytest.mark.slow
def test_the_learning_rate_may_be_lowered_on_the_way_and_nothing_else(
    tiny_model, tiny_data, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    plan = planned(folder, tiny_model, tiny_data)
    every = plan.training.eval_steps
    with monkeypatch.context() as patch:
        interrupt_at(patch, every + 2)
        with pytest.raises(training.Interrupted):
            finish(folder)
    edit(folder, "warmup_steps: ", "warmup_steps: 1")
    with pytest.raises(ValueError, match="trained under other settings"):
        finish(folder)
    edit(folder, "warmup_steps: 1", "warmup_steps: ")
    saved = weights(checkpoints.committed(folder / "checkpoints")[-1].path)
    edit(folder, "learning_rate: 0.003", "learning_rate: 1.0e-12")
    finish(folder)
    assert ledger(folder).evaluations()[-1]["step"] > every + 2
    for name, weight in weights(folder / "model").items():
        torch.testing.assert_close(weight, saved[name], rtol=0, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [None, "model.norm.weight"])
def test_resuming_warns_of_a_missing_weight_and_not_of_a_tied_one(
    lost, tiny_model, tiny_data, tmp_path, monkeypatch
):
    from safetensors.torch import save_file
    from transformers.trainer import logger

    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(training.Interrupted):
            finish(folder)
    (saved,) = checkpoints.committed(folder / "checkpoints")
    state = weights(saved.path)
    assert "lm_head.weight" not in state, "the tiny model's embeddings are tied"
    state.pop(lost, None)
    save_file(state, saved.path / "model.safetensors", metadata={"format": "pt"})
    checkpoints.commit(saved.path, saved.manifest)
    said: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda message, *_: said.append(message))
    finish(folder)
    assert [message for message in said if "missing keys" in message] == (
        [f"There were missing keys in the checkpoint model loaded: {[lost]}."] if lost else []
    )


@pytest.mark.long
def test_a_model_of_another_selection_is_not_taken_for_this_ones(tiny_model, tiny_data, tmp_path):
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data)
    finish(folder)
    edit(folder, "scorer: bm25", "scorer: uniform")
    shutil.rmtree(folder / "selected")
    with pytest.raises(ValueError, match=r"model was trained under other .*\nhint: delete"):
        finish(folder)
    shutil.rmtree(folder / "model")
    with pytest.raises(ValueError, match=r"checkpoints in .* were trained under other"):
        finish(folder)


def test_rows_named_after_planning_are_refused(tiny_model, tiny_data, tmp_path):
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data)
    edit(folder, str(tiny_data["pool"]), str(tiny_data["small_pool"]))
    with pytest.raises(ValueError, match=r"pool.sources is not what .* was prepared from\nhint"):
        finish(folder)
    (folder / "prepared.json").unlink()
    with pytest.raises(ValueError, match=r"another version made it, or .*\nhint"):
        finish(folder)


@pytest.mark.slow
def test_a_refused_test_leaves_a_control_on_dev_rows_and_is_made_up_for(
    tiny_model, tiny_data, tmp_path
):
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data, control=True)
    finish(folder)
    spent = ledger(folder).spent().flops
    edit(folder, "flops: 4000000000.0", f"flops: {spent + 1.0}")
    said: list[str] = []
    pipeline.run(folder, said.append)
    assert any("not tested" in line for line in said)
    tests = {s["name"]: s for s in ledger(folder).stages() if s["name"].endswith("test")}
    assert tests["test"]["state"] == "stopped"
    assert tests["control-test"]["detail"]["rows"] == "dev"
    edit(folder, f"flops: {spent + 1.0}", "flops: 9e9")
    with stages.at_work(RunFolder(folder), silent) as work:
        stages.test(work, work.main)
    assert ledger(folder).stages()[2]["detail"]["rows"] == "test"


# -- the best evaluated model -------------------------------------------------------------------


@pytest.mark.long
def test_the_best_evaluated_model_is_kept_whatever_comes_after(tiny_model, tiny_data, tmp_path):
    """A learning rate that ruins the model: what was best stays, or the base where none was."""

    def best_of(name: str, model, rate: float) -> int:
        planned(tmp_path / name, model, tiny_data, fixed={"training.learning_rate": rate})
        finish(tmp_path / name)
        (stage,) = [s for s in ledger(tmp_path / name).stages() if s["name"] == "train"]
        evaluated = ledger(tmp_path / name).evaluations()
        best = min(evaluated, key=lambda e: e["objective"])
        assert stage["detail"]["best_step"] == best["step"]
        return best["step"]

    assert best_of("good", tiny_model, 3e-3) > 0
    good = tmp_path / "good" / "model"
    assert best_of("ruined", good, 1.0) == 0
    kept = weights(tmp_path / "ruined" / "model")
    assert all(torch.equal(weight, kept[name]) for name, weight in weights(good).items())


def test_a_damaged_best_checkpoint_is_not_published(tmp_path):
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(100))
        checkpoints.commit(folder, {"dev_loss": loss})
    (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(bytes(99))
    best = checkpoints.best(tmp_path)
    assert best is not None
    assert best.step == 1
    assert not (tmp_path / "checkpoint-2").exists()


def test_retention_goes_by_step_and_keeps_the_best(tmp_path):
    for step, loss in ((1, 1.0), (2, 2.0), (10, 3.0), (9, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        checkpoints.commit(folder, {"dev_loss": loss})
    checkpoints.retain(tmp_path, newest=2)
    assert [c.step for c in checkpoints.committed(tmp_path)] == [1, 9, 10]


# -- how a run ends -----------------------------------------------------------------------------


class Told:
    """A stage of which the governor only reads the evaluations."""

    account, id = "budget", 1

    def __init__(self, steps):
        self.ledger = self
        self._rows = [
            {"stage_id": 1, "step": s, "flops": 0.0, "objective": 1.0, "stderr": 0.1} for s in steps
        ]

    def evaluations(self, account):
        return self._rows

    def decisions(self):
        return []


def governor(*, evaluated, max_steps=100, cooldown_steps=20, eval_steps=10):
    schedule = WarmupStableDecay(max_steps=max_steps, warmup_steps=0, cooldown_steps=cooldown_steps)
    return Governor(
        None,
        schedule,
        Told(evaluated),
        objective=None,
        step_cost=lambda: Cost(flops=1.0),
        evaluation_cost=lambda: Cost(flops=100.0),
        checkpoint_cost=lambda: Cost(seconds=5.0),
        reserved=lambda: Cost(flops=7.0),
        eval_steps=eval_steps,
    )


@pytest.mark.parametrize(
    ("step", "evaluated", "steps", "evaluations"),
    [
        (0, (), 20, 4),  # the first, then after 10, 20 and 21 steps
        (5, (0,), 20, 3),  # 10, 20, 26
        (9, (0,), 20, 3),  # 10, 20, 30: the last is at a boundary
        (10, (0,), 20, 4),  # 10 itself comes first
        (10, (0, 10), 20, 3),
        (85, (0, 80), 15, 2),  # cooling: 90 and 100
        (95, (0, 90), 5, 1),
    ],
)
def test_every_evaluation_to_come_is_reserved(step, evaluated, steps, evaluations):
    cooldown, after = governor(evaluated=evaluated).tail(step)
    assert cooldown == steps
    assert after.flops == evaluations * 100.0 + 7.0
    assert after.seconds == evaluations * 5.0


def test_the_price_is_that_of_the_best_other_use():
    one = governor(evaluated=(0,))
    one._objective = Objective()
    assert one._price("flops", Cost(flops=1e12)) == 0.0, "nothing else to do"
    one.alternatives = (lambda resource, interval: 2e-15, lambda resource, interval: 3e-15)
    assert one._price("flops", Cost(flops=1e12)) == 3e-15


@pytest.mark.slow
def test_a_budget_that_shrinks_still_ends_in_a_cooldown(tiny_model, tiny_data, tmp_path):
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data, budget=Budget(flops=6e9))
    edit(folder, "flops: 6000000000.0", "flops: 3.1e9")
    finish(folder)
    reasons = [d["chosen"] for d in ledger(folder).decisions() if d["name"] == "train on or stop"]
    assert "cool down and stop" in reasons
    assert "stop now" not in reasons
    assert ledger(folder).spent().flops <= 3.1e9


def test_the_schedule_ends_at_zero_from_wherever_it_cools():
    schedule = WarmupStableDecay(max_steps=100, warmup_steps=10, cooldown_steps=20)
    assert [schedule(k) for k in (0, 9, 50, 79)] == pytest.approx([0.1, 1.0, 1.0, 1.0])
    assert 1 > schedule(80) > schedule(99) > 0
    schedule.cool_down_from(40)
    assert schedule.end == 60
    assert schedule(39) == 1.0
    assert 1 > schedule(40) > schedule(59) > 0
    schedule.cool_down_from(50)
    assert schedule.end == 60, "it starts once"


# -- scoring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["perplexity", "grad_cosine"])
@pytest.mark.long
def test_scoring_never_passes_the_budget_whatever_was_predicted(
    scorer, tiny_model, tiny_data, tmp_path
):
    folder = tmp_path / "run"
    plan = planned(
        folder, tiny_model, tiny_data, budget=Budget(flops=9e9), fixed={"selection.scorer": scorer}
    )
    predicted = plan.predicted["select"]["flops"]
    assert predicted > 0
    text = (folder / "plan.yaml").read_text()
    text = text.replace(f"flops: {predicted}", "flops: 1000.0")  # as if it had been thought cheap
    limit = predicted / 3
    (folder / "plan.yaml").write_text(text.replace("flops: 9000000000.0", f"flops: {limit}"))
    with pytest.raises(BudgetExceeded, match=r"more than the .*FLOP that was left for it\nhint: "):
        finish(folder)
    assert 0.5 * limit < ledger(folder).spent().flops <= limit


# -- the rule -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_rule_ends_a_run_and_remembers_across_a_pause(
    tiny_model, tiny_data, tmp_path, monkeypatch
):
    """Nothing improves by ten nats: the plateau is seen at the same step either way."""
    rule = {"plateau": {"min_delta": 10.0}}
    fixed = {"stopping": rule, "training.eval_steps": 5, "training.save_steps": 5}
    ends = []
    for name, at in (("straight", None), ("paused", 8), ("paused while cooling", 17)):
        folder = tmp_path / name
        plan = planned(folder, tiny_model, tiny_data, budget=Budget(flops=2e10), fixed={**fixed})
        if at is not None:
            with monkeypatch.context() as patch:
                interrupt_at(patch, at)
                with pytest.raises(training.Interrupted):
                    finish(folder)
        finish(folder)
        (stage,) = [s for s in ledger(folder).stages() if s["name"] == "train"]
        stops = [d for d in ledger(folder).decisions() if d["chosen"] == "cool down and stop"]
        assert len(stops) == 1
        assert "3 of 3 evaluations without an improvement" in stops[0]["reason"]
        assert stage["detail"]["steps"] == stops[0]["step"] + plan.training.cooldown_steps
        assert stage["detail"]["steps"] < plan.training.max_steps
        ends.append(stage["detail"]["steps"])
    assert len(set(ends)) == 1


@pytest.mark.slow
def test_gains_are_weighed_in_the_unit_of_the_objective(tiny_model, tiny_data, tmp_path):
    metric = {"objective.metric": "exact_match", "objective.max_new_tokens": 2}
    fixed = {**metric, "training.eval_steps": 5, "training.save_steps": 5}
    planned(tmp_path / "run", tiny_model, tiny_data, fixed=fixed)
    finish(tmp_path / "run")
    weighed = [d for d in ledger(tmp_path / "run").decisions() if d["stage"] and d["choice"]]
    assert weighed
    for decision in weighed:
        assert {o["gain"]["unit"] for o in decision["choice"]["options"]} == {"exact_match"}
        assert " exact_match a " in decision["reason"]


@pytest.mark.slow
def test_recomputing_activations_changes_the_cost_and_not_the_model(
    tiny_model, tiny_data, tmp_path
):
    found = {}
    for recompute in (False, True):
        folder = tmp_path / str(recompute)
        activations = "recompute" if recompute else "keep"
        fixed = {"training.memory.activations": activations, "training.max_steps": 12}
        plan = planned(folder, tiny_model, tiny_data, fixed={**fixed})
        finish(folder)
        trained = ledger(folder).spent(activity="train").flops
        assert trained == pytest.approx(12 * plan_step(folder, plan), rel=1e-12)
        found[recompute] = (trained, weights(folder / "model"))
    assert 1.15 < found[True][0] / found[False][0] < 1.35
    for name, weight in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], weight, rtol=1e-5, atol=1e-6)


def plan_step(folder, plan) -> float:
    with stages.at_work(RunFolder(folder), silent) as work:
        return work.predicted(plan).step.flops


@pytest.mark.long
def test_a_killed_scoring_goes_on_at_the_shard(tiny_model, tiny_data, tmp_path, monkeypatch):
    from thrifty.data.store import build_store
    from thrifty.scorers.baselines.length import Length

    monkeypatch.setitem(build_store.__kwdefaults__, "shard_rows", 128)
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data, fixed={"selection.scorer": "length"})
    plain, scored = Length.score, []

    def score(self, shard, state, meter):
        if len(scored) == 3:
            scored.append(None)
            raise Killed
        scored.append(int(shard.ids[0]))
        return plain(self, shard, state, meter)

    monkeypatch.setattr(Length, "score", score)
    with pytest.raises(Killed):
        finish(folder)
    finish(folder)
    firsts = [first for first in scored if first is not None]
    assert len(firsts) == len(set(firsts)) > 4, "no shard is scored twice, and all are"
