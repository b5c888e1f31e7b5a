"""Published models, a line each, and the parameters that their pages give."""

from __future__ import annotations

from typing import Any

Row = tuple[int, int, int, int, int, int]


def configs(model_type: str, rows: dict[str, Row], **common: Any) -> dict[str, dict[str, Any]]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "vocab_size")
    return {
        name: {"model_type": model_type} | dict(zip(names, row, strict=True)) | common
        for name, row in rows.items()
    }


RELEASES: dict[str, dict[str, Any]] = {
    **configs(
        "llama",
        {
            "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000),
            "Llama-2-13B": (5120, 13824, 40, 40, 40, 32000),
            "Llama-2-70B": (8192, 28672, 80, 64, 8, 32000),
            "Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128256),
            "Llama-3.1-405B": (16384, 53248, 126, 128, 8, 128256),
        },
    ),
    **configs(
        "llama",
        {
            "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128256),
            "SmolLM2-135M": (576, 1536, 30, 9, 3, 49152),
            "SmolLM2-360M": (960, 2560, 32, 15, 5, 49152),
            "SmolLM2-1.7B": (2048, 8192, 24, 32, 32, 49152),
        },
        tie_word_embeddings=True,
    ),
    **configs("smollm3", {"SmolLM3-3B": (2048, 11008, 36, 16, 4, 128256)}, pad_token_id=128004),
    **configs(
        "mistral",
        {
            "Mistral-7B-v0.3": (4096, 14336, 32, 32, 8, 32768),
            "Mistral-Small-22B": (6144, 16384, 56, 48, 8, 32768),
            "Mistral-Small-24B": (5120, 32768, 40, 32, 8, 131072),
        },
        head_dim=128,
        sliding_window=None,
    ),
    **configs(
        "qwen2",
        {
            "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151936),
            "Qwen2.5-3B": (2048, 11008, 36, 16, 2, 151936),
        },
        tie_word_embeddings=True,
    ),
    **configs(
        "qwen2",
        {
            "Qwen2.5-14B": (5120, 13824, 48, 40, 8, 152064),
            "Qwen2.5-32B": (5120, 27648, 64, 40, 8, 152064),
            "Qwen2.5-72B": (8192, 29568, 80, 64, 8, 152064),
        },
    ),
    **configs(
        "gemma",
        {
            "Gemma-2B": (2048, 16384, 18, 8, 1, 256000),
            "Gemma-7B": (3072, 24576, 28, 16, 16, 256000),
        },
        head_dim=256,
    ),
    **configs("gemma2", {"Gemma-2-9B": (3584, 14336, 42, 16, 8, 256000)}, head_dim=256),
    **configs("gemma2", {"Gemma-2-27B": (4608, 36864, 46, 32, 16, 256000)}, head_dim=128),
    **configs(
        "gemma3_text",
        {
            "Gemma-3-270M": (640, 2048, 18, 4, 1, 262144),
            "Gemma-3-4B": (2560, 10240, 34, 8, 4, 262208),
            "Gemma-3-12B": (3840, 15360, 48, 16, 8, 262208),
        },
        head_dim=256,
        sliding_window=1024,
    ),
    **configs("gemma3_text", {"Gemma-3-27B": (5376, 21504, 62, 32, 16, 262208)}, head_dim=128),
    **configs("phi3", {"Phi-4": (5120, 17920, 40, 40, 10, 100352)}, pad_token_id=100349),
    **configs(
        "phi3",
        {"Phi-4-mini": (3072, 8192, 32, 24, 8, 200064)},
        tie_word_embeddings=True,
        partial_rotary_factor=0.75,
    ),
    **configs(
        "olmo2",
        {
            "OLMo-2-1B": (2048, 8192, 16, 16, 16, 100352),
            "OLMo-2-7B": (4096, 11008, 32, 32, 32, 100352),
            "OLMo-2-13B": (5120, 13824, 40, 40, 40, 100352),
        },
    ),
    **configs(
        "starcoder2",
        {
            "StarCoder2-3B": (3072, 12288, 30, 24, 2, 49152),
            "StarCoder2-7B": (4608, 18432, 32, 36, 4, 49152),
        },
        sliding_window=4096,
    ),
    **configs(
        "starcoder2",
        {"StarCoder2-15B": (6144, 24576, 40, 48, 4, 49152)},
        sliding_window=4096,
        tie_word_embeddings=False,
    ),
    **configs(
        "gpt_neox",
        {
            "Pythia-70M": (512, 2048, 6, 8, 8, 50304),
            "Pythia-410M": (1024, 4096, 24, 16, 16, 50304),
            "Pythia-1B": (2048, 8192, 16, 8, 8, 50304),
            "Pythia-1.4B": (2048, 8192, 24, 16, 16, 50304),
            "Pythia-2.8B": (2560, 10240, 32, 32, 32, 50304),
            "Pythia-6.9B": (4096, 16384, 32, 32, 32, 50432),
            "Pythia-12B": (5120, 20480, 36, 40, 40, 50688),
        },
    ),
    "Falcon-7B": dict(model_type="falcon", bias=False, alibi=False, multi_query=True),
    "Falcon-40B": dict(
        model_type="falcon",
        hidden_size=8192,
        num_hidden_layers=60,
        num_attention_heads=128,
        num_kv_heads=8,
        new_decoder_architecture=True,
    ),
    "Falcon-180B": dict(
        model_type="falcon",
        hidden_size=14848,
        num_hidden_layers=80,
        num_attention_heads=232,
        num_kv_heads=8,
        new_decoder_architecture=True,
    ),
    "Falcon2-11B": dict(
        model_type="falcon",
        hidden_size=4096,
        num_hidden_layers=60,
        num_attention_heads=32,
        num_kv_heads=8,
        new_decoder_architecture=True,
        num_ln_in_parallel_attn=1,
        tie_word_embeddings=False,
    ),
    "Falcon-RW-1B": dict(
        model_type="falcon",
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=32,
        vocab_size=50304,
        alibi=True,
        bias=True,
        multi_query=False,
        parallel_attn=False,
    ),
    "gpt-oss-20b": dict(model_type="gpt_oss", num_hidden_layers=24, num_local_experts=32),
    "gpt-oss-120b": dict(model_type="gpt_oss", num_hidden_layers=36, num_local_experts=128),
    "Llama-4-Scout": dict(
        model_type="llama4_text", num_local_experts=16, max_position_embeddings=10_485_760
    ),
    "Llama-4-Maverick": dict(
        model_type="llama4_text",
        num_local_experts=128,
        interleave_moe_layer_step=2,
        use_qk_norm=False,
        max_position_embeddings=1_048_576,
    ),
}

