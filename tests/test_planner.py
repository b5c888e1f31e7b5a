"""What the planner chooses, what it drops, and what it says where nothing fits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

from thrifty import combinations, held
from thrifty.advice import scoring_relief
from thrifty.core.budget import Budget
from thrifty.core.contracts import MEMORY_KINDS
from thrifty.core.resolve import all_names, method_class
from thrifty.costs.hardware import load_device
from thrifty.costs.memory import MemorySetting, account
from thrifty.costs.shape import ModelShape
from thrifty.plan_display import plan_json, plan_text
from thrifty.planner import NoPlanFits
from thrifty.preparation import Asked, quick_plan
from thrifty.priors import Priors

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
SMALL = LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}


@pytest.fixture
def planned(tmp_path, monkeypatch):
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path / "cache"))

    def plan(config=LLAMA, *, device="h100", fixed=None, using=(), devices=1, **limits):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return quick_plan(
            Asked(
                model=str(tmp_path),
                budget=Budget(**limits),
                device=device,
                fixed=fixed or {},
                techniques=using,
                num_devices=devices,
            )
        )

    return plan


def test_every_combination_is_priced(planned):
    found, request = planned(flops=1e18)
    assert found.num_combinations >= 20_000
    assert 0 < found.num_fitting < found.num_combinations
    kinds = {kind: set() for kind in MEMORY_KINDS}
    for way in found.combinations.held:
        for kind, name in way.technique_names.items():
            kinds[kind].add(name)
    searched = {
        kind: {name for name in all_names(kind) if method_class(kind, name).searched}
        for kind in MEMORY_KINDS
    }
    assert kinds == searched
    for candidate in found.candidates:
        assert candidate.peak_memory_bytes * 1.05 <= request.memory_limit


def test_the_account_of_a_candidate_is_the_peak_that_it_was_chosen_by(planned):
    found, request = planned(flops=1e18, memory_bytes=40e9)
    for candidate in found.candidates[:20]:
        alone = account(request.shape, candidate.setting).peak_memory_bytes
        assert candidate.account.peak_memory_bytes >= alone
        assert candidate.device_memory.device == pytest.approx(candidate.peak_memory_bytes)
        assert sum(candidate.memory.values()) == pytest.approx(candidate.peak_memory_bytes)


def test_money_is_the_price_of_the_time(planned):
    found, request = planned(dollars=50.0)
    rate = request.rates.dollars_per_second
    for candidate in found.candidates:
        for cost in candidate.by_stage.values():
            assert cost.dollars == pytest.approx(cost.seconds * rate)
        assert candidate.total.dollars <= 50.0


def test_within_a_prior_s_error_the_faster_wins(planned):
    """float32 is worth 1.0 and bf16 0.9 ± 0.1: hours are not paid for a guess."""
    found, _ = planned(SMALL, device="h200", flops=1e18, fixed={"training.memory.trained": "full"})
    assert found.chosen.dtype == "bfloat16"
    wide = [c for c in found.candidates if c.dtype == "float32" and c.runs]
    assert not wide or wide[0].total.seconds > 2 * found.chosen.total.seconds


@pytest.mark.long
def test_a_small_device_takes_techniques_that_make_it_fit(planned):
    small, _ = planned(device="rtx4090", flops=1e18)
    large, _ = planned(device="b200", flops=1e18)
    assert small.chosen.method != "full"
    facts = plan_json(*planned(device="rtx4090", flops=1e18), {})["chosen"]
    assert facts["tags"]["trained"] == "makes it fit"
    assert facts["makes_it_fit"]
    assert large.chosen.method == "full"
    assert large.chosen.runs


def test_named_techniques_are_taken(planned):
    found, _ = planned(device="rtx4090", flops=1e18, using=("nf4", "recompute"))
    assert all(c.techniques["weights"] == "nf4" for c in found.candidates)
    assert all(c.techniques["activations"] == "recompute" for c in found.candidates)
    with pytest.raises(ValueError, match="no memory technique 'nf5'"):
        planned(flops=1e18, using=("nf5",))


def test_an_optimizer_that_cannot_accumulate_is_none_where_that_is_asked_for(planned):
    fixed = {"training.gradient_accumulation_steps": 4}
    with pytest.raises(ValueError, match="used up at once cannot be accumulated"):
        planned(SMALL, flops=1e18, using=("lomo",), fixed=fixed)
    found, _ = planned(SMALL, flops=1e18, using=("lomo",))
    assert found.chosen.gradient_accumulation_steps == 1
    found, _ = planned(SMALL, flops=1e18, using=("adamw",), fixed=fixed)
    assert found.chosen.gradient_accumulation_steps == 4


def test_what_refuses_what_is_told_with_its_reason(planned):
    found, _ = planned(flops=1e18)
    reasons = found.combinations.refused
    assert any("int8: weights in int8 cannot be trained" in reason for reason in reasons)
    assert any(reason.startswith("lomo:") for reason in reasons)


def test_the_binding_term_and_the_ways_out(planned):
    found, request = planned(
        device="h100", flops=1e18, fixed={"training.per_device_train_batch_size": 4},
        using=("bfloat16", "lora", "keep"),
    )  # fmt: skip
    facts = plan_json(found, request, {})
    assert facts["binding_memory"]["term"] in ("activations", "logits", "optimizer_states")
    swaps = {swap["name"]: swap for swap in facts["swaps"]}
    chunked = swaps.get("chunked")
    if found.chosen.techniques["loss"] == "whole":
        assert chunked
        assert chunked["frees_bytes"] > 0
    for swap in facts["swaps"]:
        assert swap["frees_bytes"] > 0
    others = {each["device"]: each for each in facts["elsewhere"]}
    assert all(each["memory_bytes"] != request.memory_limit for each in others.values())
    text = plan_text(found, request)
    assert "the binding term is" in text
    assert "closed form" in text
    assert "calibrated" in text


def test_scoring_that_binds_offers_a_smaller_proxy(planned):
    found, request = planned(flops=1e18, device="rtx4090", using=("lora", "nf4", "recompute"))
    assert scoring_relief(found.chosen.account, request) == []
    scored = replace(found.chosen, scoring_bytes=60e9)
    assert scored.account.peak_phase == "score"
    ways = {way.way: way for way in scoring_relief(scored.account, request)}
    assert "a proxy of a tenth" in ways["proxy"].text
    assert ways["evict"].frees_bytes == 0
    assert "before the training states exist" in ways["evict"].text
    found, request = planned(flops=1e18, using=("full", "bfloat16", "adamw", "recompute"))
    again = replace(found.chosen, scoring_bytes=60e9, looking_bytes=60e9)
    assert again.account.peak_phase == "refresh"
    ways = {way.way: way for way in scoring_relief(again.account, request)}
    states = again.account.phases["refresh"]["optimizer_states"]
    assert ways["offload"].frees_bytes == ways["evict"].frees_bytes == states > 0
    assert ways["offload"].seconds < ways["evict"].seconds


def test_more_devices_hold_a_share_each_and_cost_as_many_prices(planned):
    with pytest.raises(NoPlanFits):
        planned(using=("full", "float32", "adamw", "keep"), flops=1e18, device="h100")
    found, request = planned(
        using=("full", "float32", "adamw"), flops=1e18, device="h100", devices=8
    )
    counts = {way.num_devices for way in found.combinations.held}
    assert counts == {1, 2, 4, 8}
    for candidate in found.candidates:
        count = candidate.setting.num_devices
        assert candidate.setting.masked or not candidate.runs
        assert f"sharded over {count} devices" in candidate.name
        rows = candidate.setting.micro_batch * candidate.setting.gradient_accumulation_steps
        assert candidate.step.tokens == rows * count * candidate.max_length
        rate = count * request.rates.dollars_per_second
        assert candidate.total.dollars == pytest.approx(candidate.total.seconds * rate)
    assert found.chosen.setting.num_devices == 8


def test_priors_are_the_user_s_to_edit(planned, tmp_path):
    before, _ = planned(SMALL, flops=1e18, using=("lora",))
    assert before.chosen.quality.mean == pytest.approx(0.6)
    priors = tmp_path / "cache" / "priors.yaml"
    priors.parent.mkdir(exist_ok=True)
    priors.write_text("worth: {lora: 0.8, bfloat16: {mean: 0.95, stderr: 0, source: our runs}}")
    after, _ = planned(SMALL, flops=1e18, using=("lora", "bfloat16"))
    assert after.chosen.quality.mean == pytest.approx(0.8 * 0.95)
    assert "our runs" in after.chosen.quality.source
    for text, message in (
        ("worth: {lore: 1}", "no method"),
        ("worth: {lora: -1}", "more than zero"),
        ("lora: 1", "does not say"),
    ):
        priors.write_text(text)
        with pytest.raises(ValueError, match=message):
            planned(SMALL, flops=1e18)


def test_without_a_limit_a_round_number_of_tokens_is_priced(planned):
    found, _ = planned(memory_bytes=24e9, device="rtx4090")
    assert found.chosen.total.tokens == pytest.approx(10e6, rel=0.1)


# -- where nothing fits --------------------------------------------------------------------------


def test_the_smallest_plan_names_the_one_limit_in_the_way(planned):
    with pytest.raises(NoPlanFits, match=r"GiB of peak memory but 2 GiB is allowed") as error:
        planned(flops=1e18, memory_bytes=2 * 2**30)
    assert "FLOP" not in str(error.value)
    needed = float(str(error.value).split("needs ")[1].split(" GiB")[0])
    found, _ = planned(flops=1e18, memory_bytes=(needed + 0.1) * 2**30)
    assert found.chosen.techniques["weights"] == "nf4"
    with pytest.raises(NoPlanFits, match="FLOP but 1 TFLOP is allowed") as error:
        planned(flops=1e12)
    assert "memory" not in str(error.value)


def test_a_budget_in_dollars_says_what_would_do(planned):
    with pytest.raises(NoPlanFits, match=r"needs \$") as error:
        planned(SMALL, dollars=1e-7)
    needed = float(str(error.value).split("$")[1].split(" ")[0])
    assert needed > 1e-7
    planned(SMALL, dollars=1.3 * needed)


def test_limits_set_as_keys_are_limits(planned):
    found, request = planned(SMALL, fixed={"budget.flops": "2e18"}, flops=1e18)
    assert request.budget.flops == 2e18
    assert found.chosen.total.flops > 1.5e18
    with pytest.raises(ValueError, match=r"budget\.flops"):
        planned(SMALL, fixed={"budget.flops": "lots"})


# -- devices -------------------------------------------------------------------------------------


def test_a_described_device_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="not known") as error:
        load_device("mygpu")
    assert "bandwidth_gb_per_second" in str(error.value)
    example = str(error.value).split(" as ")[1].split(", or run")[0].replace("NAME", "mygpu")
    (tmp_path / "devices.yaml").write_text(example)
    device = load_device("MyGPU")
    assert device.memory_bytes == 47.5 * 2**30
    assert device.flops_per_second["bfloat16"] == 155e12
    lacking = yaml.safe_load(example)
    del lacking["devices"]["mygpu"]["watts"]
    (tmp_path / "devices.yaml").write_text(yaml.safe_dump(lacking))
    with pytest.raises(ValueError, match="'watts'"):
        load_device("mygpu")


# -- every memory technique ----------------------------------------------------------------------

TECHNIQUES = [(kind, name) for kind in MEMORY_KINDS for name in all_names(kind)]
STARTS = [
    MemorySetting(device_kind=kind, gradient_accumulation_steps=steps)
    for kind in ("cpu", "cuda")
    for steps in (1, 4)
]


@pytest.mark.parametrize(("kind", "name"), TECHNIQUES)
def test_every_technique_rewrites_or_refuses(kind, name):
    cls = method_class(kind, name)
    shape = ModelShape.from_config(SMALL)
    for technique in cls.variants():
        assert technique.worth.mean > 0
        assert technique.worth.source
        assert technique.source
        for start in STARTS:
            reason = technique.refuses(start)
            if reason is None:
                assert account(shape, technique.rewrite(start)).peak_memory_bytes > 0
            else:
                assert len(reason.split()) > 3


@pytest.mark.parametrize(("kind", "name"), TECHNIQUES)
def test_what_is_there_to_make_it_fit_frees_something(kind, name):
    """Beside the reference of its kind, at a size where it is meant to help."""
    shape = ModelShape.from_config(LLAMA)
    cls = method_class(kind, name)
    if cls.makes == "faster":
        return
    start = MemorySetting(micro_batch=8, sequence=2048, device_kind="cuda")
    for technique in cls.variants():
        frozen = technique.refuses(start) is not None
        base = method_class("trained", "lora")().rewrite(start) if frozen else start
        assert technique.refuses(base) is None
        freed = account(shape, base).peak_memory_bytes
        freed -= account(shape, technique.rewrite(base)).peak_memory_bytes
        # An adapter may keep more activations than it frees of gradients and states.
        assert freed > 0 or technique.rewrite(base).adapter is not None


def test_a_quality_is_the_product_of_priors():
    full = combinations.variants("trained", ["full"])[0]
    bf16 = combinations.variants("weights", ["bfloat16"])[0]
    lora = combinations.variants("trained", ["lora"])[0]
    sgd = combinations.variants("states", ["sgd"])[0]
    quality = held.quality_of((full, bf16, sgd), Priors({}))
    assert quality.mean == pytest.approx(0.9 * 0.3)
    assert held.quality_of((lora, bf16), Priors({})).mean == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("technique", "why"),
    [
        ({"trained": {"lisa": {"layers": 17}}}, "a block of 17 layers is more than the model's 16"),
        ({"trained": {"badam": {"block_layers": 17}}}, "a block of 17 layers"),
        ({"trained": {"hift": {"group_layers": 50}}}, "a block of 50 layers"),
        ({"states": {"galore": {"rank": 2048}}}, "wider than rank 2048 on both sides: the widest"),
        ({"states": {"apollo": {"rank": 9999}}}, "wider than rank 9999 on both sides"),
        ({"states": {"q_galore": {"rank": 2048}}}, "wider than rank 2048 on both sides"),
    ],
    ids=str,
)
def test_what_does_not_go_with_the_model_is_refused_before_a_flop(planned, technique, why):
    fixed = {f"training.memory.{kind}": spec for kind, spec in technique.items()}
    with pytest.raises(ValueError, match=why):
        planned(SMALL, flops=1e18, fixed=fixed)
