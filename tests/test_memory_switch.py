"""Steps that are held otherwise in the midst of a run."""

import pytest
import torch

from tests import runs
from thrifty.core.budget import Budget
from thrifty.core.marginal import replay
from thrifty.interruption import Interrupted
from thrifty.memory_switch import DECISION, STAY, alike, held_as
from thrifty.run_folder import RunFolder

pytestmark = pytest.mark.xdist_group("memory_switch")

RECOMPUTED = {
    "training.memory.activations": "recompute",
    "training.per_device_train_batch_size": 2,
    "training.gradient_accumulation_steps": 2,
    "training.switch": "governed",
    "training.max_steps": 40,
    "training.warmup_steps": 2,
    "training.cooldown_steps": 4,
}


def _run(folder, model, data, **changes):
    fixed = {**RECOMPUTED, **changes}
    runs.planned(folder, model, data, fixed=fixed, budget=Budget(flops=2e10))
    runs.finish(folder)


def _switches(folder):
    decisions = runs.ledger(folder).decisions()
    return [d for d in decisions if d["name"] == DECISION and d["chosen"] != STAY]


@pytest.fixture(scope="module")
def switched(tmp_path_factory, tiny_model, tiny_data):
    folder = tmp_path_factory.mktemp("switched") / "run"
    _run(folder, tiny_model, tiny_data)
    return folder


@pytest.mark.long
def test_where_flops_bind_it_stops_recomputing(switched, tiny_model, tiny_data, tmp_path):
    (decision,) = _switches(switched)
    assert decision["chosen"].endswith("keep")
    assert replay(decision["choice"]).chosen == decision["chosen"]
    _run(tmp_path / "run", tiny_model, tiny_data, **{"training.switch": "never"})
    spent = [runs.ledger(f).spent(activity="train").flops for f in (switched, tmp_path / "run")]
    left = 1 - decision["step"] / 40
    assert spent[0] / spent[1] == pytest.approx(1 - left * (1 - 1 / 1.2), abs=0.05)
    # The same sequences, states and schedule: weights differ by the rounding of sums.
    one, other = (runs.weights(folder / "model") for folder in (switched, tmp_path / "run"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_it_was_held(
    switched, tiny_model, tiny_data, tmp_path, monkeypatch
):
    step = _switches(switched)[0]["step"]
    for at in (step - 3, step + 3):
        folder = tmp_path / str(at)
        with monkeypatch.context() as patch:
            runs.interrupt_at(patch, at)
            with pytest.raises(Interrupted):
                _run(folder, tiny_model, tiny_data)
        runs.finish(folder)
        whole, resumed = runs.weights(switched / "model"), runs.weights(folder / "model")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_all_ways_have_the_steps_of_the_plan(switched):
    training = RunFolder(switched).plan().training
    ways = list(alike(training))
    assert training in ways
    assert {way.step_sequences for way in ways} == {4}
    assert len(ways) == 3 * 4


def test_what_a_checkpoint_keeps_is_put_back(switched):
    training = RunFolder(switched).plan().training
    facts = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "activations": "keep",
    }
    there = held_as(training, facts)
    assert (there.per_device_train_batch_size, there.memory.activations) == (4, "keep")


def test_pairs_are_held_as_planned(tiny_model, tiny_data, tmp_path):
    with pytest.raises(ValueError, match=r"training\.switch"):
        runs.planned(
            tmp_path / "run", tiny_model, tiny_data, fixed={"training.switch": "sometimes"}
        )
