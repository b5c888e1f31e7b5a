"""No document sees another: in a pack each gives the logits it gives alone, family by family."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from thrifty.data.packed_attention import (
    check_isolation,
    documents,
    isolation_errors,
    pack_attention_kwargs,
)
from thrifty.data.packing import PackedDataset
from thrifty.data.tokens import Tokens

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    "num_key_value_heads": SMALL["num_attention_heads"],
    "n_routed_experts": MIXTURE["num_experts"],
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 4},
    "qwen2": GROUPED,
    "qwen3": {**HEADS, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gemma2": {**HEADS, "sliding_window": 4},
    "gemma3_text": {**HEADS, "sliding_window": 4},
    "gemma": HEADS,
    "smollm3": {**GROUPED, "use_sliding_window": True, "sliding_window": 4},
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": {**GROUPED, "sliding_window": 4},
    "starcoder2": {**GROUPED, "sliding_window": 5},
    "phi": SMALL,
    "phi3": {**GROUPED, "sliding_window": 5},
    "gpt2": {
        "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "gpt_neox": SMALL,
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": {**GROUPED, "num_local_experts": 4, "sliding_window": 4},
    "qwen2_moe": {**GROUPED, **MIXTURE, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**HEADS, **MIXTURE},
    "deepseek_v2": {**SMALL, **MIXTURE, **LATENT, "first_k_dense_replace": 1},
    "deepseek_v3": {**SMALL, **MIXTURE, **LATENT, "n_group": 2, "topk_group": 1},
    "falcon": {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2},
    "gpt_oss": {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "llama4_text": {
        **HEADS, "intermediate_size_mlp": 48, "num_local_experts": 4, "no_rope_layer_interval": 2,
        "interleave_moe_layer_step": 2,
    },
}  # fmt: skip
NO_SDPA = {"gemma2", "gpt_oss"}
MATRIX = [
    (family, attention)
    for family in FAMILIES
    for attention in ("sdpa", "eager")
    if not (attention == "sdpa" and family in NO_SDPA)
]


def build(family: str, attention: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large weights: a leak cannot hide in small logits
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


def packs() -> tuple[list[Tokens], PackedDataset]:
    """Two packs, one with padding, a document of one token among them."""
    rng = np.random.default_rng(0)
    docs = []
    for size in (7, 2, 4, 9, 12, 5):
        mask = np.arange(size) >= size // 3
        docs.append(Tokens(rng.integers(3, 97, size).astype(np.int32), mask))
    docs[1] = Tokens(docs[1].input_ids[:1], np.ones(1, dtype=np.bool_))
    data = PackedDataset(docs, 24, order=lambda epoch: range(6), pad_token_id=0)
    assert len(data) == 2
    return docs, data


@pytest.mark.parametrize(("family", "attention"), MATRIX)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_pack_gives_what_its_documents_give_alone(
    family: str, attention: str, batch: int
) -> None:
    model = build(family, attention)
    assert model.config._attn_implementation == attention
    docs, data = packs()
    for first in range(0, 2, batch):
        items = [data[i] for i in range(first, first + batch)]
        inputs = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        labels, positions = inputs.pop("labels"), inputs["position_ids"]
        kwargs = pack_attention_kwargs(
            family,
            positions,
            attn_implementation=attention,
            dtype=model.dtype,
            window=FAMILIES[family].get("sliding_window"),
        )
        with torch.no_grad():
            output = model(**inputs, labels=labels, **kwargs)
        total, count = 0.0, 0
        for i, item in enumerate(range(first, first + batch)):
            at = 0
            for doc in (docs[member] for member in data.members(item)):
                size = len(doc.input_ids)
                ids = torch.from_numpy(doc.input_ids.astype(np.int64))[None]
                with torch.no_grad():
                    alone = model(input_ids=ids, use_cache=False).logits[0]
                packed = output.logits[i, at : at + size]
                torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
                counted = torch.from_numpy(doc.loss_mask[1:])
                losses = torch.nn.functional.cross_entropy(alone[:-1], ids[0, 1:], reduction="none")
                total, count = total + float(losses[counted].sum()), count + int(counted.sum())
                at += size
        assert abs(float(output.loss) - total / count) < 1e-5
    assert max(isolation_errors(model)) < 1e-5
    check_isolation(model)


def test_half_precision_keeps_documents_apart_exactly() -> None:
    for family in ("llama", "gemma3_text", "opt"):
        model = build(family, "sdpa").to(torch.bfloat16)
        leak, shift = isolation_errors(model)
        assert leak == 0
        assert shift < 0.05
        check_isolation(model)


def test_an_adapter_in_half_precision_rounds_as_such_a_model_does() -> None:
    """As it has learnt something: a run that goes on begins with one."""
    from thrifty.costs.operations import Adapter
    from thrifty.costs.shape import ModelShape
    from thrifty.holding.adapters import with_adapter

    torch.manual_seed(0)
    wider = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 8}
    wider |= {"num_key_value_heads": 4, "intermediate_size": 256, "vocab_size": 512}
    config = AutoConfig.for_model("llama", **{**SMALL, **wider})
    model = AutoModelForCausalLM.from_config(config).eval()
    shape = ModelShape.from_config(config.to_dict())
    worn = with_adapter(model, shape, Adapter(rank=16), dtype="bfloat16", seed=0)
    with torch.no_grad():
        for name, parameter in worn.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    leak, shift = isolation_errors(worn.get_base_model())
    assert leak == 0
    assert 1e-4 < shift < 0.05
    check_isolation(worn.get_base_model())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_check_notices_a_leak(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache that models use by default is enough to lose the borders."""
    from thrifty.data import packed_attention

    model = build("llama", attention)
    monkeypatch.setattr(packed_attention, "pack_attention_kwargs", lambda *_, **__: {})
    with pytest.raises(ValueError, match=r"llama lets packed documents see each other.*\nhint: "):
        check_isolation(model)


def test_opt_leaks_without_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from thrifty.data import packed_attention

    model = build("opt", "sdpa")
    monkeypatch.setattr(packed_attention, "NEEDS_MASK", frozenset())
    with pytest.raises(ValueError, match="opt lets packed documents see"):
        check_isolation(model)


def test_alibi_is_refused() -> None:
    config = AutoConfig.for_model("falcon", **SMALL, alibi=True)
    with pytest.raises(ValueError, match=r"falcon with ALiBi.*\nhint: "):
        check_isolation(AutoModelForCausalLM.from_config(config))


def test_a_recurrent_model_is_refused() -> None:
    config = AutoConfig.for_model(
        "mamba", vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    with pytest.raises(ValueError, match="mamba lets packed documents see"):
        check_isolation(model)


def test_documents_and_flash_borders() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]])
    assert documents(positions).tolist() == [[0, 0, 0, 1, 2, 2], [0] * 6]
    kwargs = pack_attention_kwargs("llama", positions, attn_implementation="flash_attention_2")
    assert kwargs["cu_seq_lens_q"].tolist() == [0, 3, 4, 6, 12]
    assert kwargs["cu_seq_lens_k"].dtype == torch.int32
    assert kwargs["max_length_q"] == 6
    assert kwargs["use_cache"] is False
    with pytest.raises(ValueError, match=r"opt cannot keep.*\nhint"):
        pack_attention_kwargs("opt", positions, attn_implementation="flash_attention_2")
