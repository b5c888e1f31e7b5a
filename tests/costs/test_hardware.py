"""What a run that ran out of memory teaches those that are planned after it."""

from __future__ import annotations

import pytest

from thrifty.core.budget import Budget, Rates
from thrifty.costs.hardware import learn_memory_factor, load_device
from thrifty.costs.shape import ModelShape
from thrifty.request import MEMORY_MARGIN, Request

GIB = 2.0**30


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path))


def test_a_peak_that_was_too_low_is_counted_on_from_then_on():
    assert load_device("h100").memory_factor == 1.0
    assert learn_memory_factor("h100", 66 * GIB, 60 * GIB) == pytest.approx(1.1)
    assert load_device("H100 SXM").memory_factor == pytest.approx(1.1)
    assert load_device("a100").memory_factor == 1.0
    assert load_device(None).memory_factor == 1.0


def test_the_worst_holds_and_no_more_than_twice():
    learn_memory_factor(None, 66 * GIB, 60 * GIB)
    assert learn_memory_factor("local", 61 * GIB, 60 * GIB) == pytest.approx(1.1)
    assert learn_memory_factor("local", 900 * GIB, 60 * GIB) == 2.0


@pytest.mark.parametrize(("held", "predicted"), [(40.0, 60.0), (60.0, 0.0)])
def test_a_prediction_that_held_teaches_nothing(tmp_path, held, predicted):
    """A device may have less to give than a plan was told; that is no error of the prediction."""
    assert learn_memory_factor(None, held, predicted) == 1.0
    assert not (tmp_path / "memory.json").exists()


def test_plans_need_room_for_it(llama_shape: ModelShape):
    def request() -> Request:
        return Request(
            shape=llama_shape, budget=Budget(), device=load_device("h100"), rates=Rates()
        )

    assert request().memory_margin == MEMORY_MARGIN
    before = request().most_allocated
    learn_memory_factor("h100", 75 * GIB, 60 * GIB)
    assert request().memory_margin == pytest.approx(MEMORY_MARGIN * 1.25)
    assert request().most_allocated < 0.85 * before


@pytest.mark.parametrize("text", ["", "[]", '{"local": "much"}', '{"local": 0.1}'])
def test_what_cannot_be_read_counts_as_nothing_learnt(tmp_path, text):
    (tmp_path / "memory.json").write_text(text)
    assert load_device(None).memory_factor == 1.0


@pytest.fixture
def llama_shape() -> ModelShape:
    return ModelShape.from_config(
        {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
        }
    )
