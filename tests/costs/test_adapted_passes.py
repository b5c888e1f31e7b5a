"""Passes of a model under its adapter, counted: what looks at a model in training is charged."""

import numpy as np
import pytest
import torch
from tests.costs.published import TINY
from tests.costs.tracing import build
from torch.utils.flop_counter import FlopCounterMode

from thrifty.core.resolve import resolve
from thrifty.costs.flops import forward_flops, step_flops
from thrifty.costs.memory import MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.data.tokens import Tokens
from thrifty.signals.gradients import trained_flops
from thrifty.signals.models import ModelInTraining

SHAPE = ModelShape.from_config(TINY["llama"])


class Rows:
    """Rows of random tokens."""

    def __init__(self, number: int) -> None:
        random = np.random.default_rng(number)
        lengths = random.integers(8, 24, number)
        self.tokens = [
            Tokens(random.integers(0, 160, n).astype(np.int32), np.ones(n, bool)) for n in lengths
        ]

    def __len__(self) -> int:
        return len(self.tokens)


class Meter:
    flops = 0.0

    def tick(self, cost, *, steps=0):
        self.flops += cost.flops


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("base")
    build(TINY["llama"]).save_pretrained(made)
    return made


def in_training(folder, name):
    """The model under an adapter, and the adapter."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    trained = resolve("trained", name)
    adapter = trained.rewrite(MemorySetting(dtype="float32")).adapter
    return trained.prepare(model, SHAPE, 1).eval(), adapter


@pytest.mark.parametrize("scorer", ["grad_cosine", "el2n", "embedding"])
@pytest.mark.parametrize("name", ["lora", "dora", "lora_fa", "ia3", "adapters", "full"])
@pytest.mark.long
def test_looking_at_a_model_in_training_is_charged_as_counted(folder, name, scorer):
    model, adapter = in_training(folder, name)
    models, meter, looks = (
        ModelInTraining(model, SHAPE.under(adapter)),
        Meter(),
        resolve("scorer", scorer),
    )
    with FlopCounterMode(display=False) as counter:
        state = looks.prepare(None, {"sums": Rows(10)}, models, meter)
        looks.score(Rows(20), state, meter)
    assert meter.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_an_adapter_below_what_is_asked_for_runs_forward_alone(folder):
    """As ``craig`` and ``greats`` ask for the last layers' adapters."""
    _, adapter = in_training(folder, "lora")
    last = trained_flops(SHAPE, adapter, 1)(2, 16)
    below = trained_flops(SHAPE.under(adapter), adapter, 1)(2, 16) - last
    each = forward_flops(SHAPE.under(adapter), 2, 16) - forward_flops(SHAPE, 2, 16)
    assert below == pytest.approx(each * (SHAPE.num_layers - 1) / SHAPE.num_layers)
    whole = MemorySetting(adapter=adapter, micro_batch=2, sequence=16)
    assert step_flops(SHAPE.under(adapter), whole) == step_flops(SHAPE, whole)
