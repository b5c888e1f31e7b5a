"""The main job, end to end on a tiny model: what it leaves, what it spends, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import write_jsonl
from tests.runs import SMALL, asked, finish, interrupt_at, ledger, planned, silent, weights
from thrifty import checkpoints, pipeline, stages, training_rows
from thrifty.core.budget import Budget, Cost
from thrifty.core.ledger import BudgetExceeded
from thrifty.core.marginal import replay
from thrifty.data.store import open_store
from thrifty.planner import NoPlanFits
from thrifty.preparation import plan_run
from thrifty.run_folder import RunFolder


@pytest.fixture(scope="module")
def done(tiny_model, tiny_data, tmp_path_factory) -> Path:
    """A finished run with its control and report."""
    folder = tmp_path_factory.mktemp("runs") / "done"
    planned(folder, tiny_model, tiny_data, control=True, budget=Budget(flops=1.5e10))
    pipeline.run(folder, silent)
    return folder


def test_spends_what_was_planned_and_no_more(done):
    book = ledger(done)
    spent = book.spent()
    assert spent.flops <= book.budget.flops
    assert spent.flops >= 0.95 * book.budget.flops
    for stage in book.stages():
        if stage["account"] == "budget" and stage["predicted"]["flops"]:
            measured = book.spent(stage=stage["name"]).flops
            assert measured == pytest.approx(stage["predicted"]["flops"], rel=0.02)


def test_the_control_has_the_same_total_flops(done):
    book = ledger(done)
    own = book.spent(stage="select").flops + book.spent(stage="train").flops
    control = book.spent(account="control", stage="control-train").flops
    assert control <= own
    assert control >= 0.93 * own
    stage = next(s for s in book.stages() if s["name"] == "control-test")
    assert stage["detail"]["difference_stderr"] > 0


def test_what_it_leaves_loads_with_stock_libraries(done):
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(done / "model")
    tokenizer = AutoTokenizer.from_pretrained(done / "model")
    ids = torch.tensor([tokenizer("say two and three:")["input_ids"]])
    assert torch.isfinite(model(input_ids=ids).logits).all()
    rows = load_from_disk(str(done / "selected" / "data"))
    lines = (done / "selected" / "selected.jsonl").read_text().splitlines()
    assert len(rows) == len(lines) > 0
    assert set(json.loads(lines[0])) >= {"id", "prompt", "completion", "weight", "score_sums"}
    assert rows[0]["prompt"] == json.loads(lines[0])["prompt"]


def test_training_helped_and_selection_found_the_topic(done):
    evaluations = ledger(done).evaluations()
    assert evaluations[0]["step"] == 0
    assert evaluations[-1]["objective"] < evaluations[0]["objective"] - 0.5
    examples = json.loads((done / "selected" / "examples.json").read_text())
    assert len(examples["selected"]) == 20
    assert len(examples["rejected"]) == 20
    manifest = json.loads((done / "selected" / "manifest.json").read_text())
    assert 0 < manifest["num_selected"] < manifest["num_candidates"]


def test_running_a_finished_run_does_nothing(done):
    before = ledger(done).charges()
    model = (done / "model" / "model.safetensors").stat().st_mtime_ns
    pipeline.run(done, silent)
    assert ledger(done).charges() == before
    assert (done / "model" / "model.safetensors").stat().st_mtime_ns == model


def test_every_choice_can_be_replayed_from_the_ledger(done):
    choices = [d["choice"] for d in ledger(done).decisions() if d["choice"]]
    assert len(choices) >= 2
    for choice in choices:
        assert replay(choice).chosen == choice["chosen"]
        assert list(replay(choice).rates) == pytest.approx(choice["rates"])


def test_the_report_is_written(done):
    page = (done / "report.html").read_text(encoding="utf-8")
    assert "bm25" in page


@pytest.mark.long
def test_lora_leaves_an_adapter_that_peft_loads(tiny_model, tiny_data, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "lora"
    planned(folder, tiny_model, tiny_data, fixed={"training.memory.trained": "lora"})
    finish(folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, folder / "model")
    assert sum("lora_" in n for n, _ in model.named_parameters()) > 0
    rows = ledger(folder).evaluations()
    assert rows[-1]["objective"] < rows[0]["objective"]


@pytest.mark.slow
def test_a_plan_edited_to_lora_adapts_every_linear(tiny_model, tiny_data, tmp_path):
    from thrifty.costs.shape import read_shape

    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data, fixed={"training.max_steps": 4})
    plan = folder / "plan.yaml"
    text = plan.read_text()
    assert "trained: full" in text
    plan.write_text(text.replace("trained: full", "trained: lora"))
    finish(folder)
    adapted = json.loads((folder / "model" / "adapter_config.json").read_text())["target_modules"]
    assert set(adapted) == set(read_shape(tiny_model).lora_targets)
    charged = [c for c in ledger(folder).charges() if c["activity"] == "train"]
    with stages.at_work(RunFolder(folder), silent) as work:
        step = work.predicted(work.plan).step.flops
    assert sum(c["flops"] for c in charged) == pytest.approx(4 * step, rel=1e-12)


def test_continued_pretraining_with_replay(tiny_model, tiny_data, tmp_path):
    folder = tmp_path / "continued"
    fixed = {
        "training.replay": [str(tiny_data["pool"])],
        "training.replay_share": 0.25,
        "selection.scorer": "uniform",
        "selection.max_tokens": 1500,
    }
    planned(folder, tiny_model, tiny_data, task="continued", fixed=fixed)
    run = RunFolder(folder)
    with stages.at_work(run, silent) as work:
        stages.select(work, work.main)
        chosen_rows = training_rows.chosen_rows(work, work.main)
        with work.ledger.stage("train", "full") as stage:
            rounds = training_rows.rounds_of(work, work.main, chosen_rows, stage, "", Cost())
        data = training_rows.read_by_training(work.plan.training, rounds)
        data.members(len(data) - 1)
        chosen = json.loads((run.selected("budget") / "manifest.json").read_text())["num_tokens"]
        first_pass = sum(
            len(data._examples[i].input_ids)
            for item in range(data.epoch_starts[1])
            for i in data.members(item)
        )
        assert first_pass == pytest.approx(chosen / 0.75, rel=0.05)


@pytest.mark.long
def test_without_a_target_dev_rows_come_from_the_pool_and_are_not_trained_on(
    tiny_model, tiny_data, tmp_path
):
    folder = tmp_path / "no-target"
    changes = {"targets": {}, "budget": Budget(flops=2e10)}
    planned(folder, tiny_model, tiny_data, **changes, fixed={"selection.scorer": "perplexity"})
    finish(folder)
    run = RunFolder(folder)
    dev = {bytes(p) for p in open_store(run.target("pool", "dev")).shard(0).fingerprints}
    assert dev
    import numpy as np

    pool = open_store(run.pool)
    chosen = pool.take(np.load(run.selected("budget") / "ids.npy"))
    assert not dev & {bytes(p) for p in chosen.fingerprints}


@pytest.mark.long
def test_a_run_of_few_steps_keeps_a_row_however_many_passes_were_asked(
    tiny_model, tiny_data, tmp_path
):
    fixed = {"training.epochs": 100, "training.per_device_train_batch_size": 1}
    folder = tmp_path / "few"
    plan = planned(folder, tiny_model, tiny_data, budget=Budget(tokens=400), fixed=fixed)
    assert plan.selection.max_tokens >= 20
    finish(folder)
    assert 0 < ledger(folder).spent().tokens <= 400


# -- resuming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_an_interrupted_run_resumes_bit_for_bit(
    method, tiny_model, tiny_data, tmp_path, monkeypatch
):
    fixed = {"training.memory.trained": method}
    for name in ("straight", "broken"):
        planned(tmp_path / name, tiny_model, tiny_data, fixed=fixed)
    finish(tmp_path / "straight")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(Exception, match="stopped after step 7"):
            finish(tmp_path / "broken")
    assert not (tmp_path / "broken" / "model").exists()
    finish(tmp_path / "broken")
    file = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    straight = (tmp_path / "straight" / "model" / file).read_bytes()
    assert (tmp_path / "broken" / "model" / file).read_bytes() == straight
    one, other = ledger(tmp_path / "straight"), ledger(tmp_path / "broken")
    keys = ("step", "objective", "stderr", "by_target", "flops")
    assert [[e[k] for k in keys] for e in one.evaluations()] == [
        [e[k] for k in keys] for e in other.evaluations()
    ]
    assert other.spent(stage="train").flops == one.spent(stage="train").flops
    assert other.spent(lost=True).flops == 0


@pytest.mark.long
def test_work_lost_to_a_torn_checkpoint_is_charged_and_the_run_goes_on(
    tiny_model, tiny_data, tmp_path, monkeypatch
):
    folder = tmp_path / "torn"
    plan = planned(folder, tiny_model, tiny_data, budget=Budget(flops=9e9))
    every = plan.training.save_steps
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2 * every + 1)
        with pytest.raises(Exception, match="stopped"):
            finish(folder)
    saved = checkpoints.committed(folder / "checkpoints")
    newest = saved[-1].path / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(bytes(data))
    said: list[str] = []
    finish(folder, said.append)
    assert any("model.safetensors has changed" in line for line in said)
    assert any("lost with the interruption" in line for line in said)
    assert (folder / "checkpoints" / f"torn-checkpoint-{2 * every + 1}").is_dir()
    book = ledger(folder)
    assert 0 < book.spent(lost=True).flops < book.spent().flops
    assert book.spent().flops <= book.budget.flops
    assert [e["step"] for e in book.evaluations()] == sorted(
        {e["step"] for e in book.evaluations()}
    )


@pytest.mark.long
def test_another_base_model_is_refused(tiny_model, tiny_data, tmp_path, monkeypatch):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    folder = tmp_path / "run"
    planned(folder, model, tiny_data)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Exception, match="stopped"):
            finish(folder)
    state = weights(model)
    state["model.norm.weight"] += 1
    from safetensors.torch import save_file

    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has changed since the plan"):
        finish(folder)


def test_a_second_process_is_refused(tiny_model, tiny_data, tmp_path):
    folder = tmp_path / "locked"
    planned(folder, tiny_model, tiny_data)
    run = RunFolder(folder)
    refused = pytest.raises(ValueError, match=r"worked on by process \d+ on")
    with run.working(), refused, run.working():
        pass


# -- budgets and faults -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget",
    [
        Budget(flops=3.3e9),
        Budget(tokens=3000),
        Budget(flops=9e9, tokens=5000),
        pytest.param(Budget(seconds=12), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.long
def test_no_budget_is_passed(budget, tiny_model, tiny_data, tmp_path):
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data, budget=budget)
    with stages.at_work(RunFolder(folder), silent) as work:
        stages.select(work, work.main)
        stages.train(work, work.main)
        stages.test(work, work.main)
    spent = ledger(folder).spent()
    for resource in budget.limited:
        assert spent.of(resource) <= budget.limit(resource)
    assert spent.tokens > 0


@pytest.mark.slow
def test_the_flops_of_evaluations_are_known_to_the_last_before_training(
    tiny_model, tiny_data, tmp_path
):
    """Or else a test of uneven rows could pass what training left."""
    uneven = [{"prompt": "say", "completion": " five" * n} for n in (1, 2, 3, 5, 9, 20, 38, 40, 50)]
    rows = write_jsonl(tmp_path / "uneven.jsonl", uneven * 9)
    data = {**tiny_data, "test": rows, "dev": rows}
    folder = tmp_path / "run"
    plan = planned(folder, tiny_model, data, budget=Budget(flops=9e9))
    with stages.at_work(RunFolder(folder), silent) as work:
        costs = work.predicted(plan)
        stages.select(work, work.main)
        stages.train(work, work.main)
        stages.test(work, work.main)
    found = ledger(folder)
    flops = {
        name: [c["flops"] for c in found.charges() if c["activity"] == name]
        for name in ("evaluate", "test")
    }
    assert set(flops["evaluate"]) == {costs.evaluation.flops}
    assert flops["test"] == [costs.test.flops]
    assert 0.95 * 9e9 < found.spent().flops <= 9e9


def test_a_budget_for_less_than_a_step_says_the_least(tiny_model, tiny_data, tmp_path):
    with pytest.raises(NoPlanFits, match=r"smallest plan .*needs \S+ MFLOP but 1 MFLOP is allowed"):
        planned(tmp_path / "run", tiny_model, tiny_data, budget=Budget(flops=1e6))
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


def test_a_memory_budget_that_holds_no_plan_says_the_least(tiny_model, tiny_data, tmp_path):
    with pytest.raises(NoPlanFits, match=r"smallest plan .*needs .*MiB of peak memory"):
        planned(tmp_path / "run", tiny_model, tiny_data, budget=Budget(memory_bytes=1e6))


@pytest.mark.long
def test_a_budget_lowered_below_what_is_spent_stops_before_training(
    tiny_model, tiny_data, tmp_path
):
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data)
    plan = folder / "plan.yaml"
    plan.write_text(plan.read_text().replace("flops: 4000000000.0", "flops: 1e6", 1))
    with pytest.raises(BudgetExceeded, match="least that would do"):
        finish(folder)
    assert ledger(folder).decisions()[-1]["name"] == "budget"


@pytest.mark.long
def test_a_gradient_that_is_not_finite_stops_and_the_last_checkpoint_stays(
    tiny_model, tiny_data, tmp_path, monkeypatch
):
    from thrifty.trainer import BudgetedTrainer

    folder = tmp_path / "run"
    plan = planned(folder, tiny_model, tiny_data)
    plain = BudgetedTrainer.training_step
    bad = plan.training.save_steps + 2

    def poisoned(self, model, inputs, *args, **kwargs):
        loss = plain(self, model, inputs, *args, **kwargs)
        if self.state.global_step + 1 == bad:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(BudgetedTrainer, "training_step", poisoned)
        with pytest.raises(RuntimeError, match=f"gradient at step {bad} is not finite"):
            finish(folder)
    newest, torn = checkpoints.newest_whole(folder / "checkpoints")
    assert newest.step == plan.training.save_steps
    assert not torn
    assert all(torch.isfinite(w).all() for w in weights(newest.path).values())
    finish(folder)  # without the poison the same command goes on
    assert all(torch.isfinite(w).all() for w in weights(folder / "model").values())


@pytest.mark.long
def test_what_is_measured_reaches_a_reporter(tiny_model, tiny_data, tmp_path):
    """TensorBoard's files stand for all: the Trainer brings the reporters, thrifty the numbers."""
    pytest.importorskip("tensorboardX")
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data, fixed={"training.report_to": ["tensorboard"]})
    finish(folder)
    (events,) = folder.rglob("events.out.tfevents*")
    written = events.read_bytes()
    for tag in (b"train/loss", b"eval/loss", b"eval/sums_loss", b"train/spent_flops"):
        assert tag in written


