"""Runs whose rows are chosen anew while the model is trained on them."""

import json
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests import runs
from tests.test_ranks_run import as_ranks
from thrifty import checkpoints, pipeline, refreshes
from thrifty.budget_callback import BudgetCallback
from thrifty.core.arrays import load_arrays
from thrifty.core.budget import Budget
from thrifty.core.marginal import replay
from thrifty.interruption import Interrupted
from thrifty.memory_plan import Techniques
from thrifty.planner import NoPlanFits
from thrifty.priors import Priors
from thrifty.refresh import CHOSEN_ANEW, DECISION, WIDTH
from thrifty.run_folder import RunFolder

pytestmark = pytest.mark.xdist_group("refresh_runs")

ANEW = {
    "selection.scorer": "grad_cosine",
    "selection.refresh.when": "fixed",
    "selection.refresh.times": 2,
    "selection.refresh.probe_rows": 32,
    "selection.refresh.shortlist": 0.3,
    "selection.max_tokens": 1500,
    "training.max_steps": 60,
    "training.warmup_steps": 2,
    "training.cooldown_steps": 6,
}


def _refreshes(folder):
    decisions = runs.ledger(folder).decisions()
    return [(d["step"], d["detail"]) for d in decisions if d["name"] == CHOSEN_ANEW]


@pytest.fixture(scope="module")
def fixed(tmp_path_factory, tiny_model, tiny_data):
    folder = tmp_path_factory.mktemp("fixed") / "run"
    runs.planned(folder, tiny_model, tiny_data, fixed=ANEW, budget=Budget(flops=2e10))
    shutil.copy(folder / "ledger.sqlite", folder / "ledger.planned")
    runs.finish(folder)
    return folder


@pytest.mark.long
def test_other_rows_are_trained_on_where_they_are_chosen_anew(fixed):
    found = _refreshes(fixed)
    assert [step for step, _ in found] == [20, 40]
    assert all(0 <= detail["kept"] < 1 for _, detail in found)
    # Of the gradient that the selection went by nothing is kept: the second look tells.
    assert found[0][1]["turn"] is None
    assert 0 < found[1][1]["turn"] < 2


def test_every_look_is_charged(fixed):
    charges = runs.ledger(fixed).charges()
    by_name = {}
    for charge in charges:
        by_name.setdefault(charge["activity"], []).append(charge["flops"])
    assert len(by_name["refresh"]) == len(by_name["probe"]) == 2
    assert all(flops > 0 for flops in by_name["refresh"] + by_name["probe"])


@pytest.mark.parametrize(
    "step",
    [pytest.param(15, marks=pytest.mark.slow), 30, pytest.param(50, marks=pytest.mark.slow)],
)
def test_an_interrupted_run_resumes_bit_for_bit(fixed, tmp_path, monkeypatch, step):
    """Interrupted before a choice, between two, and after them."""
    folder = tmp_path / "run"
    shutil.copytree(fixed, folder)
    for name in ("checkpoints", "model", "refreshes", "ledger.sqlite", "selected", "scores"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "ledger.sqlite").write_bytes((fixed / "ledger.planned").read_bytes())
    with monkeypatch.context() as patch:
        runs.interrupt_at(patch, step)
        with pytest.raises(Interrupted):
            runs.finish(folder)
    runs.finish(folder)
    whole, resumed = runs.weights(fixed / "model"), runs.weights(folder / "model")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert _refreshes(folder) == _refreshes(fixed)


