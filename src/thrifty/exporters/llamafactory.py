"""LLaMA-Factory's YAML and its ``dataset_info.json``.

Keys as in hiyouga/LLaMA-Factory, ``src/llamafactory/hparams/`` (model, data, finetuning and
training arguments); what they do as in ``src/llamafactory/train/trainer_utils.py`` and
``model/adapter.py`` there.
"""

from __future__ import annotations

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
    optim_args,
    optimizer,
    recomputes_all,
    schedule,
    whole,
)

_ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"pissa_init": True, "pissa_iter": -1},  # -1: by the whole decomposition
    "loftq": {},
}
_ACTIVATIONS: Known = {
    "keep": {"disable_gradient_checkpointing": True},
    "recompute": {},
    "recompute_half": {},
    "selective": {},
    "offload": {"use_unsloth_gc": True},
    "recompute_offload": {"use_unsloth_gc": True},
}
_OTHERWISE = {
    "selective": "layers run again whole, products too",
    "offload": "layers run again besides, and their inputs wait on the host",
}
_LIGER = {"enable_liger_kernel": True}
_LOSS: Known = {"whole": {}, "chunked": _LIGER, "fused": _LIGER}
_WEIGHTS: Known = {
    "float32": {},
    "bfloat16": {},
    "nf4": lambda weights: {
        "quantization_bit": 4,
        "quantization_type": "nf4",
        "double_quantization": weights.double,
    },
    "int8": {"quantization_bit": 8},
}
_COLUMNS: Mapping[str, Mapping[str, Any]] = {
    "text": {"columns": {"prompt": "text"}},
    "strings": {"columns": {"prompt": "prompt", "response": "completion"}},
}
_CONVERSATIONS = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}


