"""The joint search: what fits in all phases, the front, what techniques are for, what is said."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from thrifty import planner
from thrifty.advice import WORTH_A_LINE, binding_term, elsewhere, swaps
from thrifty.answers import Purposes
from thrifty.choices import combinations_of
from thrifty.core.budget import Budget, PoolStats
from thrifty.core.contracts import MEMORY_KINDS
from thrifty.core.resolve import name_of
from thrifty.costs.allocator import allocatable, device_memory
from thrifty.costs.hardware import load_device
from thrifty.costs.job import job_account, job_peaks
from thrifty.costs.setting import MemorySetting
from thrifty.held import REFERENCE
from thrifty.pareto import pareto_front, thinned
from thrifty.plan_display import plan_json, plan_text
from thrifty.planner import NoPlanFits
from thrifty.preparation import Asked, quick_plan
from thrifty.pricing import Pricing
from thrifty.request import MEMORY_MARGIN

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
SMALL = LLAMA | {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
GIB = 2**30


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


# -- all phases ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "memory"),
    [
        (1, 24),
        pytest.param(1, 80, marks=pytest.mark.slow),
        (8, 24),
        pytest.param(8, 12, marks=pytest.mark.slow),
    ],
)
@pytest.mark.long
def test_a_candidate_s_account_is_the_table_s_number(planned, devices, memory):
    found, request = planned(devices=devices, memory_bytes=memory * GIB, flops=1e18)
    assert any(c.held.num_devices == devices for c in found.candidates)
    for candidate in found.candidates:
        account = candidate.account
        device = device_memory(account.peak_memory_bytes, "cuda").device
        assert device == pytest.approx(candidate.peak_memory_bytes, rel=1e-9)
        assert device * MEMORY_MARGIN <= request.memory_limit * (1 + 1e-9)
        for phase in account.phases:
            assert account.phase_bytes(phase) <= account.peak_memory_bytes


@pytest.mark.long
def test_scoring_counts_in_every_candidate(planned):
    _, asked = planned(device="rtx4090", flops=1e19)
    rows = PoolStats(num_examples=100_000, num_tokens=50_000_000, max_tokens=900)
    request = replace(asked, pool=rows, targets={"wanted": replace(rows, num_examples=10)})
    found = planner.search(request)
    assert {"score" in c.account.phases for c in found.candidates} == {True, False}
    for candidate in found.candidates:
        assert candidate.device_memory.device == pytest.approx(candidate.peak_memory_bytes)
        assert candidate.peak_memory_bytes * MEMORY_MARGIN <= request.memory_limit * (1 + 1e-9)
        again = candidate.by_stage["select"].peak_memory_bytes
        assert again <= candidate.peak_memory_bytes


@pytest.mark.parametrize("num_devices", [pytest.param(1, marks=pytest.mark.slow), 8])
@pytest.mark.long
def test_priced_peaks_are_those_of_one_account_after_another(planned, num_devices):
    _, request = planned(SMALL, devices=num_devices)
    found = combinations_of(request, 256)
    shape = request.shape
    for block in found.blocks[:: max(1, len(found.blocks) // 25)]:
        for state in range(0, len(block.states), 4):
            for index in (0, 4):
                setting = replace(block.settings[state], micro_batch=block.micro_batches[index])
                peak = job_account(shape, setting).peak_memory_bytes
                assert block.peaks[state, index] == pytest.approx(peak, rel=1e-9)
                saved = job_account(shape, setting).phase_bytes("save")
                assert block.resident[state] == pytest.approx(saved, rel=1e-9)
                if not setting.in_backward:
                    setting = replace(setting, gradient_accumulation_steps=2)
                    peak = job_account(shape, setting).peak_memory_bytes
                    assert block.accumulating[state, index] == pytest.approx(peak, rel=1e-9)


def test_where_something_else_may_be_trained_later_the_first_can_be_gone_over_from(planned):
    """Though weights in few bits, which an adapter does not merge into, take less memory."""
    switch = {"training.switch": {"when": "governed", "trained": ["badam"]}}
    found = []
    for fixed in ({}, switch):
        _, request = planned(SMALL, fixed=fixed)
        blocks = combinations_of(request, 256).blocks
        kinds = [{name_of(block.techniques[at]) for block in blocks} for at in (0, 1)]
        found.append(kinds)
    free, switching = found
    assert "nf4" in free[1]
    assert switching == [{"badam", "full", "lora"}, {"bfloat16", "float32"}]
    with pytest.raises(ValueError, match="merged into weights held as nf4"):
        planned(SMALL, fixed=switch | {"training.memory.weights": "nf4"})


def test_a_sharded_job_never_holds_the_whole_model(planned):
    _, request = planned()
    one, eight = (MemorySetting(device_kind="cuda", num_devices=n) for n in (1, 8))
    alone, sharded = (job_account(request.shape, setting) for setting in (one, eight))
    tensor = request.shape.head_parameters * 2
    assert sharded.phase_bytes("load") == alone.phases["load"]["weights"] / 8 + tensor
    assert sharded.phase_bytes("evaluate") < alone.phase_bytes("evaluate") / 2
    assert sharded.phase_bytes("save") == pytest.approx(alone.phase_bytes("save") / 8)


@pytest.mark.long
def test_refreshing_and_generating_are_priced_where_they_are_asked_for(planned):
    _, request = planned(SMALL, flops=1e18)
    rows = PoolStats(num_examples=100_000, num_tokens=50_000_000, max_tokens=900)
    request = replace(request, pool=rows, targets={"wanted": replace(rows, num_examples=10)})
    refreshing = planner.search(
        replace(
            request,
            fixed={
                **request.fixed,
                "selection.refresh.when": "governed",
                "selection.refresh.scorer": "grad_cosine",
            },
        )
    )
    # Also where the rows are chosen by words alone at first.
    assert any(c.scorer == "bm25" for c in refreshing.candidates)
    assert all("refresh" in c.account.phases for c in refreshing.candidates)
    for candidate in refreshing.candidates:
        assert candidate.device_memory.device == pytest.approx(candidate.peak_memory_bytes)
    settings = [MemorySetting(device_kind="cuda", recompute=1)]
    plain, talking = (
        job_peaks(request.shape, settings, (64,), generated_context=context)[0]
        for context in (0, 10**6)
    )
    account = job_account(
        request.shape, replace(settings[0], micro_batch=64), generated_context=10**6
    )
    assert talking.item() == account.phase_bytes("evaluate") > plain.item()


# -- the front -----------------------------------------------------------------------------------


def test_the_front_is_what_nothing_beats(planned):
    found, request = planned(memory_bytes=40 * GIB, using=("recompute",))
    limit, columns = request.most_allocated, found.combinations.columns
    fits = np.flatnonzero(columns.accumulating <= limit)
    points = np.stack(
        [columns.accumulating[fits], columns.seconds[fits], -columns.quality[fits].round(6)], 1
    )
    naive = set()
    for point in points:
        others = points[(points <= point).all(1)]
        if (others == point).all():
            naive.add(tuple(point))
    front = pareto_front(found.combinations, limit)
    sizes = [device_memory(point[0], "cuda").device for point in sorted(naive)]
    assert [point.memory_bytes for point in front] == pytest.approx(sizes)
    assert [point.seconds_per_useful_token for point in front] == [p[1] for p in sorted(naive)]


def test_what_is_worth_little_hides_nothing(planned):
    found, request = planned(flops=1e18)
    front = pareto_front(found.combinations, request.most_allocated)
    optimizers = {point.held.technique_names["states"] for point in front}
    assert optimizers >= {"adamw_8bit", "adam_mini", "sgd"}
    shown = thinned(front)
    assert 5 <= len(shown) <= 10
    assert all(point.held.quality.mean >= 0.5 for point in shown)
    sizes = [point.memory_bytes for point in shown]
    assert sizes == sorted(sizes)
    finest = max(point.held.quality.mean for point in front)
    assert finest in [point.held.quality.mean for point in shown]
    facts = plan_json(found, request, {})["pareto"]
    assert len(facts) == len(front)
    assert facts[0].keys() >= {
        "techniques", "micro_batch", "memory_bytes", "seconds_per_useful_token",
        "flops_per_useful_token", "quality",
    }  # fmt: skip


# -- rank and purpose ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits", [{"flops": 1e17}, {"flops": 1e19}, {"seconds": 7200.0}, {"dollars": 30.0}]
)
@pytest.mark.long
def test_usual_budgets_train_with_adam(planned, limits):
    found, _ = planned(**limits)
    assert found.chosen.techniques["states"].startswith("adam")
    assert found.chosen.quality.mean >= 0.5


def test_the_rank_shows_the_prior_and_what_a_token_costs(planned, tmp_path):
    found, request = planned(seconds=7200.0)
    facts = plan_json(found, request, {})
    assert facts["rank_by"] == {
        "order": "useful tokens x quality",
        "resource": "seconds",
        "priors": str(tmp_path / "cache" / "priors.yaml"),
    }
    gains = [candidate["gain"] for candidate in facts["candidates"]]
    assert gains == sorted(gains, reverse=True) or max(np.diff(gains)) < 1e-3
    for candidate, c in zip(facts["candidates"], found.candidates, strict=True):
        assert candidate["quality"].keys() == {"mean", "stderr", "source"}
        tokens = candidate["seconds_per_useful_token"] * c.useful_tokens
        assert tokens == pytest.approx(c.step.seconds)
    text = plan_text(found, request)
    assert "useful tokens x quality" in text
    assert "priors.yaml edits" in text
    assert "µs" in text


def test_a_technique_makes_it_fit_where_nothing_fits_without_it(planned):
    found, request = planned(device="h100", flops=1e18)
    purposes = Purposes(found.combinations, request)
    seen = set()
    for candidate in found.candidates:
        answers = purposes.of(candidate)
        for kind in ("activations", "loss", "states"):
            name = candidate.techniques[kind]
            if name == REFERENCE[kind]:
                assert name not in answers.makes_it_fit
                continue
            names = {**candidate.techniques, kind: REFERENCE[kind]}
            same = [
                way
                for way in found.combinations.held
                if way.technique_names == names
                and way.masked == candidate.held.masked
                and way.techniques[0] == candidate.held.techniques[0]
                and way.techniques[1] == candidate.held.techniques[1]
            ]
            if not same:
                continue
            fits = (same[0].block.peaks[same[0].state] <= request.most_allocated).any()
            assert (name in answers.makes_it_fit) == (not fits)
            seen.add(bool(fits))
    assert seen == {True, False}


def test_what_lowers_the_cost_of_a_token_s_worth_is_better_per_flop(planned):
    found, request = planned(device="h200", seconds=7200.0, using=("full", "keep", "whole"))
    purposes = Purposes(found.combinations, request)
    for candidate in found.candidates:
        answers = purposes.of(candidate)
        # bf16 is worth 0.9 of float32 and many times as fast; plain descent is worth 0.3.
        assert ("bfloat16" in answers.better_per_flop) == (candidate.dtype == "bfloat16")
        assert "sgd" not in answers.better_per_flop
    counted, request = planned(device="h200", flops=1e18, using=("full", "keep", "whole"))
    for candidate in counted.candidates:
        assert (
            "bfloat16" not in Purposes(counted.combinations, request).of(candidate).better_per_flop
        )


# -- what binds, and the ways out ----------------------------------------------------------------


def test_weights_bind_where_they_are_the_largest_term(planned):
    found, request = planned(
        device="h100",
        memory_bytes=20 * GIB,
        flops=1e18,
        fixed={"training.max_length": 128, "training.per_device_train_batch_size": 1},
        using=("lora", "bfloat16"),
    )
    phase, term = binding_term(found.chosen)
    assert term == "weights"
    assert found.chosen.account.phases[phase][term] == max(found.chosen.account.by_term.values())
    ways = swaps(found.chosen, request, found.combinations)
    assert ways[0].name in ("nf4", "int8")  # though the user fixed the storage
    assert ways[0].frees_of_binding_term_bytes > 0
    assert "the binding term is weights" in plan_text(found, request)


def test_swaps_name_what_differs_and_free_what_they_say(planned):
    found, request = planned(using=("lora", "bfloat16", "keep", "whole", "adamw"), flops=1e18)
    chosen = found.chosen
    ways = swaps(chosen, request, found.combinations)
    assert {way.kind for way in ways} >= {"activations", "loss", "weights"}
    peak = chosen.account.peak_memory_bytes
    places = [way.frees_of_binding_term_bytes >= WORTH_A_LINE * peak for way in ways]
    assert places == sorted(places, reverse=True)
    for way in ways:
        assert way.frees_bytes >= WORTH_A_LINE * peak
        assert bool(way.differs) == (way.name == chosen.techniques[way.kind])
    if chosen.setting.adapter_dtype == "float32":
        (lora,) = [way for way in ways if way.name == "lora"]
        assert lora.differs == "adapter_dtype bfloat16"


def test_elsewhere_counts_scoring(planned):
    found, request = planned(device="h100", flops=1e18)
    free = elsewhere(request, found.combinations, 0.0)
    scored = elsewhere(request, found.combinations, 60 * GIB)
    assert free[0].techniques is not None
    assert scored[0].techniques is None
    assert scored[1].techniques == free[1].techniques
    most = allocatable(free[0].memory_bytes / MEMORY_MARGIN, "cuda")
    way = next(w for w in found.combinations.held if w.technique_names == free[0].techniques)
    assert way.block.peaks[way.state].min() <= most


def test_where_nothing_fits_a_device_that_would_do_is_named(planned):
    with pytest.raises(NoPlanFits) as error:
        planned(device="rtx4090", flops=1e18, using=("full", "float32", "adamw"))
    text = str(error.value)
    assert "needs" in text
    assert "a smaller model" in text
    assert "pool" not in text
    name = text.split("--device ")[1].split(" ")[0]
    there, request = planned(device=name, flops=1e18, using=("full", "float32", "adamw"))
    assert there.chosen.name in text
    assert "$" in text or request.rates.dollars_per_second is None
    for other in ("a6000", "h100"):
        if load_device(other).memory_bytes < load_device(name).memory_bytes:
            with pytest.raises(NoPlanFits):
                planned(device=other, flops=1e18, using=("full", "float32", "adamw"))


@pytest.mark.long
def test_shorter_rows_are_offered_where_they_would_do(planned):
    asked = {"using": ("lora", "bfloat16", "keep", "whole"), "flops": 1e18, "device": "rtx4090"}
    with pytest.raises(NoPlanFits) as error:
        planned(fixed={"training.max_length": 4096}, **asked)
    length = int(str(error.value).split("training.max_length=")[1].split(" ")[0])
    planned(fixed={"training.max_length": length}, **asked)
    with pytest.raises(NoPlanFits) as error:
        planned(fixed={"training.max_length": 2 * length}, **asked)
    with pytest.raises(NoPlanFits) as error:  # the weights alone are too much
        planned(flops=1e18, memory_bytes=2 * GIB)
    assert "max_length" not in str(error.value)


@pytest.mark.long
def test_scoring_that_does_not_fit_offers_its_ways_out(planned):
    _, request = planned(SMALL, device="h100", flops=1e19, memory_bytes=4 * GIB)
    rows = PoolStats(num_examples=100_000, num_tokens=50_000_000, max_tokens=1000)
    request = replace(
        request,
        pool=rows,
        targets={"wanted": replace(rows, num_examples=10)},
        fixed={"training.max_length": 64, "training.per_device_train_batch_size": 1},
    )
    found = planner.search(request)
    scored = max(found.candidates, key=lambda c: c.scoring_bytes)
    limit = device_memory(scored.scoring_bytes, "cuda").device * MEMORY_MARGIN * 0.99
    tight = replace(
        request,
        budget=Budget(flops=1e19, memory_bytes=limit),
        fixed={
            **request.fixed,
            "selection.scorer": scored.scorer_spec,
            "training.memory.weights": scored.techniques["weights"],
        },
    )
    least = min(c.held.peak(0, False) for c in found.candidates)
    if least > scored.scoring_bytes:
        pytest.skip("training takes more than every scorer")
    with pytest.raises(NoPlanFits, match=r"\(at score\)") as error:
        planner.search(tight)
    assert "a proxy of a tenth" in str(error.value)


# -- what cannot be asked for --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("using", "reason"),
    [
        (("nf4", "full"), "nf4: weights in 4 bits cannot be trained themselves"),
        (("lora", "lomo"), "lomo: an adapter's gradients are small"),
        (("mezo", "recompute"), "recompute: without a backward nothing is kept"),
    ],
)
def test_what_refuses_what_was_asked_for_is_the_error(planned, using, reason):
    with pytest.raises(ValueError, match="cannot be combined") as error:
        planned(flops=1e18, using=using)
    assert reason in str(error.value)
    assert "tokens do not fill" not in str(error.value)


def test_two_techniques_of_a_kind_cannot_both_hold(planned):
    with pytest.raises(ValueError, match="--using galore and --using adamw cannot both hold"):
        planned(flops=1e18, using=("galore", "adamw"))
    with pytest.raises(ValueError, match=r"training\.memory\.weights='float32' and --using nf4"):
        planned(flops=1e18, using=("nf4",), fixed={"training.memory.weights": "float32"})
    found, _ = planned(flops=1e18, using=("nf4", "nf4"), fixed={"training.memory.weights": "nf4"})
    assert found.chosen.techniques["weights"] == "nf4"


def test_the_devices_of_a_run_share_what_does_not_fit_one(planned):
    _, request = planned(flops=1e18, device="h100")
    rows = PoolStats(num_examples=1000, num_tokens=500_000, max_tokens=900)
    whole = {"training.memory.trained": "full", "training.memory.weights": "float32"}
    fixed = {**whole, "training.memory.states": "adamw"}
    request = replace(request, pool=rows, num_devices=8, fixed=fixed)
    found = planner.search(request)
    assert (found.training.devices, found.training.parallel) == (8, "fsdp")
    assert found.chosen.runs
    assert "sharded over 8 devices" in found.chosen.name
    with pytest.raises(NoPlanFits):
        planner.search(replace(request, fixed={**fixed, "training.parallel": "ddp"}))


@pytest.mark.long
def test_the_devices_of_a_run_hold_everything_each(planned):
    _, request = planned(SMALL, flops=1e18)
    rows = PoolStats(num_examples=1000, num_tokens=500_000, max_tokens=900)
    found = planner.search(replace(request, pool=rows, num_devices=8))
    assert found.training.devices == 8
    assert found.chosen.setting.replicas == 8
    assert found.chosen.setting.num_devices == 1


def test_a_plan_for_the_machine_at_hand_says_so(planned):
    found, request = planned(SMALL, device=None, flops=1e15, memory_bytes=64 * GIB)
    text = plan_text(found, request)
    assert text.startswith("planned for this machine's CPU")
    assert "--device NAME" in text.splitlines()[0]
    with pytest.raises(NoPlanFits, match="on this machine's CPU"):
        planned(device=None, flops=1e18, memory_bytes=GIB)


def test_devices_are_found_however_they_are_written(monkeypatch, tmp_path):
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path))
    for name in ("a100 80gb", "A100-80GB", "a100_80gb", "A100"):
        assert load_device(name).name == "a100-80gb"
    with pytest.raises(ValueError, match=r"did you mean rtx4090\?"):
        load_device("rtx 4900")
    with pytest.raises(ValueError, match="leave --device out"):
        load_device("cpu")


def test_every_candidate_carries_both_answers(planned):
    found, request = planned(device="rtx4090", flops=1e18)
    facts = plan_json(found, request, {})
    for candidate in facts["candidates"]:
        assert candidate["tags"].keys() == {*MEMORY_KINDS}
        assert {*candidate["makes_it_fit"]} <= {*candidate["techniques"].values()}
        assert {*candidate["better_per_flop"]} <= {*candidate["techniques"].values()}
    assert "makes it fit: " in plan_text(found, request)
    assert facts["relief"] == []


@pytest.mark.parametrize("apart", [3, 40, 111, 100_000])
def test_evaluations_at_fixed_distances_leave_nothing_over(planned, apart):
    """Not one more step, with the evaluation that may come before it, would fit."""
    _, request = planned(SMALL, flops=2e17)
    rows = PoolStats(num_examples=100_000, num_tokens=50_000_000, max_tokens=900)
    dev = PoolStats(num_examples=2_000, num_tokens=1_000_000, max_tokens=900)
    fixed = {"training.eval_steps": apart, "selection.scorer": "uniform"}
    request = replace(request, pool=rows, dev=dev, fixed={**request.fixed, **fixed})
    chosen = planner.search(request).chosen
    evaluation = Pricing(request).predictor.of(chosen.setting, chosen.step).evaluation
    assert evaluation.flops > 2 * chosen.step.flops
    assert chosen.num_evaluations == math.ceil(chosen.max_steps / apart) + 1
    left = 2e17 - chosen.total.flops
    crosses = chosen.max_steps % apart == 0
    assert 0 <= left < chosen.step.flops + crosses * evaluation.flops
