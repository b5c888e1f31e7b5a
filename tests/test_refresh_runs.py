"""Runs whose rows are chosen anew while the model is trained on them."""

import shutil

import pytest
import torch

from tests import runs
from thrifty.core.budget import Budget
from thrifty.core.marginal import replay
from thrifty.interruption import Interrupted
from thrifty.refresh import CHOSEN_ANEW, DECISION, WIDTH

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


def test_the_governed_one_weighs_it_and_says_why(tiny_model, tiny_data, tmp_path):
    """Every verdict rests on options that can be weighed again."""
    folder = tmp_path / "run"
    settings = {**ANEW, "selection.refresh.when": "governed", "selection.refresh.probe_share": 1.0}
    runs.planned(folder, tiny_model, tiny_data, fixed=settings, budget=Budget(flops=2e10))
    runs.finish(folder)
    decisions = runs.ledger(folder).decisions()
    weighed = [d for d in decisions if d["name"] in (DECISION, WIDTH)]
    assert any(d["name"] == DECISION for d in weighed)
    for decision in weighed:
        assert replay(decision["choice"]).chosen == decision["choice"]["chosen"]
    won = {d["step"] for d in weighed if d["choice"]["chosen"] is not None}
    assert won == {step for step, _ in _refreshes(folder)}


def test_another_scorer_looks_at_the_model_in_training(tiny_model, tiny_data, tmp_path):
    """Its own view of the probe before training is what it is compared with."""
    folder = tmp_path / "run"
    settings = {**ANEW, "selection.scorer": "bm25", "selection.refresh.scorer": "el2n"}
    settings["training.memory.trained"] = "lora"
    runs.planned(folder, tiny_model, tiny_data, fixed=settings, budget=Budget(flops=2e10))
    runs.finish(folder)
    probes = [c for c in runs.ledger(folder).charges() if c["activity"] == "probe"]
    assert len(probes) == 3  # before training, and at each choice
    assert len(_refreshes(folder)) == 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"selection.scorer": "bm25"}, "bm25 does not look at the model"),
        ({"training.online": "infobatch"}, "keeps books on the rows of the first choice"),
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
