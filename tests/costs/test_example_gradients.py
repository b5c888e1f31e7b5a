"""Gradients of single examples from one backward, against one backward an example in float64, over
every family that the cost model knows."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from published import TINY
from tracing import build

from thrifty.costs.flops import train_flops
from thrifty.costs.operations import Adapter
from thrifty.costs.shape import ModelShape
from thrifty.signals.adapters import adapter_weights, sharing_copy, with_adapter
from thrifty.signals.example_gradients import ExampleGradients, each_batch
from thrifty.signals.sketch import CountSketch

ROWS, SEQUENCE = 4, 12
FUSED_EXPERTS = {
    name for name, config in TINY.items() if ModelShape.from_config(config).experts is not None
}


USUAL = ("llama", "gpt2", "gpt_neox", "opt", "deepseek_v3")


def some_slow(families: Iterable[str]) -> list[Any]:
    """The usual ones, and the others beside the slow tests."""
    return [f if f in USUAL else pytest.param(f, marks=pytest.mark.slow) for f in sorted(families)]


def model_of(family: str, adapter: Adapter | None = None) -> torch.nn.Module:
    torch.manual_seed(0)
    experts = "eager" if family in FUSED_EXPERTS else None  # grouped products know no float64
    model = build(TINY[family], dtype="float32", adapter=adapter, attention=experts).double()
    for name, weight in model.named_parameters():
        if "lora_" in name:  # B begins at zero, where A has no gradient
            torch.nn.init.normal_(weight, std=0.05)
    return model.eval()


def batch_of(config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, config["vocab_size"], (ROWS, SEQUENCE), generator=generator)
    keep = torch.rand(ROWS, SEQUENCE - 1, generator=generator) < 0.7
    keep[1, 7:] = False  # padded
    keep[2] = False  # nothing to learn from
    return ids, keep


def one_by_one(model, wanted, ids, keep) -> torch.Tensor:
    rows = []
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in flags:
        p.requires_grad_(True)
    for row, kept in zip(ids, keep, strict=True):
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
        loss = (nll * kept).sum() / kept.sum().clamp_min(1)
        found = torch.autograd.grad(loss, wanted, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(w) if g is None else g).flatten()
                    for g, w in zip(found, wanted, strict=True)
                ]
            )
        )
    for p, required in flags:
        p.requires_grad_(required)
    return torch.stack(rows)


def check(model, wanted, config) -> None:
    ids, keep = batch_of(config)
    expected = one_by_one(model, wanted, ids, keep)
    directions = [torch.randn(3, w.numel(), dtype=torch.float64) for w in wanted]
    flags = [p.requires_grad for p in model.parameters()]
    with ExampleGradients(model, wanted) as gradients:
        found = gradients.of(ids, keep)
    size = expected.norm(dim=1)
    assert (found.flat() - expected).norm(dim=1).max() <= 1e-9 * size.max()
    assert size[2] == 0
    torch.testing.assert_close(found.squared_norms(), size.square(), rtol=1e-9, atol=1e-12)
    products = expected @ torch.cat(directions, dim=1).T
    torch.testing.assert_close(found.products(directions), products, rtol=1e-7, atol=1e-9)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in homes(model))


SIZES = (5, 12, 1, 9)
"""Tokens of the examples in a pack, one of them a single token."""


def pack_of(config: dict) -> tuple[torch.Tensor, ...]:
    """Examples of differing length as padded rows with what is kept of each, and as a pack."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(3, config["vocab_size"], (len(SIZES), max(SIZES)), generator=generator)
    keep = torch.rand(rows.shape, generator=generator) < 0.8
    for row, size in enumerate(SIZES):
        keep[row, size:] = False
    ids, kept, positions = (
        torch.cat([each[row, :size] for row, size in enumerate(SIZES)])[None]
        for each in (rows, keep, torch.arange(max(SIZES)).expand(rows.shape))
    )
    # The first tokens' flags are true as they are: none of them may count.
    return rows, keep[:, 1:], ids, kept[:, 1:], positions


