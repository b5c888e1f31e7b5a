"""Q-GaLore: the error that its bits allow, GaLore where they lose nothing, when it looks anew."""

from __future__ import annotations

import pytest
import torch
from tests.holding.trained_llama import SHAPE

from thrifty.core.resolve import resolve
from thrifty.costs.setting import MemorySetting
from thrifty.holding.few_bit_galore import BLOCK, from_few_bits, in_few_bits, similarity

RATE = 1e-2


def optimizer_of(name, weight, **options):
    group = {"params": [("layers.0.weight", weight)], "lr": RATE, "weight_decay": 0.0}
    return resolve("states", {name: {"rank": 8} | options}).optimizer([group], SHAPE)


def space(seed: int, size: int = 48, rank: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [(48, 8), (7, 9), (3, 40, 5), (2, 256)])
def test_a_value_is_off_by_half_a_step_of_its_block(size, bits):
    torch.manual_seed(0)
    values = torch.randn(size)
    codes, scales = in_few_bits(values, bits)
    row = from_few_bits(codes, scales, bits)[: values.numel()]
    steps = scales.repeat_interleave(BLOCK)[: values.numel()]
    assert ((row - values.flatten()).abs() <= steps * (0.5 + 1e-5)).all()
    padded = torch.nn.functional.pad(values.flatten().abs(), (0, -values.numel() % BLOCK))
    assert torch.allclose(scales, padded.view(-1, BLOCK).amax(1) / (2 ** (bits - 1) - 1))
    assert codes.nbytes == -(-values.numel() // 2) * (2 if bits == 8 else 1)
    nothing = in_few_bits(torch.zeros(size), bits)
    assert not from_few_bits(*nothing, bits).any()


def test_similarity_is_that_of_spaces():
    one, other = space(0).double(), space(1).double()
    turned = one @ torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert float(similarity(one, turned)) == pytest.approx(1, abs=1e-6)
    cosines = torch.linalg.svdvals(one.T @ other)
    assert float(similarity(one, other)) == pytest.approx(float(cosines.square().mean().sqrt()))
    apart = torch.linalg.qr(torch.cat([one, other], 1)).Q[:, 8:]
    assert float(similarity(one, apart)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_step_is_galores_with_the_codes_for_the_projector(bits):
    """The first, whose moments are not yet in few bits: w <- w - rate scale P adam(P' G)."""
    torch.manual_seed(0)
    gradient = torch.randn(48, 96)
    weight = torch.nn.Parameter(torch.zeros(48, 96))
    optimizer = optimizer_of("q_galore", weight, bits=bits)
    weight.grad = gradient.clone()
    optimizer.step()
    vectors = torch.linalg.svd(gradient.double()).U[:, :8]
    state = optimizer.state[weight]
    row = from_few_bits(state["projector"], state["projector_scales"], bits)
    codes = row.view(48, 8).double()
    same = (codes * vectors).sum(0).sign()
    steps = state["projector_scales"].double().repeat_interleave(BLOCK)[:384].view(48, 8)
    assert ((codes - vectors * same).abs() <= steps * 0.501).all()
    low = codes.T @ gradient.double()
    wanted = -RATE * 0.25 * codes @ (low / (low.abs() + 1e-8))
    torch.testing.assert_close(weight.detach().double(), wanted, rtol=0, atol=1e-8)


def test_it_follows_galore_over_many_steps():
    """To a minimum that lies in a space of ``rank`` dimensions."""
    torch.manual_seed(0)
    goal = space(0) @ torch.randn(8, 96)
    left = {}
    for name in ("galore", "q_galore"):
        weight = torch.nn.Parameter(torch.zeros(48, 96))
        optimizer = optimizer_of(name, weight, refresh=20, scale=1.0)
        for _ in range(600):
            weight.grad = weight.detach() - goal
            optimizer.step()
        left[name] = float((weight.detach() - goal).norm() / goal.norm())
    assert left["galore"] < 0.02
    assert left["q_galore"] < 0.04


def renewals(spaces, num_steps: int, **options) -> list[int]:
    """Steps, the first 1, at which it looked anew; ``spaces(step)``: of the gradients."""
    weight = torch.nn.Parameter(torch.zeros(48, 96))
    optimizer = optimizer_of("q_galore", weight, **options)
    generator, found = torch.Generator().manual_seed(0), []
    for step in range(1, num_steps + 1):
        weight.grad = spaces(step) @ torch.randn(8, 96, generator=generator)
        due = optimizer.state[weight].get("renewal", 1)
        optimizer.step()
        if due == step:
            found.append(step)
    return found


def test_the_interval_doubles_where_the_space_stands_still():
    assert renewals(lambda step: space(0), 40, refresh=3) == [1, 4, 10, 22]
    assert renewals(space, 14, refresh=3) == [1, 4, 7, 10, 13]
    # It moves on for ten steps and then stands still.
    assert renewals(lambda step: space(min(step, 10)), 40, refresh=3) == [1, 4, 7, 10, 13, 19, 31]
    always = renewals(space, 14, refresh=3, settled=0.0)
    assert always == [1, 4, 10]


def test_bad_input():
    for options, says in (
        ({"bits": 3}, "bits must be 4 or 8, not 3"),
        ({"settled": 1.5}, "settled must be from 0 to 1"),
        ({"rank": 0}, "rank must be at least 1"),
    ):
        with pytest.raises(ValueError, match=rf"{says}.*\nhint"):
            resolve("states", {"q_galore": options})
    with pytest.raises(ValueError, match=r"wider than rank 64 on both sides\nhint"):
        optimizer_of("q_galore", torch.nn.Parameter(torch.zeros(48, 96)), rank=64)
    adapted = resolve("trained", "lora").rewrite(MemorySetting())
    assert "as adapters are" in resolve("states", "q_galore").refuses(adapted)
