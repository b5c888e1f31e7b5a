"""Predicted against measured: FLOPs, seconds and memory of real training steps.

    MALLOC_MMAP_THRESHOLD_=65536 python bench/accuracy.py [--rounds 3]

Per setting, rounds of calibration (`thrifty device`) and of measured steps are interleaved, since
the machine's speed drifts. FLOPs are checked against ``torch.utils.flop_counter`` under eager
attention, which counts all of it. Memory is the rise of the peak over the level after loading the
model: of the resident set on a CPU (MALLOC_MMAP_THRESHOLD_=65536, or freed blocks stay resident),
of the allocator on a GPU. Repeats that differ by more than 10% print 'machine busy'; such a row is
no measurement.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
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

# hidden, layers, intermediate, vocabulary, heads, micro-batch, sequence; the last has activations
# of over 300 MiB.
SETTINGS = (
    (128, 3, 512, 2048, 4, 8, 256),
    (128, 4, 344, 2048, 4, 16, 256),
    (256, 4, 704, 4096, 4, 4, 256),
    (256, 6, 704, 8192, 8, 16, 256),
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


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    if where == "cpu" and os.environ.get("MALLOC_MMAP_THRESHOLD_") != "65536":
        print("set MALLOC_MMAP_THRESHOLD_=65536 before starting", file=sys.stderr)
        return 2
    rows, worst = [], 0.0
    predicted: dict[int, list[float]] = {}
    seconds: dict[int, list[float]] = {}
    memory = {}
    busy = False
    for turn in range(options.rounds):
        device = measure_device()
        busy = busy or device.machine_busy
        for number, (*sizes, batch, sequence) in enumerate(SETTINGS):
            torch.manual_seed(0)
            model = llama(*sizes, sequence).to(where)
            shape = ModelShape.from_config(model.config.to_dict())
            setting = MemorySetting(
                micro_batch=batch, sequence=sequence, dtype="float32", device_kind=where
            )
            inputs = inputs_of(sizes[3], batch, sequence, where)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            gc.collect()
            level = memory_bytes(where)
            reset_peak(where)
            step(model, optimizer, inputs)
            step(model, optimizer, inputs)
            rise = peak_memory_bytes(where) - level
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            terms = account(shape, setting)
            memory[number] = (terms.peak_memory_bytes - weights, rise, terms.by_term)
            found = []
            for _ in range(3):
                start = time.perf_counter()
                step(model, optimizer, inputs)
                if where == "cuda":
                    torch.cuda.synchronize()
                found.append(time.perf_counter() - start)
            seconds.setdefault(number, []).append(statistics.median(found))
            predicted.setdefault(number, []).append(step_seconds(shape, setting, device))
            del model, optimizer, inputs
        print(f"round {turn + 1} of {options.rounds}", file=sys.stderr)
    for number, (*sizes, batch, sequence) in enumerate(SETTINGS):
        shape = ModelShape.from_config(llama(*sizes, sequence).config.to_dict())
        flops = train_flops(shape, batch, sequence)
        counted = counted_flops(sizes, batch, sequence)
        ratio = statistics.median(
            p / s for p, s in zip(predicted[number], seconds[number], strict=True)
        )
        spread = (max(seconds[number]) - min(seconds[number])) / statistics.median(seconds[number])
        worst = max(worst, abs(ratio - 1))
        told, rise, terms = memory[number]
        rows.append(
            (
                f"{sizes[0]} x {sizes[1]}, {shape.num_parameters / 1e6:.1f}M, {batch} x {sequence}",
                f"{flops / counted - 1:+.2%}",
                f"{statistics.median(predicted[number]):.3f}",
                f"{statistics.median(seconds[number]):.3f}",
                f"{ratio - 1:+.0%}",
                "machine busy" if spread > 0.1 else f"{spread:.0%}",
                quantities.format_bytes(terms["activations"]),
                quantities.format_bytes(told),
                quantities.format_bytes(rise),
                f"{told / rise - 1:+.1%}",
            )
        )
    print(heading("Predicted against measured, a training step"))
    if busy:
        print("machine busy during calibration: repeats differed by more than 10%")
    headers = ("width x layers, size, batch", "FLOPs", "s pred.", "s meas.", "off", "repeats")
    headers += ("activations", "rise pred.", "rise meas.", "off")
    print(display.table(headers, rows, right="lrrrrrrrrr"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