@pytest.mark.parametrize(
    ("name", "says"),
    [("wand", "'wand', which is no reporter"), ("comet_ml", "comet_ml, which is not installed")],
)
def test_a_reporter_that_cannot_report_is_refused_before_anything_is_spent(
    name, says, tiny_model, tiny_data, tmp_path
):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=says):
        planned(folder, tiny_model, tiny_data, fixed={"training.report_to": [name]})
    assert not folder.exists()
    planned(folder, tiny_model, tiny_data)
    with pytest.raises(ValueError, match=says):
        pipeline.run(folder, silent, (f"training.report_to=[{name}]",))
    assert ledger(folder).stages() == []


def test_a_plan_folder_in_use_is_refused(tiny_model, tiny_data, tmp_path):
    planned(tmp_path / "run", tiny_model, tiny_data)
    with pytest.raises(ValueError, match="exists already"):
        planned(tmp_path / "run", tiny_model, tiny_data, budget=Budget(flops=5e9))


def test_checkpoints_between_evaluations_are_refused_before_the_pool_is_read(
    tiny_model, tiny_data, tmp_path
):
    said: list[str] = []
    fixed = {**SMALL, "training.eval_steps": 5, "training.save_steps": 7}
    with pytest.raises(ValueError, match="save_steps 7 is not a multiple of eval_steps 5"):
        plan_run(asked(tiny_model, tiny_data, fixed=fixed), tmp_path / "run", said.append)
    assert said == []


@pytest.mark.parametrize("save_steps", [1, 7, 12, 1000])
def test_evaluations_are_planned_to_fall_on_the_checkpoints_asked_for(
    save_steps, tiny_model, tiny_data, tmp_path
):
    fixed = {"training.eval_steps": "auto", "training.save_steps": save_steps}
    plan = planned(tmp_path / "run", tiny_model, tiny_data, fixed=fixed)
    assert plan.training.save_steps == save_steps
    assert save_steps % plan.training.eval_steps == 0


def test_changed_selection_settings_are_noticed(tiny_model, tiny_data, tmp_path):
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data)
    with stages.at_work(RunFolder(folder), silent) as work:
        stages.select(work, work.main)
    plan = folder / "plan.yaml"
    plan.write_text(plan.read_text().replace("scorer: bm25", "scorer: uniform"))
    with pytest.raises(ValueError, match="made under other settings"):
        finish(folder)


@pytest.mark.long
def test_a_full_disk_keeps_the_last_checkpoint_and_the_same_command_goes_on(
    tiny_model, tiny_data, tmp_path, monkeypatch, capsys
):
    from thrifty.cli import main

    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data)
    plain = checkpoints.commit

    def full(path, details):
        if details["step"] == 20:
            raise OSError(28, "No space left on device", str(path / "model.safetensors"))
        plain(path, details)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "commit", full)
        assert main(["run", str(folder)]) == 5
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "the same command then goes on" in error
    newest, torn = checkpoints.newest_whole(folder / "checkpoints")
    assert newest is not None
    assert newest.step == 10
    assert not torn
    assert not (folder / "checkpoints" / "checkpoint-20").exists()  # it only filled the disk
    assert main(["run", str(folder)]) == 0
    assert ledger(folder).spent().flops <= ledger(folder).budget.flops


def test_a_picker_that_needs_vectors_is_priced_charged_and_resumed(
    tiny_model, tiny_data, tmp_path, monkeypatch
):
    folder = tmp_path / "vectors"
    fixed = {
        "selection.picker": {"clusters": {"clusters": 5}},
        "selection.filters": ["duplicates", "overlap", "near_duplicates", "semantic_duplicates"],
        "selection.max_tokens": 1500,
    }
    plan = planned(folder, tiny_model, tiny_data, fixed=fixed)
    with stages.at_work(RunFolder(folder), silent) as work:
        stages.select(work, work.main)
    book = ledger(folder)
    embedded = [c for c in book.charges() if c["activity"] == "embed"]
    assert sum(c["flops"] for c in embedded) > 0
    predicted = plan.predicted["select"]["flops"]
    assert book.spent(stage="select").flops == pytest.approx(predicted, rel=0.1)
    manifest = json.loads((RunFolder(folder).selected("budget") / "manifest.json").read_text())
    assert 1000 < manifest["num_tokens"] <= 1500
    assert manifest["picker"] == "clusters"
