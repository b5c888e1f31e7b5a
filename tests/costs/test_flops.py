"""The closed forms against torch's FlopCounterMode on the same step: they must be equal."""

from __future__ import annotations

import time

import pytest
import six_n
import torch
from published import PUBLISHED, TINY, VARIANTS, WITH_VARIANTS
from torch.utils.flop_counter import FlopCounterMode
from tracing import batch, build

from thrifty.costs.flops import (
    Adapter,
    decode_flops,
    forward_flops,
    gradient_score_flops,
    score_flops,
    step_flops,
    train_flops,
)
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape

ROWS, SEQUENCE = 2, 16
THREE = {
    name: config | ({"n_layer": 3} if config["model_type"] == "gpt2" else {"num_hidden_layers": 3})
    for name, config in (TINY | VARIANTS).items()
}


_USUAL = ("llama", "gemma2", "gpt2", "opt", "mixtral", "deepseek_v3", "falcon", "llama4_text")
DECODED = [
    pytest.param(name, marks=() if name in _USUAL else pytest.mark.slow)
    for name in (*TINY, "mistral-window", "gemma2-window", "opt-post-projected")
]


def counted(run) -> int:
    # On a CPU fused attention counts as nothing, so every model here is eager.
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def step(config, **options) -> int:
    model = build(config, attention="eager", **options)
    return counted(lambda: model(**batch(ROWS, SEQUENCE)).loss.backward())


@pytest.mark.parametrize("name", WITH_VARIANTS)
def test_full_training(name):
    config = (TINY | VARIANTS)[name]
    shape = ModelShape.from_config(config)
    for recompute in (False, True) if name in TINY else (True,):
        measured = step(config, recompute=recompute)
        assert train_flops(shape, ROWS, SEQUENCE, recompute=recompute) == measured


@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", TINY)
@pytest.mark.long
def test_adapters(family, recompute):
    shape = ModelShape.from_config(THREE[family])
    everywhere = Adapter(rank=4)
    somewhere = Adapter(rank=2, targets=shape.lora_targets[:1], layers=(1,))
    for adapter in (everywhere,) if recompute else (everywhere, somewhere):
        measured = step(THREE[family], adapter=adapter, recompute=recompute)
        predicted = train_flops(shape, ROWS, SEQUENCE, adapter=adapter, recompute=recompute)
        assert predicted == measured, adapter


def test_query_and_value_adapters():
    adapter = Adapter(rank=4, targets=("q_proj", "v_proj"))
    shape = ModelShape.from_config(THREE["llama"])
    assert train_flops(shape, ROWS, SEQUENCE, adapter=adapter) == step(
        THREE["llama"], adapter=adapter
    )


@pytest.mark.parametrize("family", TINY)
def test_forward(family):
    shape, model = ModelShape.from_config(THREE[family]), build(THREE[family], attention="eager")
    inputs = batch(ROWS, SEQUENCE)
    body = getattr(model, "model", model.base_model)
    with torch.no_grad():
        assert forward_flops(shape, ROWS, SEQUENCE) == counted(lambda: model(**inputs))
        hidden = counted(lambda: body(input_ids=inputs["input_ids"]))
    assert score_flops(shape, ROWS, SEQUENCE, logits=False) == hidden


@pytest.mark.parametrize("name", DECODED)
@pytest.mark.long
def test_decoding(name):
    shape, model = ModelShape.from_config(THREE[name]), build(THREE[name], attention="eager").eval()
    model.config.use_cache = True
    for prompt, generated in ((10, 1), (10, 8), (20, 2)):
        ids = torch.ones(ROWS, prompt, dtype=torch.long)
        measured = counted(
            lambda ids=ids, generated=generated: model.generate(
                ids, max_new_tokens=generated, min_new_tokens=generated, do_sample=False
            )
        )
        assert decode_flops(shape, ROWS, prompt, generated) == measured
    assert decode_flops(shape, ROWS, 10, 0) == 0


@pytest.mark.parametrize("last_layers", [1, 2])
def test_gradients_of_the_last_layers(last_layers):
    shape, model = ModelShape.from_config(THREE["llama"]), build(THREE["llama"], attention="eager")
    model.requires_grad_(False)
    model.model.layers[-last_layers:].requires_grad_(True)
    measured = counted(lambda: model(**batch(ROWS, SEQUENCE)).loss.backward())
    predicted = gradient_score_flops(shape, ROWS, SEQUENCE, last_layers=last_layers)
    assert predicted == measured
    with pytest.raises(ValueError, match="last_layers must be from 1 to 3"):
        gradient_score_flops(shape, ROWS, SEQUENCE, last_layers=4)


def test_a_known_model_by_hand():
    shape = ModelShape.from_config(PUBLISHED["Llama-3-8B"])
    body = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096
    tokens, sequence = 2 * 2048, 2048
    attention = 32 * 2 * 4096 * sequence
    assert forward_flops(shape, 2, sequence) == 2 * tokens * (body + attention)
    assert train_flops(shape, 2, sequence) == 3 * forward_flops(shape, 2, sequence)
    assert forward_flops(shape, 2, sequence, causal=True) == tokens * (
        2 * body + attention * (sequence + 1) / sequence
    )


def test_unknown_targets_and_layers_are_errors():
    shape = ModelShape.from_config(TINY["gpt2"])
    with pytest.raises(ValueError, match="its linears are c_attn, c_proj, c_fc"):
        train_flops(shape, 1, 8, adapter=Adapter(targets=("q_proj",)))
    with pytest.raises(ValueError, match="layers count from 0 to 1"):
        train_flops(shape, 1, 8, adapter=Adapter(layers=(2,)))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        Adapter(rank=0)


