"""Settings beyond the plain step: storage, optimizers, recomputation, chunked losses, shards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from published import PUBLISHED, TINY
from tracing import allocated_peak, batch, build

from thrifty.costs.allocator import allocatable, device_memory
from thrifty.costs.held import state_bytes, weight_bytes
from thrifty.costs.job import job_account
from thrifty.costs.memory import (
    Adapter,
    MemorySetting,
    States,
    Storage,
    account,
    peaks,
)
from thrifty.costs.shape import ModelShape
from thrifty.costs.trained import trained

LLAMA = ModelShape.from_config(PUBLISHED["Llama-3-8B"])
WIDE = TINY["llama"] | {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}


def setting(**fields):
    return MemorySetting(**{"micro_batch": 2, "sequence": 2048, "device_kind": "cuda"} | fields)


VARIED = {
    "full": {},
    "unfused": {"fused": False},
    "lora": {"adapter": Adapter(rank=16)},
    "lora bf16": {"adapter": Adapter(rank=16), "adapter_dtype": "bfloat16"},
    "some layers": {"only_layers": frozenset({3, 4})},
    "head": {"only_head": True},
    "zeroth order": {"zeroth_order": True},
    "nf4": {"adapter": Adapter(), "storage": Storage(name="nf4", bits=4.127)},
    "in backward": {"in_backward": True, "states": States(name="adalomo", edge=4.0)},
    "accumulating": {"gradient_accumulation_steps": 4},
    "every second": {"recompute": 2},
    "selective": {"recompute": 1, "selective": True},
    "offload": {"offload": True},
    "chunked": {"loss_chunk": 512},
    "held logits": {"holds_logits": True},
    "states on the host": {"states_offloaded": True},
    "sharded": {"num_devices": 8},
    "unmasked": {"masked": False},
}


@pytest.mark.parametrize("name", ["Llama-3-8B", "Gemma-3-1B", "Qwen3-30B-A3B"])
@pytest.mark.parametrize("fields", VARIED.values(), ids=VARIED)
def test_many_batches_at_once_equal_one_at_a_time(name, fields):
    shape, batches = ModelShape.from_config(PUBLISHED[name]), (1, 2, 8, 64)
    run = setting(**fields)
    states = [run, replace(run, states=States(name="sgd"))]
    together, several = peaks(shape, states, batches)
    run = replace(run, gradient_accumulation_steps=1)
    states = [replace(one, gradient_accumulation_steps=1) for one in states]
    for row, one in zip(together, states, strict=True):
        alone = [account(shape, replace(one, micro_batch=b)).peak_memory_bytes for b in batches]
        assert row == pytest.approx(alone, rel=1e-12)
    if not run.in_backward:
        twice = replace(run, gradient_accumulation_steps=2)
        alone = [account(shape, replace(twice, micro_batch=b)).peak_memory_bytes for b in batches]
        assert several[0] == pytest.approx(alone, rel=1e-12)
    else:
        assert np.isinf(several).all()


@pytest.mark.parametrize(("name", "fields"), VARIED.items(), ids=VARIED)
def test_changed_is_dataclasses_replace(name, fields):
    start = setting()
    assert start.changed(**fields) == replace(start, **fields)
    assert setting(**fields).changed(micro_batch=3) == setting(**fields, micro_batch=3)
    assert start == setting()


def test_changed_checks_as_a_new_setting_does():
    with pytest.raises(ValueError, match="sequence must be at least 1"):
        setting().changed(sequence=0)
    with pytest.raises(AssertionError, match="length"):
        setting().changed(length=512)


def test_the_bytes_of_stored_weights():
    """4.501 and 4.127 bits a weight, as bitsandbytes stores linears (measured on its own)."""
    linears = sum(
        each.in_features * each.out_features
        for index in range(LLAMA.num_layers)
        for each in LLAMA.linears_of(index)
    )
    plain = weight_bytes(LLAMA, setting())
    assert plain == 2 * LLAMA.num_parameters
    for bits in (4.5, 4.127):
        stored = setting(adapter=Adapter(), storage=Storage(name="nf4", bits=bits))
        assert weight_bytes(LLAMA, stored) == pytest.approx(plain - linears * (2 - bits / 8))


@pytest.mark.parametrize(
    ("states", "bytes_a_weight"),
    [
        (States(name="adamw", relative=2.0), 4.0),
        (States(name="adamw_8bit", absolute=2.03125), 2.03125),
        (States(name="lion", relative=1.0), 2.0),
        (States(name="adafactor", edge=4.0, vector=4.0), 0.0016),
        (States(name="sgd"), 0.0),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
def test_the_bytes_of_optimizer_states(states, bytes_a_weight):
    size = state_bytes(LLAMA, setting(states=states))
    assert size / LLAMA.num_parameters == pytest.approx(bytes_a_weight, abs=3e-4)


def test_adafactor_keeps_what_transformers_adafactor_keeps():
    import torch
    from transformers.optimization import Adafactor

    model = build(WIDE)
    optimizer = Adafactor(
        model.parameters(), lr=1e-3, scale_parameter=False, relative_step=False, warmup_init=False
    )
    model(**batch(1, 16)).loss.backward()
    optimizer.step()
    kept = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.dim()
    )
    shape = ModelShape.from_config(WIDE)
    predicted = state_bytes(
        shape, MemorySetting(dtype="float32", states=States(name="", edge=4.0, vector=4.0))
    )
    assert predicted == kept


def test_low_rank_states():
    states = States(name="galore", relative=2.0, rank=128)
    run = setting(states=states)
    matrices = trained(LLAMA, run)
    # Query projections of 4096 x 4096: 2 r n + m r elements in bf16.
    assert states.matrix_bytes(4096, 4096, 2) == 2 * (2 * 128 * 4096 + 4096 * 128)
    assert matrices.matrices[4096, 4096] == 2 * LLAMA.num_layers
    assert state_bytes(LLAMA, run) < state_bytes(LLAMA, setting()) / 4


def test_trained_elements_are_all_parameters():
    for config in (TINY["llama"], TINY["gpt2"], TINY["qwen2_moe"], TINY["opt"]):
        shape = ModelShape.from_config(config)
        found = trained(shape, MemorySetting())
        assert found.num_elements == shape.num_parameters
        some = trained(shape, MemorySetting(only_layers=frozenset({1})))
        assert some.num_elements == shape.layer_parameters(1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_when_every_second_layer_runs_again(dtype):
    shape, inputs = ModelShape.from_config(WIDE), batch(4, 96, masked=True)
    model = build(WIDE, dtype=dtype, recompute=True)
    for index, layer in enumerate(model.model.layers):
        layer.gradient_checkpointing = index % 2 == 0
    measured = allocated_peak(lambda: model(**inputs).loss.backward())
    run = MemorySetting(micro_batch=4, sequence=96, dtype=dtype, recompute=2)
    assert _beside(shape, run, inputs) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_selective_recomputation(dtype):
    from functools import partial

    import torch
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    aten = torch.ops.aten
    kept = {
        aten.mm.default,
        aten.addmm.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    }

    def policy(context, operation, *args, **kwargs):
        saves = operation in kept
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    shape, inputs = ModelShape.from_config(WIDE), batch(4, 96, masked=True)
    model = build(WIDE, dtype=dtype)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    measured = allocated_peak(lambda: model(**inputs).loss.backward())
    run = MemorySetting(micro_batch=4, sequence=96, dtype=dtype, recompute=1, selective=True)
    assert _beside(shape, run, inputs) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_peak_of_a_chunked_loss(dtype):
    import torch
    from torch.utils.checkpoint import checkpoint

    config = WIDE | {"vocab_size": 8000}
    shape, inputs = ModelShape.from_config(config), batch(8, 128, masked=True)
    model = build(config, dtype=dtype)

    def chunk_loss(hidden, labels):
        logits = model.lm_head(hidden).float()
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

    def step():
        labels = inputs["labels"].flatten()
        given = {name: value for name, value in inputs.items() if name != "labels"}
        hidden = model.model(**given).last_hidden_state.flatten(0, 1)
        loss = sum(
            checkpoint(chunk_loss, each, labels[i * 128 : i * 128 + 128], use_reentrant=False)
            for i, each in enumerate(hidden.split(128))
        )
        (loss / len(labels)).backward()

    measured = allocated_peak(step)
    run = MemorySetting(micro_batch=8, sequence=128, dtype=dtype, loss_chunk=128)
    assert _beside(shape, run, inputs) == pytest.approx(measured, rel=0.06)


def test_the_peak_when_gradients_are_used_up_in_the_backward():
    shape, inputs = ModelShape.from_config(WIDE), batch(1, 32, masked=True)
    model = build(WIDE)

    def update(parameter):
        parameter.data.add_(parameter.grad, alpha=-1e-3)
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    measured = allocated_peak(lambda: model(**inputs).loss.backward())
    run = MemorySetting(sequence=32, dtype="float32", in_backward=True, states=States(name="lomo"))
    assert _beside(shape, run, inputs) == pytest.approx(measured, rel=0.05)


def _beside(shape, run, inputs):
    """The predicted peak of forward and backward, above weights, states and the batch."""
    seen = account(shape, run)
    held = sum(seen.phases["loss"][term] for term in ("weights", "adapter", "optimizer_states"))
    most = max(seen.phase_bytes(phase) for phase in ("loss", "backward"))
    return most - held - sum(tensor.nbytes for tensor in inputs.values())


def test_shards():
    one, eight = (account(LLAMA, setting(num_devices=n, recompute=1)) for n in (1, 8))
    for term in ("weights", "optimizer_states"):
        whole = one.phases["optimizer"][term]
        assert eight.phases["optimizer"][term] == pytest.approx(whole / 8)
    assert eight.phases["backward"]["temporaries"] > one.phases["backward"]["temporaries"]


def test_a_job_has_more_phases_than_a_step():
    run = setting(adapter=Adapter(), storage=Storage(name="nf4", bits=4.127), loss_chunk=1024)
    job = job_account(LLAMA, run, scoring_bytes=1.0, looking_bytes=2.5 * LLAMA.num_parameters)
    assert list(job.phases) == [
        "load", "score", "loss", "backward", "optimizer", "evaluate", "refresh", "save", "merge",
    ]  # fmt: skip
    # Scoring again runs the model in bf16, with what trains it in 4 bits beside it.
    held = job.phase_bytes("save")
    assert job.phase_bytes("refresh") > held
    assert job.phase_bytes("evaluate") > held
    talking = job_account(LLAMA, run, generated_context=4096)
    cache = talking.phase_bytes("evaluate") - job.phase_bytes("evaluate")
    assert cache == pytest.approx(2 * 4096 * 32 * 2 * 1024 * 2)


def test_allocated_reserved_and_device_memory_are_told_apart():
    memory = device_memory(20e9, "cuda")
    assert memory.allocated < memory.reserved < memory.device
    assert memory.low < memory.device < memory.high
    assert allocatable(memory.device, "cuda") == pytest.approx(20e9)
    assert device_memory(1e9, "cpu").reserved == 1e9


def test_preference_training_counts_its_reference_model():
    from thrifty.costs.flops import forward_flops, step_flops
    from thrifty.costs.hardware import load_device
    from thrifty.costs.time import step_seconds

    h100 = load_device("h100")
    for adapter in (None, Adapter()):
        alone, asked = (setting(adapter=adapter, reference=r) for r in (False, True))
        copies = 2 if adapter is None else 1
        assert weight_bytes(LLAMA, asked) == copies * weight_bytes(LLAMA, alone)
        more = step_flops(LLAMA, asked) - step_flops(LLAMA, alone)
        assert more == forward_flops(LLAMA, 2, 2048)
        assert step_seconds(LLAMA, asked, h100) > 1.1 * step_seconds(LLAMA, alone, h100)


def test_weights_in_few_bits_are_not_moved():
    from thrifty.memory.trained.mezo import MeZO
    from thrifty.memory.weights.bfloat16 import BFloat16
    from thrifty.memory.weights.int8 import Int8
    from thrifty.memory.weights.nf4 import NF4

    moving = MeZO().rewrite(setting())
    for stored in (NF4(), NF4(double=False), Int8()):
        assert "moves the weights themselves" in stored.refuses(moving)
        assert "cannot be trained themselves" in stored.refuses(setting())
        assert stored.refuses(setting(adapter=Adapter())) is None
    assert BFloat16().refuses(moving) is None
    for fields in ({}, {"zeroth_order": True}):
        with pytest.raises(ValueError, match="\nhint: train an adapter"):
            setting(storage=Storage(name="nf4", bits=4.5), **fields)


def test_low_rank_states_need_matrices_of_a_higher_rank():
    from thrifty.memory.states.apollo import Apollo
    from thrifty.memory.states.galore import GaLore

    for method in (GaLore, Apollo):
        assert "matrices of rank 16" in method().refuses(setting(adapter=Adapter(rank=16)))
        assert method(rank=16).refuses(setting(adapter=Adapter(rank=16))) is not None
        assert method(rank=8).refuses(setting(adapter=Adapter(rank=16))) is None
        assert method().refuses(setting()) is None
        assert "without states" in method().refuses(setting(zeroth_order=True))
        # What is refused would save nothing: AdamW's two moments of each adapter.
        run = setting(adapter=Adapter(rank=16))
        assert state_bytes(LLAMA, method().rewrite(run)) == state_bytes(LLAMA, run)


def test_the_largest_tensor_of_a_mixture_holds_all_its_experts():
    """As transformers has them: what an optimizer's step allocates beside is of that."""
    shape = ModelShape.from_config(TINY["mixtral"])
    largest = max(weight.numel() for weight in build(TINY["mixtral"]).parameters())
    assert trained(shape, setting()).largest == largest
    assert largest > shape.vocab_size * shape.hidden_size
