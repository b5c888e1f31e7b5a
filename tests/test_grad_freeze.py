"""Matrices that learn no more are trained no more."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests import runs
from thrifty.core.budget import Budget
from thrifty.core.plan_freeze import GradFreeze
from thrifty.costs.setting import MemorySetting
from thrifty.grad_freeze import FILE, FreezeCallback
from thrifty.interruption import Interrupted
from thrifty.run_folder import RunFolder
from thrifty.signals.gradients import trained_matrices
from thrifty.signals.metering import PassMeter

pytestmark = pytest.mark.xdist_group("grad_freeze")

FREEZES = {
    "training.grad_freeze": {"below": 0.97, "after": 0.3, "smoothing": 0.5},
    "training.max_steps": 40,
    "training.warmup_steps": 2,
    "training.cooldown_steps": 4,
}


def _run(folder, model, data, fixed):
    runs.planned(folder, model, data, fixed=fixed, budget=Budget(flops=2e10))
    runs.finish(folder)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory, tiny_model, tiny_data):
    folder = tmp_path_factory.mktemp("frozen") / "run"
    _run(folder, tiny_model, tiny_data, FREEZES)
    return folder


def _decisions(folder):
    name = "train a matrix on or freeze it"
    return [d for d in runs.ledger(folder).decisions() if d["name"] == name]


@pytest.mark.long
def test_what_is_frozen_is_not_charged(frozen, tiny_model, tiny_data, tmp_path):
    decisions = _decisions(frozen)
    assert decisions
    assert all(d["step"] >= 12 for d in decisions)  # after 0.3 of 40 steps
    plain = {k: v for k, v in FREEZES.items() if k != "training.grad_freeze"}
    _run(tmp_path / "run", tiny_model, tiny_data, plain)
    spent = [runs.ledger(f).spent(activity="train").flops for f in (frozen, tmp_path / "run")]
    # A decision's matrices are spared from the step after it.
    spared, before = 0.0, 0.0
    tokens = 4 * 64
    for decision in decisions:
        now = decision["detail"]["spared_flops_a_token"]
        spared += (now - before) * tokens * (40 - decision["step"])
        before = now
    assert spent[1] - spent[0] == pytest.approx(spared, rel=1e-9)
    assert spared > 0.01 * spent[1]


def test_a_frozen_matrix_keeps_its_value(frozen):
    last = sorted(RunFolder(frozen).checkpoints("budget").glob("checkpoint-*"), key=_step)[-2:]
    states = [json.loads((folder / FILE).read_text()) for folder in last]
    names = [name for name, step in states[0]["frozen"].items() if step <= _step(last[0])]
    assert names
    before, after = (runs.weights(folder) for folder in last)
    assert all(torch.equal(before[name], after[name]) for name in names)
    others = [name for name in before if name not in states[1]["frozen"]]
    assert any(not torch.equal(before[name], after[name]) for name in others)


def _step(folder):
    return int(folder.name.rpartition("-")[2])


def test_an_interrupted_run_resumes_bit_for_bit(
    frozen, tiny_model, tiny_data, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        runs.interrupt_at(patch, 25)
        with pytest.raises(Interrupted):
            _run(folder, tiny_model, tiny_data, FREEZES)
    runs.finish(folder)
    whole, resumed = runs.weights(frozen / "model"), runs.weights(folder / "model")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_flops_spared_are_those_that_are_not_executed(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    told = []
    callback = FreezeCallback(GradFreeze(), told.append, lambda *_: None)
    callback.on_train_begin(None, None, None, model=model)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(64)[None].expand(2, 64)

    def counted():
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids).loss.backward()
        return counter.get_total_flops()

    before = counted()
    optimizer.step()
    names = list(callback._watched)[1:5]
    callback._stop(names, 1, optimizer)
    assert before - counted() == told[-1] * ids.numel()
    meter = PassMeter(model, MemorySetting())
    plain = meter.step_flops(2, 64)
    meter.spared = told[-1]
    assert plain - meter.step_flops(2, 64) == told[-1] * 128
    matrices = dict(model.named_parameters())
    assert all(matrices[name] not in optimizer.state for name in names)
    assert len(callback._watched) == len(trained_matrices(model, 0)) + len(names)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"training.grad_freeze": {"below": 1.5}}, r"grad_freeze.below must be in \[0, 1\)"),
        ({"training.memory.trained": {"badam": {"switch_steps": 2}}}, "never trained all at once"),
        ({"training.memory.states": "adalomo"}, "lets go of each gradient"),
    ],
)
def test_what_stands_against_it_is_said(tiny_model, tiny_data, tmp_path, settings, told):
    fixed = {**FREEZES, **settings}
    with pytest.raises(ValueError, match=told):
        _run(tmp_path / "run", tiny_model, tiny_data, fixed)
