"""Predicted against measured: FLOPs, seconds and memory of real training steps.

    python bench/accuracy.py [--rounds 3]

FLOPs are checked against ``torch.utils.flop_counter`` under eager attention, which counts it all.
Seconds: rounds of calibration (`thrifty device`) and of measured steps are interleaved, since the
machine's speed drifts; repeats that differ by more than 10% print 'machine busy', and such a row is
no measurement. Memory, each setting in a process of its own: the rise of the peak over the level
after loading the model, of the resident set on a CPU (with MALLOC_MMAP_THRESHOLD_=65536, or freed
blocks stay resident), of the allocator on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from material import heading
from thrifty import display
from thrifty.calibration import measure_device
from thrifty.core import quantities
from thrifty.costs.flops import train_flops
from thrifty.costs.memory import MemorySetting, account
from thrifty.costs.operations import Adapter
from thrifty.costs.shape import ModelShape
from thrifty.costs.time import step_seconds
from thrifty.signals.peak_memory import memory_bytes, peak_memory_bytes, reset_peak


class Case(NamedTuple):
    """A model and how it is trained."""

    dtype: str
    hidden: int
    layers: int
    inner: int
    vocabulary: int
    heads: int
    micro_batch: int
    sequence: int
    adapter: Adapter | None = None
    recompute: int = 0

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.hidden, self.layers, self.inner, self.vocabulary, self.heads

    @property
    def technique(self) -> str:
        trained = "full" if self.adapter is None else f"lora r{self.adapter.rank}"
        return trained + (" recompute" if self.recompute else "")


SETTINGS = (
    Case("float32", 128, 3, 512, 2048, 4, 8, 256),
    Case("float32", 128, 4, 344, 2048, 4, 16, 256),
    Case("float32", 256, 4, 704, 4096, 4, 4, 256),
    # Activations of over 300 MiB.
    Case("float32", 256, 6, 704, 8192, 8, 16, 256),
    Case("bfloat16", 256, 4, 704, 4096, 4, 8, 256),
)


def llama(hidden, layers, inner, vocabulary, heads, sequence, attention="sdpa"):
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=sequence,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config)


def inputs_of(vocabulary, batch, sequence, device):
    ids = torch.randint(0, vocabulary, (batch, sequence), device=device)
    half = torch.arange(sequence, device=device) % (sequence // 2)
    return {"input_ids": ids, "labels": ids, "position_ids": half.repeat(batch, 1)}


def step(model, optimizer, inputs):
    model(**inputs, use_cache=False).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def counted_flops(sizes, batch, sequence):
    model = llama(*sizes, sequence, attention="eager")
    counter = FlopCounterMode(display=False)
    with counter:
        model(**inputs_of(sizes[3], batch, sequence, "cpu"), use_cache=False).loss.backward()
    return counter.get_total_flops()


def prepared(case: Case, where: str):
    """Model, optimizer, inputs, shape and setting of a case."""
    torch.manual_seed(0)
    model = llama(*case.sizes, case.sequence).to(where, getattr(torch, case.dtype))
    shape = ModelShape.from_config(model.config.to_dict())
    if case.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if case.adapter is not None:
        from peft import LoraConfig, get_peft_model

        targets = list(case.adapter.targets or shape.lora_targets)
        model = get_peft_model(model, LoraConfig(r=case.adapter.rank, target_modules=targets))
    model.train()
    setting = MemorySetting(
        micro_batch=case.micro_batch,
        sequence=case.sequence,
        dtype=case.dtype,
        adapter=case.adapter,
        recompute=case.recompute,
        device_kind=where,
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    inputs = inputs_of(case.vocabulary, case.micro_batch, case.sequence, where)
    return model, optimizer, inputs, shape, setting


def measured_rise(number, where):
    """Bytes above the level after loading, over two steps; run in a process of its own."""
    model, optimizer, inputs, _, _ = prepared(SETTINGS[number], where)
    gc.collect()
    level = memory_bytes(where)
    reset_peak(where)
    step(model, optimizer, inputs)
    step(model, optimizer, inputs)
    return peak_memory_bytes(where) - level


def rise_in_child(number):
    command = [sys.executable, __file__, "--memory-of", str(number)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def timed(case: Case, where: str) -> float:
    """Median seconds of three steps after two."""
    model, optimizer, inputs, _, _ = prepared(case, where)
    found = []
    for _ in range(5):
        start = time.perf_counter()
        step(model, optimizer, inputs)
        if where == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:])


@dataclass
class Seconds:
    """Of one case: a number a round."""

    predicted: list[float] = field(default_factory=list)
    measured: list[float] = field(default_factory=list)

    @property
    def off(self) -> float:
        """Each round's prediction is from that round's calibration."""
        pairs = zip(self.predicted, self.measured, strict=True)
        return statistics.median(predicted / measured for predicted, measured in pairs) - 1

    @property
    def spread(self) -> float:
        return (max(self.measured) - min(self.measured)) / statistics.median(self.measured)

    @property
    def repeats(self) -> str:
        return f"{self.spread:.0%}" + (", machine busy" if self.spread > 0.1 else "")


def interleaved(
    cases: Sequence[Case], rounds: int, *, calibrate_every: int = 1
) -> tuple[list[Seconds], bool]:
    """Rounds of calibration and measured steps; also whether a calibration found a busy machine."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    found, busy = [Seconds() for _ in cases], False
    for turn in range(rounds):
        for number, case in enumerate(cases):
            if number % calibrate_every == 0:
                device = measure_device()
                busy = busy or device.machine_busy
            *_, shape, setting = prepared(case, where)
            found[number].measured.append(timed(case, where))
            found[number].predicted.append(step_seconds(shape, setting, device))
        print(f"round {turn + 1} of {rounds}", file=sys.stderr)
    return found, busy


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-of", type=int)
    options = parser.parse_args()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    if options.memory_of is not None:
        print(measured_rise(options.memory_of, where))
        return 0
    seconds, busy = interleaved(SETTINGS, options.rounds)
    rows = []
    for number, (case, found) in enumerate(zip(SETTINGS, seconds, strict=True)):
        model, _, _, shape, setting = prepared(case, where)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        del model
        counted = counted_flops(case.sizes, case.micro_batch, case.sequence)
        off = train_flops(shape, case.micro_batch, case.sequence) / counted - 1
        terms = account(shape, setting)
        rise, predicted_rise = rise_in_child(number), terms.peak_memory_bytes - weights
        rows.append(
            (
                f"{case.hidden} x {case.layers}, {shape.num_parameters / 1e6:.1f}M, "
                f"{case.micro_batch} x {case.sequence} {case.dtype}",
                f"{off:+.2%}",
                f"{statistics.median(found.predicted):.3f}",
                f"{statistics.median(found.measured):.3f}",
                f"{found.off:+.0%}",
                found.repeats,
                quantities.format_bytes(terms.by_term["activations"]),
                quantities.format_bytes(predicted_rise),
                quantities.format_bytes(rise),
                f"{predicted_rise / rise - 1:+.1%}",
            )
        )
    print(heading("Predicted against measured, a training step"))
    if busy:
        print("machine busy during a calibration: repeats differed by more than 10%")
    headers = ("width x layers, size, batch", "FLOPs", "s pred.", "s meas.", "off", "repeats")
    headers += ("activations", "rise pred.", "rise meas.", "off")
    print(display.table(headers, rows, right="lrrrrrrrrr"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
