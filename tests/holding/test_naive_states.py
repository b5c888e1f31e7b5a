"""Each optimizer against the formulas of its paper in float64, or with its library's few codes."""

from __future__ import annotations

import math

import pytest
import torch
from tests.holding.trained_llama import (
    DECAY,
    RANK,
    SHAPE,
    give_gradients,
    groups_of,
    llama,
    technique,
)

STEPS = 5
RATES = (1e-3, 2e-3, 3e-3, 2e-3, 1e-3)


def run(name, *, dtype="float64", steps=STEPS, **options):
    """The weights before, every step's gradients, the weights after, and the optimizer."""
    model = llama("float32").to(getattr(torch, dtype))
    before = {key: value.detach().double().clone() for key, value in model.named_parameters()}
    optimizer = technique(name, **options).optimizer(groups_of(model), SHAPE)
    gradients = []
    for step in range(steps):
        give_gradients(model, step)
        gradients.append({k: p.grad.double().clone() for k, p in model.named_parameters()})
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        optimizer.step()
    after = {key: value.detach() for key, value in model.named_parameters()}
    return before, gradients, after, optimizer


def check(name, update, *, dtype="float64", tolerance=1e-12, steps=STEPS, **options):
    """That every weight is w <- w - rate (update + decay w), ``update(key, gradients so far)``."""
    before, gradients, after, _ = run(name, dtype=dtype, steps=steps, **options)
    for key, weight in before.items():
        decay = DECAY if weight.dim() > 1 else 0.0
        for step in range(steps):
            history = [each[key] for each in gradients[: step + 1]]
            weight = weight - RATES[step] * (update(key, history) + decay * weight)
        torch.testing.assert_close(after[key].double(), weight, rtol=0, atol=tolerance, msg=key)


def mean(values, beta):
    """An exponential mean without its bias."""
    total = sum((1 - beta) * beta ** (len(values) - 1 - i) * v for i, v in enumerate(values))
    return total / (1 - beta ** len(values))


def adam(history):
    first, second = mean(history, 0.9), mean([g * g for g in history], 0.999)
    return first / (second.sqrt() + 1e-8)


def in_layer(key):
    return ".layers." in key and key.endswith("proj.weight")


def test_adamw():
    check("adamw", lambda key, history: adam(history))


def test_adamw_is_the_trainers_bit_for_bit(tmp_path):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(str(tmp_path), optim="adamw_torch_fused", use_cpu=True)
    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    models = llama("float32"), llama("float32")
    theirs = [{**g, "params": [p for _, p in g["params"]]} for g in groups_of(models[0])]
    optimizers = (
        cls(theirs, **options),
        technique("adamw").optimizer(groups_of(models[1]), SHAPE),
    )
    for step in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            give_gradients(model, step)
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_sgd():
    check("sgd", lambda key, history: history[-1])


def test_lion():
    def update(key, history):
        moment = sum(0.01 * 0.99 ** (len(history) - 2 - i) * g for i, g in enumerate(history[:-1]))
        return torch.sign(0.9 * moment + 0.1 * history[-1])

    check("lion", update)


def test_adafactor():
    """Algorithm 4 of arXiv:1804.04235, with the rate given."""

    def decayed(values):
        kept = torch.zeros_like(values[0])
        for step, value in enumerate(values, 1):
            kept = step**-0.8 * value + (1 - step**-0.8) * kept
        return kept

    def update(key, history):
        squares = [g * g + 1e-30 for g in history]
        if squares[0].dim() == 1:
            second = decayed(squares)
        else:
            rows = decayed([s.mean(1) for s in squares])
            columns = decayed([s.mean(0) for s in squares])
            second = rows[:, None] * columns[None] / rows.mean()
        change = history[-1] / second.sqrt()
        return change / max(1.0, float(change.square().mean().sqrt()))

    check("adafactor", update)


def test_adam_mini():
    """One second moment a head of q and k, a row of the other matrices, and a vector."""

    def update(key, history):
        def block_mean(square):
            if square.dim() == 1:
                return square.mean().expand_as(square)
            rows = 32 if key.endswith(("q_proj.weight", "k_proj.weight")) else 1
            blocks = [part.mean().expand_as(part) for part in square.split(rows)]
            return torch.cat(blocks)

        second = mean([block_mean(g * g) for g in history], 0.999)
        return mean(history, 0.9) / (second.sqrt() + 1e-8)

    check("adam_mini", update)


# -- projected ------------------------------------------------------------------------------------


def oriented(gradient):
    return (gradient, False) if gradient.shape[0] <= gradient.shape[1] else (gradient.T, True)


