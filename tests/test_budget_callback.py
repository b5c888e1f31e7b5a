"""``BudgetCallback`` in other people's Trainers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from thrifty import BudgetCallback
from thrifty.core.budget import Budget, Cost
from thrifty.core.ledger import BudgetExceeded, Ledger, Rates
from thrifty.costs.flops import train_flops
from thrifty.costs.shape import read_shape
from thrifty.signals.peak_memory import memory_bytes
from thrifty.step_cost import StepCost
from thrifty.step_leases import StepLeases


class Rows(Dataset):
    """Random token sequences of 24 tokens."""

    def __init__(self, lengths=(24,)):
        self.lengths = lengths

    def __len__(self) -> int:
        return 400

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        length = self.lengths[item % len(self.lengths)]
        ids = torch.randint(2, 300, (length,), generator=torch.Generator().manual_seed(item))
        return {"input_ids": ids, "labels": ids}


def trainer(model_folder: Path, output: Path, callback: BudgetCallback, rows=None, **arguments):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 30,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **arguments,
    }
    return Trainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        args=TrainingArguments(output_dir=str(output), **settings),
        train_dataset=rows or Rows(),
        eval_dataset=torch.utils.data.Subset(Rows(), range(16)),
        callbacks=[callback],
    )


@pytest.fixture
def step_flops(tiny_model):
    return train_flops(read_shape(tiny_model), 4, 24)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.long
def test_stops_before_the_step_that_would_pass_the_limit(steps, step_flops, tiny_model, tmp_path):
    budget = BudgetCallback(flops=(steps + 0.5) * step_flops)
    run = trainer(tiny_model, tmp_path, budget)
    run.train()
    assert run.state.global_step == steps
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.spent().flops == pytest.approx(steps * step_flops)
        assert ledger.spent().tokens == steps * 4 * 24
        assert ledger.reserved().flops == 0


def test_gradient_accumulation_counts_every_micro_batch(step_flops, tiny_model, tmp_path):
    budget = BudgetCallback(flops=6.5 * step_flops)
    run = trainer(tiny_model, tmp_path, budget, gradient_accumulation_steps=2)
    run.train()
    assert run.state.global_step == 3


@pytest.mark.long
def test_tokens_and_time_limit_too(tiny_model, tmp_path):
    run = trainer(tiny_model, tmp_path / "tokens", BudgetCallback(tokens=500))
    run.train()
    assert run.state.global_step == 5
    run = trainer(
        tiny_model, tmp_path / "time", BudgetCallback(hours="1s"), max_steps=100_000, rows=Rows()
    )
    run.train()
    with Ledger(tmp_path / "time" / "ledger.sqlite", read_only=True) as ledger:
        assert 0 < ledger.spent().seconds <= 1


@pytest.mark.long
def test_a_resumed_run_goes_on_from_what_was_spent(step_flops, tiny_model, tmp_path):
    limit = 7.5 * step_flops
    first = trainer(
        tiny_model,
        tmp_path,
        BudgetCallback(flops=limit),
        max_steps=4,
        save_strategy="steps",
        save_steps=4,
    )
    first.train()
    second = trainer(tiny_model, tmp_path, BudgetCallback(flops=limit), max_steps=30)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert second.state.global_step == 7
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.spent().flops == pytest.approx(7 * step_flops)
        assert ledger.spent(lost=True).flops == 0


@pytest.mark.long
def test_starting_over_in_the_same_folder_books_the_first_run_as_lost(
    step_flops, tiny_model, tmp_path
):
    trainer(tiny_model, tmp_path, BudgetCallback(flops=9.5 * step_flops), max_steps=4).train()
    again = trainer(tiny_model, tmp_path, BudgetCallback(flops=9.5 * step_flops), max_steps=30)
    again.train()
    assert again.state.global_step == 5
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.spent(lost=True).flops == pytest.approx(4 * step_flops)


def test_less_than_one_step_is_refused(tiny_model, tmp_path):
    tight = BudgetCallback(tokens=10)
    run = trainer(tiny_model, tmp_path, tight)
    run.args.max_length = 24
    with pytest.raises(BudgetExceeded, match="not one training step fits the tokens"):
        run.train()


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj"], "all-linear", r".*\.(q|v)_proj", ["model.layers.1.mlp.down_proj"]],
    ids=str,
)
@pytest.mark.long
def test_with_lora_the_cheaper_backward_is_counted(targets, tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    from thrifty.costs.flops import Adapter

    run = trainer(tiny_model, tmp_path, BudgetCallback(flops="1e15"), max_steps=3)
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    run.model = run.model_wrapped = get_peft_model(run.model, config)
    run.train()
    names, layers = ("q_proj", "v_proj"), None
    if targets == "all-linear":
        names = read_shape(tiny_model).lora_targets
    elif targets[0].startswith("model."):
        names, layers = ("down_proj",), (1,)
    adapter = Adapter(rank=4, targets=names, layers=layers)
    want = 3 * train_flops(read_shape(tiny_model), 4, 24, adapter=adapter)
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.spent().flops == pytest.approx(want)


def test_evaluation_is_charged(step_flops, tiny_model, tmp_path):
    run = trainer(
        tiny_model,
        tmp_path,
        BudgetCallback(flops="1e15"),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
    )
    run.train()
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.spent().flops > 4.2 * step_flops


@pytest.mark.long
def test_evaluations_do_not_pass_the_budget(step_flops, tiny_model, tmp_path):
    """The first shows what one costs, the next comes only if it fits."""
    free = trainer(
        tiny_model,
        tmp_path / "free",
        BudgetCallback(flops="1e15"),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
    )
    free.train()
    with Ledger(tmp_path / "free" / "ledger.sqlite", read_only=True) as ledger:
        evaluation = ledger.spent(activity="evaluate").flops / 2
        assert evaluation > 0.5 * step_flops
        assert ledger.spent(activity="evaluate").seconds > 0
    for name, extra, steps in (("skipped", 1.5, 4), ("enough", 2.1, 4)):
        limit = 4 * step_flops + extra * evaluation
        run = trainer(
            tiny_model,
            tmp_path / name,
            BudgetCallback(flops=limit),
            eval_strategy="steps",
            eval_steps=2,
        )
        run.train()
        with Ledger(tmp_path / name / "ledger.sqlite", read_only=True) as ledger:
            assert ledger.spent().flops <= limit
            assert ledger.spent(activity="evaluate").flops == int(extra) * evaluation
        assert run.state.global_step == steps


def test_a_first_evaluation_that_cannot_fit_is_refused_at_its_first_batch(
    step_flops, tiny_model, tmp_path
):
    run = trainer(
        tiny_model,
        tmp_path,
        BudgetCallback(flops=2.6 * step_flops),
        per_device_eval_batch_size=1,
        eval_strategy="steps",
        eval_steps=2,
    )
    with pytest.raises(BudgetExceeded, match="evaluate needs"):
        run.train()
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.spent().flops <= 2.6 * step_flops


@pytest.mark.long
def test_evaluating_after_training_and_training_once_more(step_flops, tiny_model, tmp_path):
    run = trainer(tiny_model, tmp_path, BudgetCallback(flops=9.5 * step_flops), max_steps=4)
    run.train()
    assert run.evaluate()["eval_loss"] > 0
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.spent().flops == pytest.approx(4 * step_flops)  # the evaluation is no part
    run.args.max_steps = 30
    run.train()
    assert run.state.global_step == 5
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.spent(lost=True).flops == pytest.approx(4 * step_flops)


def test_a_limit_in_dollars_needs_a_price():
    with pytest.raises(ValueError, match=r"price is unknown\nhint"):
        BudgetCallback(dollars="5")


def test_an_overflowing_loss_is_seen_whatever_the_gradients(tiny_model, tmp_path):
    run = trainer(tiny_model, tmp_path, BudgetCallback(flops="1e15"))
    plain = run.model.loss_function
    run.model.loss_function = lambda *a, **k: plain(*a, **k) + float("inf")
    with pytest.raises(RuntimeError, match="loss at step 1 is not finite"):
        run.train()


def test_a_loss_that_is_not_finite_raises(tiny_model, tmp_path):
    run = trainer(tiny_model, tmp_path, BudgetCallback(flops="1e15"))
    run.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="loss at step 1 is not finite"):
        run.train()


def test_one_line_in_trl(tiny_model, tmp_path):
    from datasets import Dataset as Table
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": f"add {i}", "completion": " two plus five"} for i in range(64)]
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_length=32,
        max_steps=20,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    limit = 4.5 * train_flops(read_shape(tiny_model), 4, 32)
    run = SFTTrainer(
        model=str(tiny_model),
        args=arguments,
        train_dataset=Table.from_list(rows),
        callbacks=[BudgetCallback(flops=limit)],
    )
    run.train()
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert 0 < ledger.spent().flops <= limit
    assert 3 < run.state.global_step < 20


def test_an_unknown_architecture_counts_by_the_usual_rule(tiny_model, tmp_path):
    from thrifty.signals.metering import PassMeter

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)
            self.config = type("Config", (), {"to_dict": lambda self: {"model_type": "odd"}})()

        def forward(self, input_ids):
            return input_ids

    model = Odd()
    meter = PassMeter(model)
    meter.attach()
    model(input_ids=torch.zeros(2, 3, dtype=torch.long))
    assert not meter.exact
    assert meter.take().flops == 6 * 20 * 6
    json.dumps(meter.take().to_dict())


_RANK = """
import sys
from pathlib import Path
import torch
from tests.test_budget_callback import trainer
from thrifty import BudgetCallback

