"""Training on pairs: rows, the loss against TRL's own, the reference's cost, resuming, refusals."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from thrifty import pipeline, stages, training_rows
from thrifty.core.budget import Budget, Cost
from thrifty.core.resolve import all_names, resolve
from thrifty.costs.flops import forward_flops, step_flops
from thrifty.costs.shape import read_shape
from thrifty.data.pairs import PairedDataset, collate, longer_side
from thrifty.data.pool import read_rows
from thrifty.data.store import build_store, open_store
from thrifty.data.tokens import load_tokenizer
from thrifty.interruption import Interrupted
from thrifty.pair_evaluation import PairLosses, share_right
from thrifty.predictions import setting_of
from thrifty.rounds import Rounds
from thrifty.run_folder import RunFolder
from thrifty.signals.metering import PassMeter

from .runs import SMALL, finish, interrupt_at, ledger, planned, silent

WORDS = "add two and three to get five plus minus equals number count total sum".split()  # noqa: SIM905
FIXED = {
    **SMALL,
    "selection.scorer": "uniform",
    "training.memory.activations": "keep",
    "training.memory.states": "adamw",
    "training.memory.loss": "whole",
    "training.eval_steps": 5,
    "training.save_steps": 5,
    "training.max_steps": 10,
}


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Better answers end, worse ones are cut and shouted."""
    rng = random.Random(seed)

    def some(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    return [
        {"prompt": f"say {some(2, 5)}:", "chosen": f" {some(3, 9)}.", "rejected": f" {some(2, 6)}!"}
        for _ in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    sizes = {"pool": (120, 1), "signal": (8, 2), "dev": (24, 3), "test": (24, 4)}
    return {name: write(folder / f"{name}.jsonl", pairs(*each)) for name, each in sizes.items()}


def plan_pairs(folder: Path, model: Path, data: dict[str, Path], **changes: Any) -> Any:
    fixed = {**FIXED, **changes.pop("fixed", {})}
    changes = {"budget": Budget(flops=2e10), "task": "preference", **changes}
    return planned(folder, model, data, fixed=fixed, **changes)


LORA = {"training.memory.trained": {"lora": {"rank": 4}}}
LIVE = {"training.preference.precompute_ref_log_probs": False}
MODES = {"precomputed": {}, "resident": LIVE, "adapter off": {**LORA, **LIVE}}


# -- rows ---------------------------------------------------------------------------------------


def test_a_pair_is_stored_as_two_sequences_and_bad_ones_are_set_aside(tiny_model, tmp_path):
    good = {"prompt": "say:", "chosen": " yes.", "rejected": " no, never."}
    talk = {
        "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "no"}],
    }
    rows = [
        good,
        {**good, "rejected": good["chosen"]},
        {"prompt": "say:", "chosen": " yes."},
        {**good, "chosen": "  "},
        {**good, "rejected": ""},
        {"prompt": "x" * 500, "chosen": " yes.", "rejected": " no."},
        {"prompt": "say:", "chosen": " yes" * 40, "rejected": " yes" * 40 + " no"},
    ]
    tokenizer = load_tokenizer(str(tiny_model))
    file = write(tmp_path / "rows.jsonl", rows)
    read = read_rows([str(file)], task="preference")
    manifest = build_store(read, tmp_path / "store", tokenizer, 64, tokenizer_fingerprint="")
    store = open_store(tmp_path / "store")
    codes = [row.code for row in store.quarantine()]
    assert codes == [
        "same_answers", "missing_fields", "empty", "empty", "prompt_too_long", "same_answers",
    ]  # fmt: skip
    assert "as far as max_length 64" in list(store.quarantine())[-1].reason
    (tokens,) = store.take([0]).tokens
    chosen, rejected = tokens.sides
    assert tokenizer.decode(chosen.input_ids) == "say: yes.</s>"
    assert tokenizer.decode(rejected.input_ids[rejected.loss_mask]) == " no, never.</s>"
    sizes = len(chosen.input_ids), len(rejected.input_ids)
    assert manifest.num_tokens == sum(sizes)
    assert manifest.num_loss_tokens == chosen.num_loss_tokens + rejected.num_loss_tokens
    assert manifest.max_tokens == max(sizes)
    assert manifest.num_padded_tokens == 2 * max(sizes)
    assert manifest.num_squared_tokens == sizes[0] ** 2 + sizes[1] ** 2
    assert "prompt" not in talk  # TRL's implicit prompt: the turns that both begin with
    (row,) = read_rows([str(write(tmp_path / "talk.jsonl", [talk]))], task="preference")
    assert row.content["prompt"] == talk["chosen"][:1]


def test_rows_of_another_task_say_what_is_needed(tiny_model, tiny_data, tmp_path):
    with pytest.raises(ValueError, match="rows need prompt, chosen and rejected") as refusal:
        plan_pairs(tmp_path / "run", tiny_model, tiny_data)
    assert "a prompt_completion row in a pool for task preference" in str(refusal.value)


def examples(model: Path, file: Path, folder: Path) -> list[Any]:
    rows = read_rows([str(file)], task="preference")
    build_store(rows, folder, load_tokenizer(str(model)), 64, tokenizer_fingerprint="")
    store = open_store(folder)
    return [tokens for shard in store.shards() for tokens in shard.tokens]


def test_pairs_of_like_lengths_come_together_each_once_an_epoch(tiny_model, data, tmp_path):
    found = examples(tiny_model, data["pool"], tmp_path)
    random_order = [np.random.default_rng(epoch).permutation(len(found)) for epoch in range(4)]

    def dataset() -> PairedDataset:
        return PairedDataset(found, 7, num_items=300, order=lambda epoch: random_order[epoch])

    rows = [dataset().row(item) for item in range(240)]
    counts = np.bincount(rows[: 120 // 7 * 7], minlength=120)
    assert counts.max() == 1
    assert np.bincount(rows, minlength=120).sum() == 240
    lengths = np.array([longer_side(pair) for pair in found])
    batches = lengths[rows[:119]].reshape(-1, 7)
    in_order = lengths[random_order[0][:119]].reshape(-1, 7)
    waste = [1 - each.sum() / (each.max(1).sum() * 7) for each in (batches, in_order)]
    assert waste[0] < 0.05 < 0.2 < waste[1]
    assert batches[0].max() == lengths[random_order[0][:119]].max()  # what does not fit shows first
    assert dataset().row(200) == rows[200]  # a resumed run asks for it first
    exact = PairedDataset(found, 7, num_items=7, order=lambda epoch: range(120), exact=True)
    assert sorted(exact.row(item) for item in range(7)) == list(range(7))


def test_batches_are_those_of_trl(tiny_model, data, tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    found = examples(tiny_model, data["pool"], tmp_path)[:5]
    rows = []
    for pair in found:
        chosen, rejected = pair.sides
        start = int(np.argmax(chosen.loss_mask))
        assert start == int(np.argmax(rejected.loss_mask))
        rows.append(
            {
                "prompt_ids": chosen.input_ids[:start].tolist(),
                "chosen_ids": chosen.input_ids[start:].tolist(),
                "rejected_ids": rejected.input_ids[start:].tolist(),
            }
        )
    theirs = DataCollatorForPreference(pad_token_id=0)(rows)
    ours = collate([{"sides": pair.sides} for pair in found])
    assert set(ours) == set(theirs)
    for name, values in theirs.items():
        assert (ours[name] == values).all()


# -- a run --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def done(tiny_model, data, tmp_path_factory) -> Iterator[dict[str, Path]]:
    """A run to the end in each way to ask the reference."""
    folders = {}
    for mode, fixed in MODES.items():
        folder = tmp_path_factory.mktemp("preference") / "run"
        plan_pairs(folder, tiny_model, data, fixed=fixed)
        pipeline.run(folder, silent)
        folders[mode] = folder
    return folders


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.long
def test_a_run_lowers_the_loss_within_its_budget(done, mode):
    with ledger(done[mode]) as book:
        losses = [each["objective"] for each in book.evaluations()]
        test = next(s["detail"] for s in book.stages() if s["name"] == "test")
        assert book.spent().flops <= 2e10
    assert losses[0] == pytest.approx(np.log(2.0), abs=1e-12)
    assert losses[-1] < losses[0] - 0.005
    assert test["before"] == pytest.approx(np.log(2.0), abs=1e-12)
    assert test["after"] < test["before"]
    assert test["right"] > 0.5


@pytest.mark.parametrize("mode", MODES)
def test_what_is_charged_is_what_the_batches_take(done, mode, tiny_model):
    """Step by step as padded: the policy's passes, and the reference's unless it is asked once."""
    run = RunFolder(done[mode])
    with stages.at_work(run, silent) as work:
        branch, shape = work.main, read_shape(tiny_model)
        chosen = training_rows.chosen_rows(work, branch)
        settings = branch.plan.training
        rounds = Rounds(resolve("online", "shuffled"), chosen, {}, num_tokens=1e9, seed=0)
        batches = training_rows.read_by_training(settings, rounds)
        setting = setting_of(settings, shape, work.device)
        assert setting.reference == (mode != "precomputed")
        spent = {
            name: work.ledger.spent(stage="train", activity=name) for name in ("train", "reference")
        }
        steps = next(s["detail"]["steps"] for s in work.ledger.stages() if s["name"] == "train")
        asked = training_rows.predicted_reference(work, branch, chosen)
    flops, tokens = 0.0, 0
    for step in range(steps):
        batch = collate([batches[4 * step + i] for i in range(4)])
        rows, length = batch["input_ids"].shape
        held = replace(setting, micro_batch=rows, sequence=length)
        flops += step_flops(shape, held)
        tokens += int(batch["attention_mask"].sum())
    assert spent["train"].flops == pytest.approx(flops, rel=1e-9)
    assert spent["train"].tokens == tokens
    assert spent["reference"].flops == pytest.approx(asked.flops, rel=1e-9)
    assert (asked.flops > 0) == (mode == "precomputed")


@pytest.mark.parametrize(
    "mode", ["precomputed", pytest.param("adapter off", marks=pytest.mark.slow)]
)
@pytest.mark.long
def test_an_interrupted_run_ends_with_the_same_weights(
    mode, done, tiny_model, data, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    plan_pairs(folder, tiny_model, data, fixed=MODES[mode])
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(Interrupted):
            finish(folder)
    for file in RunFolder(folder).checkpoints("budget").glob("reference-*"):
        aside = file.rename(tmp_path / file.name)
        with pytest.raises(ValueError, match="what the reference model said is not in"):
            finish(folder)
        aside.rename(file)
    finish(folder)
    name = "model.safetensors" if mode == "precomputed" else "adapter_model.safetensors"
    ours, theirs = (load_file(each / "model" / name) for each in (folder, done[mode]))
    assert set(ours) == set(theirs)
    assert all((ours[key] == theirs[key]).all() for key in ours)
    with ledger(folder) as book, ledger(done[mode]) as whole:
        for activity in ("reference", "train"):
            spent = [each.spent(stage="train", activity=activity).flops for each in (book, whole)]
            assert spent[0] == spent[1]


def test_stock_libraries_load_what_is_left(done, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(done["resident"] / "model")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = PeftModel.from_pretrained(base, done["adapter off"] / "model")
    assert set(adapted.peft_config) == {"default"}  # TRL's copy of the adapter is not left there
    assert not (done["adapter off"] / "model" / "ref").exists()
    assert plain.num_parameters() == base.num_parameters() - sum(
        p.numel() for name, p in adapted.named_parameters() if "lora" in name
    )


SHORT = {
    "adapters": {"rank": 8},
    "addax": {"short": 16},
    "badam": {"switch_steps": 2},
    "lisa": {"switch_steps": 2},
}
WAYS = {
    **{
        name: {"training.memory.trained": {name: SHORT.get(name, {})}}
        for name in all_names("trained")
    },
    "lomo": {"training.memory.states": "lomo"},
    "fused": {"training.memory.loss": "fused"},
    "selective": {"training.memory.activations": "selective"},
    "recompute_half": {"training.memory.activations": "recompute_half"},
}
REFUSED = {
    "mezo": "by gradients",
    "addax": "by gradients",
    "fused": "loss of pairs is another",
    "adalora": "alone on its model",
    "loftq": "these lose nothing|is no reference",
}
REFUSED_LIVE = {**REFUSED, "pissa": "is no reference"}


@pytest.mark.slow
@pytest.mark.parametrize("live", [{}, LIVE], ids=["once", "live"])
@pytest.mark.parametrize("way", WAYS)
def test_every_technique_trains_on_pairs_or_says_why_not(way, live, tiny_model, data, tmp_path):
    folder, fixed = tmp_path / "run", {**WAYS[way], **live}
    if why := (REFUSED_LIVE if live else REFUSED).get(way):
        with pytest.raises(ValueError, match=why):
            plan_pairs(folder, tiny_model, data, fixed=fixed)
        return
    plan_pairs(folder, tiny_model, data, fixed=fixed)
    finish(folder)
    with ledger(folder) as book:
        losses = [each["objective"] for each in book.evaluations()]
    assert losses[0] == pytest.approx(np.log(2.0), abs=1e-12)
    assert np.isfinite(losses[-1])
    assert losses[-1] != losses[0]


# -- the loss against TRL's own -----------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_loss_is_trls_own(mode, done, tiny_model, data, tmp_path):
    """``DPOTrainer`` as its users have it, on the texts, on the trained model of each run."""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in data["dev"].read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model)
    trained = done[mode] / "model"
    if mode == "adapter off":
        model = PeftModel.from_pretrained(model, trained)
    else:
        model = AutoModelForCausalLM.from_pretrained(trained)
    arguments = DPOConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=64,
        activation_checkpointing=False, per_device_eval_batch_size=len(rows),
    )  # fmt: skip
    tokenizer = load_tokenizer(str(tiny_model))
    theirs = DPOTrainer(
        model, reference, arguments, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    batch = next(iter(theirs.get_eval_dataloader(theirs.train_dataset)))
    with torch.no_grad():
        loss = float(theirs.compute_loss(theirs.model.eval(), batch))
    with ledger(done[mode]) as book:
        found = [each["objective"] for each in book.evaluations()]
    assert min(found) == pytest.approx(loss, abs=1e-6)


def test_a_pair_on_which_model_and_reference_agree_is_half_right():
    reference = {"a": np.array([[-1.0, -2.0], [-3.0, -1.0], [-2.0, -2.0]])}
    losses = PairLosses(0.5, reference)
    same = losses.measured(reference, {"a": 1.0})
    assert same.objective == pytest.approx(np.log(2.0))
    assert share_right(same) == 0.5
    better = losses.measured({"a": reference["a"] + [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]}, {"a": 1})
    assert share_right(better) == pytest.approx(0.5)
    margins = np.array([1.0, -1.0, 0.0])
    assert better.objective == pytest.approx(np.log1p(np.exp(-0.5 * margins)).mean())


def test_a_pass_without_a_backward_is_counted_as_one(tiny_model):
    """As a stock ``DPOTrainer`` asks a model in training mode without its adapter."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    meter = PassMeter(model)
    meter.attach()
    with torch.no_grad():
        model(input_ids=torch.ones(4, 16, dtype=torch.long))
    meter.detach()
    assert meter.take() == Cost(flops=forward_flops(read_shape(tiny_model), 4, 16))


# -- what cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixed", "says"),
    [
        ({"selection.scorer": "perplexity"}, "perplexity makes no sense for task preference"),
        ({"training.preference.beta": 0}, "training.preference.beta must be more than zero"),
        ({"training.online": "infobatch"}, "looks at the losses of rows"),
        ({"selection.picker": "clusters"}, "takes a vector of each row, and a pair has two"),
        ({"training.preference.bets": 1}, "did you mean beta"),
        ({"training.memory.trained": "mezo"}, "by gradients, of which a zeroth-order step has"),
        ({"training.memory.trained": "adalora"}, "AdaLoRA is alone on its model"),
        ({"training.memory.trained": "pissa", **LIVE}, "the model without its adapter is no"),
    ],
)
def test_what_does_not_go_with_pairs_is_refused(fixed, says, tiny_model, data, tmp_path):
    with pytest.raises(ValueError, match=says):
        plan_pairs(tmp_path / "run", tiny_model, data, fixed=fixed)


def test_other_tasks_have_no_preference(tiny_model, tiny_data, tmp_path):
    with pytest.raises(ValueError, match=r"training\.preference needs task: preference, not sft"):
        planned(tmp_path / "run", tiny_model, tiny_data, fixed={"training.preference.beta": 0.1})


def test_without_trl_a_run_says_what_to_install(tiny_model, data, tmp_path, monkeypatch):
    plan_pairs(tmp_path / "run", tiny_model, data)
    monkeypatch.setattr("thrifty.open_run.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'thrifty\[trl\]'"):
        finish(tmp_path / "run")
