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

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from material import heading
from thrifty import display
from thrifty.calibration import measure_device
from thrifty.core import quantities
from thrifty.costs.flops import train_flops
from thrifty.costs.memory import MemorySetting, account
from thrifty.costs.shape import ModelShape
from thrifty.costs.time import step_seconds
from thrifty.signals.peak_memory import memory_bytes, peak_memory_bytes, reset_peak

# dtype, hidden, layers, intermediate, vocabulary, heads, micro-batch, sequence; the fourth has
# activations of over 300 MiB.
SETTINGS = (
    ("float32", 128, 3, 512, 2048, 4, 8, 256),
    ("float32", 128, 4, 344, 2048, 4, 16, 256),
    ("float32", 256, 4, 704, 4096, 4, 4, 256),
    ("float32", 256, 6, 704, 8192, 8, 16, 256),
    ("bfloat16", 256, 4, 704, 4096, 4, 8, 256),
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


def prepared(number, where):
    """Model, optimizer, inputs, shape and setting of a row."""
    dtype, *sizes, batch, sequence = SETTINGS[number]
    torch.manual_seed(0)
    model = llama(*sizes, sequence).to(where, getattr(torch, dtype))
    shape = ModelShape.from_config(model.config.to_dict())
    setting = MemorySetting(micro_batch=batch, sequence=sequence, dtype=dtype, device_kind=where)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return model, optimizer, inputs_of(sizes[3], batch, sequence, where), shape, setting


def measured_rise(number, where):
    """Bytes above the level after loading, over two steps; run in a process of its own."""
    model, optimizer, inputs, _, _ = prepared(number, where)
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


def timed(number, where):
    """Median seconds of three steps after two."""
    model, optimizer, inputs, _, _ = prepared(number, where)
    found = []
    for _ in range(5):
        start = time.perf_counter()
        step(model, optimizer, inputs)
        if where == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-of", type=int)
    options = parser.parse_args()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    if options.memory_of is not None:
        print(measured_rise(options.memory_of, where))
        return 0
    numbers = range(len(SETTINGS))
    ratios = {number: [] for number in numbers}
    seconds = {number: [] for number in numbers}
    told = {number: [] for number in numbers}
    busy = False
    for turn in range(options.rounds):
        for number in numbers:
            device = measure_device()
            busy = busy or device.machine_busy
            _, _, _, shape, setting = prepared(number, where)
            found = timed(number, where)
            predicted = step_seconds(shape, setting, device)
            seconds[number].append(found)
            told[number].append(predicted)
            ratios[number].append(predicted / found)
        print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
    rows = []
    for number in numbers:
        dtype, *sizes, batch, sequence = SETTINGS[number]
        model, _, _, shape, setting = prepared(number, where)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        del model
        off = train_flops(shape, batch, sequence) / counted_flops(sizes, batch, sequence) - 1
        middle = statistics.median(seconds[number])
        spread = (max(seconds[number]) - min(seconds[number])) / middle
        terms = account(shape, setting)
        rise, predicted_rise = rise_in_child(number), terms.peak_memory_bytes - weights
        rows.append(
            (
                f"{sizes[0]} x {sizes[1]}, {shape.num_parameters / 1e6:.1f}M, "
                f"{batch} x {sequence} {dtype}",
                f"{off:+.2%}",
                f"{statistics.median(told[number]):.3f}",
                f"{middle:.3f}",
                f"{statistics.median(ratios[number]) - 1:+.0%}",
                f"{spread:.0%}" + (", machine busy" if spread > 0.1 else ""),
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
