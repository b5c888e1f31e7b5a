"""Examples a core-second whose gradients are scored against a target's, and how well they agree
with exact cosines.

    OMP_NUM_THREADS=1 python bench/gradients.py [--rounds 3] [--width 256] [--rows 256] [--full]
        [--dtype float32] [--peer NAME=PYTHON ...] [--without "NAME;..."] [--memory]

A Llama of 4 layers (``--width`` 256: heads 4, inner 704, vocabulary 4,096), random weights and a
LoRA of rank 8 on every linear, warmed up for 40 steps; ``--full``: no adapter, all weights of the
layers' linears. ``--rows`` sequences of 128 tokens about eight topics, and 16 target sequences of
the first. A topic has words of its own and an order of its own in which they follow each other, so
that the exact cosines of rows differ by more than the error of a sketch, and what is measured is
the sketch. Ways are timed in turns, in CPU time; plain training with the same batches stands beside
them. 'agrees' is Pearson's and Spearman's correlation of a row's mean cosine with the target and
the exact one, and which share of the best tenth is the same.

``--peer``: another library (``gradient_peers.py``) under the Python that has it, in turn with the
rest, in a process of its own whose loading does not count: traker, kronfluence, dattri, bergson and
bergson-exact. Pythons that are not there are left out.

``--memory``: instead of speed the most bytes at a time for one batch, of training and of the hooks,
as the allocator reports them, weights (and AdamW's states, of training) included: the same on a
busy machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr
from transformers import LlamaConfig, LlamaForCausalLM

from material import heading
from thrifty import display
from thrifty.costs.shape import ModelShape
from thrifty.signals.adapters import with_adapter
from thrifty.signals.example_gradients import ExampleGradients
from thrifty.signals.sketch import CountSketch

SEQUENCE, TARGETS, TOPICS, WORDS, DIMENSIONS, BATCH = 128, 16, 8, 16, 8192, 16


def llama_config(width: int) -> LlamaConfig:
    """Of 4 layers, 4 heads and 4,096 tokens."""
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )


class Job:
    """The model, the rows and the target."""

    def __init__(self, width: int, num_rows: int, *, full: bool, dtype: str) -> None:
        torch.manual_seed(0)
        config = llama_config(width)
        linears = ModelShape.from_config(config.to_dict()).lora_targets
        self.model: Any = LlamaForCausalLM(config)
        if not full:
            self.model = with_adapter(self.model, linears, 8, 16.0, 0)
        self.successors = torch.randint(0, WORDS, (TOPICS, WORDS, 4))
        self.rows = self._sequences(torch.arange(num_rows) % TOPICS)
        self.target = self._sequences(torch.zeros(TARGETS, dtype=torch.long))
        self.modules = [
            name
            for name, module in self.model.named_modules()
            if type(module) is torch.nn.Linear
            and (name.split(".")[-1] in linears if full else "lora_" in name)
        ]
        """Names of the linears whose weights are asked for."""
        self.weights = [self.model.get_submodule(name).weight for name in self.modules]
        self._warm_up()
        self.model.eval()
        self.sketch = CountSketch(sum(w.numel() for w in self.weights), DIMENSIONS, 0)
        self.sketch(torch.zeros(1, self.sketch.num_elements))  # its hashes are made once
        self.exact, self.norms, self.target_norms = self._exactly()
        self.model.to(getattr(torch, dtype))

    def _sequences(self, topics: torch.Tensor) -> torch.Tensor:
        """A word is one of four that follow the last in the topic's order; one in five is any."""
        at = torch.randint(0, WORDS, topics.shape)
        found = []
        for _ in range(SEQUENCE):
            found.append(topics * WORDS + at)
            following = self.successors[topics, at, torch.randint(0, 4, topics.shape)]
            anything = torch.randint(0, WORDS, topics.shape)
            at = torch.where(torch.rand(topics.shape) < 0.8, following, anything)
        return torch.stack(found, dim=1)

    def _warm_up(self) -> None:
        optimizer = torch.optim.AdamW(self.weights, lr=1e-3)
        for step in range(40):
            batch = self.rows[torch.arange(step * 8, step * 8 + 8) % len(self.rows)]
            self.loss(batch).backward()
            optimizer.step()
            self.model.zero_grad()

    def _exactly(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cosines [rows, targets] and both sides' norms, in float32."""
        target = hooks_exact(self, self.target)
        norms = target.norm(dim=1)
        parts = list((target / norms[:, None]).split([w.numel() for w in self.weights], dim=1))
        products, sizes = [], []
        for batch in self.rows.split(BATCH):
            gradients = self.gradients(batch)
            products.append(gradients.products(parts))
            sizes.append(gradients.squared_norms().sqrt())
        size = torch.cat(sizes)
        return torch.cat(products) / size[:, None], size, norms

    def save(self, folder: Path) -> None:
        """For other libraries."""
        base = copy.deepcopy(self.model)
        if hasattr(base, "peft_config"):
            base.save_pretrained(folder / "adapter")
            base = base.unload()
        base.save_pretrained(folder / "base")
        save_file({"rows": self.rows, "target": self.target}, folder / "rows.safetensors")
        (folder / "modules.json").write_text(json.dumps(self.modules), encoding="utf-8")

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
    names = {f"{name}.weight" for name in job.modules}
    wanted = {n: p.detach() for n, p in job.model.named_parameters() if n in names}
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
    "one by one, exact": (one_by_one, 4, "vectors"),
    "one by one + count-sketch": (one_by_one_sketched, 4, "vectors"),
    "one by one + dense, drawn anew (LESS's recipe)": (one_by_one_dense, 16, "vectors"),
    "vmap, exact": (vmapped, 1, "vectors"),
    "hooks, exact": (hooks_exact, 1, "vectors"),
    "hooks + count-sketch": (hooks_sketched, 1, "vectors"),
    "hooks, products with a known target": (hooks_products, 1, "cosines"),
}
"""Way -> what it runs, on which share of the rows it is timed (one in so many), what it gives."""


