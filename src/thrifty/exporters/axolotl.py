"""axolotl's YAML.

Keys as in axolotl-ai-cloud/axolotl, ``src/axolotl/utils/schemas/`` (config, model, peft, training,
datasets, integrations); how they reach transformers as in ``src/axolotl/core/builders/base.py``.
Packs keep their documents apart under sdpa.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from thrifty.core.resolve import name_of
from thrifty.exported import (
    DATA,
    TRAIN,
    VALIDATION,
    Exportable,
    Exporter,
    Known,
    Translation,
    begins_as_lora,
    common,
    end_to_end,
    optimizer,
    recomputes_all,
    schedule,
    whole,
    without_decay,
)

_NO_WARMUP = 1e-9
"""A share of the steps: 0 steps would be taken for no answer, and 3% warmed up."""
_ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "rslora": {"peft_use_rslora": True},
    "dora": {"peft_use_dora": True},
    "pissa": {"peft_init_lora_weights": "pissa"},
    "loftq": {},
}
_ACTIVATIONS: Known = {
    "keep": {"gradient_checkpointing": False},
    "recompute": {"gradient_checkpointing": True},
    "recompute_half": {"gradient_checkpointing": True},
    "selective": {"gradient_checkpointing": True},
    "offload": {"gradient_checkpointing": True, "activation_offloading": True},
    "recompute_offload": {"gradient_checkpointing": True, "activation_offloading": True},
}
_OTHERWISE = {
    "selective": "layers run again whole, products too",
    "offload": "layers run again besides, and their inputs wait on the host",
}
_LIGER = {
    "plugins": ["axolotl.integrations.liger.LigerPlugin"],
    "liger_fused_linear_cross_entropy": True,
}
_LOSS: Known = {
    "whole": {},
    "chunked": _LIGER,
    "fused": _LIGER,
}
_WEIGHTS: Known = {
    "float32": {},
    "bfloat16": {},
    "nf4": lambda weights: {
        "load_in_4bit": True,
        "bnb_config_kwargs": {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": weights.double,
        },
    },
    "int8": {"load_in_8bit": True},
}
_REPORTERS = {
    "wandb": "use_wandb",
    "mlflow": "use_mlflow",
    "tensorboard": "use_tensorboard",
    "comet_ml": "use_comet",
}


class Axolotl(Exporter):
    """axolotl."""

    program: ClassVar[str] = "axolotl"
    install: ClassVar[str] = "pip install axolotl"
    file: ClassVar[str] = "axolotl.yaml"
    command: ClassVar[str] = "axolotl train axolotl.yaml"

    def translate(self, run: Exportable, into: Translation) -> None:
        training = run.training
        into.put(
            base_model=run.base,
            bf16=False,  # they are "auto" and unset where nothing is said
            fp16=False,
            **({"bfloat16": True} if run.in_bfloat16 else {"float32": True}),
            datasets=[_dataset(run, TRAIN)],
            train_on_inputs=False,
            val_set_size=0.0,
            output_dir="model",
            micro_batch_size=training.per_device_train_batch_size,
            eval_batch_size=training.per_device_train_batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            sequence_len=training.max_length,
            excess_length_strategy="truncate",
            sample_packing=True,
            pad_to_sequence_len=True,
            attn_implementation="sdpa",
            max_steps=training.max_steps,
            num_epochs=float(math.ceil(training.epochs) + 1),  # so that they do not end it before
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            seed=training.seed,
            save_steps=training.save_steps,
            logging_steps=max(1, training.eval_steps // 4),
        )
        if run.plan.model.revision is not None:
            into.put(revision_of_model=run.plan.model.revision)
        if run.has_dev:
            into.put(
                test_datasets=[_dataset(run, VALIDATION)],
                eval_sample_packing=False,  # few rows may not fill a pack for each device
                eval_steps=training.eval_steps,
                load_best_model_at_end=True,
                metric_for_best_model="eval_loss",
                greater_is_better=False,
            )
        for reporter in training.report_to:
            if reporter in _REPORTERS:
                into.put(**{_REPORTERS[reporter]: True})
            else:
                into.lacks("training.report_to", f"{reporter} is not reported to")
        self._rates(run, into)
        self._memory(run, into)
        common(run, into)
        end_to_end(run, into, "attn_implementation: flash_attention_2")
        if run.in_bfloat16:
            into.lacks("training.memory.weights", "products run under autocast besides")
        if run.form == "strings":
            into.lacks("rows", "prompt and completion are tokenised apart")

    def _rates(self, run: Exportable, into: Translation) -> None:
        warmup, options = schedule(run.training, into)
        into.put(lr_scheduler="warmup_stable_decay", lr_scheduler_kwargs=options)
        if warmup > 1:
            into.put(warmup_steps=warmup)
        else:  # it makes two steps of one
            into.put(warmup_ratio=_NO_WARMUP)
        if warmup == 1:
            into.lacks("training.warmup_steps", "axolotl has no single step of it: there is none")
        found = optimizer(run, into)
        into.put(optimizer=found.optim)
        if found.options:
            into.put(optim_args=dict(found.options))
        if found.on_layers:
            into.put(optim_target_modules=list(run.shape.lora_targets))
        if found.beta2 is not None:
            into.put(adam_beta2=found.beta2)
        without_decay(run, found, into)

    def _memory(self, run: Exportable, into: Translation) -> None:
        held = run.techniques
        self._trained(run, into)
        into.technique("weights", held.weights, _WEIGHTS, run.setting.dtype)
        into.put(gradient_checkpointing=True)
        into.technique("activations", held.activations, _ACTIVATIONS, "gradient_checkpointing")
        if (name := name_of(held.activations)) in _OTHERWISE:
            into.lacks("training.memory.activations", f"{name}: {_OTHERWISE[name]}")
        recomputes_all(run, into)
        into.technique("loss", held.loss, _LOSS, "whole logits")
        if name_of(held.loss) != "whole":
            into.packages.append("liger-kernel")
            into.lacks("training.memory.loss", "the chunks are of Liger's own size, on GPUs alone")

    def _trained(self, run: Exportable, into: Translation) -> None:
        trained: Any = run.techniques.trained
        name = name_of(trained)
        if name == "full":
            return
        if name == "lisa":
            into.cannot_hold("trained", trained, "lisa that keeps the states of layers it left")
            into.put(lisa_n_layers=trained.layers, lisa_step_interval=trained.switch_steps)
            return
        if name not in _ADAPTERS:
            into.unknown("trained", trained, "LoRA" if run.has_adapter else "all weights")
            if not run.has_adapter:
                return
        into.put(
            adapter="qlora" if name_of(run.techniques.weights) == "nf4" else "lora",
            lora_r=run.adapter_rank,
            lora_target_modules=run.adapter_targets,
            lora_dropout=0.0,
            peft_autocast_adapter_dtype=run.setting.adapter_dtype == "float32",
            **_ADAPTERS.get(name, {}),
        )
        if name not in _ADAPTERS:
            return
        into.put(lora_alpha=round(trained.alpha))
        if whole(trained.alpha) != round(trained.alpha):
            into.lacks("training.memory.trained", f"an alpha of {trained.alpha:g} is rounded")
        if name == "loftq":
            begins_as_lora(run, into)

    def row(self, run: Exportable, content: Mapping[str, Any]) -> Mapping[str, Any]:
        """Strings as segments, with and without loss: there special tokens are written out."""
        if run.form == "strings":
            return {
                "segments": [
                    {"label": False, "text": run.begin + content["prompt"]},
                    {"label": True, "text": content["completion"] + run.end},
                ]
            }
        if run.form == "turns":
            sides = (("prompt", False), ("completion", True))
            turns = [{**turn, "train": train} for side, train in sides for turn in content[side]]
            return {"messages": turns}
        return content


def _dataset(run: Exportable, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"path": f"{DATA}/{name}.jsonl", "ds_type": "json", "split": TRAIN}
    if run.form == "strings":
        return {**found, "type": "input_output"}
    if run.form == "text":
        return {**found, "type": "completion", "field": "text"}
    found |= {
        "type": "chat_template",
        "chat_template": "tokenizer_default",
        "field_messages": "messages",
        "roles_to_train": ["assistant"],
        "train_on_eos": "turn",
    }
    return found | ({"message_field_training": "train"} if run.form == "turns" else {})