class InFloat64:
    """``torch`` as a model's own file sees it, where float32 is float64: what routers and norms
    round to turns a last bit that the order of a sum decided into an error of 1e-8."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def unrounded(monkeypatch):
    """Makes a model compute in float64 throughout."""

    def of(model):
        for module in model.modules():
            file = sys.modules[type(module).__module__]
            if file.__name__.startswith("transformers.models.") and hasattr(file, "torch"):
                monkeypatch.setattr(file, "torch", InFloat64())
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return model

    return of


def check_pack(model, wanted, config) -> None:
    rows, keep, ids, kept, positions = pack_of(config)
    expected = one_by_one(model, wanted, rows, keep)
    with ExampleGradients(model, wanted) as gradients:
        padded = gradients.of(rows, keep)
        packed = gradients.of_pack(ids, kept, positions)
    most = 1e-9 * expected.norm(dim=1).max()
    assert len(packed) == len(SIZES)
    assert (packed.flat() - expected).norm(dim=1).max() <= most
    assert (packed.flat() - padded.flat()).norm(dim=1).max() <= most
    torch.testing.assert_close(packed.losses, padded.losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        packed.squared_norms(), expected.square().sum(1), rtol=1e-9, atol=1e-12
    )
    assert packed.losses[2] == 0


def homes(model):
    return [m for m in model.modules() if list(m.parameters(recurse=False))]


@pytest.mark.parametrize("family", some_slow(set(TINY) - FUSED_EXPERTS))
def test_all_weights(family):
    model = model_of(family)
    check(model, list(model.parameters()), TINY[family])


@pytest.mark.parametrize("family", sorted(FUSED_EXPERTS))
def test_fused_experts_are_refused_by_name(family):
    model = model_of(family)
    with pytest.raises(ValueError, match=r"experts.* holds experts.*\nhint: use LoRA"):
        ExampleGradients(model, list(model.parameters()))


@pytest.mark.parametrize("family", some_slow(TINY))
def test_adapters(family):
    adapter = Adapter(rank=2)
    model = model_of(family, adapter)
    check(model, adapter_weights(model), TINY[family])


@pytest.mark.parametrize("family", some_slow(set(TINY) - FUSED_EXPERTS))
def test_all_weights_of_packed_examples(family, unrounded):
    model = unrounded(model_of(family))
    check_pack(model, list(model.parameters()), TINY[family])


@pytest.mark.parametrize("family", some_slow(TINY))
def test_adapters_of_packed_examples(family, unrounded):
    model = unrounded(model_of(family, Adapter(rank=2)))
    check_pack(model, adapter_weights(model), TINY[family])


def test_a_family_that_lets_packed_examples_see_each_other_is_refused_by_name():
    config = TINY["falcon"] | {"alibi": True, "new_decoder_architecture": False}
    model = build(config, attention="eager").eval()
    *_, ids, keep, positions = pack_of(config)
    refused = pytest.raises(ValueError, match="falcon with ALiBi lets packed documents see")
    with ExampleGradients(model, list(model.transformer.h[-1].parameters())) as each, refused:
        each.of_pack(ids, keep, positions)


@pytest.mark.parametrize("positions", [[[1, 2, 3]], [[0, 1, 3]], [[0, 1, 1]], [[0, 1], [0, 1]]])
def test_positions_that_are_of_no_pack_are_refused(positions):
    model = model_of("llama")
    positions = torch.tensor(positions)
    refused = pytest.raises(ValueError, match="not those of one packed sequence\nhint: ")
    with ExampleGradients(model, [model.lm_head.weight]) as each, refused:
        each.of_pack(positions, positions[:, 1:].bool(), positions)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_upper_layers_alone_and_the_backward_ends_below_them(family):
    model = model_of(family)
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    layers = max(lists, key=len)
    check(model, list(layers[-1].parameters()), TINY[family])
    reached = []

    def see(place, output):
        first = output[0] if isinstance(output, tuple) else output
        reached.append((place, first.requires_grad))

    handles = [
        layer.register_forward_hook(lambda _, __, output, i=i: see(i, output))
        for i, layer in enumerate(layers)
    ]
    ids, keep = batch_of(TINY[family])
    with ExampleGradients(model, list(layers[-1].parameters())) as gradients:
        gradients.of(ids, keep)
    for handle in handles:
        handle.remove()
    assert reached == [(i, i == len(layers) - 1) for i in range(len(layers))]


@pytest.mark.parametrize("adapter", [None, Adapter(rank=2)], ids=["full", "lora"])
def test_it_takes_the_flops_of_a_plain_backward(adapter):
    """Of the lowest layer what the wanted linears are given needs no gradient."""
    from torch.utils.flop_counter import FlopCounterMode

    model = model_of("llama", adapter).float()
    ids, keep = batch_of(TINY["llama"])
    weights = [p for p in model.parameters() if p.requires_grad]
    with FlopCounterMode(display=False) as plain:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    with ExampleGradients(model, weights) as gradients, FlopCounterMode(display=False) as ours:
        gradients.of(ids, keep).flat()
    assert ours.get_total_flops() == plain.get_total_flops()


@pytest.mark.parametrize("family", some_slow(TINY))
def test_adapters_of_the_last_layers_alone_are_what_is_priced(family):
    """As scorers with ``layers`` put them there: which, how many elements, and the FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = ModelShape.from_config(TINY[family])
    last = shape.num_layers - 1
    adapter = Adapter(rank=2, layers=(last,))
    model = build(TINY[family], attention="eager")
    model = with_adapter(model, shape.lora_targets, 2, 4.0, 0, adapter.layers).eval()
    names = [name for name, _ in model.named_parameters() if ".lora_" in name]
    assert all(f".{last}." in name for name in names)
    wanted = adapter_weights(model)
    assert sum(weight.numel() for weight in wanted) == adapter.num_parameters(shape)
    ids, keep = batch_of(TINY[family])
    with ExampleGradients(model, wanted) as gradients, FlopCounterMode(display=False) as counted:
        gradients.of(ids, keep).flat()
    priced = train_flops(shape, ROWS, SEQUENCE, adapter=adapter)
    assert counted.get_total_flops() == pytest.approx(priced, rel=1e-9)
    assert priced < 0.9 * train_flops(shape, ROWS, SEQUENCE, adapter=Adapter(rank=2))


