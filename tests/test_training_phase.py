"""Runs that go over to training something else on the way."""

import dataclasses
import multiprocessing
import os
import signal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests import runs
from thrifty import checkpoints, stages, training_phase, verify_command
from thrifty.core.budget import Budget
from thrifty.core.marginal import replay
from thrifty.holding.merging import write_merged
from thrifty.interruption import Interrupted
from thrifty.memory_plan import Techniques
from thrifty.memory_switch import DECISION, STAY, MemorySwitch
from thrifty.refresh import CHOSEN_ANEW
from thrifty.run_folder import RunFolder
from thrifty.schedule import WarmupStableDecay
from thrifty.signals.models import load_model

pytestmark = pytest.mark.xdist_group("training_phase")

LORA = {"lora": {"rank": 4, "alpha": 8.0}}
BADAM = {"badam": {"switch_steps": 3}}
SETTINGS = {
    "training.memory.trained": LORA,
    "training.switch": {"when": "governed", "trained": [BADAM]},
    "training.max_steps": 30,
    "training.warmup_steps": 3,
    "training.cooldown_steps": 4,
    "training.eval_steps": 6,
    "training.save_steps": 6,
    "selection.scorer": "uniform",
    "stopping": "plateau",
}


def forced(monkeypatch, turns):
    """Have a run go over to each of ``turns``, step -> what is trained, whatever it brings."""

    def consider(self, standing, stage):
        name = turns.get(standing.step)
        if name is None:
            return None
        ways = {holding.name.split()[0]: holding for holding in map(self.holding_of, self.ways())}
        stage.decide(DECISION, ways[name].name, "as the test says", step=standing.step)
        return ways[name]

    monkeypatch.setattr(MemorySwitch, "consider", consider)


def planned(folder, model, data, **changes):
    fixed = {**SETTINGS, **changes}
    return runs.planned(folder, model, data, fixed=fixed, budget=Budget(flops=2e10))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40)[None]).logits


TURNS = {6: "badam", 18: "lora"}


@pytest.fixture(scope="module")
def turned(tmp_path_factory, tiny_model, tiny_data):
    """The folder, and what was said; no checkpoint of it is deleted."""
    folder, said = tmp_path_factory.mktemp("turned") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        forced(patch, TURNS)
        patch.setattr(checkpoints, "KEPT", 100)
        patch.setattr(training_phase, "retain", lambda folder: None)
        planned(folder, tiny_model, tiny_data)
        runs.finish(folder, said.append)
    return folder, said


@pytest.fixture(scope="module")
def left(turned):
    """Step -> checkpoint."""
    return {each.step: each for each in checkpoints.committed(turned[0] / "checkpoints")}


def test_what_a_checkpoint_trained_and_on_which_weights_it_says(left):
    phases = {step: each.manifest["phase"] for step, each in left.items()}
    assert {step: next(iter(phase["trained"])) for step, phase in phases.items()} == {
        6: "lora", 12: "badam", 18: "badam", 24: "lora", 30: "lora",
    }  # fmt: skip
    assert [phases[step]["since"] for step in sorted(phases)] == [0, 6, 6, 18, 18]
    assert [phases[step]["base"] for step in sorted(phases)] == ["", "", "", "base-18", "base-18"]


def test_going_over_leaves_the_model_as_it_is(turned, left, tiny_model):
    folder = turned[0] / "checkpoints"
    plain = load_model(tiny_model, "float32", "cpu")
    before = logits(PeftModel.from_pretrained(plain, str(left[6].path)))
    after = logits(load_model(folder / "base-6", "float32", "cpu"))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after, logits(load_model(tiny_model, "float32", "cpu")), atol=1e-4)
    # Back: the same weights, and an adapter that adds nothing yet.
    blocks, whole = (runs.weights(each) for each in (left[18].path, folder / "base-18"))
    assert all(torch.equal(blocks[name], whole[name]) for name in blocks)
    plan = RunFolder(turned[0]).plan()
    with stages.at_work(RunFolder(turned[0]), runs.silent) as work:
        fresh = Techniques.of(plan.training.memory).build(folder / "base-18", work.shape, "cpu", 0)
    found, expected = logits(fresh), logits(load_model(left[18].path, "float32", "cpu"))
    assert torch.equal(found, expected)


def merged_by_hand(base, adapter, rank=4, alpha=8.0):
    """W + alpha / rank B A in float64."""
    found = {name: weight.double() for name, weight in runs.weights(base).items()}
    parts = load_file(adapter / "adapter_model.safetensors")
    for name in (each for each in parts if "lora_A" in each):
        own = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        high = parts[name.replace("lora_A", "lora_B")].double()
        found[own] = found[own] + alpha / rank * high @ parts[name].double()
    return found