@pytest.mark.parametrize("refresh", [200, 3])
def test_galore(refresh):
    """Moments are kept over a refresh, the new vectors pointing the way of the old."""

    def update(key, history):
        if not in_layer(key):
            return adam(history)
        low, projector = [], None
        for step, gradient in enumerate(history):
            seen, turned = oriented(gradient)
            if step % refresh == 0:
                vectors = torch.linalg.svd(seen).U[:, :RANK]
                if projector is not None:
                    same = (vectors * projector).sum(0) >= 0
                    vectors = torch.where(same, vectors, -vectors)
                projector = vectors
            low.append(projector.T @ seen)
        change = 0.25 * projector @ adam(low)
        return change.T if turned else change

    check("galore", update, refresh=refresh)


def test_galore_in_the_space_of_all_gradients_is_adamw_rotated():
    """Gradients P A of one space of ``rank`` dimensions: the weights' part in it, P' W, goes as
    AdamW on P' G, and nothing else moves. Elementwise steps do not commute with a rotation, so
    that there is no equality without it."""
    from thrifty.holding.projected_adam import GaLore

    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    weight, space = normal(24, 40), torch.linalg.qr(normal(24, 8)).Q
    parameter = torch.nn.Parameter(weight.clone())
    group = {"params": [("layers.0.weight", parameter)], "lr": 1e-2, "weight_decay": 0.0}
    galore = GaLore([group], rank=8, refresh=200, scale=1.0)
    rotated = None
    for _ in range(STEPS):
        parameter.grad = space @ normal(8, 40)
        galore.step()
        if rotated is None:
            axes = galore.state[parameter]["projector"].clone()
            rotated = torch.nn.Parameter(axes.T @ weight)
            adamw = torch.optim.AdamW([rotated], lr=1e-2, weight_decay=0.0)
        rotated.grad = axes.T @ parameter.grad
        adamw.step()
    wanted = weight + axes @ (rotated.detach() - axes.T @ weight)
    torch.testing.assert_close(parameter.detach(), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["galore", "apollo"])
def test_what_is_no_wider_than_the_rank_is_adamws(name):
    """The key projections are 64 x 128."""
    before, gradients, after, _ = run(name, rank=64, steps=1)
    key = "model.layers.0.self_attn.k_proj.weight"
    wanted = before[key] - RATES[0] * (adam([gradients[0][key]]) + DECAY * before[key])
    torch.testing.assert_close(after[key], wanted, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="wider than rank 128 on both sides\nhint: give a lower"):
        run(name, rank=128)


@pytest.mark.parametrize("options", [{}, {"tensor_wise": True, "rank": 1, "scale": 128**0.5}])
def test_apollo(options):
    from thrifty.holding.noise import generator_of

    rank, scale = options.get("rank", RANK), options.get("scale", 1.0)
    over = (0, 1) if options else 0

    def update(key, history):
        if not in_layer(key):
            return adam(history)
        low, last = [], None
        for step, gradient in enumerate(history):
            seen, turned = oriented(gradient)
            drawn = generator_of(0, key, step // 2, torch.device("cpu"))
            size = (rank, seen.shape[0])
            space = torch.randn(size, generator=drawn, dtype=torch.float64) / math.sqrt(rank)
            low.append(space @ seen)
            step_sizes = adam(low).norm(dim=over, keepdim=True) / low[-1].norm(
                dim=over, keepdim=True
            )
            change = seen * step_sizes
            if last is not None and change.norm() > 1.01 * last:
                change = change * 1.01 * last / change.norm()
            last = change.norm()
        return scale * (change.T if turned else change)

    check("apollo", update, refresh=2, tolerance=1e-11, **options)


def test_apollos_space_keeps_norms_and_changes_with_the_seed():
    from thrifty.holding.projected_adam import Apollo

    def optimizer(seed):
        torch.manual_seed(seed)
        parameter = torch.nn.Parameter(torch.zeros(512, 600))
        group = {"params": [("layers.0.weight", parameter)], "lr": 1.0, "weight_decay": 0.0}
        return Apollo([group], rank=64, refresh=9, scale=1.0, tensor_wise=False)

    gradient = torch.randn(512, 600)
    spaces = [
        optimizer(seed).projection("layers.0.weight", gradient, seed, 0) for seed in (0, 0, 1)
    ]
    assert torch.equal(spaces[0], spaces[1])
    assert not torch.equal(spaces[0], spaces[2])
    low = spaces[0] @ gradient
    assert float(low.square().sum() / gradient.square().sum()) == pytest.approx(1, abs=0.05)


def test_apollo_goes_on_after_a_gradient_of_zero():
    parameter = torch.nn.Parameter(torch.zeros(32, 32))
    group = {"params": [("layers.0.weight", parameter)], "lr": 1.0, "weight_decay": 0.0}
    optimizer = technique("apollo").optimizer([group], SHAPE)
    for gradient in (torch.zeros(32, 32), torch.ones(32, 32)):
        parameter.grad = gradient
        optimizer.step()
    assert parameter.detach().abs().min() > 0.1


# -- bfloat16 -------------------------------------------------------------------------------------


def test_rounding_at_random_has_no_bias():
    from thrifty.holding.rounding import round_at_random

    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, generator=generator) * torch.logspace(-30, 30, 64)
    rounded = round_at_random(values.repeat(20_000, 1), generator)
    assert rounded.dtype == torch.bfloat16
    below, above = rounded.float().amin(0), rounded.float().amax(0)
    gap = above - below
    assert ((below <= values) & (values <= above)).all()
    assert (gap <= values.abs() * 2**-7).all()
    error = (rounded.double().mean(0) - values) / gap
    assert error.abs().max() < 5 * 0.5 / 20_000**0.5  # five standard errors of a coin
    exact = values.to(torch.bfloat16)
    assert torch.equal(round_at_random(exact.float(), generator), exact)