PARAMETERS = {
    "Llama-3-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Llama-3.2-3B": 3_212_749_824,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "SmolLM3-3B": 3_075_098_624,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Mistral-Nemo-12B": 12_247_782_400,
    "Mistral-Small-22B": 22_247_282_688,
    "Mistral-Small-24B": 23_572_403_200,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Gemma-2B": 2_506_172_416,
    "Gemma-7B": 8_537_680_896,
    "Gemma-2-2B": 2_614_341_888,
    "Gemma-2-9B": 9_241_705_984,
    "Gemma-2-27B": 27_227_128_320,
    "Gemma-3-270M": 268_098_176,
    "Gemma-3-1B": 999_885_952,
    "Phi-3-mini": 3_821_079_552,
    "Phi-4": 14_659_507_200,
    "Phi-4-mini": 3_836_021_760,
    "OLMo-2-1B": 1_484_916_736,
    "OLMo-2-7B": 7_298_617_344,
    "OLMo-2-13B": 13_716_198_400,
    "StarCoder2-3B": 3_030_371_328,
    "StarCoder2-7B": 7_173_923_840,
    "StarCoder2-15B": 15_957_889_024,
    "GPT-2": 124_439_808,
    "Pythia-70M": 70_426_624,
    "Pythia-160m": 162_322_944,
    "Pythia-410M": 405_334_016,
    "Pythia-1B": 1_011_781_632,
    "Pythia-1.4B": 1_414_647_808,
    "Pythia-2.8B": 2_775_208_960,
    "Pythia-6.9B": 6_857_302_016,
    "Pythia-12B": 11_846_072_320,
    "OPT-125m": 125_239_296,
    "OPT-350m": 331_196_416,
    "Mixtral-8x7B": 46_702_792_704,
    "Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen3-30B-A3B": 30_532_122_624,
    # Stored with a copy of the tied head.
    "Falcon-7B": 7_217_189_760 - 65024 * 4544,
    "Falcon-180B": 179_522_565_120 - 65024 * 14848,
    "Falcon-RW-1B": 1_311_625_216,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}
"""Elements of the weights as stored on the Hub, a tied head once."""
