"""Every two memory techniques either train together or say why not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from thrifty.core.contracts import MEMORY_KINDS
from thrifty.core.plan import MemoryPlan
from thrifty.core.resolve import all_names, method_class
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import read_shape
from thrifty.data.packed_attention import attention_of
from thrifty.memory_plan import Techniques

SMALL: dict[str, dict[str, Any]] = {
    # The model is 64 wide: at the usual ranks nothing would be projected.
    "galore": {"rank": 4, "refresh": 2},
    "apollo": {"rank": 4, "refresh": 2},
    "q_galore": {"rank": 4},
    "lora": {"rank": 4},
    "adalora": {"rank": 4, "alpha": 1024.0},
    "badam": {"switch_steps": 1},
    "lisa": {"layers": 1, "switch_steps": 1},
    "addax": {"short": 16},
}


def runnable(kind: str) -> list[str]:
    classes: dict[str, Any] = {name: method_class(kind, name) for name in all_names(kind)}
    return [name for name, cls in classes.items() if cls.runs]


def spec(name: str) -> Any:
    return {name: SMALL[name]} if name in SMALL else name


PAIRS = [
    ((one, a), (other, b))
    for one, other in itertools.combinations(MEMORY_KINDS, 2)
    for a, b in itertools.product(runnable(one), runnable(other))
]


def plan_of(*techniques: tuple[str, str]) -> MemoryPlan:
    """Of what is named, and of what it needs: weights in few bits need an adapter, an optimizer
    for bf16 weights those, a zeroth-order update no states, a mixed one lomo's, LoftQ what 4 bits
    have lost."""
    named = dict(techniques)
    if named.get("weights") in ("int8", "nf4", "fp8"):
        named.setdefault("trained", "lora")
    if named.get("states") == "adamw_bf16":
        named.setdefault("weights", "bfloat16")
    if named.get("trained") == "mezo":
        named.setdefault("states", "sgd")
    if named.get("trained") == "addax":
        named.setdefault("states", "lomo")
    if named.get("trained") == "loftq":
        named.setdefault("weights", "nf4")
    return MemoryPlan(**{kind: spec(name) for kind, name in named.items()})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def start_of(device_kind: str = "cpu") -> MemorySetting:
    return MemorySetting(micro_batch=2, sequence=32, masked=True, device_kind=device_kind)


@pytest.mark.parametrize("device_kind", ["cpu", "cuda"])
def test_every_pair_makes_a_setting_or_says_why_not(device_kind):
    """Of one reason each: that of the technique that refuses."""
    refused = 0
    for pair in PAIRS:
        try:
            setting = Techniques.of(plan_of(*pair)).setting(start_of(device_kind))
        except ValueError as refusal:
            said = str(refusal)
            assert "does not go here: " in said, pair
            assert "\nhint: " in said, pair
            refused += 1
        else:
            assert setting.micro_batch == 2
    assert 0 < refused < len(PAIRS) / 2


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kinds", list(itertools.combinations(MEMORY_KINDS, 2)), ids="-".join)
def test_every_pair_trains_three_steps_or_refuses(kinds, base):
    failed = {}
    for pair in PAIRS:
        if (pair[0][0], pair[1][0]) != kinds:
            continue
        techniques = Techniques.of(plan_of(*pair))
        shape = read_shape(base)
        try:
            techniques.setting(start_of())
        except ValueError:
            continue
        if techniques.weights.refuses_model(shape, "cpu"):
            continue
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled it is another test's, once
                losses = three_steps(techniques, base)
        except Exception as error:  # all of them are told at once
            failed[pair] = repr(error)[:200]
        else:
            if not all(map(torch.isfinite, losses)) or losses[0] == losses[-1]:
                failed[pair] = str(losses)
    assert not failed, "\n".join(f"{pair}: {why}" for pair, why in failed.items())


def three_steps(techniques: Techniques, base: Any) -> list[torch.Tensor]:
    """As the trainer drives them."""
    shape = read_shape(base)
    model = techniques.build(base, shape, "cpu", seed=0).train()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": named, "lr": 1e-3, "weight_decay": 0.01}]
    optimizer = techniques.optimizer(groups, shape, seed=0)
    torch.manual_seed(1)
    ids = torch.randint(0, 256, (2, 32))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(32).repeat(2, 1)}
    losses = []
    for step in range(3):
        techniques.trained.at_step(model, optimizer, step, 0)
        apart = attention_of(_inner(model), batch["position_ids"])

        def loss(model: Any = model, apart: Any = apart) -> torch.Tensor:
            return model(**{**batch, **apart, "use_cache": False}).loss

        if hasattr(optimizer, "estimate"):
            found = optimizer.estimate(lambda: loss().detach())
        if not hasattr(optimizer, "estimate") or techniques.trained.short:
            found = loss()
            found.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.as_tensor(found).detach().float())
    return losses


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@pytest.mark.slow
@pytest.mark.parametrize("trained", runnable("trained"))
def test_what_was_trained_is_loaded_by_stock_libraries(trained, base, tmp_path):
    """The same logits, from a folder that knows nothing of thrifty, on the base as stock libraries
    hold it: LoftQ's in 4 bits."""
    from peft import PeftModel

    techniques = Techniques.of(plan_of(("trained", trained)))
    shape = read_shape(base)
    model = techniques.build(base, shape, "cpu", seed=0).train()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": named, "lr": 1e-3, "weight_decay": 0.0}]
    optimizer = techniques.optimizer(groups, shape, seed=0)
    ids = torch.arange(32)[None]
    techniques.trained.at_step(model, optimizer, 0, 0)
    if hasattr(optimizer, "estimate"):
        optimizer.estimate(lambda: model(input_ids=ids, labels=ids).loss.detach())
    if not hasattr(optimizer, "estimate") or techniques.trained.short:
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    saved, made = tmp_path / "saved", tmp_path / "made"
    made.mkdir()
    if not techniques.trained.save(model, saved):
        model.save_pretrained(saved)
    left = made if techniques.trained.publish(saved, made, base) else saved
    if (left / "adapter_config.json").exists():
        plain = techniques.weights_of(base, "cpu")
        again: Any = PeftModel.from_pretrained(plain, str(left)).eval()
    else:
        assert load_file(left / "model.safetensors")
        again = AutoModelForCausalLM.from_pretrained(left, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
