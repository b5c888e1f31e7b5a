"""A run in another program's files: TRL's is really trained, the others' keys are the published."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import SchedulerType, Seq2SeqTrainingArguments, TrainerCallback
from transformers.optimization import get_scheduler
from transformers.training_args import OptimizerNames

from tests.conftest import write_jsonl
from tests.runs import planned, silent
from thrifty import stages
from thrifty.cli import main
from thrifty.core.budget import Budget
from thrifty.core.contracts import MEMORY_KINDS
from thrifty.core.plan import MemoryPlan, ModelSource, Plan, PoolSource, Training
from thrifty.core.resolve import all_names, resolve
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import read_shape
from thrifty.data.store import open_store
from thrifty.export import export, exporter_named, exporter_names
from thrifty.exported import Exportable, Translation, schedule
from thrifty.memory_plan import Techniques
from thrifty.run_folder import RunFolder
from thrifty.schedule import WarmupStableDecay

STEPS, WARMUP, COOLDOWN = 7, 3, 2
FIXED = {
    "training.max_steps": STEPS,
    "training.warmup_steps": WARMUP,
    "training.cooldown_steps": COOLDOWN,
    "training.eval_steps": 3,
    "training.save_steps": 3,
    "training.seed": 5,
    "training.gradient_accumulation_steps": 2,
    "training.per_device_train_batch_size": 2,
    "training.weight_decay": 0.1,
    "training.max_grad_norm": 0.5,
}


@pytest.fixture(scope="module")
def run(tiny_model, tiny_data, tmp_path_factory) -> Path:
    """A run whose rows are chosen."""
    folder = tmp_path_factory.mktemp("export") / "run"
    planned(folder, tiny_model, tiny_data, fixed=FIXED)
    with stages.at_work(RunFolder(folder), silent) as work:
        stages.select(work, work.main)
    return folder


def edited(run: Path, folder: Path, **memory: Any) -> Path:
    """A copy of ``run`` with other techniques in its plan."""
    shutil.copytree(run, folder)
    values = yaml.safe_load((folder / "plan.yaml").read_text())
    values["training"]["memory"].update(memory)
    (folder / "plan.yaml").write_text(yaml.safe_dump(values))
    return folder


def settings_of(folder: Path, to: str) -> dict[str, Any]:
    return yaml.safe_load((folder / exporter_named(to).file).read_text())


# -- TRL ----------------------------------------------------------------------------------------


def trained_by_trl(folder: Path) -> tuple[Any, list[float]]:
    """The trainer after ``trl sft --config`` in ``folder``, in this process, and its rates."""
    import datasets
    import trl
    from trl.scripts import sft

    kept: list[Any] = []
    rates: list[float] = []

    class Rates(TrainerCallback):
        def on_step_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    class Kept(trl.SFTTrainer):
        def __init__(self, **named: Any) -> None:
            super().__init__(**named, callbacks=[Rates()])
            kept.append(self)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TRL's own
        patch.chdir(folder)
        patch.setattr(trl, "SFTTrainer", Kept)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        sft.main(*sft.make_parser().parse_args_and_config(["--config", "sft.yaml"]))
    return kept[0], rates


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory) -> tuple[Any, Any, list[float]]:
    """What was written for TRL, its trainer, its rates."""
    written = export(RunFolder(run), "trl", tmp_path_factory.mktemp("trl") / "out")
    return written, *trained_by_trl(written.folder)


@pytest.mark.long
def test_trl_trains_as_planned(run, trained):
    import torch

    written, trainer, _ = trained
    plan, args = RunFolder(run).plan(), trainer.args
    for name in (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_length",
        "max_steps",
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "eval_steps",
        "save_steps",
        "seed",
    ):
        assert getattr(args, name) == getattr(plan.training, name), name
    assert trainer.state.global_step == STEPS
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.1, 0.0}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert (args.bf16, args.gradient_checkpointing, args.report_to) == (False, False, [])
    evaluated = [line["step"] for line in trainer.state.log_history if "eval_loss" in line]
    assert evaluated == [0, 3, 6, STEPS]
    assert (written.folder / "model" / "model.safetensors").is_file()


def test_trl_has_the_planned_rates(run, trained):
    written, _, rates = trained
    peak = RunFolder(run).plan().training.learning_rate
    ours = WarmupStableDecay(max_steps=STEPS, warmup_steps=WARMUP, cooldown_steps=COOLDOWN)
    # What does not translate, and is told: the warm-up begins at nothing.
    short = [max(WARMUP - 1 - step, 0) / (WARMUP * (WARMUP - 1)) for step in range(STEPS)]
    expected = [peak * (ours(step) - lower) for step, lower in enumerate(short)]
    assert np.allclose(rates, expected, rtol=0, atol=1e-9)
    assert any(line.startswith("training.warmup_steps") for line in written.untranslated)


def test_trl_sees_the_chosen_rows_and_the_same_loss_tokens(run, trained):
    written, trainer, _ = trained
    ids = np.load(run / "selected" / "ids.npy")
    rows = open_store(run / "pool").take(ids)
    lines = (written.folder / "data" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row.content for row in rows.rows]
    packs = trainer.train_dataset
    assert sum(len(ids) for ids in packs["input_ids"]) == rows.num_tokens.sum()
    assert max(len(ids) for ids in packs["input_ids"]) <= 64
    labels = [label for pack in packs["labels"] for label in pack]
    assert sum(label != -100 for label in labels) == sum(t.num_loss_tokens for t in rows.tokens)
    dev = open_store(run / "targets" / "sums" / "dev")
    assert len((written.folder / "data" / "validation.jsonl").read_text().splitlines()) == len(dev)


@pytest.mark.long
def test_trl_keeps_packed_documents_apart(trained):
    import torch
    from torch.nn.functional import cross_entropy

    _, trainer, _ = trained
    model = trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    places = batch["position_ids"][0].tolist()
    starts = [i for i, place in enumerate(places) if place == 0]
    assert len(starts) > 1
    losses = []
    for start, end in zip(starts, [*starts[1:], len(places)], strict=True):
        alone = batch["input_ids"][:, start:end]
        logits = trainer.model.forward(input_ids=alone).logits
        labels = batch["labels"][0, start + 1 : end]
        losses.append(cross_entropy(logits[0, :-1], labels, reduction="none")[labels != -100])
    with torch.no_grad():
        together = trainer.compute_loss(model, dict(batch))
    assert together.item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


@pytest.mark.long
def test_trl_trains_the_adapter_of_the_plan(run, tmp_path):
    lora = {"lora": {"rank": 4, "alpha": 12.0, "targets": ["q_proj", "down_proj"]}}
    made = edited(run, tmp_path / "run", trained=lora, states="adafactor", activations="recompute")
    trainer, _ = trained_by_trl(export(RunFolder(made), "trl").folder)
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 12, 0.0)
    assert config.target_modules == {"q_proj", "down_proj"}
    assert type(trainer.optimizer.optimizer).__name__ == "Adafactor"
    assert trainer.args.gradient_checkpointing
    assert trainer.state.global_step == STEPS


@pytest.mark.slow
def test_the_command_that_the_readme_names_trains(run, tmp_path):
    folder = export(RunFolder(run), "trl", tmp_path / "trl").folder
    command = [str(Path(sys.executable).with_name("trl")), "sft", "--config", "sft.yaml"]
    env = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("steps", "warmup", "cooldown"),
    [(20, 0, 5), (20, 4, 0), (9, 1, 8), (5, 0, 5), (7, 0, 0), (6, 6, 0), (20, 4, 5), (9, 4, 5)],
)
def test_transformers_schedule_is_the_planned_one(steps, warmup, cooldown):
    import torch

    training = Training(max_steps=steps, warmup_steps=warmup, cooldown_steps=cooldown)
    into = Translation("a program")
    begins, options = schedule(training, into)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(
        "warmup_stable_decay",
        optimizer,
        num_warmup_steps=begins,
        num_training_steps=steps,
        scheduler_specific_kwargs=options,
    ).lr_lambdas[0]
    ours = WarmupStableDecay(max_steps=steps, warmup_steps=warmup, cooldown_steps=cooldown)
    differs = [abs(theirs(step) - ours(step)) for step in range(steps)]
    if warmup > 1 and cooldown:
        assert into.untranslated
        assert max(differs) == pytest.approx(1 / warmup)
        differs = differs[warmup - 1 :]
    else:
        assert not into.untranslated
    assert max(differs) < 1e-12


# -- every technique in every program -----------------------------------------------------------

# axolotl-ai-cloud/axolotl, src/axolotl/utils/schemas/: config.py, model.py, peft.py, training.py,
# integrations.py; src/axolotl/integrations/liger/args.py
AXOLOTL_KEYS = """
base_model revision_of_model bf16 fp16 bfloat16 float32 datasets test_datasets val_set_size
train_on_inputs output_dir micro_batch_size eval_batch_size gradient_accumulation_steps
sequence_len excess_length_strategy sample_packing eval_sample_packing pad_to_sequence_len
attn_implementation max_steps num_epochs learning_rate weight_decay max_grad_norm seed
save_steps eval_steps logging_steps load_best_model_at_end metric_for_best_model
greater_is_better lr_scheduler lr_scheduler_kwargs warmup_steps warmup_ratio optimizer
optim_args optim_target_modules adam_beta2 gradient_checkpointing activation_offloading
adapter lora_r lora_alpha lora_dropout lora_target_modules peft_use_dora peft_use_rslora
peft_init_lora_weights peft_autocast_adapter_dtype load_in_4bit load_in_8bit
bnb_config_kwargs lisa_n_layers lisa_step_interval use_wandb use_mlflow use_tensorboard
use_comet plugins liger_fused_linear_cross_entropy
"""
# hiyouga/LLaMA-Factory, src/llamafactory/hparams/: model_args.py, data_args.py, finetuning_args.py;
# its training_args.py extends transformers' Seq2SeqTrainingArguments
LLAMAFACTORY_KEYS = """
model_name_or_path model_revision stage dataset eval_dataset dataset_dir template cutoff_len
packing neat_packing mask_history finetuning_type pure_bf16 lora_rank lora_alpha lora_dropout
lora_target use_rslora use_dora pissa_init pissa_iter quantization_bit quantization_type
double_quantization use_galore galore_target galore_rank galore_update_interval galore_scale
use_apollo apollo_target apollo_rank apollo_update_interval apollo_scale apollo_scale_type
use_badam badam_mode badam_switch_mode badam_switch_interval use_adam_mini
disable_gradient_checkpointing use_unsloth_gc enable_liger_kernel
"""


def trl_keys() -> set[str]:
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    classes = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
    return {field.name for cls in classes for field in fields(cls)}


def keys_of(to: str) -> set[str]:
    if to == "axolotl":
        return set(AXOLOTL_KEYS.split())
    if to == "llamafactory":
        return {*LLAMAFACTORY_KEYS.split(), *(f.name for f in fields(Seq2SeqTrainingArguments))}
    return trl_keys()


def exportable(model: Path, form: Any = "strings", **kinds: Any) -> Exportable:
    """A run with these techniques, on a GPU."""
    memory = MemoryPlan(**kinds)
    techniques = Techniques(**{kind: resolve(kind, getattr(memory, kind)) for kind in MEMORY_KINDS})
    plan = Plan(
        model=ModelSource(path=str(model), revision="abc"),
        pool=PoolSource(sources=("pool.jsonl",)),
        budget=Budget(flops=1e9),
        training=Training(memory=memory, max_steps=50, warmup_steps=5, cooldown_steps=10),
    )
    return Exportable(
        plan=plan,
        techniques=techniques,
        setting=techniques.setting(MemorySetting(device_kind="cuda")),
        shape=read_shape(model),
        base=str(model),
        form=form,
        has_dev=True,
    )


def translated(to: str, run: Exportable) -> Translation:
    exporter = exporter_named(to)
    into = Translation(exporter.program)
    exporter.translate(run, into)
    return into


BESIDE: tuple[dict[str, Any], ...] = (
    {},
    {"trained": "lora"},
    {"weights": "bfloat16"},
    {"weights": "nf4"},
    {"states": "sgd"},
    {"states": "lomo"},
)


def exportable_with(model: Path, kind: str, name: str) -> Exportable:
    """A run with a technique, beside the first that it can be put together with."""
    for other in BESIDE:
        try:
            return exportable(model, **{**other, kind: name})
        except ValueError:
            continue
    raise AssertionError(f"{name} goes with none of these")


@pytest.mark.parametrize("to", exporter_names())
@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_every_technique_is_translated_told_or_refused(to, kind, tiny_model):
    plain = translated(to, exportable(tiny_model)).settings
    for name in all_names(kind):
        run = exportable_with(tiny_model, kind, name)
        into = translated(to, run)
        assert set(into.settings) <= keys_of(to), name
        assert json.loads(json.dumps(into.settings)) == into.settings
        told = [line for line in into.untranslated if f"training.memory.{kind}" in line]
        same = kind == "loss" and to == "trl"  # which never holds whole logits
        if name != getattr(MemoryPlan(), kind) and not same:
            assert into.settings != plain or told or into.refused, name


@pytest.mark.parametrize(
    ("to", "kinds", "found"),
    [
        ("trl", {"states": "adamw_8bit"}, {"optim": "adamw_bnb_8bit"}),
        ("trl", {"states": "lion_8bit"}, {"optim": "lion_8bit", "adam_beta2": 0.99}),
        (
            "trl",
            {"states": {"galore": {"rank": 8, "refresh": 50, "scale": 0.5}}},
            {"optim": "galore_adamw", "optim_args": "rank=8,update_proj_gap=50,scale=0.5"},
        ),
        (
            "trl",
            {"states": {"apollo": {"rank": 1, "scale": 8.0, "tensor_wise": True}}},
            {"optim_args": "rank=1,update_proj_gap=200,scale=64.0,scale_type=tensor"},
        ),
        (
            "trl",
            {"trained": {"dora": {"rank": 8}}, "weights": {"nf4": {"double": False}}},
            {
                "use_peft": True,
                "use_dora": True,
                "lora_r": 8,
                "lora_alpha": 32,
                "load_in_4bit": True,
                "use_bnb_nested_quant": False,
                "dtype": "bfloat16",
            },
        ),
        (
            "trl",
            {"activations": "selective"},
            {"gradient_checkpointing_kwargs": {"selective": True}},
        ),
        (
            "axolotl",
            {"trained": "lora", "weights": "nf4"},
            {"adapter": "qlora", "load_in_4bit": True, "peft_autocast_adapter_dtype": True},
        ),
        ("axolotl", {"weights": "bfloat16"}, {"bfloat16": True, "bf16": False}),
        ("axolotl", {"trained": "pissa"}, {"peft_init_lora_weights": "pissa"}),
        ("axolotl", {"trained": "rslora"}, {"adapter": "lora", "peft_use_rslora": True}),
        (
            "llamafactory",
            {"trained": {"badam": {"switch_steps": 7, "order": "descending"}}},
            {"use_badam": True, "badam_switch_interval": 7, "badam_switch_mode": "descending"},
        ),
        (
            "llamafactory",
            {"states": {"apollo": {"rank": 4, "scale": 2.0}}},
            {"use_apollo": True, "apollo_rank": 4, "apollo_scale": 4.0, "optim": "adamw_torch"},
        ),
        ("llamafactory", {"states": "adam_mini"}, {"use_adam_mini": True}),
        (
            "llamafactory",
            {"trained": "lora", "weights": "int8"},
            {"finetuning_type": "lora", "quantization_bit": 8, "bf16": True},
        ),
        ("llamafactory", {"activations": "recompute_offload"}, {"use_unsloth_gc": True}),
    ],
)
def test_what_a_technique_is_called(to, kinds, found, tiny_model):
    into = translated(to, exportable(tiny_model, **kinds))
    assert not into.refused
    assert {key: into.settings.get(key) for key in found} == found


@pytest.mark.parametrize("to", ["trl", "axolotl", "llamafactory"])
def test_layers_that_do_not_run_again_here_do_there(to, tiny_model):
    for activations, every in (("recompute_half", 2), ({"recompute": {"every": 3}}, 3)):
        into = translated(to, exportable(tiny_model, activations=activations))
        assert f"every layer runs again, not one in every {every}" in str(into.untranslated)
    into = translated(to, exportable(tiny_model, activations="recompute"))
    assert "every layer runs again" not in str(into.untranslated)


@pytest.mark.parametrize(
    ("to", "kinds"),
    [
        ("trl", {"states": "adam_mini"}),
        ("trl", {"trained": "lora_fa"}),
        ("trl", {"trained": "ia3"}),
        ("trl", {"trained": {"adapters": {"rank": 8}}}),
        ("axolotl", {"trained": {"adapters": {"rank": 8}}}),
        ("llamafactory", {"trained": {"adapters": {"rank": 8}}}),
        ("trl", {"trained": {"lora": {"adapter_dtype": "bfloat16"}}, "weights": "bfloat16"}),
        ("trl", {"states": "lion", "weights": "bfloat16"}),
        ("axolotl", {"trained": "lisa"}),
        ("axolotl", {"states": "adam_mini"}),
        ("llamafactory", {"trained": "lisa"}),
        ("llamafactory", {"trained": "badam", "weights": "bfloat16"}),
    ],
)
def test_what_would_take_other_memory_is_refused(to, kinds, tiny_model):
    assert translated(to, exportable(tiny_model, **kinds)).refused


@pytest.mark.parametrize("to", exporter_names())
def test_names_of_optimizers_and_schedules_exist(to, tiny_model):
    optimizers = {each.value for each in OptimizerNames}
    for name in all_names("states"):
        run = exportable_with(tiny_model, "states", name)
        found = translated(to, run).settings
        assert (found.get("optim") or found["optimizer"]) in optimizers
        schedules = {each.value for each in SchedulerType}
        assert (found.get("lr_scheduler_type") or found["lr_scheduler"]) in schedules


ASKS, ANSWERS = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "ab"},
    "strings": {"prompt": "a", "completion": "b"},
    "messages": {"messages": [*ASKS, *ANSWERS]},
    "turns": {"prompt": ASKS, "completion": ANSWERS},
}


@pytest.mark.parametrize(
    ("to", "form", "written", "found"),
    [
        ("trl", "messages", ROWS["messages"], {"assistant_only_loss": True}),
        ("trl", "turns", ROWS["turns"], {"assistant_only_loss": None}),
        (
            "axolotl",
            "strings",
            {"segments": [{"label": False, "text": "<s>a"}, {"label": True, "text": "b</s>"}]},
            {},
        ),
        ("axolotl", "text", ROWS["text"], {}),
        (
            "axolotl",
            "turns",
            {"messages": [{**ASKS[0], "train": False}, {**ANSWERS[0], "train": True}]},
            {},
        ),
        (
            "llamafactory",
            "strings",
            {"prompt": "<s>a", "completion": "b</s>"},
            {"stage": "sft", "template": "empty", "neat_packing": True},
        ),
        ("llamafactory", "text", ROWS["text"], {"stage": "pt", "neat_packing": None}),
        ("llamafactory", "messages", ROWS["messages"], {"template": None}),
        ("llamafactory", "turns", ROWS["messages"], {"mask_history": True}),
    ],
)
def test_every_form_of_rows(to, form, written, found, tiny_model):
    run = replace(exportable(tiny_model, form=form), begin="<s>", end="</s>")
    into = translated(to, run)
    assert exporter_named(to).row(run, ROWS[form]) == written
    assert {key: into.settings.get(key) for key in found} == found
    assert set(into.settings) <= keys_of(to)


# -- what the command says ----------------------------------------------------------------------


@pytest.mark.parametrize("to", exporter_names())
def test_the_command_writes_a_folder_and_tells(to, run, tmp_path, capsys):
    folder = tmp_path / "out"
    assert main(["export", str(run), "--to", to, "-o", str(folder)]) == 0
    out = capsys.readouterr().out
    exporter = exporter_named(to)
    assert str(folder) in out
    assert exporter.command in out
    readme = (folder / "README.txt").read_text()
    told = " ".join(readme.split())
    for line in out.splitlines()[2:]:
        assert " ".join(line.split()) in told
    assert "budget and ledger" in out
    assert exporter.command in readme
    assert ("BudgetCallback(flops=4e+09)" in out) == (to == "trl")
    assert settings_of(folder, to)
    assert (folder / "data" / "train.jsonl").read_text().count("\n") == len(
        np.load(run / "selected" / "ids.npy")
    )


def refused(capsys: Any, *arguments: Any) -> str:
    assert main(["export", *map(str, arguments)]) == 4
    return capsys.readouterr().err


def test_what_exists_is_not_written_over(run, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    said = refused(capsys, run, "--to", "trl", "-o", folder)
    assert "mine.txt already" in said
    assert "--overwrite" in said
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    assert main(["export", str(run), "--to", "trl", "-o", str(folder), "--overwrite"]) == 0
    assert (folder / "mine.txt").read_text() == "mine"
    assert (folder / "sft.yaml").is_file()


def test_bad_input(run, tiny_model, tiny_data, tmp_path, capsys):
    assert "did you mean axolotl?" in refused(capsys, run, "--to", "axolot")
    assert "no run folder" in refused(capsys, tmp_path / "none", "--to", "trl")
    (tmp_path / "empty").mkdir()
    assert "there is no plan" in refused(capsys, tmp_path / "empty", "--to", "trl")
    planned(tmp_path / "early", tiny_model, tiny_data, fixed=FIXED)
    said = refused(capsys, tmp_path / "early", "--to", "trl")
    assert "no selection yet" in said
    assert f"thrifty select {tmp_path / 'early'}" in said
    assert not (tmp_path / "early" / "export").exists()


def test_a_plan_of_preferences_is_refused(tiny_model, tiny_data, tmp_path, capsys):
    row = {"prompt": "say", "chosen": " one two", "rejected": " three"}
    rows = [{**row, "prompt": f"say {n}:"} for n in range(40)]
    data = {**tiny_data, "pool": write_jsonl(tmp_path / "pool.jsonl", rows)}
    made = tmp_path / "run"
    planned(
        made, tiny_model, data, fixed={"selection.scorer": "length"}, task="preference", targets={}
    )
    assert "task preference" in refused(capsys, made, "--to", "trl")


def test_what_takes_other_memory_is_written_where_asked_for(run, tmp_path, capsys):
    made = edited(run, tmp_path / "run", states="adam_mini")
    said = refused(capsys, made, "--to", "trl")
    for word in ("adam_mini", "adamw_torch_fused", "--nearest"):
        assert word in said
    assert main(["export", str(made), "--to", "trl", "--nearest"]) == 0
    assert "another amount of memory" in capsys.readouterr().out
    assert settings_of(made / "export" / "trl", "trl")["optim"] == "adamw_torch_fused"
    assert main(["export", str(made), "--to", "llamafactory"]) == 0
