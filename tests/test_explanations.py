"""What a plan says of its own choices, and where float32 alone would not fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from thrifty.advice import swaps, unbeaten
from thrifty.answers import Purposes
from thrifty.core.budget import Budget
from thrifty.held import REFERENCE
from thrifty.plan_display import plan_text
from thrifty.preparation import Asked, quick_plan

LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
LARGE = LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}


@pytest.fixture
def planned(tmp_path, monkeypatch):
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path / "cache"))

    def plan(config=LLAMA, *, device="h100", using=(), **limits):
        (tmp_path / "config.json").write_text(json.dumps(config))
        asked = Asked(model=str(tmp_path), budget=Budget(**limits), device=device, techniques=using)
        return quick_plan(asked)

    return plan


def test_an_optimizer_that_has_to_be_is_not_said_to_be_as_good(planned):
    found, _ = planned(device="h100", flops=1e16, using=("addax",))
    why = found.why["training.memory.states"]
    assert why == "lomo: adamw does not go with the rest of it"


def test_a_gpu_without_bfloat16_takes_it_only_where_float32_does_not_fit(planned):
    small, _ = planned(device="t4", flops=1e16, using=("lora",))
    assert {c.dtype for c in small.candidates} == {"float32"}
    large, request = planned(LARGE, device="t4", flops=1e17)
    assert large.chosen.peak_memory_bytes < request.device.memory_bytes
    assert "has no instructions for bfloat16" in large.why["training.memory.weights"]
    assert "bfloat16" not in small.why.get("training.memory.weights", "")


@pytest.mark.parametrize(
    ("limits", "device"),
    [({"flops": 1e18}, "h100"), ({"flops": 1e18}, "rtx4090"), ({"seconds": 3600.0}, "l4")],
)
def test_a_reason_holds_for_the_reference_in_its_place(planned, limits, device):
    found, request = planned(device=device, **limits)
    chosen, most = found.chosen, request.most_allocated
    place = chosen.held.micro_batches.index(chosen.setting.micro_batch)
    purposes = Purposes(found.combinations, request)
    answers = purposes.of(chosen)
    told = {*answers.makes_it_fit, *answers.makes_the_batch_fit, *answers.frees_bytes}
    for kind, name in chosen.techniques.items():
        if name == REFERENCE[kind] or name not in told:
            continue
        without = purposes._without(chosen.held, kind)
        assert without is not None
        fits = without.block.peaks[without.state] <= most
        assert (name in answers.makes_it_fit) == (not fits.any())
        assert (name in answers.makes_the_batch_fit) == (fits.any() and not fits[place])
        if name in answers.frees_bytes:
            freed = without.peak(place, False) - chosen.held.peak(place, False)
            assert answers.frees_bytes[name] == freed
    for kind in ("weights", "states", "loss"):
        said = found.why.get(f"training.memory.{kind}")
        assert (said is None) == (chosen.techniques[kind] == REFERENCE[kind])


def test_what_another_way_out_replaces_is_not_shown(planned):
    found, request = planned(using=("lora", "bfloat16", "keep", "whole"), flops=1e18)
    ways = swaps(found.chosen, request, found.combinations)
    left = unbeaten(ways)
    names = {way.name for way in left}
    assert {way.name for way in ways} - names == {"offload"}  # recompute_offload frees as much
    assert "recompute_offload" in names
    text = plan_text(found, request)
    assert "  recompute_offload frees" in text
    assert "\n  offload frees" not in text
    quick = replace(next(way for way in ways if way.name == "offload"), slows=0.0)
    assert quick in unbeaten([*left, quick])
