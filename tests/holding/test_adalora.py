"""AdaLoRA: PEFT's own schedule on its own importances, once a step, and what a checkpoint keeps."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tests.costs.published import TINY
from tests.costs.tracing import allocated_peak, batch, build, input_bytes, saved_bytes
from torch.utils.flop_counter import FlopCounterMode

from thrifty.core.resolve import resolve
from thrifty.costs.flops import fixed_flops, step_flops
from thrifty.costs.held import state_bytes
from thrifty.costs.memory import MemorySetting, account
from thrifty.costs.memory import saved_bytes as priced_saved_bytes
from thrifty.costs.shape import ModelShape
from thrifty.costs.trained import trained
from thrifty.holding.adalora import pull
from thrifty.signals.models import load_model

SHAPE = ModelShape.from_config(TINY["llama"])
WIDE = TINY["llama"] | {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3}
SCHEDULE = {"first_cut": 2, "last_cut": 7, "cut_steps": 1}
HELD = ("weights", "adapter", "optimizer_states")


def technique(**options):
    return resolve("trained", {"adalora": {"rank": 4} | options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("base")
    build(TINY["llama"]).save_pretrained(made)
    return made


def started(folder: Path, states: str = "adamw", **options):
    chosen = technique(**SCHEDULE | options)
    model = chosen.prepare(load_model(folder, "float32", "cpu"), SHAPE, 1).train()
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    group = {"params": named, "lr": 0.02, "weight_decay": 0.01}
    return chosen, model, resolve("states", states).optimizer([group], SHAPE)


def inputs_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 160, (2, 12), generator=generator)
    return {"input_ids": ids, "labels": ids}


def train(chosen, model, optimizer, steps: range) -> None:
    for step in steps:
        chosen.at_step(model, optimizer, step, 1)
        model(**inputs_of(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def values_of(model) -> torch.Tensor:
    """Every singular value."""
    return torch.cat([w.detach().flatten() for n, w in model.named_parameters() if ".lora_E." in n])


def test_it_trains_as_peft_says_to(folder):
    """The loop of PEFT's documentation, whose loss is the plain one plus the regularisation."""
    chosen, model, optimizer = started(folder)
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, total_step=7, deltaT=1, lora_alpha=32.0,
        target_modules=list(SHAPE.lora_targets), task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = get_peft_model(load_model(folder, "float32", "cpu"), config).train()
    named = [weight for _, weight in theirs.named_parameters() if weight.requires_grad]
    adamw = torch.optim.AdamW(named, lr=0.02, weight_decay=0.01, fused=True)
    for step in range(10):
        theirs(**inputs_of(step)).loss.backward()
        adamw.step()
        theirs.base_model.update_and_allocate(step + 1)
        adamw.zero_grad()
        train(chosen, model, optimizer, range(step, step + 1))
        assert torch.equal(values_of(model) == 0, values_of(theirs) == 0), step
    pairs = zip(model.named_parameters(), theirs.named_parameters(), strict=True)
    for (name, one), (_, other) in pairs:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4, msg=name)
    share = float((values_of(model) != 0).float().mean())
    assert share == pytest.approx(0.5)


def test_the_pull_is_the_gradient_of_the_norm():
    torch.manual_seed(0)
    directions = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    (directions @ directions.T - torch.eye(3, dtype=torch.float64)).norm().backward()
    assert torch.allclose(pull(directions.detach()), directions.grad, rtol=1e-12)
    orthogonal = torch.eye(3, 11)
    assert torch.equal(pull(orthogonal), torch.zeros(3, 11))


def test_the_loss_is_the_plain_one(folder):
    """In training and in evaluations alike, however far from orthogonal the directions are."""
    _, model, _ = started(folder)
    wanted = float(load_model(folder, "float32", "cpu")(**inputs_of(0)).loss.detach())
    for each in (model.train(), model.eval()):
        found = each(**inputs_of(0)).loss.detach()
        assert float(found) == pytest.approx(wanted, rel=1e-6)


def test_a_step_of_several_micro_batches_pulls_once(folder):
    chosen, model, optimizer = started(folder)
    chosen.at_step(model, optimizer, 0, 1)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    first = next(w for n, w in model.named_parameters() if ".lora_A." in n)
    wanted = pull(first.detach()) * 0.5 / (2 * len(SHAPE.lora_targets) * SHAPE.num_layers)
    optimizer.step()
    assert torch.allclose(first.grad, wanted)


