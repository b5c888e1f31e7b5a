"""TRL's ``trl sft --config``: ``SFTConfig``, ``ModelConfig`` and ``ScriptArguments`` in one file.

Names and behaviour as in TRL 1.16 and transformers 5.23. The base is loaded in the plan's dtype and
trained without autocast, rows are packed with their documents apart (``bfd``), and TRL never holds
whole logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from thrifty.core.resolve import name_of
from thrifty.exported import (
    DATA,
    VALIDATION,
    Exportable,
    Exporter,
    Known,
    Translation,
    begins_as_lora,
    common,
    end_to_end,
    optim_args,
    optimizer,
    recomputes_all,
    schedule,
    whole,
    without_decay,
)

_ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {},
    "loftq": {},
}
_ACTIVATIONS: Known = {
    "keep": {"gradient_checkpointing": False},
    "recompute": {"gradient_checkpointing": True},
    "recompute_half": {"gradient_checkpointing": True},
    "selective": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"selective": True},
    },
    "offload": {"gradient_checkpointing": False, "activation_offloading": True},
    "recompute_offload": {"gradient_checkpointing": True, "activation_offloading": True},
}
_LOSS: Known = {"whole": {}, "chunked": {}, "fused": {}}
_WEIGHTS: Known = {
    "float32": {},
    "bfloat16": {},
    "nf4": lambda weights: {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "use_bnb_nested_quant": weights.double,
    },
    "int8": {"load_in_8bit": True},
}


class TRL(Exporter):
    """TRL's supervised fine-tuning."""

    program: ClassVar[str] = "TRL"
    install: ClassVar[str] = "pip install trl peft"
    file: ClassVar[str] = "sft.yaml"
    command: ClassVar[str] = "trl sft --config sft.yaml"

    def translate(self, run: Exportable, into: Translation) -> None:
        training = run.training
        into.put(
            model_name_or_path=run.base,
            dtype=run.setting.dtype,
            bf16=False,
            fp16=False,
            dataset_name=DATA,
            output_dir="model",
            per_device_train_batch_size=training.per_device_train_batch_size,
            per_device_eval_batch_size=training.per_device_train_batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            max_length=training.max_length,
            packing=True,
            packing_strategy="bfd",
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
        if run.form == "messages":
            into.put(assistant_only_loss=True)
        if run.has_dev:
            into.put(
                dataset_test_split=VALIDATION,
                eval_strategy="steps",
                eval_steps=training.eval_steps,
                eval_on_start=True,
                load_best_model_at_end=True,
                metric_for_best_model="eval_loss",
                greater_is_better=False,
            )
        self._rates(run, into)
        self._memory(run, into)
        common(run, into)
        end_to_end(run, into, "attn_implementation: flash_attention_2")
        into.lacks("to hold the budget there", f"a script of your own with {_callback(run)}")

    def _rates(self, run: Exportable, into: Translation) -> None:
        warmup, options = schedule(run.training, into)
        into.put(
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs=options,
            warmup_steps=warmup,
        )
        found = optimizer(run, into)
        into.put(optim=found.optim)
        if found.options:
            into.put(optim_args=optim_args(found.options))
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
        recomputes_all(run, into)
        into.technique("loss", held.loss, _LOSS, "a chunked loss")

    def _trained(self, run: Exportable, into: Translation) -> None:
        trained: Any = run.techniques.trained
        name = name_of(trained)
        if name == "full":
            return
        if name not in _ADAPTERS:
            into.unknown("trained", trained, "LoRA" if run.has_adapter else "all weights")
            if not run.has_adapter:
                return
        into.packages.append("peft")
        into.put(
            use_peft=True,
            lora_r=run.adapter_rank,
            lora_target_modules=run.adapter_targets,
            lora_dropout=0.0,
            **_ADAPTERS.get(name, {}),
        )
        if name in _ADAPTERS:
            into.put(lora_alpha=whole(trained.alpha))
        if name in ("pissa", "loftq"):
            begins_as_lora(run, into)
        held = "bfloat16" if run.setting.storage is not None else "float32"
        if run.setting.adapter_dtype != held:
            what = f"an adapter in {held}"
            if held == "float32":
                into.cannot_hold("trained", trained, what)
            else:
                into.lacks("training.memory.trained", f"{name} has {what}")

    def row(self, run: Exportable, content: Mapping[str, Any]) -> Mapping[str, Any]:
        return content


def _callback(run: Exportable) -> str:
    """The line that holds the budget in a script."""
    budget, price = run.plan.budget, run.plan.dollars_per_hour
    limits = {
        "flops": budget.flops,
        "tokens": budget.tokens,
        "hours": None if budget.seconds is None else f"{budget.seconds / 3600:g}",
        "dollars": budget.dollars,
        "dollars_per_hour": price if budget.dollars is not None else None,
    }
    given = ", ".join(
        f"{name}={value if isinstance(value, str) else f'{value:g}'}"
        for name, value in limits.items()
        if value is not None
    )
    return f"SFTTrainer(..., callbacks=[thrifty.BudgetCallback({given})])"