def test_an_adapter_is_merged_as_by_hand(turned, left, tiny_model):
    found = runs.weights(turned[0] / "checkpoints" / "base-6")
    expected = merged_by_hand(tiny_model, left[6].path)
    moved = 0
    for name, weight in found.items():
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-6, atol=1e-8)
        moved += not torch.equal(weight, runs.weights(tiny_model)[name])
    assert moved == 2 * 7


def test_in_bfloat16_each_weight_is_rounded_once(left, tiny_model, tmp_path):
    def load(folder, device):
        return load_model(folder, "bfloat16", device)

    write_merged(load, tiny_model, left[6].path, tmp_path)
    base = tmp_path / "base"
    load(tiny_model, "cpu").save_pretrained(base)
    expected = merged_by_hand(base, left[6].path)
    for name, weight in runs.weights(tmp_path).items():
        assert weight.dtype == torch.bfloat16
        # Where the sum in float32 lies between two of bfloat16 it may go to the other.
        torch.testing.assert_close(weight.double(), expected[name], rtol=2**-8, atol=1e-6)
        same = (weight == expected[name].bfloat16()).float().mean()
        assert same > 0.99


def test_the_model_that_is_left_is_whole(turned, left, tiny_model):
    """Of the last phase, an adapter's, merged into weights that nobody else has."""
    model = turned[0] / "model"
    assert not (model / "adapter_config.json").exists()
    plain = load_model(turned[0] / "checkpoints" / "base-18", "float32", "cpu")
    expected = logits(PeftModel.from_pretrained(plain, str(left[30].path)))
    found = logits(load_model(model, "float32", "cpu"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert any("merged into the weights of step 18" in line for line in turned[1])


def test_going_over_is_charged_and_said(turned, tiny_model):
    charges = runs.ledger(turned[0]).charges()
    found = [(c["activity"], c["step_from"], c["flops"]) for c in charges if c["activity"] in
             ("switch", "merge")]  # fmt: skip
    weights = runs.weights(tiny_model)
    matrices = [w for name, w in weights.items() if name.endswith("proj.weight")]
    flops = sum((2 * 4 + 2) * weight.numel() for weight in matrices)
    assert found == [("switch", 6, flops), ("switch", 18, 0.0), ("merge", 30, flops)]
    assert all(c["seconds"] > 0 for c in charges if c["activity"] == "switch")
    told = [line for line in turned[1] if "begin anew" in line]
    assert "from 0.003 to 0.0003" in told[0]
    assert "from 0.0003 to 0.003" in told[1]
    assert "warmed up over 3 steps" in told[0]
    assert "the adapter merged in float32;" in told[0]
    assert "merged" not in told[1]


def test_steps_are_charged_as_what_is_trained_takes(turned):
    plan = RunFolder(turned[0]).plan()
    with stages.at_work(RunFolder(turned[0]), runs.silent) as work:
        switch = stages.memory_switch_of(work, plan)
        ways = [switch.holding_of(training) for training in switch.ways()]
    assert [way.name for way in ways] == ["lora 4x1 keep", "badam 4x1 keep"]
    charges = [c for c in runs.ledger(turned[0]).charges() if c["activity"] == "train"]
    taken = {
        name: sum(c["flops"] for c in charges if first <= c["step_from"] < last) / (last - first)
        for name, first, last in (("lora", 0, 6), ("badam", 6, 18), ("again", 18, 30))
    }
    assert taken["lora"] == taken["again"] == pytest.approx(ways[0].step.flops)
    # Twelve steps are two rounds of two blocks.
    assert taken["badam"] == pytest.approx(ways[1].step.flops)


def rates(folder, step):
    saved = torch.load(folder / f"checkpoint-{step}" / "scheduler.pt", weights_only=True)
    return {round(rate, 12) for rate in saved["_last_lr"]}


def test_the_learning_rate_is_that_of_what_is_trained(turned):
    folder = turned[0] / "checkpoints"
    assert rates(folder, 6) == {3e-3}
    assert rates(folder, 12) == rates(folder, 18) == {3e-4}
    assert rates(folder, 24) == {3e-3}


def kill_within(patch, owner, name, which=1):
    """The process is killed in the midst of that call: as it has done what it does, before anyone
    knows."""
    plain, calls = getattr(owner, name), []

    def killed(*args, **kwargs):
        calls.append(name)
        found = plain(*args, **kwargs)
        if len(calls) == which:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    patch.setattr(owner, name, killed)


def kill_before_saving(patch, step):
    """A checkpoint of that step is written and never committed."""
    plain = checkpoints.commit

    def killed(folder, details):
        if details["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(folder, details)

    patch.setattr(checkpoints, "commit", killed)


KILLS = {
    "before": lambda patch: runs.kill_at(patch, 3),
    "decided, not saved": lambda patch: kill_before_saving(patch, 6),
    "weights being made": lambda patch: kill_within(patch, training_phase, "write_merged"),
    "weights made": lambda patch: kill_within(patch, training_phase, "weights_sha256"),
    "blocks, not saved": lambda patch: runs.kill_at(patch, 8),
    "blocks, saved": lambda patch: runs.kill_at(patch, 14),
    "weights copied": lambda patch: kill_within(patch, training_phase, "weights_sha256", 2),
    "adapter, not saved": lambda patch: runs.kill_at(patch, 20),
    "adapter, saved": lambda patch: runs.kill_at(patch, 26),
    "model being merged": lambda patch: kill_within(patch, training_phase, "write_merged", 2),
}
QUICK = {"weights being made"}


@pytest.mark.parametrize(
    "when",
    [pytest.param(w, marks=[] if w in QUICK else pytest.mark.slow, id=w) for w in KILLS],
)
def test_a_killed_run_leaves_the_same_weights(
    when, turned, tiny_model, tiny_data, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    forced(monkeypatch, TURNS)
    planned(folder, tiny_model, tiny_data)
    with monkeypatch.context() as patch:
        KILLS[when](patch)
        process = multiprocessing.get_context("fork").Process(target=runs.finish, args=(folder,))
        process.start()
        process.join(150)
    assert process.exitcode == -signal.SIGKILL
    runs.finish(folder)
    whole, resumed = (runs.weights(each / "model") for each in (turned[0], folder))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    kept = {each.name for each in (folder / "checkpoints").iterdir()}
    assert kept - {"torn-checkpoint-6"} == {"base-18", "checkpoint-24", "checkpoint-30"}
    assert runs.ledger(folder).faults() == []


@pytest.mark.long
def test_what_a_run_goes_over_to_is_weighed(tiny_model, tiny_data, tmp_path, monkeypatch):
    """Where its user knows that tokens in blocks are worth more; tested, verified, replayed."""
    cache = tmp_path / "cache"
    cache.mkdir()
    worths = "worth: {lora: {mean: 0.6, stderr: 0.01}, badam: {mean: 0.9, stderr: 0.01}}"
    (cache / "priors.yaml").write_text(worths, encoding="utf-8")
    monkeypatch.setenv("THRIFTY_CACHE", str(cache))
    folder = tmp_path / "run"
    by_rule = ("training.max_steps", "training.warmup_steps", "training.cooldown_steps")
    fixed = {key: value for key, value in SETTINGS.items() if key not in by_rule}
    plan = runs.planned(folder, tiny_model, tiny_data, fixed=fixed, budget=Budget(flops=4e9))
    # Steps may come to take fewer FLOPs, and the schedule has some for what that saves.
    assert plan.why["training.max_steps"].startswith(f"{plan.training.max_steps}: a cap")
    with stages.at_work(RunFolder(folder), runs.silent) as work:
        stages.select(work, work.main)
        stages.train(work, work.main)
        stages.test(work, work.main)
        twice = 2 * dataclasses.replace(work.yardstick(work.plan), shape=work.shape).flops(
            work.rows("test")
        )
    ledger = runs.ledger(folder)
    taken = [d for d in ledger.decisions() if d["name"] == DECISION and d["chosen"] != STAY]
    assert taken[0]["chosen"] == "badam 4x1 keep"
    assert 1 <= len(taken) <= 2
    for decision in taken:
        assert replay(decision["choice"]).chosen == decision["chosen"]
    assert "the optimizer's states begin anew" in taken[0]["reason"]
    assert ledger.spent().flops <= plan.budget.flops
    # What is left is whole, and is tested as that.
    assert ledger.spent(stage="test").flops == twice
    assert all(part.is_well for part in verify_command.parts_of(RunFolder(folder)))


OTHERS = {
    "hift": {"training.switch": {"when": "governed", "trained": ["hift"]}},
    "lisa": {
        "training.switch": {
            "when": "governed",
            "trained": [{"lisa": {"layers": 1, "switch_steps": 3}}],
        }
    },
    "full": {"training.switch": {"when": "governed", "trained": ["full"]}},
    "rslora": {"training.switch": {"when": "governed", "trained": ["rslora"]}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_run_goes_over_and_back(name, weights, tiny_model, tiny_data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    forced(monkeypatch, {6: name, 18: "lora"})
    planned(folder, tiny_model, tiny_data, **OTHERS[name], **{"training.memory.weights": weights})
    runs.finish(folder)
    evaluations = runs.ledger(folder).evaluations()
    assert evaluations[-1]["objective"] < evaluations[0]["objective"]
    if weights == "float32":
        assert "model.safetensors" in {each.name for each in (folder / "model").iterdir()}


@pytest.mark.slow
def test_rows_are_chosen_anew_beside(tiny_model, tiny_data, tmp_path, monkeypatch):
    """By what a scorer sees in the forward; resumed within the second phase all the same."""
    found = []
    for cut in (None, 14):
        folder = tmp_path / f"run-{cut}"
        with monkeypatch.context() as patch:
            forced(patch, TURNS)
            anew = {"when": "fixed", "times": 2, "probe_rows": 32, "shortlist": 0.3}
            changes = {f"selection.refresh.{key}": value for key, value in anew.items()}
            changes |= {"selection.scorer": "perplexity", "selection.max_tokens": 1500}
            planned(folder, tiny_model, tiny_data, **changes)
            if cut is not None:
                with patch.context() as interrupting:
                    runs.interrupt_at(interrupting, cut)
                    with pytest.raises(Interrupted):
                        runs.finish(folder)
            runs.finish(folder)
        chosen = [d for d in runs.ledger(folder).decisions() if d["name"] == CHOSEN_ANEW]
        assert len(chosen) == 2
        found.append(runs.weights(folder / "model"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.long
def test_an_adapter_on_other_weights_is_refused(tiny_model, tiny_data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    forced(monkeypatch, {6: "badam", 12: "lora"})
    planned(folder, tiny_model, tiny_data)
    with monkeypatch.context() as patch:
        runs.interrupt_at(patch, 14)
        with pytest.raises(Interrupted):
            runs.finish(folder)
    weights = folder / "checkpoints" / "base-12" / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), None):
        weights.unlink() if damaged is None else weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"base-12.*\nhint: put that folder back"):
            runs.finish(folder)
    weights.write_bytes(whole)
    runs.finish(folder)


def test_new_states_are_warmed_up_again():
    """Beside the schedule, which goes on; a cool-down that begins in the midst of it too."""
    plain = WarmupStableDecay(max_steps=100, warmup_steps=4, cooldown_steps=10)
    anew = WarmupStableDecay(max_steps=100, warmup_steps=4, cooldown_steps=10, anew=30)
    assert [anew(step) for step in (30, 31, 32, 33, 34)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [anew(step) for step in range(40, 101)] == [plain(step) for step in range(40, 101)]
    anew.cool_down_from(31)
    plain.cool_down_from(31)
    assert anew(31) == 0.5 * plain(31)
    none = WarmupStableDecay(max_steps=100, warmup_steps=0, cooldown_steps=10, anew=30)
    assert none(30) == 1.0


@pytest.mark.long
def test_the_learning_rate_may_be_edited_on_the_way(tiny_model, tiny_data, tmp_path, monkeypatch):
    """What is trained by then has its share of the new one."""
    folder = tmp_path / "run"
    forced(monkeypatch, TURNS)
    planned(folder, tiny_model, tiny_data)
    with monkeypatch.context() as patch:
        runs.interrupt_at(patch, 10)
        with pytest.raises(Interrupted):
            runs.finish(folder)
    with stages.at_work(RunFolder(folder), runs.silent, ("training.learning_rate=0.002",)) as work:
        stages.train(work, work.main)
    assert rates(folder / "checkpoints", 24) == {2e-3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.switch": {"when": "governed", "trained": ["badam"]}}, "to come round once"),
        (
            {"training.switch": {"when": "governed", "trained": [{"lisa": {"layers": 9}}]}},
            "a block of 9 layers is more than the model's 2",
        ),
        (
            {
                "training.memory.trained": "full",
                "training.memory.states": "lomo",
                "training.switch": {"when": "governed", "trained": [LORA]},
            },
            "an adapter's gradients are small",
        ),
    ],
)
def test_what_does_not_go_with_the_rest_is_refused_when_planning(
    changes, message, tiny_model, tiny_data, tmp_path
):
    with pytest.raises(ValueError, match=rf"training\.switch\.trained: .*{message}"):
        planned(tmp_path / "run", tiny_model, tiny_data, **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_the_control_of_a_run_that_ended_early_trains_what_the_run_began_with(
    tiny_model, tiny_data, tmp_path
):
    """It has too few steps for a round of the blocks that the run might have gone over to."""
    folder, slow = tmp_path / "run", {"badam": {"switch_steps": 7}}
    fixed = {**SETTINGS, "training.switch": {"when": "governed", "trained": [slow]}}
    runs.planned(folder, tiny_model, tiny_data, fixed=fixed, budget=Budget(flops=1e9), control=True)
    runs.finish(folder)
    with stages.at_work(RunFolder(folder), runs.silent) as work:
        steps = max(each["step"] for each in work.ledger.evaluations())
        branch = stages.control(work)
        assert not branch.plan.training.switch.trained
        assert branch.plan.training.max_steps <= steps < SETTINGS["training.max_steps"]
        stages.select(work, branch)
        stages.train(work, branch)
    assert (folder / "control" / "model").is_dir()
