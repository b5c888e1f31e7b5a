"""Small models of many families, as a memory technique is to hold them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tests.costs.published import TINY
from tests.costs.tracing import batch, build

from thrifty.core.resolve import resolve
from thrifty.costs.operations import Adapter

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "opt")
FAMILIES += ("mixtral", "falcon", "deepseek_v3", "llama4_text", "gpt_oss")
USUAL = ("llama", "gemma2", "gpt2", "opt", "mixtral", "llama4_text")
ADAPTERS = {"full": None, "lora": Adapter(rank=4)}
ROWS, SEQUENCE = 3, 24
SCALED = dict(TINY["llama"], num_hidden_layers=1)
WITH_SCALED_LOGITS = {
    "granite": SCALED | dict(model_type="granite", logits_scaling=8.0),
    "cohere": SCALED | dict(model_type="cohere", logit_scale=0.25, eos_token_id=2),
}
"""Beside gemma2's, which are capped."""


def model_of(config: dict[str, Any], adapter: Adapter | None = None, **options: Any) -> Any:
    """Adapters away from where they begin, at which half of their gradients are 0."""
    torch.manual_seed(0)
    model = build(config, adapter=adapter, **options)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def rows(model: Any, num_rows: int = ROWS, sequence: int = SEQUENCE) -> dict[str, Any]:
    """Packed rows of random tokens, some of which carry no loss."""
    inputs: dict[str, Any] = batch(num_rows, sequence, masked=True, model=model)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (num_rows, sequence), generator=generator)
    inputs["input_ids"], inputs["labels"] = ids, ids.clone()
    inputs["labels"][0, 3 : sequence // 2] = -100
    inputs["num_items_in_batch"] = torch.tensor(60)
    return inputs


def held(model: Any, kind: str, technique: Any) -> Any:
    """A copy of ``model``, held so."""
    found = copy.deepcopy(model)
    resolve(kind, technique).hold(found)
    return found


def gradients(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and by name the gradients."""
    torch.manual_seed(2)  # dropout draws the same
    loss = model(**inputs).loss
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {name: p.grad for name, p in named if p.grad is not None}


def kept_bytes(run: Any) -> int:
    """Of what ``run`` leaves alive as long as its result is, as the allocator reports it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as seen:
        result = run()
    events = seen.profiler.kineto_results.events()
    del result
    return sum(event.nbytes() for event in events if event.name() == "[memory]")
