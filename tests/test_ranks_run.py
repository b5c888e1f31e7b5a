"""A run on several devices: two ranks on this machine, over gloo, beside one process that does the
same with twice the micro-batches."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.runs import asked, interrupt_at, kill_at, ledger, planned, silent, weights
from thrifty import launch, pipeline, ranks
from thrifty.agreement import AgreeingCallback
from thrifty.cli import main
from thrifty.core import plan as plans
from thrifty.core.budget import Budget
from thrifty.costs.memory import account
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import read_shape
from thrifty.memory_plan import Techniques
from thrifty.open_run import Work
from thrifty.preparation import plan_run
from thrifty.run_folder import RunFolder
from thrifty.signals.models import load_model

STEPS = 30
ONE = {"training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 2}
TWO = {**ONE, "training.gradient_accumulation_steps": 1, "training.devices": 2}


@pytest.fixture(scope="module")
def small_shards():
    """Six shards of the small pool, as of one of many gigabytes."""
    from thrifty.data import store

    whole = store.build_store
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "build_store", lambda *a, **k: whole(*a, **{**k, "shard_rows": 25}))
        yield


@pytest.fixture(scope="module")
def plan_of(small_shards, tiny_model, tiny_data):
    def plan(folder: Path, layout: dict, model: Path = tiny_model) -> Path:
        data = {**tiny_data, "pool": tiny_data["small_pool"]}
        fixed = {"training.max_steps": STEPS, "selection.scorer": "perplexity", **layout}
        planned(folder, model, data, fixed=fixed, budget=Budget(flops=2e10))
        return folder

    return plan


@pytest.fixture(scope="module")
def wider_model(tiny_model, tmp_path_factory):
    """Its layers' matrices have the 4096 elements, and rows of 64, that few bits take."""
    folder = tmp_path_factory.mktemp("wider") / "model"
    shutil.copytree(tiny_model, folder)
    config = LlamaConfig.from_pretrained(folder)
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def as_ranks(job, count: int = 2) -> list[int]:
    """Exit codes of ``job()`` as so many ranks, forked: they need not import anything anew."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch._free_port())}

    def as_rank(number: int) -> None:
        os.environ.update(shared, WORLD_SIZE=str(count), RANK=str(number), LOCAL_RANK=str(number))
        torch.set_num_threads(1)  # the threads of the process that was forked are not here
        job()

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=as_rank, args=(number,)) for number in range(count)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(150)
        assert one.exitcode is not None, "the ranks wait for each other"
    return [one.exitcode for one in processes]


def run(folder: Path, *overrides: str) -> None:
    pipeline.train(folder, silent, overrides)


@pytest.fixture(scope="module")
def one(plan_of, tmp_path_factory):
    """The run of one process."""
    folder = plan_of(tmp_path_factory.mktemp("one") / "run", ONE)
    run(folder)
    return folder


@pytest.fixture(scope="module")
def two(plan_of, tmp_path_factory):
    """The same on two ranks."""
    folder = plan_of(tmp_path_factory.mktemp("two") / "run", TWO)
    assert as_ranks(lambda: run(folder)) == [0, 0]
    return folder


CUT = {**TWO, "training.parallel": "fsdp"}


@pytest.fixture(scope="module")
def cut(plan_of, tmp_path_factory):
    """The same on two ranks that have half of each weight."""
    folder = plan_of(tmp_path_factory.mktemp("cut") / "run", CUT)
    assert as_ranks(lambda: run(folder)) == [0, 0]
    return folder


def losses(folder: Path) -> list[float]:
    state = folder / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json"
    return [e["loss"] for e in json.loads(state.read_text())["log_history"] if "loss" in e]


@pytest.mark.long
def test_ranks_with_half_the_weights_learn_what_one_process_does(one, cut):
    check_alike(one, cut)


def test_two_ranks_learn_what_one_process_does(one, two):
    check_alike(one, two)


def check_alike(one: Path, two: Path) -> None:
    assert len(losses(two)) > 10
    np.testing.assert_allclose(losses(two), losses(one), rtol=0, atol=1e-6)
    dev = [[e["objective"] for e in ledger(each).evaluations()] for each in (one, two)]
    np.testing.assert_allclose(*dev, rtol=0, atol=1e-6)
    for name, weight in weights(one / "model").items():
        torch.testing.assert_close(weights(two / "model")[name], weight, rtol=0, atol=1e-5)


def test_the_ledger_has_what_all_ranks_spent(one, two):
    for activity in ("score", "train", "evaluate"):
        alone, together = (ledger(each).spent(activity=activity) for each in (one, two))
        assert together.flops == pytest.approx(alone.flops, rel=1e-12)
        assert together.flops > 0
        assert together.tokens == alone.tokens
    assert ledger(two).reserved().flops == 0


def by_its_letters(prompt: str, answer: str, gold: str) -> float:
    """A score that differs from row to row."""
    return sum(map(ord, prompt + answer)) % 97 / 97


@pytest.mark.slow
def test_answers_dealt_to_ranks_score_and_cost_the_same(plan_of, tmp_path):
    scored = {
        "objective.metric": {"callable": {"function": f"{__name__}:by_its_letters"}},
        "objective.max_new_tokens": 6,
        "training.max_steps": 10,
    }
    alone = plan_of(tmp_path / "alone", {**ONE, **scored})
    dealt = plan_of(tmp_path / "dealt", {**TWO, **scored})
    run(alone)
    assert as_ranks(lambda: run(dealt)) == [0, 0]
    first, same = (ledger(each).evaluations()[0] for each in (alone, dealt))
    assert 0 < first["objective"] < 1
    for key in ("objective", "stderr", "by_target", "beside"):
        assert same[key] == first[key]
    costs = [
        next(c["flops"] for c in ledger(each).charges() if c["activity"] == "evaluate")
        for each in (alone, dealt)
    ]
    assert costs[1] == pytest.approx(costs[0], rel=1e-12)


@pytest.mark.long
def test_ranks_with_half_the_weights_spend_as_much(one, cut):
    alone, together = (ledger(each).spent(activity="train").flops for each in (one, cut))
    assert together == pytest.approx(alone, rel=1e-12)
    alone, together = (ledger(each).spent(activity="evaluate").flops for each in (one, cut))
    assert alone < together < 1.01 * alone, "idle passes keep ranks in step"


@pytest.mark.slow
def test_shards_dealt_to_ranks_have_the_same_scores(one, two):
    files = [sorted(RunFolder(each).scores("budget").rglob("*.parquet")) for each in (one, two)]
    assert len(files[0]) == 6
    for alone, dealt in zip(*files, strict=True):
        assert pq.read_table(alone).equals(pq.read_table(dealt))


@pytest.mark.slow
def test_no_limit_is_passed_and_all_ranks_stop_at_once(two, plan_of, tmp_path):
    limit = 0.8 * ledger(two).spent().flops
    folder = plan_of(tmp_path / "run", TWO)
    text = (folder / "plan.yaml").read_text()
    (folder / "plan.yaml").write_text(text.replace("flops: 20000000000.0", f"flops: {limit}", 1))
    assert as_ranks(lambda: run(folder)) == [0, 0]
    spent = ledger(folder).spent().flops
    assert 0.8 * limit < spent <= limit
    (detail,) = [s["detail"] for s in ledger(folder).stages() if s["name"] == "train"]
    assert 0 < detail["steps"] < STEPS
    reasons = [d["reason"] for d in ledger(folder).decisions() if d["name"] == "train on or stop"]
    assert any("suffice for the cool-down" in reason for reason in reasons)


@pytest.mark.parametrize(
    "layout", ["two", pytest.param("cut", marks=pytest.mark.slow)], ids=["ddp", "fsdp"]
)
@pytest.mark.long
def test_killed_and_gone_on_bit_for_bit(layout, request, plan_of, tmp_path, monkeypatch):
    unbroken = request.getfixturevalue(layout)
    folder = plan_of(tmp_path / "run", {"two": TWO, "cut": CUT}[layout])
    with monkeypatch.context() as patch:
        kill_at(patch, 17)
        assert -signal.SIGKILL in as_ranks(lambda: run(folder))
    assert as_ranks(lambda: run(folder)) == [0, 0]
    for name, weight in weights(unbroken / "model").items():
        assert torch.equal(weight, weights(folder / "model")[name])
    assert ledger(folder).spent(lost=True).flops > 0
    spent = (ledger(folder).spent() + ledger(folder).spent(lost=True) * -1).flops
    assert spent == pytest.approx(ledger(unbroken).spent().flops, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [TWO, CUT], ids=["ddp", "fsdp"])
def test_goes_on_with_one_process_where_its_micro_batches_make_up_for_it(
    layout, one, plan_of, tmp_path, monkeypatch
):
    folder = plan_of(tmp_path / "run", layout)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 15)
        codes = as_ranks(lambda: run(folder))
    assert codes[0] != 0, "interrupted"
    with pytest.raises(ValueError, match=r"devices 2, and this is a job of 1 process\nhint: "):
        run(folder)
    with pytest.raises(ValueError, match="under other settings"):
        run(folder, "training.devices=1")
    run(folder, "training.devices=1", "training.gradient_accumulation_steps=2")
    for name, weight in weights(one / "model").items():
        torch.testing.assert_close(weights(folder / "model")[name], weight, rtol=0, atol=1e-5)


FEW_STEPS = {f"training.{each}_steps": 3 for each in ("max", "eval", "save")}


def few_steps(folder: Path, model: Path, plan_of, monkeypatch, **memory) -> Path:
    """Three steps on two ranks, after each of which both have the same weights."""
    whole = AgreeingCallback.on_step_end

    def compared(self, args, state, control, model=None, **kwargs):
        trained = [p.detach().double() for p in model.parameters() if p.requires_grad]
        own = np.array([(float(p.sum()), float(p.square().sum())) for p in trained])
        assert np.array_equal(ranks.added(own), own + own)
        assert np.abs(own).sum() > 0
        whole(self, args, state, control, model=model, **kwargs)

    memory = {f"training.memory.{kind}": technique for kind, technique in memory.items()}
    plan_of(folder, TWO | FEW_STEPS | memory, model)
    with monkeypatch.context() as patch:
        patch.setattr(AgreeingCallback, "on_step_end", compared)
        assert as_ranks(lambda: run(folder)) == [0, 0]
    return folder / "checkpoints" / "checkpoint-3"


@pytest.mark.slow
def test_moments_stay_in_8_bits(plan_of, wider_model, tmp_path, monkeypatch):
    """Some ways to train on several devices widen them and say nothing."""
    saved = few_steps(tmp_path / "run", wider_model, plan_of, monkeypatch, states="adamw_8bit")
    states = torch.load(saved / "optimizer.pt")["state"].values()
    moments = [each["__bnb_optimizer_quant_state__"]["state1"] for each in states]
    few = [moment.numel() for moment in moments if moment.dtype == torch.uint8]
    assert len(few) == 2 * 5, "q, o, gate, up and down of two layers"
    assert min(few) >= 4096


@pytest.mark.slow
@pytest.mark.parametrize(
    "memory",
    [
        {"trained": "lora", "weights": "nf4"},
        {"trained": "lora", "weights": "int8"},
        {"trained": "lora", "weights": "bfloat16"},
        {"trained": "dora", "activations": "recompute"},
        {"trained": {"adapters": {"rank": 8}}, "weights": "bfloat16"},
        {"trained": {"adalora": {"first_cut": 0, "last_cut": 2, "cut_steps": 1}}},
        {"activations": "selective", "loss": "chunked"},
        {"states": "adafactor"},
        {"states": {"galore": {"rank": 8}}},
        {"states": "adam_mini"},
        {"states": "adamw_4bit"},
        {"states": "sgd"},
    ],
    ids=lambda memory: "-".join(map(str, memory.values())),
)
def test_techniques_that_ranks_can_share(memory, plan_of, wider_model, tmp_path, monkeypatch):
    assert few_steps(tmp_path / "run", wider_model, plan_of, monkeypatch, **memory).is_dir()


CUT_ALIKE = [
    {"activations": "recompute"},
    {"activations": "selective", "loss": {"chunked": {"tokens": 24}}},
    {"trained": "lora"},
    {"trained": "rslora", "activations": "recompute", "loss": "chunked"},
    {"trained": "lora_fa"},
    {"trained": "ia3"},
    {"trained": "lora", "weights": "bfloat16"},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "memory", CUT_ALIKE, ids=lambda memory: "-".join(map(str, memory.values()))
)
def test_what_is_cut_learns_what_whole_replicas_do(memory, plan_of, wider_model, tmp_path):
    chosen = {f"training.memory.{kind}": technique for kind, technique in memory.items()}
    folders = []
    for name, layout in (("whole", TWO), ("cut", CUT)):
        folders.append(plan_of(tmp_path / name, layout | FEW_STEPS | chosen, wider_model))
        assert as_ranks(lambda: pipeline.run(folders[-1], silent)) == [0, 0]
    (file,) = (folders[0] / "checkpoints" / "checkpoint-3").glob("*model.safetensors")
    first, same = (load_file(each / file.relative_to(folders[0])) for each in folders)
    assert first.keys() == same.keys()
    for name, weight in first.items():
        last_digit = 2**-6 if weight.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(same[name], weight, rtol=0, atol=last_digit)
    near = 1e-5 if all(w.dtype == torch.float32 for w in first.values()) else 1e-3
    dev = [[e["objective"] for e in ledger(each).evaluations()] for each in folders]
    np.testing.assert_allclose(*dev, rtol=0, atol=near)
    tests = [
        next(s["detail"] for s in ledger(each).stages() if s["name"] == "test") for each in folders
    ]
    for key in ("after", "before", "change_stderr"):
        assert tests[1][key] == pytest.approx(tests[0][key], abs=near)
    flops = [ledger(each).spent(activity="test").flops for each in folders]
    assert flops[1] == pytest.approx(flops[0], rel=0.01)


def test_each_rank_has_its_share_and_no_more(wider_model):
    def counted() -> None:
        torch.distributed.init_process_group("gloo")
        model = load_model(wider_model, "float32", "cpu", shards=2)
        own = sum(p.to_local().numel() for p in model.parameters())
        assert own == sum(p.numel() for p in model.parameters()) / 2
        torch.distributed.destroy_process_group()

    assert as_ranks(counted) == [0, 0]


# -- what is planned, and what is refused ---------------------------------------------------------


def test_a_plan_for_two_devices(tiny_model, tiny_data, tmp_path):
    wish = replace(asked(tiny_model, tiny_data), num_devices=2)
    planned, _, plan = plan_run(wish, tmp_path / "run", silent)
    assert plan.training.devices == 2
    assert plan.training.parallel == "ddp"
    step = planned.chosen.step
    assert step.tokens == plan.training.step_sequences * plan.training.max_length
    work = Work(RunFolder(tmp_path / "run"), plan, silent)
    assert work.predicted(plan).step.flops == pytest.approx(step.flops)


def test_replicas_hold_all_and_their_gradients_stay(tiny_model):
    shape = read_shape(tiny_model)
    alone, other = (
        account(shape, MemorySetting(sequence=64, dtype="float32", replicas=n)).phases["optimizer"]
        for n in (1, 2)
    )
    assert other["weights"] == alone["weights"]
    assert other["optimizer_states"] == alone["optimizer_states"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"training.parallel": "fsdp", "training.memory.states": "adamw_8bit"},
            "adamw_8bit cannot be cut over devices in a run",
        ),
        (
            {"training.parallel": "fsdp", "training.memory.trained": {"adapters": {"rank": 8}}},
            r"adapters.* cannot be cut over devices in a run",
        ),
        ({"training.online": "rho1"}, "each device sees its own alone"),
        ({"training.devices": 0}, "training.devices must be more than zero"),
    ],
    ids=str,
)
def test_what_several_devices_cannot_do_is_refused(changes, reason, tiny_model, tiny_data):
    wish = asked(tiny_model, tiny_data, fixed={"training.devices": 2, **changes})
    with pytest.raises(ValueError, match=reason):
        plan_run(wish, Path("nowhere"), silent)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("states", "lomo"),
        ("states", "adalomo"),
        ("trained", "mezo"),
        ("trained", "lisa"),
        ("trained", "badam"),
        ("trained", "hift"),
    ],
)
def test_what_has_no_gradients_to_add_up_is_refused(kind, name):
    plan = plans.MemoryPlan(**{"states": "sgd", kind: name})
    techniques = Techniques.of(plan)
    techniques.setting(MemorySetting())
    with pytest.raises(ValueError, match=f"{name} does not go here: .*\nhint: "):
        techniques.setting(MemorySetting(replicas=2))


# -- the command ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_starts_its_ranks(plan_of, tmp_path, two):
    folder = plan_of(tmp_path / "run", TWO)
    done = subprocess.run(
        [sys.executable, "-m", "thrifty", "train", str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder / 'model'}\n"
    assert done.stderr.count("loading the model") == 1, "rank 0 alone says what is done"
    for name, weight in weights(two / "model").items():
        assert torch.equal(weight, weights(folder / "model")[name])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_does_as_well(plan_of, tmp_path, two):
    folder = plan_of(tmp_path / "run", TWO)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "thrifty", "run", str(folder)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "report.html").is_file()
    for name, weight in weights(two / "model").items():
        assert torch.equal(weight, weights(folder / "model")[name])


def test_the_ranks_exit_code_is_the_commands(plan_of, tmp_path, monkeypatch):
    folder = plan_of(tmp_path / "run", TWO)
    started = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(launch, "run_ranks", lambda *asked: started.append(asked) or 5)
    assert main(["train", str(folder), "--set", "training.seed=1"]) == 5
    assert started == [(2, ["train", str(folder), "--set=training.seed=1"])]