def agreement(cosines: torch.Tensor, exact: torch.Tensor) -> str:
    mean, true = cosines.mean(1), exact[: len(cosines)].mean(1)
    pearson = torch.corrcoef(torch.stack([mean, true]))[0, 1]
    most = max(1, len(mean) // 10)
    same = set(mean.topk(most).indices.tolist()) & set(true.topk(most).indices.tolist())
    return f"{pearson:.3f} / {spearmanr(mean, true)[0]:.3f} / {len(same) / most:.2f}"


def measured(job: Job, name: str, num_rows: int, compare: bool) -> tuple[float, str]:
    """Rows a second, and how well they agree."""
    way, one_in, gives = WAYS[name]
    rows = job.rows[: max(BATCH, num_rows // one_in)]
    start = time.process_time()
    found = way(job, rows)
    speed = len(rows) / (time.process_time() - start)
    if not (compare and gives):
        return speed, ""
    if gives == "vectors":
        found = unit(found.float()) @ unit(way(job, job.target).float()).T
    return speed, agreement(found, job.exact)


def of_peer(job: Job, name: str, python: str, folder: Path, compare: bool) -> tuple[float, str]:
    script = Path(__file__).resolve().with_name("gradient_peers.py")
    command = [str(Path(python).absolute()), str(script), name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        print(f"{name}: {done.stderr.strip()[-500:]}", file=sys.stderr)
        return float("nan"), "failed"
    told = json.loads(done.stdout.splitlines()[-1])
    speed = told["rows"] / told["seconds"]
    if not compare:
        return speed, ""
    found = {k: torch.from_numpy(v).float() for k, v in np.load(folder / "found.npz").items()}
    if "products" in found:
        cosines = found["products"] / job.norms[:, None] / job.target_norms
    else:
        cosines = unit(found["rows"]) @ unit(found["target"]).T
    return speed, agreement(cosines, job.exact)


def peaks(job: Job, names: list[str]) -> list[tuple[str, ...]]:
    """Of a batch: each way's rise above what is held, both together, and beside training."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "costs"))
    from tracing import allocated_peak

    ids = job.rows[:BATCH]
    optimizer = torch.optim.AdamW(job.weights, lr=0.0)

    def step() -> None:
        for weight in job.weights:
            weight.requires_grad_(True)
        job.loss(ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    weights = sum(weight.nbytes for weight in job.model.parameters())
    states = sum(each.nbytes for of in optimizer.state.values() for each in of.values())
    rises = {"training": allocated_peak(step)}
    plain = rises["training"] + weights + states
    for name in names:
        if name.startswith("hooks"):
            way = WAYS[name][0]
            rises[name] = allocated_peak(lambda way=way: way(job, ids))
    rows = []
    for name, rise in rises.items():
        total = rise + weights + (states if name == "training" else 0)
        rows.append((name, f"{rise / 2**20:.1f}", f"{total / 2**20:.1f}", f"{total / plain:.2f}"))
        print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    return rows


def _line(name: str, speeds: list[float], training: list[float], agrees: str) -> tuple[str, ...]:
    middle = statistics.median(speeds)
    shares = [one / other for one, other in zip(speeds, training, strict=True)]
    spread = (max(speeds) - min(speeds)) / middle
    return (
        name,
        f"{middle:.2f}",
        f"{statistics.median(shares):.2f}",
        f"{spread:.0%}{'' if spread <= 0.1 else ', no measurement'}",
        agrees,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--without", default="", metavar="NAME;...")
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    display.quiet_libraries()
    job = Job(options.width, options.rows, full=options.full, dtype=options.dtype)
    without = options.without.split(";")  # names have commas
    peers = dict(peer.split("=", 1) for peer in options.peer)
    for name in [name for name, python in peers.items() if not Path(python).exists()]:
        print(f"{name}: no {peers.pop(name)}, left out", file=sys.stderr)
    names = [name for name in WAYS if name not in without]
    of_what = "all weights of the layers' linears" if options.full else "LoRA of rank 8"
    what = f"{options.width} wide, {of_what} ({job.sketch.num_elements:,} elements), "
    if options.memory:
        print(heading(f"Gradients of examples, {what}{BATCH} rows of {SEQUENCE}, {options.dtype}"))
        headers: tuple[str, ...] = ("way", "rise, MiB", "with weights", "of training")
        print(display.table(headers, peaks(job, names), right="lrrr"))
        return
    speeds: dict[str, list[float]] = {name: [] for name in [*names, *peers]}
    agrees: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        job.save(folder)
        for number in range(options.rounds):
            for name in speeds:
                if name in peers:
                    speed, told = of_peer(job, name, peers[name], folder, not number)
                else:
                    speed, told = measured(job, name, options.rows, not number)
                speeds[name].append(speed)
                agrees.setdefault(name, told)
                print(f"{name}  {speed:.2f}  {told}", file=sys.stderr, flush=True)
    what += f"{options.rows} rows, {options.dtype}, {options.rounds} rounds in turns"
    print(heading(f"Gradients of examples, {what}"))
    spread = f"{job.exact.mean(1).min():.2f} to {job.exact.mean(1).max():.2f}"
    print(f"exact mean cosines {spread}, standard deviation {job.exact.mean(1).std():.3f}")
    rows = [_line(name, found, speeds["training"], agrees[name]) for name, found in speeds.items()]
    headers = ("way", "rows a core-second", "of training", "spread", "agrees")
    print(display.table(headers, rows, right="lrrrr"))


if __name__ == "__main__":
    main()
