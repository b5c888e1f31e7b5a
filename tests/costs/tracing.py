"""Models to measure the closed forms against: tiny, on the CPU, run as the trainer runs them."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from thrifty.costs.operations import Adapter
from thrifty.costs.shape import ModelShape
from thrifty.data.packed_attention import pack_attention_kwargs


def build(
    config: dict[str, Any],
    *,
    dtype: str = "float32",
    adapter: Adapter | None = None,
    adapter_dtype: str = "float32",
    recompute: bool = False,
    attention: str | None = None,
) -> torch.nn.Module:
    """A model in training mode, with PEFT's adapter and transformers' checkpointing if asked."""
    fields = dict(config)
    options = {} if attention is None else {"attn_implementation": attention}
    if attention == "eager":  # the flop counter knows no grouped product either
        options["experts_implementation"] = "eager"
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(fields.pop("model_type"), **fields),
        dtype=getattr(torch, dtype),
        **options,
    )
    model.config.use_cache = False
    plain = model
    if adapter is not None:
        from peft import LoraConfig, get_peft_model

        targets = adapter.targets or ModelShape.from_config(config).lora_targets
        layers = None if adapter.layers is None else list(adapter.layers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's remarks on Conv1D
            model = get_peft_model(
                model,
                LoraConfig(
                    r=adapter.rank, target_modules=list(targets), layers_to_transform=layers
                ),
                autocast_adapter_dtype=adapter_dtype == "float32",
            )
    if recompute:
        plain.activation_checkpointing_enable()
    return model.train()


def batch(
    rows: int, sequence: int, *, masked: bool = False, model: torch.nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """Packed rows: masked ones hold two documents each, the others one; with the mask that the
    trainer gives to ``model``."""
    ids = torch.ones(rows, sequence, dtype=torch.long)
    positions = torch.arange(sequence).repeat(rows, 1)
    if masked:
        positions %= sequence // 2 + 1
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions}
    if model is not None:
        given = pack_attention_kwargs(
            model.config.model_type,
            positions,
            dtype=model.dtype,
            window=getattr(model.config, "sliding_window", None),
        )
        if "attention_mask" in given and not getattr(model.config, "alibi", False):
            inputs["attention_mask"] = given["attention_mask"]
    return inputs


def masks(inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Those that a batch holds."""
    given = inputs.get("attention_mask")
    return list(given.values()) if isinstance(given, dict) else [] if given is None else [given]


def input_bytes(inputs: dict[str, Any], *, with_masks: bool = True) -> int:
    plain = [tensor for name, tensor in inputs.items() if name != "attention_mask"]
    return sum(tensor.nbytes for tensor in (*plain, *(masks(inputs) if with_masks else ())))


def saved_bytes(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes of the distinct buffers that autograd keeps after a forward, parameters excluded. What
    it kept for results that nothing uses is gone by then."""

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    alive: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Kept:
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = model(**inputs).loss  # holds the graph
    storages = [kept.tensor.untyped_storage() for kept in alive]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for parameter in model.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    del loss
    return sum(sizes.values())


def allocated_peak(run: Any) -> int:
    """The most bytes alive during ``run`` above the level at its start, as the allocator reports
    them to the profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as seen:
        run()
    level = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak
