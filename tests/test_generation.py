"""Answers of a model: the same as transformers gives, at exactly the FLOPs that are charged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.costs.published import TINY, VARIANTS
from tests.costs.tracing import allocated_peak, build
from tests.methods.conftest import Tally
from thrifty.costs.flops import decode_flops
from thrifty.costs.job import job_account
from thrifty.costs.memory import kv_cache_bytes
from thrifty.costs.setting import MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.signals.generation import Decoding, answers_flops, generate

USUAL = ("llama", "gpt2", "mistral-window", "deepseek_v3")
FAMILIES = [
    pytest.param(name, marks=() if name in USUAL else pytest.mark.slow)
    for name in (*TINY, "mistral-window", "gemma2-window")
]
LENGTHS = (7, 12, 9, 12, 25, 8)


def model_of(name: str) -> tuple[ModelShape, torch.nn.Module]:
    torch.manual_seed(0)
    config = (TINY | VARIANTS)[name]
    model = build(config, attention="eager")
    model.generation_config.eos_token_id = None
    return ModelShape.from_config(config), model


def prompts_of(shape: ModelShape) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(3, shape.vocab_size, length) for length in LENGTHS]


def by_transformers(model, prompt, new: int) -> list[int]:
    ids = torch.from_numpy(prompt)[None]
    with torch.inference_mode():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            use_cache=True,
        )
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.long
def test_greedy_answers_are_those_of_transformers_and_flops_are_counted_exactly(name):
    from torch.utils.flop_counter import FlopCounterMode

    shape, model = model_of(name)
    prompts, new = prompts_of(shape), 8
    wanted = [by_transformers(model.eval(), prompt, new) for prompt in prompts]
    # An end that some answers come to, and not at the same token.
    end = wanted[0][3]
    decoding = Decoding(max_new_tokens=new, end_ids=frozenset({end}))
    meter = Tally()
    model.train()
    with FlopCounterMode(display=False) as counter:
        found = generate(model, shape, prompts, decoding, meter, max_tokens=60)
    assert model.training
    for answer, whole in zip(found, wanted, strict=True):
        cut = whole[: whole.index(end)] if end in whole else whole
        assert answer.ids.tolist() == cut
        assert answer.num_tokens == len(cut) + (end in whole)
        assert answer.ended == (end in whole)
    counts = [answer.num_tokens for answer in found]
    assert min(counts) < new, "no answer ended early"
    assert meter.cost.flops == counter.get_total_flops()
    exact = answers_flops(shape, LENGTHS, decoding, 60, counts)
    assert meter.cost.flops == pytest.approx(exact, rel=1e-12)
    assert exact < answers_flops(shape, LENGTHS, decoding, 60)
    assert meter.cost.tokens == 0, "no token is trained on"


def test_shares_of_the_batches_together_are_all_of_them():
    shape, model = model_of("llama")
    prompts, decoding = prompts_of(shape), Decoding(max_new_tokens=4)
    whole = generate(model, shape, prompts, decoding, Tally(), max_tokens=40)
    parts = [generate(model, shape, prompts, decoding, Tally(), 40, (i, 2)) for i in range(2)]
    for answer, *each in zip(whole, *parts, strict=True):
        (own,) = [found for found in each if found is not None]
        assert own.ids.tolist() == answer.ids.tolist()


def test_sampling_follows_its_seed_whatever_the_batches():
    shape, model = model_of("llama")
    prompts = [prompts_of(shape)[0]] * 5
    hot = Decoding(max_new_tokens=6, temperature=1.0, seed=3)
    first, again, alone = (
        generate(model, shape, prompts, hot, Tally(), most) for most in (None, None, 1)
    )
    said = [answer.ids.tolist() for answer in first]
    assert said == [answer.ids.tolist() for answer in again]
    assert said == [answer.ids.tolist() for answer in alone]
    assert len({tuple(ids) for ids in said}) > 1, "five answers to one prompt differ"
    other = generate(model, shape, prompts, Decoding(max_new_tokens=6, temperature=1.0), Tally())
    assert said != [answer.ids.tolist() for answer in other]
    cold = Decoding(max_new_tokens=6, temperature=1e-4)
    greedy = generate(model, shape, prompts, Decoding(max_new_tokens=6), Tally())
    near = generate(model, shape, prompts, cold, Tally())
    assert [a.ids.tolist() for a in near] == [a.ids.tolist() for a in greedy]


def test_sampling_draws_by_the_model_s_probabilities():
    shape, model = model_of("llama")
    prompt = prompts_of(shape)[0]
    with torch.inference_mode():
        logits = model.eval()(input_ids=torch.from_numpy(prompt)[None]).logits[0, -1]
    likely = (logits.double() / 0.3).softmax(-1)
    top = int(likely.argmax())
    drawn = generate(
        model, shape, [prompt] * 2000, Decoding(max_new_tokens=1, temperature=0.3), Tally()
    )
    share = np.mean([answer.ids[0] == top for answer in drawn])
    error = float((likely[top] * (1 - likely[top]) / 2000) ** 0.5)
    assert abs(share - float(likely[top])) < 4 * error


def test_an_answer_keeps_within_the_context():
    shape, model = model_of("llama")
    most = shape.max_position_embeddings
    prompts = [np.full(most - 2, 5), np.full(most, 5)]
    meter = Tally()
    found = generate(model, shape, prompts, Decoding(max_new_tokens=9), meter)
    assert [answer.num_tokens for answer in found] == [2, 0]
    assert meter.cost.flops == decode_flops(shape, 1, most - 2, 2)
    mixed = generate(
        model, shape, [prompts[0], prompts[0][:-5]], Decoding(max_new_tokens=9), Tally()
    )
    assert [answer.num_tokens for answer in mixed] == [2, 7], "each by its own length"


def test_what_generation_holds_is_within_what_is_counted_for_it():
    """In float32 on a CPU: activations, masks and the cache of a batch, beside the weights."""
    shape, model = ModelShape.from_config(TINY["llama"]), build(TINY["llama"])
    rows, length, new = 8, 96, 32
    setting = MemorySetting(micro_batch=rows, sequence=length + new, dtype="float32", masked=True)
    context = length + new + new
    counted = job_account(shape, setting, generated_context=context).phases["evaluate"]
    counted = counted["activations"] + counted["logits"] + counted["temporaries"]
    prompts, decoding = [np.full(length, 5)] * rows, Decoding(max_new_tokens=new)
    most = setting.tokens
    held = allocated_peak(lambda: generate(model, shape, prompts, decoding, Tally(), most))
    cache = kv_cache_bytes(shape, rows, length + new, "float32")
    assert cache < held < counted