@pytest.mark.long
def test_the_governed_one_weighs_it_and_says_why(tiny_model, tiny_data, tmp_path):
    """Every verdict rests on options that can be weighed again; a look is taken where one of them
    could be the answer, and not towards the end of the run."""
    folder = tmp_path / "run"
    settings = {**ANEW, "selection.refresh.when": "governed", "selection.refresh.probe_share": 1.0}
    settings |= {"training.max_steps": 400, "training.eval_steps": 25, "training.save_steps": 50}
    settings |= {"training.cooldown_steps": 40, "selection.refresh.probe_rows": 8}
    runs.planned(folder, tiny_model, tiny_data, fixed=settings, budget=Budget(flops=1e11))
    runs.finish(folder)
    assert _probes(folder)
    assert max(_probes(folder)) < 300
    decisions = runs.ledger(folder).decisions()
    weighed = [d for d in decisions if d["name"] in (DECISION, WIDTH)]
    assert any(d["name"] == DECISION for d in weighed)
    looked = [d["detail"]["standing"] for d in weighed if d["name"] == DECISION]
    assert all(standing["tokens_since_look"] > 0 for standing in looked)
    for decision in weighed:
        assert replay(decision["choice"]).chosen == decision["choice"]["chosen"]
    won = {d["step"] for d in weighed if d["choice"]["chosen"] is not None}
    assert won == {step for step, _ in _refreshes(folder)}


@pytest.mark.long
def test_a_first_look_that_a_crash_undid_is_taken_again(
    tiny_model, tiny_data, tmp_path, monkeypatch
):
    """As the checkpoint after it is written; the choices that follow are those of a run that went
    through."""
    settings = {**ANEW, "selection.scorer": "bm25", "selection.refresh.scorer": "grad_cosine"}
    settings |= {"selection.refresh.when": "governed", "selection.refresh.probe_share": 1.0}
    settings |= {"training.max_steps": 400, "training.eval_steps": 25, "training.save_steps": 100}
    settings |= {"training.cooldown_steps": 40, "selection.refresh.probe_rows": 8}
    settings |= {"selection.refresh.shortlist": 0.05, "selection.max_tokens": 500}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        runs.planned(folder, tiny_model, tiny_data, fixed=settings, budget=Budget(flops=2e11))
    runs.finish(whole)
    first = _probes(whole)[0]
    assert 0 < first < 99
    with monkeypatch.context() as patch:
        commit = checkpoints.commit

        def crash(folder, details):
            if details["step"] == first:
                raise RuntimeError("crashed")
            commit(folder, details)

        patch.setattr(checkpoints, "commit", crash)
        with pytest.raises(RuntimeError, match="crashed"):
            runs.finish(broken)
    runs.finish(broken)
    assert _probes(broken) == [first, *_probes(whole)]  # the lost one too
    undone, *found = _refreshes(broken)
    assert found == _refreshes(whole) == [undone]
    one, other = (runs.weights(folder / "model") for folder in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


def _probes(folder):
    """Steps of all looks at the probe, lost ones too."""
    charges = runs.ledger(folder).charges()
    return [charge["step_from"] for charge in charges if charge["activity"] == "probe"]


@pytest.mark.long
def test_a_scorer_that_is_worth_more_takes_over_and_a_run_that_goes_on_keeps_it(
    tiny_model, tiny_data, tmp_path, monkeypatch
):
    """By its own probe and its own short-list; from there on the probes are its own."""
    known = Priors({"grad_cosine": {"mean": 1.2, "stderr": 0.01}, "el2n": {"mean": 9, "stderr": 1}})
    monkeypatch.setattr(refreshes, "load_priors", lambda: known)
    settings = {**ANEW, "selection.refresh.others": ("el2n",), "selection.refresh.times": 3}
    settings |= {"selection.refresh.when": "governed", "selection.refresh.probe_share": 1.0}
    settings |= {"training.max_steps": 400, "training.eval_steps": 25, "training.save_steps": 25}
    settings |= {"training.cooldown_steps": 40, "selection.refresh.probe_rows": 8}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        runs.planned(folder, tiny_model, tiny_data, fixed=settings, budget=Budget(flops=2e11))
    runs.finish(whole)
    took = [
        d["step"]
        for d in runs.ledger(whole).decisions()
        if d["name"] == DECISION and d["chosen"] == "choose rows anew by el2n"
    ]
    assert len(took) == 1
    after = [detail for step, detail in _refreshes(whole) if step >= took[0]]
    files = sorted((whole / "refreshes").glob("*.npz"))
    assert len(files) >= len(after) > 0
    assert {str(load_arrays(file)["looking"]) for file in files[-len(after) :]} == {"el2n"}
    with monkeypatch.context() as patch:
        runs.interrupt_at(patch, took[0] + 5)
        with pytest.raises(Interrupted):
            runs.finish(cut)
    runs.finish(cut)
    assert _refreshes(cut) == _refreshes(whole)
    one, other = (runs.weights(folder / "model") for folder in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.long
@pytest.mark.parametrize("trained", ["lora", "adapters"])
def test_another_scorer_looks_at_the_model_in_training(
    trained, tiny_model, tiny_data, tmp_path, monkeypatch
):
    """Its own view of the probe before training is what it is compared with. Evaluations and looks
    are charged with all that the model executes, its adapters included."""
    counted, whole, build = [], BudgetCallback.activity, Techniques.build

    @contextmanager
    def watched(self, name, upper, *, step):
        counter = FlopCounterMode(display=False)
        with counter, whole(self, name, upper, step=step) as lease:
            yield lease
        counted.append((name, lease.used.flops, counter.get_total_flops()))

    def built(*args):
        model = build(*args)
        model.set_attn_implementation("eager")  # the counter does not know the other on CPUs
        return model

    monkeypatch.setattr(BudgetCallback, "activity", watched)
    monkeypatch.setattr(Techniques, "build", built)
    folder = tmp_path / "run"
    settings = {**ANEW, "selection.scorer": "bm25", "selection.refresh.scorer": "el2n"}
    settings["training.memory.trained"] = {trained: {"rank": 16}}
    runs.planned(folder, tiny_model, tiny_data, fixed=settings, budget=Budget(flops=2e10))
    runs.finish(folder)
    probes = [c for c in runs.ledger(folder).charges() if c["activity"] == "probe"]
    assert len(probes) == 3  # before training, and at each choice
    seen = [(name, used, flops) for name, used, flops in counted if flops]
    assert {name for name, _, _ in seen} == {"evaluate", "probe", "refresh"}
    for _, used, flops in seen:
        assert used == pytest.approx(flops, rel=0.01)
    assert len(_refreshes(folder)) == 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"selection.scorer": "bm25"}, "bm25 does not look at the model"),
        ({"training.online": "infobatch"}, "keeps books on the rows of the first choice"),
        ({"training.memory.trained": "addax"}, "addax draws short and long rows apart, once"),
        ({"selection.refresh.dwell": 0}, "selection.refresh.dwell must be in"),
        ({"selection.refresh.when": "sometimes"}, "selection.refresh.when"),
        ({"selection.scorer": "s2l"}, "trains a model of its own"),
    ],
)
def test_what_cannot_be_refreshed_is_refused(tiny_model, tiny_data, tmp_path, settings, told):
    with pytest.raises(ValueError, match=told):
        runs.planned(
            tmp_path / "run",
            tiny_model,
            tiny_data,
            fixed={**ANEW, **settings},
            budget=Budget(flops=2e10),
        )