@pytest.mark.parametrize("stopped", [3, 6, 7, 8])
@pytest.mark.parametrize("states", ["adamw", "adafactor", "adamw_8bit"])
@pytest.mark.long
def test_a_run_that_resumes_is_the_one_that_was_not_interrupted(folder, states, stopped):
    """Before, at and after the last cut; the adapter through PEFT, as the Trainer has it."""
    whole = started(folder, states)
    train(*whole, range(10))
    chosen, model, optimizer = started(folder, states)
    train(chosen, model, optimizer, range(stopped))
    file = io.BytesIO()
    torch.save([get_peft_model_state_dict(model), optimizer.state_dict()], file)
    file.seek(0)
    adapter, state = torch.load(file, weights_only=True)
    chosen, again, optimizer = started(folder, states)
    set_peft_model_state_dict(again, adapter)
    optimizer.load_state_dict(state)
    train(chosen, again, optimizer, range(stopped, 10))
    for (name, one), other in zip(whole[1].named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_stock_peft_loads_what_it_saves(folder, tmp_path):
    chosen, model, optimizer = started(folder)
    train(chosen, model, optimizer, range(8))
    assert not chosen.save(model, tmp_path)
    model.save_pretrained(tmp_path)
    ids = inputs_of(0)["input_ids"]
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        loaded = PeftModel.from_pretrained(load_model(folder, "float32", "cpu"), tmp_path)
        assert torch.equal(loaded.eval()(ids).logits, wanted)
        merged = copy.deepcopy(loaded).merge_and_unload()(ids).logits
    assert torch.allclose(merged, wanted, atol=2e-5)


@pytest.mark.parametrize("states", ["adamw", "sgd"])
def test_what_is_trained_and_kept_is_what_is_priced(folder, states):
    chosen, model, optimizer = started(folder, states)
    setting = resolve("states", states).rewrite(chosen.rewrite(MemorySetting(dtype="float32")))
    wide = technique().prepare(load_model(folder, "bfloat16", "cpu"), SHAPE, 1)
    for each in (model, wide):
        found = [weight for weight in each.parameters() if weight.requires_grad]
        assert sum(weight.numel() for weight in found) == trained(SHAPE, setting).num_elements
        assert {weight.dtype for weight in found} == {torch.float32}
    train(chosen, model, optimizer, range(3))
    kept = (v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))
    measured = sum(each.nbytes for each in kept if each.dim())
    assert measured == pytest.approx(state_bytes(SHAPE, setting), rel=1e-3)
    train(chosen, model, optimizer, range(3, 8))
    assert not any("importance" in state for state in optimizer.state.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral", "deepseek_v3"])
def test_flops(family):
    shape, chosen = ModelShape.from_config(TINY[family]), technique()
    model = chosen.prepare(build(TINY[family], attention="eager"), shape, 0).train()
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(named, fused=True)
    setting = chosen.rewrite(MemorySetting(micro_batch=2, sequence=16))
    chosen.at_step(model, optimizer, 0, 0)
    for recompute in (0, 1):
        if recompute:
            model.get_base_model().activation_checkpointing_enable()
        with FlopCounterMode(display=False) as counter:
            model(**batch(2, 16)).loss.backward()
        before = counter.get_total_flops()
        now = replace(setting, recompute=recompute)
        assert step_flops(shape, now) - fixed_flops(shape, now) == before
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        assert fixed_flops(shape, now) == counter.get_total_flops()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes(dtype):
    shape, chosen = ModelShape.from_config(WIDE), technique()
    setting = chosen.rewrite(MemorySetting(dtype=dtype, micro_batch=4, sequence=96))
    model = chosen.prepare(build(WIDE, dtype=dtype), shape, 0).train()
    inputs = batch(4, 96, masked=True)
    kept = priced_saved_bytes(shape, setting, (4,), head=True)[0]
    assert kept == pytest.approx(saved_bytes(model, inputs), rel=2e-3)
    model(**inputs).loss.backward()
    model.zero_grad()
    measured = allocated_peak(lambda: model(**inputs).loss.backward())
    phases = account(shape, setting).phases
    beside = max(
        sum(size for term, size in phases[phase].items() if term not in HELD)
        for phase in ("loss", "backward")
    )
    assert beside - input_bytes(inputs) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("passed_over", [1, 3, 6])
def test_a_step_that_is_passed_over_has_no_gradient(folder, passed_over):
    """Ranks are cut as scheduled, by the steps that there were."""
    chosen, model, optimizer = started(folder)
    for step in range(9):
        chosen.at_step(model, optimizer, step, 1)
        if step != passed_over:
            model(**inputs_of(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    values = values_of(model)
    assert int((values != 0).sum()) == len(values) // 2


def test_bad_input(folder):
    assert "rank 33 is more than k_proj has" in technique(rank=33).refuses_model(SHAPE, "cpu")
    for options, says in (
        ({"rank": 1}, "rank must be at least 2, not 1"),
        ({"rank": 2, "kept": 0.1}, "kept must be a share of 2 ranks that leaves one and drops one"),
        ({"kept": 0.99}, "kept must be a share of 4 ranks"),
        ({"first_cut": 100}, "last_cut must be after first_cut, which is 100, not 100"),
    ):
        with pytest.raises(ValueError, match=rf"(?s){says}.*\nhint"):
            technique(**options)
    assert technique(last_cut=300).cycle_steps(SHAPE) == 300
    adapted = technique().rewrite(MemorySetting())
    assert "float32 on 8-bit weights" in resolve("weights", "int8").refuses(adapted)
    assert "no adapter" in technique().refuses(MemorySetting(zeroth_order=True))