def test_a_price_takes_microseconds():
    shape, adapter = ModelShape.from_config(PUBLISHED["Llama-3-8B"]), Adapter()
    train_flops(shape, 1, 2048, adapter=adapter)
    start = time.perf_counter()
    for sequence in range(1, 501):
        train_flops(shape, 1, sequence, adapter=adapter)
    assert time.perf_counter() - start < 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_the_head_alone(family):
    config = THREE[family]
    shape, model = ModelShape.from_config(config), build(config, attention="eager")
    model.requires_grad_(False)
    model.get_output_embeddings().weight.requires_grad_(True)
    measured = counted(lambda: model(**batch(ROWS, SEQUENCE)).loss.backward())
    setting = MemorySetting(micro_batch=ROWS, sequence=SEQUENCE, only_head=True)
    # GPT-2's head is its embedding, so that its gradient is wanted through all layers.
    assert step_flops(shape, setting) == measured


@pytest.mark.parametrize("recompute", [0, 1])
def test_one_block_of_layers(recompute):
    shape, config = ModelShape.from_config(THREE["llama"]), THREE["llama"]
    model = build(config, attention="eager", recompute=bool(recompute))
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    measured = counted(lambda: model(**batch(ROWS, SEQUENCE)).loss.backward())
    setting = MemorySetting(
        micro_batch=ROWS, sequence=SEQUENCE, only_layers=frozenset({1}), recompute=recompute
    )
    assert step_flops(shape, setting) == measured


def test_recomputing_every_second_layer():
    shape = ModelShape.from_config(THREE["llama"])
    model = build(THREE["llama"], attention="eager", recompute=True)
    for index, layer in enumerate(model.model.layers):
        layer.gradient_checkpointing = index % 2 == 0
    measured = counted(lambda: model(**batch(ROWS, SEQUENCE)).loss.backward())
    setting = MemorySetting(micro_batch=ROWS, sequence=SEQUENCE, recompute=2)
    assert step_flops(shape, setting) == measured


def test_selective_recomputation_runs_no_product_again():
    from functools import partial

    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    products = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default}

    def policy(context, operation, *args, **kwargs):
        kept = operation in products
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    shape, model = ModelShape.from_config(THREE["llama"]), build(THREE["llama"], attention="eager")
    model.gradient_checkpointing_enable(
        {
            "use_reentrant": False,
            "context_fn": partial(create_selective_checkpoint_contexts, policy),
        }
    )
    measured = counted(lambda: model(**batch(ROWS, SEQUENCE)).loss.backward())
    setting = MemorySetting(micro_batch=ROWS, sequence=SEQUENCE, recompute=1, selective=True)
    assert step_flops(shape, setting) == measured


def test_two_forwards_of_zeroth_order():
    shape = ModelShape.from_config(THREE["llama"])
    setting = MemorySetting(micro_batch=ROWS, sequence=SEQUENCE, zeroth_order=True)
    assert step_flops(shape, setting) == 2 * forward_flops(shape, ROWS, SEQUENCE)


def test_a_chunked_loss_makes_its_logits_twice():
    shape = ModelShape.from_config(THREE["llama"])
    whole = MemorySetting(micro_batch=ROWS, sequence=SEQUENCE)
    chunked = MemorySetting(micro_batch=ROWS, sequence=SEQUENCE, loss_chunk=8)
    more = step_flops(shape, chunked) - step_flops(shape, whole)
    assert more == 2 * ROWS * SEQUENCE * shape.hidden_size * shape.vocab_size


@pytest.fixture(scope="module")
def by_the_counter():
    return {way: six_n.counted(setting) for way, setting in six_n.WAYS.items()}


@pytest.mark.parametrize("way", six_n.WAYS)
@pytest.mark.long
def test_the_small_model_is_counted_to_the_last_flop(way, by_the_counter):
    shape = ModelShape.from_config(six_n.SMALL)
    assert step_flops(shape, six_n.WAYS[way]) == by_the_counter[way].flops


@pytest.mark.parametrize(
    ("way", "over"),
    [
        ("full", 0.79),
        ("LoRA rank 16 on all linears", 1.08),
        ("LoRA rank 16 on q and v of the last 2 layers", 1.43),
        ("head alone", 1.96),
    ],
)
def test_where_six_n_is_off(way, over, by_the_counter):
    assert by_the_counter[way].six_n == pytest.approx(over, abs=0.005)


def test_six_n_lacks_attention_and_nothing_else(by_the_counter):
    """6 N T + 12 L h S T is full training's truth, but for the norms' weights, which N counts."""
    shape, run = ModelShape.from_config(six_n.SMALL), six_n.RUN
    products = by_the_counter["full"].num_parameters - 9 * 256
    attention = 12 * shape.num_layers * shape.query_size * run.sequence * run.tokens
    assert 6 * products * run.tokens + attention == by_the_counter["full"].flops


def test_recomputation_is_no_whole_forward_more(by_the_counter):
    """x 1.22 of a step and not x 4/3: the head does not run again, nor what a layer ends with."""
    again, kept = (by_the_counter[way].flops for way in ("full, recompute", "full"))
    assert again / kept == pytest.approx(1.216, abs=0.002)


def test_fused_attention_is_counted_as_nothing_on_a_cpu(by_the_counter):
    shape, run = ModelShape.from_config(six_n.SMALL), six_n.RUN
    attention = 12 * shape.num_layers * shape.query_size * run.sequence * run.tokens
    assert six_n.counted(run, "sdpa").flops == by_the_counter["full"].flops - attention
