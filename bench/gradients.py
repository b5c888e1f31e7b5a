"""Examples a core-second whose gradients are scored against a target's, and how well they agree
with exact cosines.

    OMP_NUM_THREADS=1 python bench/gradients.py [--rounds 3] [--width 256] [--rows 256]

A Llama of 4 layers (``--width`` 256: heads 4, inner 704, vocabulary 4,096), random weights and a
LoRA of rank 8 on every linear, warmed up for 40 steps; ``--rows`` sequences of 128 tokens about
eight topics, and 16 target sequences of the first. Ways are timed in turns, in CPU time of this
process; plain training with the same batches stands beside them. 'agrees' is Pearson's and
Spearman's correlation of a row's mean cosine with the target and the exact one, and which share of
the best tenth is the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from scipy.stats import spearmanr
from transformers import LlamaConfig, LlamaForCausalLM

from material import heading
from thrifty import display
from thrifty.costs.shape import ModelShape
from thrifty.signals.adapters import adapter_weights, with_adapter
from thrifty.signals.example_gradients import ExampleGradients
from thrifty.signals.sketch import CountSketch

SEQUENCE, TARGETS, TOPICS, DIMENSIONS, BATCH = 128, 16, 8, 8192, 16


class Job:
    """The model, the rows and the target."""

    def __init__(self, width: int, num_rows: int) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=4096,
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        )
        shape = ModelShape.from_config(config.to_dict())
        self.model = with_adapter(LlamaForCausalLM(config), shape.lora_targets, 8, 16.0, 0)
        topics = torch.arange(num_rows) % TOPICS
        self.rows = self._sequences(topics)
        self.target = self._sequences(torch.zeros(TARGETS, dtype=torch.long))
        self.weights = adapter_weights(self.model)
        self._warm_up()
        self.model.eval()
        self.sketch = CountSketch(sum(w.numel() for w in self.weights), DIMENSIONS, 0)
        self.sketch(torch.zeros(1, self.sketch.num_elements))  # its hashes are made once

    def _sequences(self, topics: torch.Tensor) -> torch.Tensor:
        """Each topic has 64 words of its own among 4,096, half of its text."""
        own = topics[:, None] * 64 + torch.randint(0, 64, (len(topics), SEQUENCE))
        other = torch.randint(512, 4096, own.shape)
        return torch.where(torch.rand(own.shape) < 0.5, own, other)

    def _warm_up(self) -> None:
        optimizer = torch.optim.AdamW(self.weights, lr=1e-3)
        for step in range(40):
            batch = self.rows[torch.arange(step * 8, step * 8 + 8) % len(self.rows)]
            self.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    def loss(self, ids: torch.Tensor) -> Any:
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def gradients(self, ids: torch.Tensor) -> Any:
        keep = torch.ones(len(ids), ids.shape[1] - 1, dtype=torch.bool)
        with ExampleGradients(self.model, self.weights) as each:
            return each.of(ids, keep)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True)


def training(job: Job, ids: torch.Tensor) -> None:
    for weight in job.weights:
        weight.requires_grad_(True)
    for batch in ids.split(BATCH):
        job.loss(batch).backward()
        for weight in job.weights:
            weight.grad = None


def one_by_one(job: Job, ids: torch.Tensor) -> torch.Tensor:
    for weight in job.weights:
        weight.requires_grad_(True)
    return torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(job.loss(row[None]), job.weights)])
            for row in ids
        ]
    )


def one_by_one_sketched(job: Job, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([job.sketch(one_by_one(job, row[None])) for row in ids])


def one_by_one_dense(job: Job, ids: torch.Tensor) -> torch.Tensor:
    """LESS's recipe on a CPU: a dense projection whose blocks are drawn anew for 16 rows."""
    found = torch.zeros(len(ids), DIMENSIONS)
    for start in range(0, len(ids), 16):
        some = one_by_one(job, ids[start : start + 16])
        for block in range(0, DIMENSIONS, 128):
            generator = torch.Generator().manual_seed(block)
            signs = torch.randint(0, 2, (some.shape[1], 128), generator=generator).float() * 2 - 1
            found[start : start + 16, block : block + 128] = some @ signs
    return found


