"""Bottleneck adapters: they begin at nothing, are r more inner features of a stock model's MLP in
value and in gradient, and take the bytes and FLOPs that are declared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.costs.published import TINY
from tests.costs.tracing import allocated_peak, batch, build, input_bytes, saved_bytes
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from thrifty.core.resolve import resolve
from thrifty.costs.flops import forward_flops, step_flops
from thrifty.costs.memory import MemoryAccount, MemorySetting, account
from thrifty.costs.memory import saved_bytes as priced_saved_bytes
from thrifty.costs.shape import ModelShape, read_shape
from thrifty.costs.trained import trained
from thrifty.fake_step import record
from thrifty.holding.wider_mlp import features_of
from thrifty.signals.adapters import adapter_weights, sharing_copy
from thrifty.signals.example_gradients import ExampleGradients
from thrifty.signals.gradients import trained_matrices
from thrifty.signals.model_folder import TRAINED
from thrifty.signals.models import load_model

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")
MIXTURES += ("gpt_oss", "llama4_text")
CONFIGS: dict[str, dict[str, Any]] = {
    **{name: config for name, config in TINY.items() if name not in MIXTURES},
    "llama with biases": TINY["llama"] | {"mlp_bias": True},
    "falcon with biases": TINY["falcon"] | {"bias": True},
    "opt in sequence": TINY["opt"] | {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "gpt2 n_inner": TINY["gpt2"] | {"n_inner": 64},
}
USUAL = ("llama", "gemma2", "phi3", "gpt2", "opt", "falcon", "phi")
RANK = 4
IDS = torch.arange(24).view(2, 12) % 160


def technique(**options: Any) -> Any:
    return resolve("trained", {"adapters": {"rank": RANK} | options})


@pytest.fixture
def base(request: Any, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    build(CONFIGS[request.param]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def prepared(folder: Path, **options: Any) -> Any:
    return technique(**options).prepare(load_model(folder, "float32", "cpu"), read_shape(folder), 1)


def shaken(folder: Path) -> Any:
    """Adapters away from where they begin."""
    model = prepared(folder).eval()
    torch.manual_seed(2)
    for weight in adapter_weights(model):
        weight.data += 0.1 * torch.randn_like(weight)
    return model


def published(model: Any, base: Path, to: Path) -> Path:
    model.save_pretrained(to / "checkpoint")
    (to / "model").mkdir()
    assert technique().publish(to / "checkpoint", to / "model", base)
    return to / "model"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


each_family = pytest.mark.parametrize("base", CONFIGS, indirect=True)
usual_family = pytest.mark.parametrize("base", USUAL, indirect=True)


@each_family
def test_a_stock_model_has_them_as_inner_features(base, tmp_path):
    plain = logits(load_model(base, "float32", "cpu"))
    assert torch.equal(logits(prepared(base)), plain)
    model = shaken(base)
    wanted = logits(model)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    left = published(model, base, tmp_path)
    assert read_shape(left).intermediate_size == read_shape(base).intermediate_size + RANK
    stock, loading = AutoModelForCausalLM.from_pretrained(left, output_loading_info=True)
    assert not any(loading.values()), loading
    assert stock.dtype == torch.float32
    torch.testing.assert_close(logits(stock), wanted, rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    for folder in (tmp_path / "checkpoint", left):
        again = prepared(base)
        assert technique().restore(again, folder)
        assert torch.equal(logits(again), wanted)


@each_family
def test_gradients_are_those_of_the_stock_models_features(base, tmp_path):
    model = shaken(base)
    left = published(model, base, tmp_path)
    wide = load_model(left, "float32", "cpu").eval().double()
    model.double()
    losses = []
    for each in (model, wide):
        losses.append(each(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    own = {n: w.grad for n, w in model.named_parameters() if w.requires_grad}
    assert all(".bottleneck." in name for name in own)
    stored = load_file(left / "model.safetensors").keys()
    grads = {n: w.grad.contiguous() for n, w in wide.named_parameters() if n in stored}
    (tmp_path / "gradients").mkdir()
    save_file(grads, tmp_path / "gradients" / "model.safetensors")
    (tmp_path / "gradients" / "config.json").write_bytes((left / "config.json").read_bytes())
    rows = features_of(tmp_path / "gradients", RANK, own)
    assert rows.keys() == own.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, rows[name], rtol=1e-9, atol=1e-14, msg=name)


@pytest.mark.parametrize("base", ["llama", "opt"], indirect=True)
def test_models_of_several_files_and_of_few_bytes(base, tmp_path):
    load_model(base, "bfloat16", "cpu").save_pretrained(tmp_path / "cut", max_shard_size="50KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    model = shaken(tmp_path / "cut")  # float32 on stored bfloat16
    left = published(model, tmp_path / "cut", tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(left)
    assert stock.dtype == torch.float32
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-5)


def test_what_is_left_has_the_dtype_that_weights_had(tmp_path):
    torch.manual_seed(0)
    build(TINY["llama"]).save_pretrained(tmp_path / "base")
    narrow = load_model(tmp_path / "base", "bfloat16", "cpu")
    model = technique().prepare(narrow, ModelShape.from_config(TINY["llama"]), 1)
    left = published(model, tmp_path / "base", tmp_path)
    assert AutoModelForCausalLM.from_pretrained(left).dtype == torch.bfloat16
    size = sum(each.nbytes for each in adapter_weights(model))
    assert 0 <= (tmp_path / "checkpoint" / TRAINED).stat().st_size - size < 2048
    assert [each.name for each in (tmp_path / "checkpoint").iterdir()] == [TRAINED]


def test_the_base_model_is_left_as_it_is_where_no_step_improved_it(tmp_path):
    torch.manual_seed(0)
    build(TINY["llama"]).save_pretrained(tmp_path)
    model = prepared(tmp_path)
    assert technique().restore(model, tmp_path)
    assert torch.equal(logits(model), logits(load_model(tmp_path, "float32", "cpu")))


# -- what it costs --------------------------------------------------------------------------------


def held(name: str, *, eager: bool = False, dtype: str = "float32", **options: Any) -> Any:
    shape, chosen = ModelShape.from_config(CONFIGS[name]), technique(**options)
    model = build(CONFIGS[name], attention="eager" if eager else None, dtype=dtype)
    return shape, chosen, chosen.prepare(model, shape, 0).train()


@pytest.mark.parametrize("name", CONFIGS)
def test_flops(name):
    shape, chosen, model = held(name, eager=True)
    setting = chosen.rewrite(MemorySetting(micro_batch=2, sequence=16))
    for recompute in (0, 1):
        if recompute:
            model.activation_checkpointing_enable()
        with FlopCounterMode(display=False) as counter:
            model(**batch(2, 16)).loss.backward()
        predicted = step_flops(shape, replace(setting, recompute=recompute))
        assert predicted == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(IDS)
    assert forward_flops(shape.under(setting.adapter), 2, 12) == counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_trained_is_what_is_priced(name):
    shape, chosen, model = held(name)
    found = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    setting = chosen.rewrite(MemorySetting())
    assert found == trained(shape, setting).num_elements == setting.adapter.num_parameters(shape)


WIDE = {
    "llama": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3},
    "phi3": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3},
    "gpt2": {"n_embd": 128, "n_layer": 3},
    "opt": {"hidden_size": 128, "ffn_dim": 512, "num_hidden_layers": 3},
}


def beside(found: MemoryAccount) -> float:
    """Of the forward and the backward, the most that is held beside what always is."""
    always = ("weights", "adapter", "optimizer_states")
    return max(
        sum(size for term, size in found.phases[phase].items() if term not in always)
        for phase in ("loss", "backward")
    )


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")],
)
@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("rank", [4, 64])
def test_bytes(name, dtype, adapter_dtype, rank):
    config = TINY[name] | WIDE[name]
    shape, chosen = (
        ModelShape.from_config(config),
        technique(rank=rank, adapter_dtype=adapter_dtype),
    )
    setting = chosen.rewrite(MemorySetting(dtype=dtype, micro_batch=4, sequence=96))
    model = chosen.prepare(build(config, dtype=dtype), shape, 0).train()
    inputs = batch(4, 96, masked=True, model=model)
    kept = priced_saved_bytes(shape, setting, (4,), head=True)[0]
    assert kept == pytest.approx(saved_bytes(model, inputs), rel=2e-3)
    model(**inputs).loss.backward()
    model.zero_grad()
    measured = allocated_peak(lambda: model(**inputs).loss.backward())
    assert beside(account(shape, setting)) - input_bytes(inputs) == pytest.approx(
        measured, rel=0.03
    )


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_bytes_and_gradients_where_few_tokens_run_at_a_time(name, adapter_dtype):
    config = TINY[name] | WIDE[name] | {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    shape, chosen = ModelShape.from_config(config), technique(adapter_dtype=adapter_dtype)
    start = MemorySetting(dtype="bfloat16", micro_batch=4, sequence=96)
    inputs = batch(4, 96, masked=True)
    gradients = []
    for tokens in (0, 32):
        torch.manual_seed(0)
        model = chosen.prepare(build(config, dtype="bfloat16"), shape, 0).train()
        setting = chosen.rewrite(start)
        if tokens:
            slices = resolve("activations", {"chunked_mlp": {"tokens": tokens}})
            setting = slices.rewrite(setting)
            slices.hold(model)
        for weight in adapter_weights(model):
            weight.data += 0.1 * torch.randn_like(weight)
        model(**inputs).loss.backward()
        gradients.append([weight.grad.float() for weight in adapter_weights(model)])
        model.zero_grad()
        kept = priced_saved_bytes(shape, setting, (4,), head=True)[0]
        assert kept == pytest.approx(saved_bytes(model, inputs), rel=2e-3)
        measured = allocated_peak(lambda model=model: model(**inputs).loss.backward())
        assert beside(account(shape, setting)) - input_bytes(inputs) == pytest.approx(
            measured, rel=0.03
        )
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() < 0.02 * one.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "changes", [{}, {"recompute": 1}, {"recompute": 1, "selective": True}], ids=str
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_traced_step_has_the_predicted_peak(name, changes, kind, dtype):
    config = TINY[name] | WIDE[name]
    chosen = technique(rank=16, adapter_dtype=dtype)
    start = MemorySetting(micro_batch=4, sequence=96, device_kind=kind, **changes)
    setting = chosen.rewrite(start)
    traced = max(record(config, setting).peaks().values())
    predicted = account(ModelShape.from_config(config), setting).peak_memory_bytes
    assert predicted == pytest.approx(traced, rel=0.03)


# -- what looks at a model with them --------------------------------------------------------------


@pytest.mark.parametrize("name", USUAL)
def test_gradients_of_single_examples(name):
    _, _, model = held(name)
    torch.manual_seed(3)
    for weight in adapter_weights(model):
        weight.data += 0.1 * torch.randn_like(weight)
    wanted = trained_matrices(model, 0)
    assert len(wanted) == len(adapter_weights(model))
    ids = torch.randint(1, 160, (3, 10))
    keep = torch.ones(3, 9, dtype=torch.bool)
    with ExampleGradients(model, wanted) as each:
        found: dict[int, Any] = {}
        for place, rows, gradients in each.of(ids, keep).weights():
            found.setdefault(place, np.zeros((3, wanted[place].numel())))[rows] = gradients
    model.eval()
    for row in range(3):
        loss = model(input_ids=ids[row : row + 1], labels=ids[row : row + 1]).loss
        alone = torch.autograd.grad(loss, wanted)
        for place, gradient in enumerate(alone):
            np.testing.assert_allclose(found[place][row], gradient.flatten(), atol=2e-5)


def test_a_copy_on_the_same_weights_has_its_own_adapters():
    _, _, model = held("llama")
    copy = sharing_copy(model.eval())
    assert {w.data_ptr() for w in copy.parameters()} == {w.data_ptr() for w in model.parameters()}
    for weight in adapter_weights(copy):
        weight.data = weight.data + 0.1  # no longer shared
    with model.disable_adapter():
        assert not torch.allclose(logits(copy), logits(model), atol=1e-3)
    with copy.disable_adapter():
        assert torch.equal(logits(copy), logits(model))


# -- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_refused_by_name(name):
    shape = ModelShape.from_config(TINY[name])
    assert f"{name} has experts" in technique().refuses_model(shape, "cpu")
    with pytest.raises(ValueError, match=r"(?s)has experts.*\nhint: .*lora"):
        technique().prepare(build(TINY[name]), shape, 0)


def test_bad_input(tmp_path):
    torch.manual_seed(0)
    build(TINY["llama"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)rank must be at least 1.*\nhint"):
        technique(rank=0)
    with pytest.raises(ValueError, match=r"(?s)rank 65 is no bottleneck of a model 64 wide\nhint"):
        prepared(tmp_path, rank=65)
    with pytest.raises(ValueError, match=r"(?s)adapter_dtype 'float8' is not known\nhint"):
        technique(adapter_dtype="float8").rewrite(MemorySetting())
    with pytest.raises(ValueError, match=r"(?s)targets.*\nhint"):
        technique(targets=["q_proj"])
    model = prepared(tmp_path)
    model.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"(?s)checkpoint holds adapters of other sizes.*\nhint"):
        technique().restore(prepared(tmp_path, rank=8), tmp_path / "checkpoint")
    shape = read_shape(tmp_path)
    with pytest.raises(
        ValueError, match=r"(?s)GPT2LMHeadModel has no gate_proj and down_proj.*\nhint"
    ):
        technique().prepare(build(TINY["gpt2"]), shape, 0)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"(?s)0 weights called gate_proj and 2 layers\nhint"):
        technique().publish(tmp_path / "checkpoint", tmp_path / "model", tmp_path)
