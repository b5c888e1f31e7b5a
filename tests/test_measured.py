"""Models counted as they are built: against the closed forms, and where there is none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.costs.published import PUBLISHED, TINY
from thrifty import measured_plan
from thrifty.cli import main
from thrifty.costs.flops import step_coefficients
from thrifty.costs.memory import account
from thrifty.costs.operations import Adapter
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.fake_step import skeleton
from thrifty.measured import Measured, NotTraced
from thrifty.measured_plan import LORA, Way
from thrifty.meta_step import ROWS, _line, run_step
from thrifty.verification import PHASES, trace

LLAMA: dict[str, Any] = dict(
    model_type="llama",
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=160,
    max_position_embeddings=256,
)
QWEN3_MOE = LLAMA | dict(
    model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
)
GRANITE = LLAMA | dict(model_type="granite")
BLOOM = dict(model_type="bloom", hidden_size=64, n_layer=2, n_head=4, vocab_size=160)
GPT2 = dict(model_type="gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=160, n_positions=128)
NARROW_VALUES = LLAMA | dict(
    model_type="deepseek_v3",
    num_key_value_heads=4,
    q_lora_rank=32,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
)
MAMBA = dict(model_type="mamba", hidden_size=32, num_hidden_layers=2, vocab_size=160, state_size=4)


@pytest.mark.parametrize("name", [*TINY, "Llama-3-8B", "Qwen2.5-7B"])
def test_parameters_are_the_closed_forms(name):
    config = (TINY | PUBLISHED)[name]
    counted, shape = Measured(config), ModelShape.from_config(config)
    assert counted.parameters_by_part == shape.parameters_by_part | {"other": 0}
    assert counted.num_parameters == shape.num_parameters


@pytest.mark.parametrize(
    ("config", "adapter", "recompute"),
    [(LLAMA, None, 0), (QWEN3_MOE, LORA, 1)],
    ids=("llama, full", "qwen3_moe, lora, recompute"),
)
@pytest.mark.long
def test_bytes_and_flops_are_near_the_closed_forms(config, adapter, recompute):
    counted, shape = Measured(config), ModelShape.from_config(config)
    setting = MemorySetting(
        micro_batch=2, sequence=96, adapter=adapter, recompute=recompute, device_kind="cuda"
    )
    step = counted.step(setting)
    flops = step_coefficients(shape, setting)
    assert (step.flops.token, step.flops.pair) == pytest.approx(flops)
    measured, closed = step.account(setting.micro_batch), account(shape, setting)
    assert len(counted.depths) == 2, "carried on to the sixth layer"
    for phase, terms in measured.phases.items():
        assert sum(terms.values()) == pytest.approx(closed.phase_bytes(phase), rel=0.03)
    states = measured.phases["optimizer"]["optimizer_states"]
    assert states == pytest.approx(closed.phases["optimizer"]["optimizer_states"])
    gradients = measured.phases["optimizer"]["gradients"]
    assert gradients == pytest.approx(closed.phases["optimizer"]["gradients"])
    assert measured.phases["loss"]["gradients"] == 0


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (GRANITE, dict(adapter=LORA, recompute=1)),
        (QWEN3_MOE, dict(adapter=LORA)),
        (BLOOM, dict(recompute=1, masked=False, device_kind="cpu")),
        (NARROW_VALUES, dict()),
        (GPT2, dict(adapter=LORA, adapter_dtype="bfloat16")),
    ],
    ids=lambda value: value.get("model_type") or ", ".join(value),
)
@pytest.mark.long
def test_bytes_are_those_of_the_step_on_fake_tensors(config, fields):
    setting = MemorySetting(sequence=48, **{"device_kind": "cuda"} | fields)
    step = run_step(skeleton(config, setting, 2), setting)
    peaks = dict.fromkeys(PHASES, 0.0)
    for instant, (total, _) in step.highest(3).items():
        peaks[instant.phase] = max(peaks[instant.phase], total)
    # Four bytes a tensor count AdamW's steps; a CPU's norms keep two bytes a token less.
    traced = trace(config, replace(setting, micro_batch=3), 2)
    assert peaks == pytest.approx(traced, rel=0.005)


def test_flops_are_the_counters_at_every_length():
    config = QWEN3_MOE | dict(num_hidden_layers=2)
    setting = MemorySetting(sequence=96, adapter=LORA, recompute=1, device_kind="cuda")
    flops = Measured(config).step(setting).flops
    model = skeleton(config, setting, None)
    # Operations whose products the counter knows.
    model.set_attn_implementation("eager")
    model.set_experts_implementation("batched_mm")
    for length in (32, 250):
        ids = torch.ones(1, length, dtype=torch.long, device="meta")
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, attention_mask=ids, labels=ids).loss.backward()
        assert length * flops.per_token(length) == pytest.approx(counter.get_total_flops())


def test_the_largest_micro_batch_is_the_largest():
    step = Measured(GRANITE).step(MemorySetting(sequence=64, device_kind="cuda"))
    limit = step.account(7).peak_memory_bytes
    for spare, largest in ((0.0, 7), (-1.0, 6)):
        way = Way(trained="full", recompute=False, limit=limit + spare, sequence=64, step=step)
        assert way.fits
        assert way.micro_batch == largest
    small = replace(way, limit=step.account(1).peak_memory_bytes - 1.0)
    assert not small.fits
    assert small.micro_batch == 1


def test_what_grows_with_the_square_of_the_rows_is_refused():
    assert _line(12 * ROWS, (3, ROWS)) == (0, 12)
    assert _line(-8 * (ROWS + 5), (ROWS + 5, 4)) == (-40, -8)
    assert _line(ROWS + 1, (7,)) == (ROWS + 1, 0)
    with pytest.raises(ValueError, match="square of the rows"):
        _line(2 * ROWS**2, (ROWS, ROWS))


def test_a_setting_that_is_not_followed_is_refused():
    with pytest.raises(NotTraced, match="a step with gradient_accumulation_steps 2"):
        Measured(GRANITE).step(MemorySetting(gradient_accumulation_steps=2))


def test_a_loop_over_tokens_is_not_measured():
    counted = Measured(MAMBA)
    assert counted.num_parameters > 0
    with pytest.raises(NotTraced, match="a loop over tokens"):
        counted.step(MemorySetting(sequence=64))


def test_what_a_model_raises_is_the_reason():
    with pytest.raises(NotTraced, match="found in the base model"):
        Measured(GRANITE).step(MemorySetting(adapter=Adapter(rank=4, targets=("nothing",))))


@pytest.fixture
def plan(tmp_path, capsys):
    """Runs `thrifty plan --measure` on a config: exit code, standard output, standard error."""

    def run(config: Any, *options: str) -> tuple[int, str, str]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        command = ["plan", "--model", str(tmp_path), "--device", "h100", *options]
        code = main(command)
        return code, *capsys.readouterr()

    return run


def test_an_unknown_architecture_is_offered_measuring(plan):
    code, _, err = plan(GRANITE)
    assert code == 4
    assert "model_type 'granite' is not supported" in err
    assert "hint: `thrifty plan --measure`" in err


def test_an_unknown_architecture_through_the_command(plan, monkeypatch):
    monkeypatch.setattr(measured_plan, "WAYS", measured_plan.WAYS[::3])
    code, out, _ = plan(GRANITE, "--measure", "--json", "--memory", "1GiB", "--flops", "1e12")
    assert code == 0
    found = json.loads(out)
    twin = ModelShape.from_config(LLAMA)
    assert found["model"]["num_parameters"] == twin.num_parameters
    assert found["model"]["num_parameters_by_part"] == twin.parameters_by_part | {"other": 0}
    assert found["measured"]["failed"] is None
    names = [each["name"] for each in found["candidates"]]
    assert sorted(names) == ["full keep", "lora recompute"]
    for each in found["candidates"]:
        assert each["fits"]
        assert each["failed"] is each["closed_form"] is None
        assert each["per_device_train_batch_size"] >= 1
        assert sum(each["peak_memory_bytes_by_term"].values()) == each["peak_memory_bytes"]
        assert each["tokens"] * each["flops_per_token"] == pytest.approx(1e12)
        assert each["memory_source"] == "measured on the meta device"
        assert each["seconds_source"].startswith("predicted")


def test_what_is_printed_of_a_known_one_that_does_not_fit(plan, monkeypatch):
    monkeypatch.setattr(measured_plan, "WAYS", measured_plan.WAYS[:1])
    options = ("--memory", "521MiB", "--hours", "1", "--set", "training.max_length=32")
    code, out, err = plan(LLAMA, "--measure", *options)
    assert code == 3
    assert "no way that was measured fits 521 MiB: the smallest, " in err
    assert out.startswith("llama: ")
    for part in ("largest micro-batch", "peak (measured)", "tokens/s (predicted)", "optimizer"):
        assert part in out
    assert "full keep: the closed form is off by" in out
    assert "measured on the meta device at 2 and 3 layers, carried on to 6" in out


def test_what_cannot_be_measured_still_has_parameters(plan):
    code, out, err = plan(MAMBA, "--measure")
    assert code == 4
    assert out.startswith("mamba: ")
    assert "no step could be measured: it runs a loop over tokens" in out
    assert "error: the parameters of" in err
    code, out, _ = plan(MAMBA, "--measure", "--json")
    assert code == 4
    assert json.loads(out)["candidates"] == []


@pytest.mark.parametrize(
    ("config", "options", "code", "message"),
    [
        (GRANITE, ("--pool", "rows.jsonl"), 4, "--measure plans no run"),
        (GRANITE, ("--devices", "8"), 4, "--measure does not know --devices"),
        (GRANITE, ("--set", "training.seed=4"), 4, "does not know --set training.seed"),
        (GRANITE, ("--set", "training.max_length=999"), 4, "longer than the model's context"),
        (dict(model_type="no_such"), (), 4, "knows no model_type 'no_such'"),
        (dict(hidden_size=4), (), 4, "no model_type in the model's config"),
        (dict(model_type="vit"), (), 4, "builds no causal language model of this vit config"),
        (LLAMA | dict(hidden_size="x"), (), 4, "builds no causal language model of this llama"),
        ([], (), 4, "holds no object"),
    ],
)
def test_clear_errors(plan, config, options, code, message):
    found, _, err = plan(config, "--measure", *options)
    assert found == code
    assert message in err
    assert "\nhint: " in err
