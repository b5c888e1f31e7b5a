"""Runs whose rows are chosen while training: the ledger, the loss, a resume."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.runs import finish, interrupt_at, ledger, planned, silent, weights
from thrifty import stages, training_rows
from thrifty.core.contracts import Chosen, OnlineMethod, Round
from thrifty.core.resolve import resolve
from thrifty.data.packing import IGNORED, PackedDataset
from thrifty.rounds import Rounds
from thrifty.run_folder import RunFolder
from thrifty.weighed_loss import weighed_loss

SEVERAL_PASSES = {"selection.max_tokens": 1500}
COSTS = ("craig", "curriculum", "gradmatch", "greats", "rho1", "self_paced")
METHODS = (*COSTS, "colm", "infobatch", "ordered")


def run(folder, model, data, online):
    plan = planned(folder, model, data, fixed={**SEVERAL_PASSES, "training.online": online})
    finish(folder)
    return plan


@pytest.mark.parametrize(
    "name",
    [
        n
        if n in ("colm", "craig", "greats", "infobatch", "rho1")
        else pytest.param(n, marks=pytest.mark.slow)
        for n in METHODS
    ],
)
@pytest.mark.long
def test_a_run_says_what_it_cost_and_saved_and_keeps_within_the_budget(
    name, tiny_model, tiny_data, tmp_path
):
    plan = run(tmp_path / "run", tiny_model, tiny_data, name)
    book = ledger(tmp_path / "run")
    assert plan.training.online == name
    assert book.spent().flops <= book.budget.flops
    assert book.spent().flops > 0.85 * book.budget.flops
    extra = book.spent(activity="online").flops
    assert (extra > 0) == (name in COSTS)
    (said,) = [d for d in book.decisions() if d["name"] == "what to train on next"]
    assert said["chosen"] == name
    detail = said["detail"] if isinstance(said["detail"], dict) else json.loads(said["detail"])
    assert detail["extra_flops"] == extra
    assert (detail["saved_tokens"] > 0) == (name in ("infobatch", "self_paced"))
    assert detail["rounds"] > 1
    assert (detail["choosing_flops"] > 0) == (name in ("colm", "greats"))
    with stages.at_work(RunFolder(tmp_path / "run"), silent) as work:
        step = work.predicted(work.plan).step
    assert detail["saved_flops"] == pytest.approx(detail["saved_tokens"] * step.flops / step.tokens)
    rows = book.evaluations()
    assert rows[-1]["objective"] < rows[0]["objective"]


@pytest.mark.parametrize(
    "name",
    [
        "colm",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("craig", "gradmatch", "greats", "infobatch", "self_paced", "rho1")
        ),
    ],
)
def test_an_interrupted_run_resumes_bit_for_bit(name, tiny_model, tiny_data, tmp_path, monkeypatch):
    run(tmp_path / "straight", tiny_model, tiny_data, name)
    fixed = {**SEVERAL_PASSES, "training.online": name}
    planned(tmp_path / "broken", tiny_model, tiny_data, fixed=fixed)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 9)  # in the second pass
        with pytest.raises(Exception, match="stopped after step 9"):
            finish(tmp_path / "broken")
    finish(tmp_path / "broken")
    one, other = (weights(tmp_path / each / "model") for each in ("straight", "broken"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    books = [ledger(tmp_path / each) for each in ("straight", "broken")]
    assert books[0].spent(stage="train").flops == books[1].spent(stage="train").flops
    assert books[1].spent(lost=True).flops == 0


@pytest.mark.long
def test_what_was_prepared_is_paid_for_once(tiny_model, tiny_data, tmp_path, monkeypatch):
    fixed = {**SEVERAL_PASSES, "training.online": "self_paced"}
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data, fixed=fixed)
    with monkeypatch.context() as patch:
        patch.setattr(
            training_rows, "read_by_training", lambda *_: 1 / 0
        )  # a fault before the first step
        with pytest.raises(ZeroDivisionError):
            finish(folder)
    before = ledger(folder).spent(activity="online").flops
    finish(folder)
    book = ledger(folder)
    assert book.spent(activity="online").flops == before > 0
    assert book.spent(lost=True).flops == 0


@pytest.mark.long
def test_other_options_are_another_training(tiny_model, tiny_data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data, fixed=SEVERAL_PASSES)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Exception, match="stopped after step 5"):
            finish(folder)
    plan = folder / "plan.yaml"
    plan.write_text(plan.read_text().replace("online: shuffled", "online: infobatch"))
    with pytest.raises(ValueError, match="trained under other settings"):
        finish(folder)


# -- the loss -------------------------------------------------------------------------------------


class Weighted(OnlineMethod):
    """Two documents; the second weighs three times as much; of it every other token none."""

    watches = True
    weighs_tokens = True

    def next_round(self, chosen, known, now):
        return Round(rows=np.array([1, 0]), weights=np.array([3.0, 1.0], dtype=np.float32))

    def token_weights(self, known, rows, places, losses):
        return np.where((rows == 1) & (places % 2 == 0), 0.0, 1.0)


def documents(model):
    from types import SimpleNamespace

    random = np.random.default_rng(0)
    made = []
    for size in (11, 17):
        mask = random.random(size) < 0.8
        ids = random.integers(2, 300, size).astype(np.int32)
        made.append(SimpleNamespace(input_ids=ids, loss_mask=mask))
    lengths = np.array([11, 17])
    return Chosen(tokens=made, num_tokens=lengths, scores=np.zeros(2, dtype=np.float32))


def batch_of(rounds, chosen):
    data = PackedDataset(
        chosen.tokens, 32, num_items=1, order=rounds.order, exact=True, tells_rows=True
    )
    return {name: value[None] for name, value in data[0].items()}


@pytest.mark.parametrize("num_items", [None, 50])
def test_with_weights_of_one_it_is_the_loss_of_transformers(tiny_model, num_items):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    chosen = documents(model)
    rounds = Rounds(resolve("online", "infobatch"), chosen, {}, num_tokens=1e3, seed=0)
    batch = batch_of(rounds, chosen)
    shown = {name: batch[name] for name in ("input_ids", "position_ids")}
    more = {} if num_items is None else {"num_items_in_batch": num_items}
    theirs = model(**shown, labels=batch["labels"], **more).loss
    ours = weighed_loss(model(**shown).logits, batch, num_items, rounds)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    one, other = (torch.autograd.grad(x, list(model.parameters())) for x in (ours, theirs))
    for mine, its in zip(one, other, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-7)


def test_weights_of_rows_and_of_tokens_multiply_and_losses_are_noted():
    chosen = documents(None)
    rounds = Rounds(Weighted(), chosen, {}, num_tokens=1e3, seed=0)
    batch = batch_of(rounds, chosen)
    logits = torch.randn(1, 32, 320, generator=torch.Generator().manual_seed(1))
    found = weighed_loss(logits, batch, None, rounds).item()
    total = count = 0.0
    seen = {0: [], 1: []}
    for t in range(31):
        label = int(batch["labels"][0, t + 1])
        if label == IGNORED:
            continue
        row, place = int(batch["rows"][0, t + 1]), int(batch["position_ids"][0, t + 1])
        nll = -float(logits[0, t].double().log_softmax(-1)[label])
        seen[row].append(nll)
        token = 0.0 if row == 1 and place % 2 == 0 else 1.0
        total += nll * token * (3.0 if row == 1 else 1.0)
        count += 1
    assert found == pytest.approx(total / count, rel=1e-5)
    noted = rounds._losses
    assert noted == pytest.approx([np.mean(seen[0]), np.mean(seen[1])], rel=1e-5)


def test_padding_belongs_to_no_row():
    chosen = documents(None)
    rounds = Rounds(Weighted(), chosen, {}, num_tokens=1e3, seed=0)
    batch = batch_of(rounds, chosen)
    assert batch["rows"][0].tolist() == [1] * 17 + [0] * 11 + [-1] * 4
    assert (batch["labels"][0][batch["rows"][0] == -1] == IGNORED).all()
    assert set(batch["epoch"][0].tolist()) == {0}


@pytest.mark.parametrize("name", ["greats", "colm"])
@pytest.mark.long
def test_what_choosing_takes_is_told_of_every_micro_batch(name, tiny_model, tiny_data, tmp_path):
    fixed = {**SEVERAL_PASSES, "training.online": name}
    fixed |= {"training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 2}
    planned(tmp_path / "run", tiny_model, tiny_data, fixed=fixed)
    finish(tmp_path / "run")
    book = ledger(tmp_path / "run")
    (stage,) = [s for s in book.stages() if s["name"] == "train"]
    with stages.at_work(RunFolder(tmp_path / "run"), silent) as work:
        step = work.predicted(work.plan).step
        plain = replace(work.plan, training=replace(work.plan.training, online="shuffled"))
        more = step.flops - work.predicted(plain).step.flops
    steps = stage["detail"]["steps"]
    assert more > 0
    assert stage["detail"]["online"]["choosing_flops"] == pytest.approx(more * steps)
    assert book.spent(activity="train").flops == pytest.approx(step.flops * steps)
