"""Logits of a few tokens at a time: the loss of all at once, the bytes and FLOPs priced."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.costs.published import TINY
from tests.costs.tracing import allocated_peak, input_bytes
from tests.holding.held_models import (
    ADAPTERS,
    FAMILIES,
    ROWS,
    SEQUENCE,
    USUAL,
    WITH_SCALED_LOGITS,
    gradients,
    held,
    model_of,
    rows,
)
from tests.methods.conftest import Tally
from torch.utils.flop_counter import FlopCounterMode

from thrifty.core.resolve import all_names, method_class, resolve
from thrifty.costs.flops import step_flops
from thrifty.costs.job import job_account
from thrifty.costs.memory import account
from thrifty.costs.operations import Adapter
from thrifty.costs.phases import BATCH_BYTES
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.data.packing import IGNORED
from thrifty.data.tokens import Tokens
from thrifty.holding.fused_loss import FusedLoss
from thrifty.signals.forward import example_losses, token_losses

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
NAMES = [name for name in all_names("loss") if method_class("loss", name).runs]
SEVEN = {"chunked": {"tokens": 7}}
FUSED = {"fused": {"tokens": 7}}
MORE_THAN_A_HEAD = ("gemma2", "granite", "cohere")
"""Families that cap or scale their logits."""
CASES = [
    *(
        pytest.param(TINY[family], way, marks=() if family in USUAL else pytest.mark.slow)
        for family in FAMILIES
        for way in ADAPTERS
    ),
    *((config, "full") for config in WITH_SCALED_LOGITS.values()),
]


def _name_of(value):
    return value if isinstance(value, str) else value["model_type"]


def assert_same(found, wanted, rel=1e-6):
    """Gradients that are 0 but for rounding (of OPT's key biases) are held against the others."""
    assert found.keys() == wanted.keys()
    whole = torch.stack([each.norm() for each in wanted.values()]).max()
    for name, gradient in wanted.items():
        error = (found[name] - gradient).norm()
        assert error <= rel * max(gradient.norm(), 1e-2 * whole), name


@pytest.mark.parametrize(("config", "way"), CASES, ids=_name_of)
def test_loss_and_gradients_are_the_same(config, way):
    model = model_of(config, ADAPTERS[way])
    inputs = rows(model)
    for items in (torch.tensor(60), 60, None):
        inputs["num_items_in_batch"] = items
        loss, wanted = gradients(copy.deepcopy(model), inputs)
        same_loss, found = gradients(held(model, "loss", SEVEN), inputs)
        assert same_loss.dtype == torch.float32
        assert same_loss == pytest.approx(float(loss), rel=1e-6)
        assert_same(found, wanted)


@pytest.mark.parametrize(("config", "way"), CASES, ids=_name_of)
def test_fused_with_its_gradient_they_are_the_same(config, way):
    """Or it is refused; whatever the loss is scaled by afterwards."""
    model = model_of(config, ADAPTERS[way])
    if config["model_type"] in MORE_THAN_A_HEAD:
        with pytest.raises(ValueError, match=r"more to its logits.*\nhint: memory.loss chunked"):
            held(model, "loss", FUSED)
        return
    inputs = rows(model)
    for items in (torch.tensor(60), None):
        inputs["num_items_in_batch"] = items
        loss, wanted = gradients(copy.deepcopy(model), inputs)
        same_loss, found = gradients(held(model, "loss", FUSED), inputs)
        assert same_loss.dtype == torch.float32
        assert same_loss == pytest.approx(float(loss), rel=1e-6)
        assert_same(found, wanted, rel=2e-6)


def test_fused_in_float64_it_is_autograds_own():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in ((10, 6), (9, 6), (9,))
    )
    ids = torch.randint(0, 9, (10,), generator=generator)
    ids[3] = IGNORED
    for chunk in (1, 4, 10, 99):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        plain = torch.nn.functional.cross_entropy(logits, ids, reduction="sum")
        wanted = torch.autograd.grad(3.0 * plain, (hidden, weight, bias))
        fused = FusedLoss.apply(hidden, weight, bias, ids, chunk)
        torch.testing.assert_close(fused, plain)
        found = torch.autograd.grad(3.0 * fused, (hidden, weight, bias))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_fused_in_bfloat16_gradients_are_as_near_float32_as_the_plain_ones():
    """Which a loss divided by a number that bfloat16 has not would show."""
    exact = gradients(model_of(TINY["llama"]), rows(model_of(TINY["llama"])))[1]
    model = model_of(TINY["llama"], dtype="bfloat16")
    inputs = rows(model)
    inputs["num_items_in_batch"] = 61.3
    (_, plain), (_, fused) = (gradients(x, inputs) for x in (model, held(model, "loss", FUSED)))
    name = "lm_head.weight"
    wanted = exact[name] * 60 / 61.3
    off = [float((each[name].float() - wanted).norm() / wanted.norm()) for each in (plain, fused)]
    assert off[1] < 1.3 * off[0] < 0.05