@pytest.mark.long
def test_where_no_probe_can_be_paid_for_only_the_width_is_weighed(tiny_model, tiny_data, tmp_path):
    """A choice without a look is kept, and gone on from, like any other."""
    folder = tmp_path / "run"
    settings = {**ANEW, "selection.refresh.when": "governed", "selection.scorer": "bm25"}
    settings |= {"selection.refresh.scorer": "grad_cosine", "selection.refresh.probe_share": 1e-6}
    runs.planned(folder, tiny_model, tiny_data, fixed=settings, budget=Budget(flops=2e10))
    runs.finish(folder)
    assert not [c for c in runs.ledger(folder).charges() if c["activity"] in ("probe", "refresh")]
    decisions = runs.ledger(folder).decisions()
    assert not [d for d in decisions if d["name"] == DECISION]
    widths = [d for d in decisions if d["name"] == WIDTH]
    assert len(widths) == len(_refreshes(folder))
    assert all("for nothing" in d["reason"] for d in widths)
    assert widths


@pytest.mark.long
def test_where_no_look_fits_into_memory_rows_are_chosen_once(tiny_model, tiny_data, tmp_path):
    """Governed refreshing is an option; fixed refreshing was asked for."""
    looks = {**ANEW, "selection.scorer": "bm25", "selection.refresh.scorer": "grad_cosine"}
    budget = Budget(flops=2e10, memory_bytes=2.0**40)

    def plan(when, memory_bytes, name):
        settings = {**looks, "selection.refresh.when": when}
        limits = replace(budget, memory_bytes=memory_bytes)
        folder = tmp_path / name
        runs.planned(folder, tiny_model, tiny_data, fixed=settings, budget=limits)
        return RunFolder(folder).plan()

    def fits(when, memory_bytes):
        try:
            return plan(when, memory_bytes, f"{when}-{memory_bytes:.0f}")
        except NoPlanFits:
            return None

    # Between what training alone and what training with looks needs.
    low, high = 2.0**28, 2.0**32
    while high - low > 2.0**20:
        middle = (low + high) / 2
        low, high = (low, middle) if fits("fixed", middle) else (middle, high)
    assert plan("governed", high, "above").selection.refresh.when == "governed"
    found = plan("governed", low, "below")
    assert found.selection.refresh.when == "never"
    assert "rows are chosen once: with another look" in found.why["selection.refresh.when"]