def vmapped(job: Job, ids: torch.Tensor) -> torch.Tensor:
    wanted = {n: p.detach() for n, p in job.model.named_parameters() if "lora_" in n}
    rest = {n: p.detach() for n, p in job.model.named_parameters() if n not in wanted}

    def loss(weights: dict[str, Any], row: torch.Tensor) -> Any:
        shown = (row[None],)
        put_out = torch.func.functional_call(
            job.model, {**rest, **weights}, shown, {"use_cache": False}
        )
        return torch.nn.functional.cross_entropy(put_out.logits[0, :-1], row[1:])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    found = [torch.cat([g.flatten(1) for g in each(wanted, b).values()], 1)
             for b in ids.split(BATCH)]  # fmt: skip
    return torch.cat(found)


def hooks_exact(job: Job, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([job.gradients(batch).flat() for batch in ids.split(BATCH)])


def hooks_sketched(job: Job, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([job.sketch(job.gradients(batch).flat()) for batch in ids.split(BATCH)])


def hooks_products(job: Job, ids: torch.Tensor) -> torch.Tensor:
    """Cosines with the target themselves, nothing stored."""
    towards = unit(hooks_exact(job, job.target))
    parts = list(towards.split([w.numel() for w in job.weights], dim=1))
    found = []
    for batch in ids.split(BATCH):
        gradients = job.gradients(batch)
        norms = gradients.squared_norms().sqrt()
        found.append(gradients.products(parts) / norms[:, None])
    return torch.cat(found)


WAYS: dict[str, tuple[Callable[[Job, torch.Tensor], Any], int, str]] = {
    "training": (training, 1, ""),
    "one by one, exact": (one_by_one, 4, "exact"),
    "one by one + count-sketch": (one_by_one_sketched, 4, "vectors"),
    "one by one + dense, drawn anew (LESS's recipe)": (one_by_one_dense, 16, "vectors"),
    "vmap, exact": (vmapped, 1, "exact"),
    "hooks, exact": (hooks_exact, 1, "exact"),
    "hooks + count-sketch": (hooks_sketched, 1, "vectors"),
    "hooks, products with a known target": (hooks_products, 1, "cosines"),
}
"""Way -> what it runs, on which share of the rows it is timed (one in so many), what it gives."""


def agreement(found: torch.Tensor, towards: torch.Tensor, exact: torch.Tensor) -> str:
    cosines = found if towards is found else unit(found) @ unit(towards).T
    mean, true = cosines.mean(1), exact[: len(cosines)].mean(1)
    pearson = torch.corrcoef(torch.stack([mean, true]))[0, 1]
    most = max(1, len(mean) // 10)
    same = set(mean.topk(most).indices.tolist()) & set(true.topk(most).indices.tolist())
    return f"{pearson:.3f} / {spearmanr(mean, true)[0]:.3f} / {len(same) / most:.2f}"


def _line(
    name: str, speeds: list[float], training: list[float], agrees: dict[str, str]
) -> tuple[str, ...]:
    middle = statistics.median(speeds)
    shares = [one / other for one, other in zip(speeds, training, strict=True)]
    spread = (max(speeds) - min(speeds)) / middle
    return (
        name,
        f"{middle:.2f}",
        f"{statistics.median(shares):.2f}",
        f"{spread:.0%}",
        agrees.get(name, ""),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", type=int, default=256)
    options = parser.parse_args()
    display.quiet_libraries()
    job = Job(options.width, options.rows)
    exact = unit(hooks_exact(job, job.rows)) @ unit(hooks_exact(job, job.target)).T
    speeds: dict[str, list[float]] = {name: [] for name in WAYS}
    agrees: dict[str, str] = {}
    for number in range(options.rounds):
        for name, (way, one_in, gives) in WAYS.items():
            rows = job.rows[: max(BATCH, options.rows // one_in)]
            start = time.process_time()
            found = way(job, rows)
            speeds[name].append(len(rows) / (time.process_time() - start))
            if number or not gives:
                continue
            towards = found if gives == "cosines" else way(job, job.target)
            agrees[name] = agreement(found, towards, exact)
    what = f"{options.width} wide, {options.rows} rows, {options.rounds} rounds in turns"
    print(heading(f"Gradients of examples, {what}"))
    rows = [_line(name, found, speeds["training"], agrees) for name, found in speeds.items()]
    headers = ("way", "rows a core-second", "of training", "spread", "agrees")
    print(display.table(headers, rows, right="lrrrr"))


if __name__ == "__main__":
    main()