def test_a_weight_that_no_module_holds_is_named():
    model = model_of("llama")
    with pytest.raises(ValueError, match="no module of LlamaForCausalLM holds"):
        ExampleGradients(model, [torch.nn.Parameter(torch.zeros(3))])


def test_gradients_do_not_depend_on_the_batch():
    from types import SimpleNamespace

    import numpy as np

    config = TINY["llama"]
    model = model_of("llama", Adapter(rank=2))
    random = np.random.default_rng(0)
    examples = [
        SimpleNamespace(
            input_ids=random.integers(3, config["vocab_size"], size).astype(np.int32),
            loss_mask=random.random(size) < 0.8,
        )
        for size in random.integers(3, 40, 17)
    ]

    class Tally:
        flops = 0.0

        def tick(self, cost, *, steps=0):
            self.flops += cost.flops

    together, tally = torch.zeros(17, 8, dtype=torch.float64), Tally()
    wanted = adapter_weights(model)
    sketch = CountSketch(sum(w.numel() for w in wanted), 8, 3)
    for places, found in each_batch(model, wanted, examples, tally, lambda b, s: b * s):
        together[places] = sketch(found.flat())
    assert tally.flops >= sum(len(e.input_ids) for e in examples)
    for i, example in enumerate(examples):
        ((_, found),) = each_batch(model, wanted, [example], Tally(), lambda b, s: 0.0)
        alone = sketch(found.flat())[0]
        torch.testing.assert_close(alone, together[i], rtol=1e-9, atol=1e-12)


# -- the sketch ------------------------------------------------------------------------------------


def test_a_sketch_is_what_its_definition_says():
    sketch = CountSketch(50, 7, seed=2)
    places, signs = sketch._hashes
    x = torch.randn(3, 50, dtype=torch.float64)
    expected = torch.zeros(3, 7, dtype=torch.float64)
    for i in range(50):
        expected[:, places[i]] += x[:, i] * signs[i]
    torch.testing.assert_close(sketch(x), expected)
    assert set(signs.tolist()) == {-1.0, 1.0}


def test_a_sketch_keeps_inner_products_within_its_stated_error():
    torch.manual_seed(0)
    num, size, dimensions = 400, 20_000, 2048
    sketch = CountSketch(size, dimensions, seed=0)
    one, other = torch.randn(2, num, size).unbind()
    error = (sketch(one) * sketch(other)).sum(1) - (one * other).sum(1)
    relative = error / (one.norm(dim=1) * other.norm(dim=1))
    assert abs(relative.mean()) < 4 * relative.std() / num**0.5
    assert relative.std().item() == pytest.approx(dimensions**-0.5, rel=0.1)


# -- copies that share their weights ---------------------------------------------------------------


def test_a_sharing_copy_takes_no_weights_of_its_own_and_leaves_the_flags_alone():
    model = model_of("llama")
    copied = sharing_copy(model)
    for one, other in zip(model.parameters(), copied.parameters(), strict=True):
        assert one.data_ptr() == other.data_ptr()
        assert one.requires_grad
        assert not other.requires_grad
    assert model.model.layers[0] is not copied.model.layers[0]
