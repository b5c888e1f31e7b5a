"""Models counted as they are built: against the closed forms, and where there is none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.costs.published import PUBLISHED, TINY
from thrifty import measured_plan
from thrifty.cli import main
from thrifty.costs.flops import step_coefficients
from thrifty.costs.memory import account
from thrifty.costs.operations import Adapter
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.measured import Flops, Measured, NotTraced
from thrifty.measured_plan import LORA, Way, _accounts

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
MAMBA = dict(model_type="mamba", hidden_size=32, num_hidden_layers=2, vocab_size=160, state_size=4)


@pytest.mark.parametrize("name", [*TINY, "Llama-3-8B", "Qwen2.5-7B"])
def test_parameters_are_the_closed_forms(name):
    config = (TINY | PUBLISHED)[name]
    counted, shape = Measured(config), ModelShape.from_config(config)
    assert counted.parameters_by_part == shape.parameters_by_part | {"other": 0}
    assert counted.num_parameters == shape.num_parameters


@pytest.mark.parametrize(
    "config",
    [LLAMA, pytest.param(QWEN3_MOE, marks=pytest.mark.slow)],
    ids=lambda config: config["model_type"],
)
def test_bytes_and_flops_are_near_the_closed_forms(config):
    counted, shape = Measured(config), ModelShape.from_config(config)
    for adapter, recompute in ((None, 0), (LORA, 1)):
        setting = MemorySetting(
            micro_batch=2, sequence=96, adapter=adapter, recompute=recompute, device_kind="cuda"
        )
        flops = counted.flops(setting)
        assert (flops.token, flops.pair) == pytest.approx(step_coefficients(shape, setting))
        assert flops.error == pytest.approx(0.0, abs=1e-9)
        measured, closed = counted.account(setting), account(shape, setting)
        assert len(counted.depths) == 2, "carried on to the sixth layer"
        for phase, terms in measured.phases.items():
            assert sum(terms.values()) == pytest.approx(closed.phase_bytes(phase), rel=0.03)
        states = measured.phases["optimizer"]["optimizer_states"]
        assert states == pytest.approx(closed.phases["optimizer"]["optimizer_states"])
        gradients = measured.phases["optimizer"]["gradients"]
        assert gradients == pytest.approx(closed.phases["optimizer"]["gradients"])
        assert measured.phases["loss"]["gradients"] == 0


@pytest.mark.slow
def test_the_largest_micro_batch_is_the_largest():
    counted, setting = Measured(GRANITE), MemorySetting(sequence=64, device_kind="cuda")
    limit = counted.account(MemorySetting(**vars(setting) | {"micro_batch": 7})).peak_memory_bytes
    for spare, largest in ((0.0, 7), (-1.0, 6)):
        accounts = _accounts(counted, setting, limit + spare)
        way = Way(
            trained="full",
            recompute=False,
            accounts=accounts,
            flops=Flops(1.0, 0.0, 0.0),
            limit=limit + spare,
            sequence=64,
        )
        assert way.micro_batch == largest
        assert way.affine_error == pytest.approx(0.0, abs=0.002)


def test_a_loop_over_tokens_is_not_measured():
    counted = Measured(MAMBA)
    assert counted.num_parameters > 0
    with pytest.raises(NotTraced, match="a loop over tokens"):
        counted.account(MemorySetting(sequence=64))


def test_what_a_model_raises_is_the_reason():
    with pytest.raises(NotTraced, match="found in the base model"):
        Measured(GRANITE).account(MemorySetting(adapter=Adapter(rank=4, targets=("nothing",))))


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


@pytest.mark.slow
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
        assert each["memory_source"] == "measured on fake tensors"
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
    assert "measured on fake tensors at 2 and 3 layers, carried on to 6" in out


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
        (GRANITE, ("--set", "training.lora.rank=4"), 4, "does not know --set training.lora.rank"),
        (GRANITE, ("--set", "training.max_length=999"), 4, "longer than the model's context"),
        (dict(model_type="no_such"), (), 4, "knows no model_type 'no_such'"),
        (dict(hidden_size=4), (), 4, "knows no model_type None"),
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
