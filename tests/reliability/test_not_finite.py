"""What is not finite in training stops it before the update; or it goes on without the batch."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from tests.runs import finish, ledger, planned, silent, weights
from thrifty import checkpoints, stages
from thrifty.core import plan as plans
from thrifty.core.budget import Budget
from thrifty.core.ledger import Ledger
from thrifty.divergence import NonFiniteGradient
from thrifty.evaluation import Diverged
from thrifty.holding.zeroth_order import ZerothOrder
from thrifty.rewinding import DECISION, rewind, skipped_steps
from thrifty.run_folder import RunFolder

SHORT = {
    "training.max_steps": 12,
    "training.warmup_steps": 0,
    "training.cooldown_steps": 2,
    "training.eval_steps": 4,
    "training.save_steps": 4,
}


@pytest.fixture(scope="module")
def plan(tmp_path_factory, tiny_model, tiny_data):
    folder = tmp_path_factory.mktemp("not-finite") / "run"
    planned(folder, tiny_model, tiny_data, budget=Budget(flops=1e11), fixed=SHORT)
    with stages.at_work(RunFolder(folder), silent) as work:
        stages.select(work, work.main)
    return folder


@contextmanager
def bad_batches(*steps: int, training: bool = True):
    """What goes through the embedding for the n-th time, in training or else out of it, gives no
    numbers from then on, whenever it comes."""
    seen, bad = [0], []

    def embed(module, args, output):
        if module.training != training or not isinstance(module, torch.nn.Embedding):
            return None
        seen[0] += 1
        if seen[0] in steps:
            bad.append(args[0].clone())
        if any(torch.equal(args[0], each) for each in bad):
            return output * float("nan")
        return None

    hook = torch.nn.modules.module.register_module_forward_hook(embed)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def bad_estimate(number: int):
    """The n-th time that a zeroth-order optimizer asks for a loss it is no number. It asks in
    evaluation mode, in which ``bad_batches`` does not tell training from the rest."""
    seen, estimate = [0], ZerothOrder.estimate

    def counted(self, loss):
        seen[0] += 1
        bad = seen[0] == number
        return estimate(self, (lambda: loss() * float("nan")) if bad else loss)

    with mock.patch.object(ZerothOrder, "estimate", counted):
        yield


def with_rewinds(plan, tmp_path, most: int, **more: object):
    folder = shutil.copytree(plan, tmp_path / "run")
    values = plans.to_dict(plans.load(folder / "plan.yaml"))
    values["training"] |= {"rewinds": most, **more}
    (folder / "plan.yaml").write_text(plans.dump(plans.from_dict(values)))
    return folder


def rewinds_of(folder):
    return [row for row in ledger(folder).decisions() if row["name"] == DECISION]


def all_finite(folder):
    return all(bool(tensor.isfinite().all()) for tensor in weights(folder).values())


@pytest.mark.long
def test_without_rewinds_it_stops_before_the_update(plan, tmp_path):
    folder = with_rewinds(plan, tmp_path, 0)
    with bad_batches(6), pytest.raises(NonFiniteGradient, match="step 6 is not finite"):
        finish(folder)
    newest, torn = checkpoints.newest_whole(folder / "checkpoints")
    assert newest is not None
    assert newest.step == 4
    assert not torn
    assert all_finite(newest.path)
    finish(folder)  # the batch is good again: the same goes on
    assert not rewinds_of(folder)


@pytest.mark.long
def test_the_batch_is_passed_over_and_what_was_done_twice_is_lost(plan, tmp_path):
    folder, said = with_rewinds(plan, tmp_path, 1), []
    with bad_batches(6):
        finish(folder, said.append)
    (row,) = rewinds_of(folder)
    assert row["chosen"] == "pass over step 6"
    assert row["detail"] == {"skipped": [6], "from_step": 4}
    assert any("resuming from step 4" in line for line in said)
    assert all_finite(folder / "model")
    with ledger(folder) as book:
        assert [row["step"] for row in book.evaluations()] == [0, 4, 8, 12]
        train = {"stage": "train", "activity": "train"}
        lost, useful = book.spent(**train, lost=True), book.spent(**train, lost=False)
        assert lost.flops == pytest.approx(useful.flops * 2 / 11)  # the fifth and the sixth of 11


@pytest.mark.long
def test_it_is_passed_over_again_after_a_resume(plan, tmp_path, monkeypatch):
    from tests.runs import interrupt_at
    from thrifty.interruption import Interrupted

    straight = with_rewinds(plan, tmp_path / "straight", 1)
    with bad_batches(6):
        finish(straight)
    folder = with_rewinds(plan, tmp_path / "broken", 1)
    with bad_batches(6), monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(Interrupted):
            finish(folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-7")
    finish(folder)  # from step 4 once more, its batch good by now and passed over all the same
    assert skipped(folder) == {6}
    ours, theirs = weights(folder / "model"), weights(straight / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def skipped(folder):
    return {step for row in rewinds_of(folder) for step in row["detail"]["skipped"]}


@pytest.mark.long
def test_after_so_many_it_stops_and_names_the_last(plan, tmp_path):
    folder = with_rewinds(plan, tmp_path, 1)
    # The second is met in the second attempt: steps 5, 7, 8, 9 are passes 7, 8, 9, 10.
    with bad_batches(6, 10), pytest.raises(NonFiniteGradient, match="step 9"):
        finish(folder)
    assert len(rewinds_of(folder)) == 1
    assert skipped(folder) == {6}


@pytest.mark.long
def test_an_evaluation_that_is_not_finite_passes_over_all_since_the_checkpoint(plan, tmp_path):
    folder = with_rewinds(plan, tmp_path, 1)
    real = Diverged("the loss on sums is not finite: the model diverged")
    bad = [8]

    from thrifty.trainer import BudgetedTrainer

    plain = BudgetedTrainer._measure

    def measure(self, meter):
        if self.state.global_step in bad:
            bad.clear()
            raise real
        return plain(self, meter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BudgetedTrainer, "_measure", measure)
        finish(folder)
    (row,) = rewinds_of(folder)
    assert row["detail"] == {"skipped": [5, 6, 7, 8], "from_step": 4}
    assert row["chosen"] == "pass over steps 5 to 8"
    assert [r["step"] for r in ledger(folder).evaluations()] == [0, 4, 8, 12]


def test_a_base_model_that_is_not_finite_is_refused(plan, tmp_path):
    folder = with_rewinds(plan, tmp_path, 3)
    with bad_batches(1, training=False), pytest.raises(ValueError, match="logits are not finite"):
        finish(folder)
    assert not rewinds_of(folder)


@pytest.mark.parametrize(
    "memory", [{"trained": "mezo"}, {"states": "adalomo"}, {"trained": "lora", "states": "lion"}]
)
@pytest.mark.slow
def test_whatever_is_trained(tiny_model, tiny_data, tmp_path, memory):
    fixed = SHORT | {f"training.memory.{kind}": name for kind, name in memory.items()}
    fixed["training.rewinds"] = 2
    folder = tmp_path / "run"
    planned(folder, tiny_model, tiny_data, budget=Budget(flops=1e11), fixed=fixed)
    with stages.at_work(RunFolder(folder), silent) as work:
        stages.select(work, work.main)
    with bad_estimate(6) if memory.get("trained") == "mezo" else bad_batches(6):
        finish(folder)
    assert skipped(folder) == {6}


def test_what_is_decided(tmp_path):
    nan = NonFiniteGradient.at(6)
    with (
        Ledger.create(tmp_path / "ledger.sqlite", Budget()) as book,
        book.stage("train", "full") as stage,
    ):
        assert not rewind(stage, nan, 5, 4, 0)
        assert rewind(stage, nan, 5, 4, 2)
        assert rewind(stage, Diverged("no"), 8, 4, 2)
        assert not rewind(stage, nan, 10, 8, 2)
        assert skipped_steps(stage) == {5, 6, 7, 8}
        assert not rewind(stage, Diverged("no"), 0, 0, 9)
