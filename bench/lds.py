"""Whether scores say what training does: linear datamodeling scores, damaged rows found, and what
the scoring takes.

    OMP_NUM_THREADS=1 python bench/lds.py [SHARED/data] [--rows 200] [--subsets 50] [--seeds 2]
        [--results FILE.jsonl] [--only less,tracin] [--by-itself tracin,datainf]
        [--costs [--cost-rows 2000] [--smaller FOLDER]]

Model: stories260K; short undamaged rows of ten sources of the mixed pool, as many of each; a tenth
of them then get another row's answer. Without a folder a small model and functions of the standard
library. Adapters of rank 8 are trained on random halves of the rows, ``--seeds`` times each, and
the losses of ``--targets`` held-out rows measured; retrainings are kept in --results, which a
second run goes on with.

    LDS  = mean over target rows of  Spearman over subsets( sum of the subset's scores,
           the loss before training less the loss after it )                  (arXiv:2303.14186)

with the standard error of a bootstrap over subsets and target rows. 'seeds against seeds' is the
same between the drops of one half of the seeds and those of the other: how much there is to say.
'datamodel of the retrainings' is the linear model of scorer ``datamodel`` on these retrainings
themselves, each subset's drop predicted from those of the other four fifths.
AUROC: the probability that a row with another's answer ranks above another row, by its negative
mean score, and by its score for itself (``grand``: its score), which is asked of the methods in
``--by-itself`` alone, for it takes as many targets as there are rows.

``--costs`` prints what the scorers with a model take of the FLOPs of one epoch of full training on
--cost-rows rows of the pool: predicted by ``cost``, and measured by the meter.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.stats import rankdata

from material import heading, small_job
from thrifty import display
from thrifty.core.budget import Cost
from thrifty.core.contracts import Scorer, Work
from thrifty.core.resolve import all_names, resolve
from thrifty.costs.flops import train_flops
from thrifty.costs.hardware import load_device
from thrifty.costs.operations import Adapter
from thrifty.data.pool import Row, read_rows
from thrifty.data.store import Store, build_store, open_store
from thrifty.data.tokens import load_tokenizer, tokenizer_fingerprint
from thrifty.scorers.gradients.datamodel import subset_weights
from thrifty.signals.forward import example_losses
from thrifty.signals.models import LoadedModels
from thrifty.signals.proxy_run import proxy_run

Floats = NDArray[np.float64]

SOURCES: tuple[str, ...] = (
    "gsm8k",
    "wikisql",
    "medquad",
    "dolly",
    "flan-cot:creak",
    "flan-cot:sensemaking",
)
SOURCES += ("mbpp", "gpteacher-codegen", "legalbench", "flan-cot:ecqa")
MAX_LENGTH, MAX_CHARACTERS = 256, 200
EPOCHS, LEARNING_RATE, RANK = 3, 3e-3, 8
METHODS: tuple[str, ...] = ("uniform", "bm25", "embedding", "rds_grad", "grad_cosine", "tracin")
METHODS += ("less", "trak", "datainf", "ekfac", "logra", "influence_distillation", "grand")
TIMES = 1000
"""Of the bootstrap."""


class Tally:
    """A meter that adds up."""

    def __init__(self) -> None:
        self.cost = Cost()

    def tick(self, cost: Cost, *, steps: int = 0) -> None:
        self.cost += cost


# -- the rows -------------------------------------------------------------------------------------


def mixed_rows(data: Path, per_source: int) -> list[dict[str, str]]:
    """Short undamaged ones of every source, in turns."""
    columns = ["source", "corrupt", "prompt", "response"]
    table = pq.read_table(data / "mix" / "pool.parquet", columns=columns).to_pylist()
    by_source: list[list[dict[str, str]]] = []
    for source in SOURCES:
        found = [
            {"prompt": row["prompt"], "completion": row["response"]}
            for row in table
            if row["source"] == source
            and not row["corrupt"]
            and len(row["prompt"]) + len(row["response"]) < MAX_CHARACTERS
        ]
        chosen = np.random.default_rng(0).choice(len(found), per_source, replace=False)
        by_source.append([found[i] for i in chosen])
    return [row for rows in zip(*by_source, strict=True) for row in rows]


def library_rows(pool: Path, count: int) -> list[dict[str, str]]:
    rows = (row for row in read_rows([str(pool)]) if isinstance(row, Row))
    short = (row for row in rows if len(row.text) < MAX_CHARACTERS)
    return [
        {"prompt": row.prompt, "completion": row.completion}
        for row in itertools.islice(short, count)
    ]


class Task:
    """A model, rows to train on, of which a tenth have another row's answer, and target rows."""

    def __init__(self, data: Path | None, home: Path, num_rows: int, num_targets: int) -> None:
        total = num_rows + num_targets
        if data is None:
            job: dict[str, Any] = small_job(home)
            folder, rows = Path(job["model"]), library_rows(Path(job["pool"][0]), total)
        else:
            folder = data / "stories260K-hf"
            rows = mixed_rows(data, -(-total // len(SOURCES)))[:total]
        kept, held = rows[:num_rows], rows[num_rows:]
        self.swapped = np.zeros(len(kept), dtype=bool)
        self.swapped[np.random.default_rng(1).choice(len(kept), len(kept) // 10, False)] = True
        places = np.flatnonzero(self.swapped)
        answers = [kept[i]["completion"] for i in places]
        for place, answer in zip(places, answers[1:] + answers[:1], strict=True):
            kept[place] = kept[place] | {"completion": answer}
        self.models = LoadedModels(folder, "float32")
        self.pool = store_of(kept, home / "rows", folder)
        self.targets = store_of(held, home / "targets", folder)
        assert len(self.pool) == num_rows
        self.rows = self.pool.shard(0)
        held_rows = range(len(self.targets))
        self.each_target = {f"row{i}": self.targets.take([i]) for i in held_rows}
        self.each_row = {f"row{i}": self.pool.take([i]) for i in range(num_rows)}

    def losses(self, model: Any) -> Floats:
        """[targets], nats a token."""
        shown = self.targets.shard(0).tokens
        return np.asarray(example_losses(model, self.models.shape, shown, Tally()).mean)

    def retrained(self, subset: NDArray[np.intp], seed: int) -> Floats:
        """The targets' losses after training on a subset."""
        model = proxy_run(
            self.models.base(),
            self.models.shape,
            [self.rows.tokens[i] for i in subset],
            Tally(),
            epochs=EPOCHS,
            learning_rate=LEARNING_RATE,
            seed=seed,
            adapter=Adapter(rank=RANK),
        )
        return self.losses(model)


def store_of(rows: list[dict[str, str]], folder: Path, model: Path) -> Store:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = load_tokenizer(str(model))
    build_store(
        read_rows([str(file)]),
        folder / "store",
        tokenizer,
        MAX_LENGTH,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )
    return open_store(folder / "store")


# -- retraining -----------------------------------------------------------------------------------


def subsets_of(num_rows: int, count: int) -> list[NDArray[np.intp]]:
    random = np.random.default_rng(2)
    return [np.sort(random.permutation(num_rows)[: num_rows // 2]) for _ in range(count)]


def retrainings(task: Task, count: int, seeds: int, file: Path) -> Floats:
    """[subsets, seeds, targets]: losses; those that ``file`` has are not measured again."""
    settings = {
        "model": task.models.folder.name,
        "rows": len(task.pool),
        "targets": len(task.targets),
        "epochs": EPOCHS,
        "learning_rate": LEARNING_RATE,
        "rank": RANK,
    }
    lines = file.read_text().splitlines() if file.exists() else []
    if lines and json.loads(lines[0]) != settings:
        raise SystemExit(f"{file} is of {lines[0]}\nhint: name another --results")
    if not lines:
        file.write_text(json.dumps(settings) + "\n")
    known = {(row["subset"], row["seed"]): row["losses"] for row in map(json.loads, lines[1:])}
    subsets = subsets_of(len(task.pool), count)
    for seed, number in itertools.product(range(seeds), range(count)):
        if (number, seed) in known:
            continue
        known[number, seed] = task.retrained(subsets[number], seed).tolist()
        with file.open("a") as stream:
            row = {"subset": number, "seed": seed, "losses": known[number, seed]}
            stream.write(json.dumps(row) + "\n")
    return np.asarray([[known[n, s] for s in range(seeds)] for n in range(count)])


# -- scoring --------------------------------------------------------------------------------------


def scorer_for(name: str, num_rows: int) -> Scorer:
    """With the training that the retrainings have, where it trains."""
    same = {"max_warmup_rows": num_rows, "learning_rate": LEARNING_RATE, "epochs": EPOCHS}
    same |= {"rank": RANK, "max_target_rows": num_rows, "landmarks": num_rows // 4}
    known = {field.name for field in dataclasses.fields(resolve("scorer", name))}
    scorer: Scorer = resolve("scorer", {name: {k: v for k, v in same.items() if k in known}})
    return scorer


def scored(task: Task, name: str, towards: dict[str, Any]) -> tuple[Floats, float, float]:
    """[rows, targets], FLOPs, and the processor's seconds."""
    scorer, tally = scorer_for(name, len(task.pool)), Tally()
    start = time.process_time()
    given = towards if scorer.needs_target else {}
    state = scorer.prepare(task.pool, given, task.models, tally)
    found = scorer.score(task.rows, state, tally).astype(np.float64)
    return found, tally.cost.flops, time.process_time() - start


def correlations(predicted: Floats, measured: Floats) -> Floats:
    """Spearman's of each column: [subsets, targets] twice -> [targets]; 0 for a constant one."""
    ranks = [rankdata(each, axis=0) for each in (predicted, measured)]
    one, other = (each - each.mean(0) for each in ranks)
    size = np.sqrt((one**2).sum(0) * (other**2).sum(0))
    return (one * other).sum(0) / np.where(size > 0, size, np.inf)


def with_error(predicted: Floats, measured: Floats) -> str:
    random, found = np.random.default_rng(3), []
    subsets, targets = measured.shape
    for _ in range(TIMES):
        some = np.ix_(random.integers(0, subsets, subsets), random.integers(0, targets, targets))
        found.append(correlations(predicted[some], measured[some]).mean())
    return f"{correlations(predicted, measured).mean():+.3f} ± {np.std(found):.3f}"


def of_other_subsets(subsets: list[NDArray[np.intp]], num_rows: int, drop: Floats) -> Floats:
    """[subsets, targets]: a datamodel's, of a fifth of the subsets from the others."""
    chosen = np.zeros((len(subsets), num_rows))
    for number, subset in enumerate(subsets):
        chosen[number, subset] = 1.0
    found = np.zeros_like(drop)
    for fold in range(5):
        out = np.arange(len(subsets)) % 5 == fold
        weights = subset_weights(chosen[~out], drop[~out])
        found[out] = (chosen[out] - chosen[~out].mean(0)) @ weights + drop[~out].mean(0)
    return found


def auroc(score: Floats, damaged: NDArray[np.bool_]) -> str:
    """Probability that a damaged row ranks above another."""
    n, m = int(damaged.sum()), int((~damaged).sum())
    return f"{(rankdata(score)[damaged].sum() - n * (n + 1) / 2) / (n * m):.2f}"


def table(
    task: Task, losses: Floats, names: list[str], by_itself: list[str]
) -> Iterator[tuple[str, ...]]:
    num_rows, num_targets = len(task.pool), len(task.targets)
    subsets = subsets_of(num_rows, len(losses))
    drop = task.losses(task.models.base()) - losses.mean(1)
    if losses.shape[1] > 1:
        half = losses.shape[1] // 2
        other = with_error(losses[:, :half].mean(1), losses[:, half : 2 * half].mean(1))
        yield "(seeds against seeds)", other, "", "", "", ""
    oracle = with_error(of_other_subsets(subsets, num_rows, drop), drop)
    yield "(datamodel of the retrainings)", oracle, "", "", "", ""
    for name in names:
        if name == "uniform":
            found = np.random.default_rng(4).random((num_rows, num_targets))
            flops = seconds = 0.0
        else:
            found, flops, seconds = scored(task, name, task.each_target)
        itself = ""
        if name in by_itself:
            itself = auroc(np.diagonal(scored(task, name, task.each_row)[0]), task.swapped)
        if found.shape[1] == 1:  # knows no target
            lds, against = "", ""
            itself = auroc(found[:, 0], task.swapped)
        else:
            sums = np.stack([found[subset].sum(0) for subset in subsets])
            lds, against = with_error(sums, drop), auroc(-found.mean(1), task.swapped)
        yield name, lds, against, itself, f"{flops / 1e9:.1f}", f"{seconds:.1f}"


# -- what scoring takes ---------------------------------------------------------------------------


def costs(task: Task, smaller: Path | None, names: list[str]) -> Iterator[tuple[str, ...]]:
    """In epochs of full training, one scorer after the other with its defaults."""
    tokens = task.rows.num_tokens
    epoch = sum(train_flops(task.models.shape, 1, int(length)) for length in tokens)
    targets = {"target": task.targets.shard(0)}
    models = {"itself": ""} | ({"smaller": str(smaller)} if smaller else {})
    for name, (which, path) in itertools.product(names, models.items()):
        known = {field.name for field in dataclasses.fields(resolve("scorer", name))}
        if path and "model" not in known:
            continue
        share = max(1, len(task.pool) // 20)  # as the paper of LESS has it
        options = {"model": path, "max_warmup_rows": share}
        scorer = resolve("scorer", {name: {k: v for k, v in options.items() if k in known}})
        if not scorer.needs_model:
            continue
        stats = {"target": task.targets.manifest.stats} if scorer.needs_target else {}
        work = Work(
            pool=task.pool.manifest.stats,
            targets=stats,
            shape=task.models.shape,
            device=load_device("h100"),
            max_length=MAX_LENGTH,
        )
        tally = Tally()
        state = scorer.prepare(
            task.pool, targets if scorer.needs_target else {}, task.models, tally
        )
        for shard in task.pool.shards():
            scorer.score(shard, state, tally)
        predicted = scorer.cost(work).flops
        off = f"{predicted / tally.cost.flops - 1:+.1%}"
        yield name, which, f"{predicted / epoch:.3f}", f"{tally.cost.flops / epoch:.3f}", off


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--targets", type=int, default=20)
    parser.add_argument("--subsets", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=None)
    parser.add_argument("--only", default=",".join(METHODS))
    parser.add_argument("--by-itself", default="tracin", help="scored for themselves too")
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--cost-rows", type=int, default=2000)
    parser.add_argument("--smaller", type=Path, default=None, help="a model, for --costs")
    options = parser.parse_args()
    display.quiet_libraries()
    there = set(all_names("scorer"))
    names = [name for name in options.only.split(",") if name in there]
    for name in set(options.only.split(",")) - there:
        print(f"{name}: there is no such scorer, left out", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        if options.costs:
            task = Task(options.data, home, options.cost_rows, options.targets)
            shown = costs(task, options.smaller, names)
            title = f"Scoring {options.cost_rows:,} rows, in epochs of full training on them"
            headers: tuple[str, ...] = ("method", "selector", "predicted", "measured", "off")
            right = "llrrr"
        else:
            task = Task(options.data, home, options.rows, options.targets)
            file = options.results or Path(tempfile.mkdtemp()) / "retrainings.jsonl"
            losses = retrainings(task, options.subsets, options.seeds, file)
            shown = table(task, losses, names, options.by_itself.split(","))
            title = f"Linear datamodeling scores, {options.rows} rows, {options.targets} targets, "
            title += f"{options.subsets} subsets, {options.seeds} seeds"
            headers = ("method", "LDS", "AUROC, against targets", "by itself", "GFLOP", "CPU s")
            right = "lrrrrr"
        rows = []
        for row in shown:
            rows.append(row)
            print(*row, sep="  ", file=sys.stderr, flush=True)
    print(heading(title))
    print(display.table(headers, rows, right=right))
    return 0


if __name__ == "__main__":
    sys.exit(main())