def test_fused_nothing_is_kept_of_a_head_that_is_frozen():
    model = model_of(TINY["llama"])
    model.get_output_embeddings().weight.requires_grad_(False)
    inputs = rows(model)
    _, wanted = gradients(copy.deepcopy(model), inputs)
    _, found = gradients(held(model, "loss", FUSED), inputs)
    assert not any("lm_head" in name for name in found)
    assert_same(found, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_without_labels_it_answers_as_ever(name):
    model = model_of(TINY["llama"])
    inputs = rows(model)
    for label in ("labels", "num_items_in_batch"):
        del inputs[label]
    assert torch.equal(held(model, "loss", name)(**inputs).logits, model(**inputs).logits)


def test_there_are_no_logits_of_all_tokens():
    model = held(model_of(TINY["llama"]), "loss", SEVEN)
    most = 0

    def see(head, args, logits):
        nonlocal most
        most = max(most, logits.shape[:-1].numel())

    model.lm_head.register_forward_hook(see)
    out = model(**rows(model))
    assert out.logits is None
    assert most == 7


def test_in_bfloat16_the_loss_is_taken_in_float32():
    model = model_of(TINY["llama"], dtype="bfloat16")
    inputs = rows(model)
    wanted, found = (x(**inputs).loss.detach() for x in (model, held(model, "loss", SEVEN)))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_an_adapter_on_the_head_is_in_the_loss():
    model = model_of(TINY["llama"], Adapter(rank=4, targets=("q_proj",)))
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        model_of(TINY["llama"]), LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    inputs = rows(model)
    _, wanted = gradients(copy.deepcopy(model), inputs)
    _, found = gradients(held(model, "loss", SEVEN), inputs)
    assert any("lm_head" in name for name in found)
    assert_same(found, wanted)


def test_it_goes_together_with_recomputation_and_the_host():
    model = model_of(TINY["llama"], ADAPTERS["lora"])
    inputs = rows(model)
    _, wanted = gradients(copy.deepcopy(model), inputs)
    for activations in ("recompute", "selective", "recompute_offload"):
        both = held(held(model, "loss", SEVEN), "activations", activations)
        assert_same(gradients(both, inputs)[1], wanted)


@pytest.mark.parametrize("name", ["chunked", "fused"])
@pytest.mark.parametrize("way", ADAPTERS)
def test_the_peak_is_what_is_priced(way, name):
    config = TINY["llama"] | {"hidden_size": 128, "intermediate_size": 352, "vocab_size": 8000}
    shape = ModelShape.from_config(config)
    technique = {name: {"tokens": 128}}
    model = held(model_of(config, ADAPTERS[way]), "loss", technique)
    inputs = rows(model, 8, 128)
    del inputs["num_items_in_batch"]
    measured = allocated_peak(lambda: model(**inputs).loss.backward())
    setting = resolve("loss", technique).rewrite(
        MemorySetting(micro_batch=8, sequence=128, dtype="float32", adapter=ADAPTERS[way])
    )
    seen = account(shape, setting)
    states = ("weights", "adapter", "optimizer_states")
    most = max(seen.phase_bytes(phase) for phase in ("loss", "backward"))
    most -= sum(seen.phases["loss"][term] for term in states) + input_bytes(inputs)
    assert most == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("way", ADAPTERS)
@pytest.mark.parametrize("name", NAMES)
def test_flops_are_what_is_priced(name, way, family):
    if name == "fused" and family in MORE_THAN_A_HEAD:
        return  # refused
    shape = ModelShape.from_config(TINY[family])
    model = held(model_of(TINY[family], ADAPTERS[way], attention="eager"), "loss", name)
    inputs = rows(model)

    def added_up(total, one, other, **_):
        return 2 * one[0] * one[1] * other[1]

    summed_up = {torch.ops.aten.addmm_: added_up}  # which torch's counter does not know
    with FlopCounterMode(display=False, custom_mapping=summed_up) as counter:
        model(**inputs).loss.backward()
    setting = MemorySetting(
        micro_batch=ROWS, sequence=SEQUENCE, adapter=ADAPTERS[way], dtype="float32"
    )
    assert step_flops(shape, resolve("loss", name).rewrite(setting)) == counter.get_total_flops()


@pytest.mark.parametrize("way", ADAPTERS)
def test_it_is_evaluated_in_chunks_too(way):
    model = model_of(TINY["gemma2"], ADAPTERS[way])
    shape, rng = ModelShape.from_config(TINY["gemma2"]), np.random.default_rng(0)
    examples = [
        Tokens(rng.integers(0, 160, n).astype(np.int32), rng.random(n) < 0.7) for n in (5, 17, 30)
    ]
    chunked, most = held(model, "loss", SEVEN), 0

    def see(head, args, logits):
        nonlocal most
        most = max(most, logits.shape[:-1].numel())

    chunked.get_output_embeddings().register_forward_hook(see)
    plain, few = Tally(), Tally()
    wanted = example_losses(model, shape, examples, plain)
    found = example_losses(chunked, shape, examples, few)
    assert found.nll == pytest.approx(wanted.nll, rel=1e-6)
    assert np.array_equal(found.num_tokens, wanted.num_tokens)
    assert few.cost == plain.cost
    each = token_losses(chunked, shape, examples, few)
    for one, other in zip(each, token_losses(model, shape, examples, plain), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert most == 7
    assert chunked.training


def test_an_evaluation_holds_what_is_priced():
    """The activations of a layer, where logits of all tokens would be ten times that."""
    config = TINY["llama"] | {"hidden_size": 128, "intermediate_size": 352, "vocab_size": 8000}
    shape, model = ModelShape.from_config(config), model_of(config)
    examples = [Tokens(np.ones(128, dtype=np.int32), np.ones(128, dtype=bool))] * 8
    setting = MemorySetting(micro_batch=8, sequence=128, dtype="float32", masked=False)

    def peaks(held_model, run):
        job = job_account(shape, run).phases
        priced = sum(job["evaluate"].values()) - sum(job["save"].values())
        measured = allocated_peak(lambda: example_losses(held_model, shape, examples, Tally()))
        return measured, priced - BATCH_BYTES * run.tokens

    whole, _ = peaks(model, setting)
    technique = {"chunked": {"tokens": 32}}
    few = held(model, "loss", technique)
    measured, priced = peaks(few, resolve("loss", technique).rewrite(setting))
    assert measured < whole / 8
    assert priced == pytest.approx(measured, rel=0.05)


def test_a_copy_of_a_held_model_has_weights_of_its_own():
    model = held(model_of(TINY["llama"]), "loss", SEVEN)
    copied, inputs = copy.deepcopy(model), rows(model)
    before = model(**inputs).loss
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(copied(**inputs).loss, before)
    assert not torch.equal(model(**inputs).loss, before)


def test_bad_combinations_are_refused():
    assert "without a backward" in resolve("loss", SEVEN).refuses(MemorySetting(zeroth_order=True))
    assert "without a backward" in resolve("loss", FUSED).refuses(MemorySetting(zeroth_order=True))
    cut = MemorySetting(num_devices=2, device_kind="cuda")
    assert "cut over the devices" in resolve("loss", FUSED).refuses(cut)
    capped = ModelShape.from_config(TINY["gemma2"])
    assert resolve("loss", FUSED).refuses_model(capped, "cpu") == "its logits are capped"
    from peft import LoraConfig, get_peft_model

    on_head = LoraConfig(r=4, target_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"head has an adapter.*\nhint: memory.loss chunked"):
        held(get_peft_model(model_of(TINY["llama"]), on_head), "loss", FUSED)
    for name in ("chunked", "fused"):
        with pytest.raises(ValueError, match="tokens"):
            resolve("loss", {name: {"tokens": 0}})
    routed = TINY["mixtral"] | {"output_router_logits": True}
    with pytest.raises(ValueError, match=r"mixtral has a loss over its routers.*\nhint: "):
        held(model_of(routed), "loss", SEVEN)
    model = model_of(TINY["llama"])
    model.loss_function = lambda **_: None
    with pytest.raises(ValueError, match=r"llama has a loss of its own.*\nhint: memory.loss"):
        held(model, "loss", SEVEN)