@pytest.mark.slow
def test_two_ranks_go_on_with_the_same_rows(tiny_model, tiny_data, tmp_path, monkeypatch):
    """Rank 0 looks, and all read what it chose from the same item on: killed between two choices
    and begun again, all by the books of rank 0, they come to the same."""
    few = {"training.max_steps": 30, "training.per_device_train_batch_size": 2}
    two = {**ANEW, **few, "training.devices": 2}
    data = {**tiny_data, "pool": tiny_data["small_pool"]}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for folder in (unbroken, broken):
        runs.planned(folder, tiny_model, data, fixed=two, budget=Budget(flops=2e10))
    assert as_ranks(lambda: pipeline.train(unbroken, runs.silent)) == [0, 0]
    assert [step for step, _ in _refreshes(unbroken)] == [10, 20]
    with monkeypatch.context() as patch:
        runs.kill_at(patch, 17)
        assert -signal.SIGKILL in as_ranks(lambda: pipeline.train(broken, runs.silent))
    assert as_ranks(lambda: pipeline.train(broken, runs.silent)) == [0, 0]
    assert _refreshes(broken) == _refreshes(unbroken)
    one, other = (runs.weights(folder / "model") for folder in (unbroken, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.long
def test_groups_have_their_shares_of_each_choice_and_replay_goes_on(
    tiny_model, tiny_data, tmp_path
):
    lines = map(json.loads, tiny_data["small_pool"].read_text().splitlines())
    pool = [{**row, "half": "ab"[k % 2]} for k, row in enumerate(lines)]
    file = tmp_path / "pool.jsonl"
    file.write_text("\n".join(map(json.dumps, pool)), encoding="utf-8")
    kept = {"selection.groups": "half", "selection.quotas": {"a": 0.8}}
    replayed = {
        "training.replay": (str(tiny_data["small_pool"]),),
        "training.replay_share": 0.25,
    }
    folder = tmp_path / "run"
    few = {"training.max_steps": 30, "selection.refresh.times": 1}
    runs.planned(
        folder,
        tiny_model,
        {**tiny_data, "pool": file},
        task="continued",
        fixed={**ANEW, **few, **kept, **replayed},
        budget=Budget(flops=2e10),
    )
    runs.finish(folder)
    ((step, _),) = _refreshes(folder)
    assert step == 20
    saved = np.load(max(folder.glob("checkpoints/*-30")) / "rounds.npz")
    chosen, lengths = saved["leg 0"], len(saved["drawn"])
    assert 0.6 < np.mean(chosen % 2 == 0) < 0.9
    assert lengths > len(chosen) + len(np.load(folder / "selected" / "ids.npy"))
