"""Configs as published on the Hub (the keys that change shapes), and variants of each family."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

PUBLISHED: dict[str, Config] = {
    "Llama-3-8B": dict(
        model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
        max_position_embeddings=8192, tie_word_embeddings=False, torch_dtype="bfloat16",
        rope_theta=500000.0, rms_norm_eps=1e-5, attention_bias=False,
    ),
    "Llama-3.2-1B": dict(
        model_type="llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, vocab_size=128256,
        tie_word_embeddings=True, torch_dtype="bfloat16",
    ),
    "Mistral-7B-v0.1": dict(
        model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=32000, sliding_window=4096,
        torch_dtype="bfloat16",
    ),
    "Mistral-Nemo-12B": dict(
        model_type="mistral", hidden_size=5120, intermediate_size=14336, num_hidden_layers=40,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=131072,
        sliding_window=None, torch_dtype="bfloat16",
    ),
    "Qwen2.5-0.5B": dict(
        model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
        max_position_embeddings=32768, use_sliding_window=False, torch_dtype="bfloat16",
    ),
    "Qwen2.5-7B": dict(
        model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
        torch_dtype="bfloat16",
    ),
    "Qwen3-0.6B": dict(
        model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        tie_word_embeddings=True, attention_bias=False, torch_dtype="bfloat16",
    ),
    "Gemma-2-2B": dict(
        model_type="gemma2", hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, vocab_size=256000,
        sliding_window=4096, torch_dtype="float32",
    ),
    "Gemma-3-1B": dict(
        model_type="gemma3_text", hidden_size=1152, intermediate_size=6912, num_hidden_layers=26,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, vocab_size=262144,
        sliding_window=512, sliding_window_pattern=6, torch_dtype="bfloat16",
    ),
    "Phi-3-mini": dict(
        model_type="phi3", hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, vocab_size=32064, sliding_window=2047,
        torch_dtype="bfloat16",
    ),
    "GPT-2": dict(
        model_type="gpt2", n_embd=768, n_layer=12, n_head=12, n_positions=1024, n_ctx=1024,
        vocab_size=50257, activation_function="gelu_new",
    ),
    "Pythia-160m": dict(
        model_type="gpt_neox", hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, vocab_size=50304, rotary_pct=0.25, use_parallel_residual=True,
        max_position_embeddings=2048, tie_word_embeddings=False, torch_dtype="float16",
    ),
    "OPT-125m": dict(
        model_type="opt", hidden_size=768, ffn_dim=3072, num_hidden_layers=12,
        num_attention_heads=12, vocab_size=50272, word_embed_proj_dim=768,
        do_layer_norm_before=True, torch_dtype="float16",
    ),
    "OPT-350m": dict(
        model_type="opt", hidden_size=1024, ffn_dim=4096, num_hidden_layers=24,
        num_attention_heads=16, vocab_size=50272, word_embed_proj_dim=512,
        do_layer_norm_before=False, torch_dtype="float16",
    ),
}  # fmt: skip

TINY: dict[str, Config] = {
    "llama": dict(
        model_type="llama", hidden_size=64, intermediate_size=176, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=160,
    ),
    "mistral": dict(
        model_type="mistral", hidden_size=64, intermediate_size=176, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, vocab_size=160, head_dim=24,
    ),
    "qwen2": dict(
        model_type="qwen2", hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=160, tie_word_embeddings=True,
    ),
    "qwen3": dict(
        model_type="qwen3", hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=160, head_dim=32,
    ),
    "gemma2": dict(
        model_type="gemma2", hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=160, head_dim=32,
    ),
    "gemma3_text": dict(
        model_type="gemma3_text", hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, vocab_size=160, head_dim=32,
    ),
    "phi3": dict(
        model_type="phi3", hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=160, pad_token_id=0,
    ),
    "gpt2": dict(
        model_type="gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=160, n_positions=128,
    ),
    "gpt_neox": dict(
        model_type="gpt_neox", hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=160,
    ),
    "opt": dict(
        model_type="opt", hidden_size=64, ffn_dim=160, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=160, max_position_embeddings=128,
    ),
}  # fmt: skip

VARIANTS: dict[str, Config] = {
    "llama-biased": TINY["llama"] | dict(attention_bias=True, mlp_bias=True),
    "llama-mha-tied": TINY["llama"] | dict(num_key_value_heads=None, tie_word_embeddings=True),
    "mistral-window": TINY["mistral"] | dict(sliding_window=16),
    "qwen2-window": TINY["qwen2"]
    | dict(use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "qwen3-biased-tied": TINY["qwen3"] | dict(attention_bias=True, tie_word_embeddings=True),
    "gemma2-uncapped": TINY["gemma2"]
    | dict(attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True),
    "gemma2-window": TINY["gemma2"] | dict(sliding_window=16),
    "gemma3-window": TINY["gemma3_text"] | dict(sliding_window=16, sliding_window_pattern=2),
    "gemma3-capped": TINY["gemma3_text"] | dict(final_logit_softcapping=30.0, attention_bias=True),
    "phi3-tied-partial": TINY["phi3"] | dict(tie_word_embeddings=True, partial_rotary_factor=0.5),
    "gpt2-no-dropout": TINY["gpt2"] | dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "gpt2-inner-untied": TINY["gpt2"] | dict(n_inner=96, tie_word_embeddings=False),
    "gpt_neox-sequential": TINY["gpt_neox"]
    | dict(use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True),
    "gpt_neox-dropout": TINY["gpt_neox"] | dict(hidden_dropout=0.1),
    "opt-post-projected": TINY["opt"] | dict(do_layer_norm_before=False, word_embed_proj_dim=32),
    "opt-plain": TINY["opt"]
    | dict(enable_bias=False, layer_norm_elementwise_affine=False, dropout=0.0),
    "opt-untied-no-final": TINY["opt"]
    | dict(tie_word_embeddings=False, _remove_final_layer_norm=True),
}