model, output, flops = sys.argv[1:]
run = trainer(Path(model), Path(output), BudgetCallback(flops=float(flops)), ddp_backend="gloo")
run.train()
print(f"rank {run.args.process_index} of {run.args.world_size} ended at {run.state.global_step}")
torch.distributed.destroy_process_group()  # not while another rank still uses it
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="built without distribution")
def test_all_ranks_stop_at_the_same_step_on_one_ledger(step_flops, tiny_model, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    limit = 2 * 5.5 * step_flops
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(script), str(tiny_model), str(tmp_path), str(limit)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 2 ended at 5" in done.stdout
    assert "rank 1 of 2 ended at 5" in done.stdout
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as ledger:
        assert ledger.spent().flops == pytest.approx(2 * 5 * step_flops)
        assert ledger.spent().tokens == 2 * 5 * 4 * 24


@pytest.mark.parametrize(
    "budget",
    [Budget(seconds=1.28), Budget(dollars=0.0128), Budget(joules=128.0)],
    ids=["seconds", "dollars", "joules"],
)
def test_what_passes_between_two_steps_is_taken_from_the_margin_of_the_next(budget, tmp_path):
    """A step of 1 s is bounded by 1.3 s; 1.28 s are left when it begins."""
    rates = Rates(dollars_per_second=0.01, watts=100.0)
    cost = StepCost(Cost())
    cost.measure(Cost(flops=5.0), 1.0)
    file = tmp_path / "ledger.sqlite"
    with Ledger.create(file, budget, rates) as book, book.stage("train", "callback") as stage:
        steps = StepLeases(stage, cost, "cpu")
        assert steps.next_step().seconds == pytest.approx(1.3)
        steps.begin(0, 1, Cost())
        assert steps.holds_a_step
        steps.end()


@pytest.mark.parametrize("budget", [Budget(seconds=0.9), Budget(seconds=9.0, flops=4.0)])
def test_a_step_itself_is_never_cut(budget, tmp_path):
    cost = StepCost(Cost())
    cost.measure(Cost(flops=5.0), 1.0)
    file = tmp_path / "ledger.sqlite"
    with Ledger.create(file, budget, Rates()) as book, book.stage("train", "callback") as stage:
        steps = StepLeases(stage, cost, "cpu")
        with pytest.raises(BudgetExceeded, match="train needs"):
            steps.begin(0, 1, Cost())


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc's allocator")
def test_near_its_memory_limit_a_process_gives_back_what_it_does_not_use(tmp_path):
    """Small blocks that were freed stay resident as long as one above them is in use."""
    blocks = [np.ones(8_000) for _ in range(2_500)]  # 64 kB each, below the mmap threshold
    above = np.ones(8_000)
    blocks.clear()
    before, found = memory_bytes("cpu"), {}
    assert above.sum() == 8_000
    for name, limit in (("far from it", 10 * before), ("near it", 1.05 * before)):
        budget = Budget(flops=1e9, memory_bytes=limit)
        with (
            Ledger.create(tmp_path / f"{name}.sqlite", budget) as ledger,
            ledger.stage("train", "test") as stage,
        ):
            steps = StepLeases(stage, StepCost(Cost(flops=1.0, seconds=1.0)), "cpu")
            steps.begin(0, 10, Cost())
            steps.end()
        found[name] = memory_bytes("cpu")
    assert found["near it"] < found["far from it"] - 80e6
