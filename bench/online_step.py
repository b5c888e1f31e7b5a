"""What choosing rows inside a step takes, beside a plain step on the same batch.

    OMP_NUM_THREADS=1 python bench/online_step.py [--rounds 5] [--width 256] [--dtype float32]

A Llama of 4 layers, random weights; a micro-batch of two packs of 1,024 tokens, rows of 40 to 200
tokens; all weights or LoRA of rank 8 trained. Timed in turns, in CPU time of this process: forward,
backward and the gradients of what is trained. 'predicted' is the price that a plan sees.
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from gradients import llama_config
from material import heading
from thrifty import display
from thrifty.core.budget import Cost
from thrifty.core.contracts import Chosen
from thrifty.core.resolve import resolve
from thrifty.costs.flops import step_flops
from thrifty.costs.setting import Adapter, MemorySetting
from thrifty.costs.shape import ModelShape
from thrifty.data.packing import PackedDataset
from thrifty.rounds import Rounds
from thrifty.signals.adapters import with_adapter
from thrifty.signals.gradients import trained_elements
from thrifty.step_choice import StepChoice

PACKS, SEQUENCE = 2, 1024
RANK = 8


def model_of(width: int, dtype: torch.dtype, method: str) -> tuple[Any, ModelShape]:
    torch.manual_seed(0)
    config = llama_config(width)
    shape = ModelShape.from_config(config.to_dict())
    model: Any = LlamaForCausalLM(config).to(dtype)
    if method == "lora":
        model = with_adapter(model, shape.lora_targets, RANK, 16.0, 0)
    return model.train(), shape


def batch_of() -> tuple[Chosen, dict[str, torch.Tensor]]:
    random = np.random.default_rng(0)
    sizes = random.integers(40, 200, 64)
    rows = [
        SimpleNamespace(
            input_ids=random.integers(0, 4096, size).astype(np.int32),
            loss_mask=np.ones(size, dtype=bool),
        )
        for size in sizes
    ]
    chosen = Chosen(tokens=rows, num_tokens=sizes, scores=np.zeros(64, dtype=np.float32))
    data = PackedDataset(rows, SEQUENCE, num_items=PACKS, tells_rows=True, window=16)
    items = [data[i] for i in range(PACKS)]
    return chosen, {name: torch.stack([item[name] for item in items]) for name in items[0]}


def plain(model: Any, batch: dict[str, torch.Tensor]) -> None:
    shown = {name: batch[name] for name in ("input_ids", "position_ids", "labels")}
    model(**shown, use_cache=False).loss.backward()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    display.quiet_libraries()
    chosen, batch = batch_of()
    rows = []
    for method in ("full", "lora"):
        model, shape = model_of(options.width, getattr(torch, options.dtype), method)
        adapter = Adapter(rank=RANK) if method == "lora" else None
        setting = MemorySetting(
            micro_batch=PACKS, sequence=SEQUENCE, dtype=options.dtype, adapter=adapter
        )
        step = Cost(flops=step_flops(shape, setting), seconds=1.0)
        ways: dict[str, Any] = {"plain": lambda m=model: plain(m, batch)}
        more = {"plain": 1.0}
        for layers in (1, 2, 0):
            greats = resolve("online", {"greats": {"layers": layers}})
            size = trained_elements(shape, adapter, layers)
            known = {"target": np.random.default_rng(1).normal(size=size).astype(np.float32)}
            choice = StepChoice(model, Rounds(greats, chosen, known, num_tokens=1e5, seed=0))
            name = f"greats, {f'last {layers}' if layers else 'all'} layers"
            ways[name] = lambda c=choice: c.step(batch, None)
            more[name] = greats.step_cost(step, shape, setting).flops / step.flops
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds + 1):
            for name, way in ways.items():
                start = time.process_time()
                way()
                seconds[name].append(time.process_time() - start)
                model.zero_grad()
        for name, each in seconds.items():
            ratios = [
                one / other for one, other in zip(each[1:], seconds["plain"][1:], strict=True)
            ]
            middle = statistics.median(ratios)
            spread = (max(ratios) - min(ratios)) / middle
            took = f"{statistics.median(each[1:]):.3f}"
            rows.append((method, name, took, f"{middle:.2f}", f"{more[name]:.2f}", f"{spread:.0%}"))
    what = f"{options.width} wide, {options.dtype}, {options.rounds} rounds in turns"
    print(heading(f"A step that chooses its rows, {what}"))
    headers = ("trained", "step", "CPU s", "of plain", "predicted", "spread")
    print(display.table(headers, rows, right="llrrrr"))


if __name__ == "__main__":
    main()