def test_what_is_not_finite_stays_so():
    from thrifty.holding.rounding import round_at_random

    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32)
    odd = torch.cat([bits.view(torch.float32), torch.tensor([math.inf, -math.inf, -0.0])])
    rounded = round_at_random(odd, torch.Generator().manual_seed(0))
    assert rounded[:3].isnan().all()
    assert rounded[3:].tolist() == [math.inf, -math.inf, 0.0]
    assert rounded[5].signbit()


def test_small_updates_of_bfloat16_weights_are_not_lost():
    """A thousand steps of a thousandth of the distance between neighbours: the mean moves by it."""
    moved = {}
    for name in ("adamw", "adamw_bf16"):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        group = {"params": [("w", parameter)], "lr": 2.0**-17, "weight_decay": 0.0}
        optimizer = technique(name).optimizer([group], SHAPE)
        for _ in range(1024):
            parameter.grad = torch.full_like(parameter, -0.5)
            optimizer.step()
        moved[name] = float(parameter.detach().double().mean()) - 1
    assert moved["adamw"] == 0
    assert moved["adamw_bf16"] == pytest.approx(2.0**-7, rel=0.05)


def test_the_rounded_second_moment_follows_the_gradients():
    """To nearest it would stand at the large gradients of the beginning for ever."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = technique("adamw_bf16").optimizer(
        [{"params": [("w", parameter)], "lr": 0.0, "weight_decay": 0.0}], SHAPE
    )
    parameter.grad = torch.full_like(parameter, 10.0)
    for _ in range(500):
        optimizer.step()
        parameter.grad = torch.full_like(parameter, 0.125)
    found = float(optimizer.state[parameter]["exp_avg_sq"].double().mean())
    wanted = 0.1 * 0.999**499 + 0.125**2 * (1 - 0.999**499)
    assert found == pytest.approx(wanted, rel=0.01)


def test_adamw_bf16_is_adamw_to_rounding():
    before, gradients, after, _ = run("adamw_bf16", dtype="bfloat16")
    for key, weight in before.items():
        decay = DECAY if weight.dim() > 1 else 0.0
        start = weight = weight.to(torch.bfloat16).double()
        for step in range(STEPS):
            history = [each[key] for each in gradients[: step + 1]]
            weight = weight - RATES[step] * (adam(history) + decay * weight)
        # Each step may go to either neighbour, 2^-7 of the weight away.
        gap = torch.maximum(start.abs(), weight.abs()) * 2**-7 + 1e-5
        assert ((after[key].double() - weight).abs() <= STEPS * gap).all(), key
        bias = (after[key].double() - weight).mean() / gap.mean()
        assert abs(float(bias)) < 5 * 0.5 * (STEPS / weight.numel()) ** 0.5 + 0.01, key


def test_adamw_bf16_draws_from_the_seed():
    def weights(seed):
        model = llama("bfloat16")
        torch.manual_seed(seed)
        optimizer = technique("adamw_bf16").optimizer(groups_of(model), SHAPE)
        give_gradients(model, 0)
        optimizer.step()
        return model.lm_head.weight.detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_adamw_bf16_refuses_other_weights():
    from thrifty.costs.operations import Adapter
    from thrifty.costs.setting import MemorySetting

    with pytest.raises(ValueError, match=r"embed_tokens.weight is float32.*\nhint: load the"):
        technique("adamw_bf16").optimizer(groups_of(llama("float32")), SHAPE)
    method = technique("adamw_bf16")
    assert "float32 need no" in method.refuses(MemorySetting(dtype="float32"))
    assert "float32 need no" in method.refuses(MemorySetting(adapter=Adapter()))
    assert "without states" in method.refuses(MemorySetting(zeroth_order=True))
    assert method.refuses(MemorySetting(dtype="bfloat16")) is None


# -- few bits -------------------------------------------------------------------------------------


def nearest(values, codes, block):
    """Each value as the nearest of ``codes`` times the largest of its block."""
    blocks = values.reshape(-1, block)
    most = blocks.abs().amax(1, keepdim=True).clamp_min(1e-300)
    places = (blocks / most)[..., None].sub(codes).abs().argmin(-1)
    return (codes[places] * most).reshape(values.shape)


def in_few_bits(before, gradients, key, first, second):
    """AdamW whose moments go through ``first`` and ``second`` after every step; Lion where the
    latter is None."""
    weight, mean, square = before[key], torch.zeros(()), torch.zeros(())
    decay = DECAY if weight.dim() > 1 else 0.0
    for step, each in enumerate(gradients, 1):
        g, rate = each[key], RATES[step - 1]
        weight = weight * (1 - rate * decay)
        if second is None:
            weight = weight - rate * torch.sign(0.9 * mean + 0.1 * g)
            mean = first(0.99 * mean + 0.01 * g)
            continue
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        scale = (square / (1 - 0.999**step)).sqrt() + 1e-8
        weight = weight - rate * mean / (1 - 0.9**step) / scale
        mean, square = first(mean), second(square)
    return weight


def close_to_all(found, wanted, step):
    """Within a hundredth of a step but for one in a hundred, whose code was a neighbour."""
    error = (found.double() - wanted).abs() / step
    return float((error > 0.01).double().mean()) < 0.01


KEYS = ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight")


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_eight_bits(name):
    functional = pytest.importorskip("bitsandbytes").functional

    def through_codes(signed):
        codes = functional.create_dynamic_map(signed)

        def coded(values):
            few, scales = functional.quantize_blockwise(values.float(), codes, blocksize=256)
            return functional.dequantize_blockwise(few, scales).double()

        return coded

    before, gradients, after, optimizer = run(name, dtype="float32")
    second = through_codes(False) if name == "adamw_8bit" else None
    for key in (*KEYS, "lm_head.weight"):
        wanted = in_few_bits(before, gradients, key, through_codes(True), second)
        assert close_to_all(after[key], wanted, RATES[0]), key
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    dtypes = {
        name: optimizer.state[weight]["state1"].dtype
        for name, weight in zip(names, weights, strict=True)
    }
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert wide == {"model.embed_tokens.weight"} | {n for n in names if "norm" in n}
    for key in ("model.embed_tokens.weight", "model.norm.weight"):
        decay = DECAY if before[key].dim() > 1 else 0.0
        weight = before[key]
        for step in range(STEPS):
            history = [each[key] for each in gradients[: step + 1]]
            moment = sum(0.01 * 0.99 ** (step - 1 - i) * g for i, g in enumerate(history[:-1]))
            lion = torch.sign(0.9 * moment + 0.1 * history[-1])
            change = lion if second is None else adam(history)
            weight = weight - RATES[step] * (change + decay * weight)
        torch.testing.assert_close(after[key].double(), weight, rtol=0, atol=1e-6, msg=key)


def test_an_optimizer_in_eight_bits_knows_its_own_embedding_alone():
    """The library keeps such settings for the whole process, by the address of the weight."""
    manager = pytest.importorskip("bitsandbytes").optim.GlobalOptimManager.get_instance()
    run("adamw_8bit", dtype="float32", steps=1)
    assert not manager.pid2config
    assert not manager.index2config


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_four_bits():
    pytest.importorskip("torchao")
    from torchao.optim.subclass_4bit import get_qmap_signed, get_qmap_unsigned

    def through_codes(codes):
        return lambda values: nearest(values, torch.tensor(codes).double(), 128)

    before, gradients, after, _ = run("adamw_4bit", dtype="float32")
    coders = through_codes(get_qmap_signed()), through_codes(get_qmap_unsigned())
    for key in KEYS:
        wanted = in_few_bits(before, gradients, key, *coders)
        assert close_to_all(after[key], wanted, RATES[0]), key


@pytest.mark.parametrize(
    ("name", "package"),
    [("adamw_8bit", "bitsandbytes"), ("lion_8bit", "bitsandbytes"), ("adamw_4bit", "torchao")],
)
def test_a_package_that_is_missing_is_named(name, package, monkeypatch):
    import sys

    for module in (package, f"{package}.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    wanted = rf"{name} needs the package {package}.*\nhint: pip install 'thrifty\[{package}\]'"
    with pytest.raises(ValueError, match=wanted):
        technique(name).optimizer(groups_of(llama("float32")), SHAPE)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("galore", {"rank": 0}),
        ("galore", {"refresh": 0}),
        ("galore", {"scale": -1.0}),
        ("apollo", {"rank": 0}),
        ("apollo", {"refresh": 0}),
        ("apollo", {"scale": -1.0}),
    ],
)
def test_options_have_ranges(name, options):
    with pytest.raises(ValueError, match="must be at least"):
        technique(name, **options)