class LLaMAFactory(Exporter):
    """LLaMA-Factory."""

    program: ClassVar[str] = "LLaMA-Factory"
    install: ClassVar[str] = "pip install llamafactory"
    file: ClassVar[str] = "train.yaml"
    command: ClassVar[str] = "llamafactory-cli train train.yaml"

    def translate(self, run: Exportable, into: Translation) -> None:
        training = run.training
        into.put(
            model_name_or_path=run.base,
            stage="pt" if run.form == "text" else "sft",
            do_train=True,
            dataset=TRAIN,
            dataset_dir=DATA,
            output_dir="model",
            cutoff_len=training.max_length,
            packing=True,
            per_device_train_batch_size=training.per_device_train_batch_size,
            per_device_eval_batch_size=training.per_device_train_batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            max_steps=training.max_steps,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            seed=training.seed,
            data_seed=training.seed,
            save_strategy="steps",
            save_steps=training.save_steps,
            logging_steps=max(1, training.eval_steps // 4),
            report_to=list(training.report_to) or "none",
        )
        if run.plan.model.revision is not None:
            into.put(model_revision=run.plan.model.revision)
        if run.has_dev:
            into.put(
                eval_dataset=VALIDATION,
                eval_strategy="steps",
                eval_steps=training.eval_steps,
                eval_on_start=True,
                load_best_model_at_end=True,
                metric_for_best_model="eval_loss",
                greater_is_better=False,
            )
        self._rows(run, into)
        self._rates(run, into)
        self._memory(run, into)
        common(run, into)

    def _rows(self, run: Exportable, into: Translation) -> None:
        if run.form == "text":
            into.lacks("packing", "texts are laid end to end and cut, and see each other")
            return
        into.put(neat_packing=True)  # documents apart
        if run.form == "strings":
            into.put(template="empty")
            into.lacks("rows", "prompt and completion are tokenised apart")
            return
        into.lacks("rows", "the template is read off the tokenizer's; turns must take turns")
        if run.form == "turns":
            into.put(mask_history=True)
            into.lacks("rows", "of a completion's turns the last alone is trained on")

    def _rates(self, run: Exportable, into: Translation) -> None:
        training = run.training
        warmup, options = schedule(training, into)
        # Unless it is told, it makes a third of the steps stable.
        stable = training.max_steps - warmup - options["num_decay_steps"]
        into.put(
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_stable_steps": stable, **options},
            warmup_steps=warmup,
        )
        states: Any = run.techniques.states
        if name_of(states) == "adam_mini":
            into.packages.append("adam-mini")
            into.put(optim="adamw_torch", use_adam_mini=True)
            return
        found = optimizer(run, into)
        if not found.on_layers:
            into.put(optim=found.optim)
            if found.options:
                into.put(optim_args=optim_args(found.options))
            if found.beta2 is not None:
                into.put(adam_beta2=found.beta2)
            return
        name = name_of(states)  # galore, apollo: it builds them itself, on this one alone
        into.put(optim="adamw_torch", **{f"use_{name}": True})
        into.put(
            **{
                f"{name}_target": ",".join(run.shape.lora_targets),
                f"{name}_rank": found.options["rank"],
                f"{name}_update_interval": found.options["update_proj_gap"],
                f"{name}_scale": found.options["scale"],
            }
        )
        if "scale_type" in found.options:
            into.put(**{f"{name}_scale_type": found.options["scale_type"]})

    def _memory(self, run: Exportable, into: Translation) -> None:
        held = run.techniques
        self._trained(run, into)
        into.technique("weights", held.weights, _WEIGHTS, run.setting.dtype)
        into.technique("activations", held.activations, _ACTIVATIONS, "gradient checkpointing")
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
        if not run.has_adapter:
            into.put(finetuning_type="full", pure_bf16=run.in_bfloat16)
            if name == "badam":
                self._badam(run, trained, into)
            elif name != "full":
                into.unknown("trained", trained, "all weights")
            return
        narrow = run.setting.adapter_dtype == "bfloat16"
        into.put(
            finetuning_type="lora",
            lora_rank=run.adapter_rank,
            lora_target=",".join(run.adapter_targets),
            lora_dropout=0.0,
            pure_bf16=narrow,
            bf16=run.in_bfloat16 and not narrow,
            **_ADAPTERS.get(name, {}),
        )
        if run.in_bfloat16 and not narrow:
            into.lacks("training.memory.weights", "products run under autocast besides")
        elif not run.in_bfloat16:
            into.lacks("training.memory.weights", "the base keeps the dtype of its files")
        if name not in _ADAPTERS:
            into.unknown("trained", trained, "LoRA")
            return
        into.put(lora_alpha=whole(trained.alpha))
        if name == "loftq":
            begins_as_lora(run, into)

    def _badam(self, run: Exportable, trained: Any, into: Translation) -> None:
        if run.in_bfloat16:  # 16 bytes a weight of the block, says BAdam's README
            into.cannot_hold("trained", trained, "badam with a float32 copy of the block")
        else:
            into.lacks("training.memory.weights", "the base keeps the dtype of its files")
        into.packages.append("badam")
        into.put(
            use_badam=True,
            badam_mode="layer",
            badam_switch_mode=trained.order,
            badam_switch_interval=trained.switch_steps,
        )
        if trained.block_layers > 1:
            into.lacks("training.memory.trained", "badam: a block is one layer, which holds less")

    def row(self, run: Exportable, content: Mapping[str, Any]) -> Mapping[str, Any]:
        """Its template ``empty`` writes no special tokens, so these stand in the strings."""
        if run.form == "strings":
            return {
                "prompt": run.begin + content["prompt"],
                "completion": content["completion"] + run.end,
            }
        if run.form == "turns":
            return {"messages": [*content["prompt"], *content["completion"]]}
        return content

    def files(self, run: Exportable) -> Mapping[str, Any]:
        described = _COLUMNS.get(run.form, _CONVERSATIONS)
        names = [TRAIN, VALIDATION] if run.has_dev else [TRAIN]
        return {
            "dataset_info.json": {
                name: {"file_name": f"{name}.jsonl", **described} for name in names
            }
        }
