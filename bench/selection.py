"""Ways to choose data, at one budget that pays for the choosing too.

    python bench/selection.py DATA [--flops 1.8e12] [--rows 5000 --share 0.2] [--only dsir,bm25]

Model: stories260K. Pool: the mixed pool, of which prompt and response alone are shown; targets:
mathematics and general questions. Each method keeps 5% of the pool's tokens and trains until the
budget of FLOPs, its scoring and the test included, is spent. Afterwards the columns that nothing
saw say which share of the kept rows is of a target's domain, and which was damaged on purpose. Also
the area under the ROC curve with which a score tells damaged rows from others, a kind at a time.

Rows are appended to --results as they come, so that several processes can share the work. What does
not fit the budget with its scoring is named and left out: --rows takes a part of the pool.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import rankdata

from material import heading
from mix import TARGETS, write_targets
from thrifty import display, stages
from thrifty.core.budget import Budget
from thrifty.core.plan import Target
from thrifty.planner import NoPlanFits
from thrifty.preparation import Asked, plan_run
from thrifty.run_folder import RunFolder

BM25 = {"scorer": "bm25", "picker": "balanced"}
WAYS: dict[str, dict[str, Any]] = {
    "uniform": {"scorer": "uniform", "picker": "top_k"},
    "length": {"scorer": "length", "picker": "top_k"},
    "bm25": BM25,
    "dsir": {"scorer": "dsir", "picker": "balanced"},
    "dsir by word": {"scorer": {"dsir": {"by": "word"}}, "picker": "balanced"},
    "dsir, gumbel": {"scorer": "dsir", "picker": "gumbel"},
    "quality": {"scorer": "quality", "picker": "balanced"},
    "embedding": {"scorer": "embedding", "picker": "balanced"},
    "embedding, round-robin": {"scorer": "embedding", "picker": "round_robin"},
    "perplexity, middle": {"scorer": "perplexity", "picker": "top_k"},
    "ifd": {"scorer": "ifd", "picker": "top_k"},
    "el2n, coverage": {"scorer": "el2n", "picker": "coverage"},
    "loss, low": {"scorer": {"loss": {"keep": "low"}}, "picker": "top_k"},
    "memorization": {"scorer": "memorization", "picker": "top_k"},
    "rho": {"scorer": "rho", "picker": "balanced"},
    "aum": {"scorer": {"aum": {"max_rows": 8000}}, "picker": "top_k"},
    "s2l": {"scorer": {"s2l": {"max_rows": 8000}}, "picker": "top_k"},
    "dsir by word, near duplicates out": {
        "scorer": {"dsir": {"by": "word"}},
        "picker": "balanced",
        "filters": ["duplicates", "overlap", "near_duplicates"],
    },
    "bm25, curriculum": {**BM25, "online": "curriculum"},
    "bm25, curriculum by length": {**BM25, "online": {"curriculum": {"by": "length"}}},
    "bm25, self-paced": {**BM25, "online": "self_paced"},
    "bm25, infobatch": {**BM25, "online": "infobatch"},
    "bm25, rho-1": {**BM25, "online": "rho1"},
    "bm25, ordered": {**BM25, "online": "ordered"},
    "quality, infobatch": {"scorer": "quality", "picker": "balanced", "online": "infobatch"},
    "quality, curriculum": {"scorer": "quality", "picker": "balanced", "online": "curriculum"},
    "quality, near duplicates out": {
        "scorer": "quality",
        "picker": "balanced",
        "filters": ["duplicates", "overlap", "near_duplicates"],
    },
    "less": {"scorer": "less", "picker": "balanced"},
    "tracin": {"scorer": "tracin", "picker": "balanced"},
    "grand, coverage": {"scorer": "grand", "picker": "coverage"},
    "uniform, greats": {"scorer": "uniform", "picker": "top_k", "online": "greats"},
    "uniform, colm": {"scorer": "uniform", "picker": "top_k", "online": "colm"},
    "uniform, craig": {"scorer": "uniform", "picker": "top_k", "online": "craig"},
    "uniform, gradmatch": {"scorer": "uniform", "picker": "top_k", "online": "gradmatch"},
    "quality, greats": {"scorer": "quality", "picker": "balanced", "online": "greats"},
    "full pool, greats": {
        "scorer": "uniform",
        "picker": "top_k",
        "max_tokens": None,
        "online": "greats",
    },
    "full pool": {"scorer": "uniform", "picker": "top_k", "max_tokens": None},
}


COLUMNS = ("method", "seeds", "dev", *(f"test {t}" for t in TARGETS), "on target", "damaged")
COLUMNS += ("GFLOP", "scoring GFLOP", "s", "off", "off s", "AUROC by kind")


def asked(data: Path, home: Path, flops: float, way: dict[str, Any], seed: int) -> Asked:
    pool = home / "pool.parquet"
    if not pool.exists():
        table = pq.read_table(data / "mix" / "pool.parquet")
        pq.write_table(table.take(np.load(home / "rows.npy")).select(["prompt", "response"]), pool)
        write_targets(data, home)
    parts = {t: {p: (str(home / f"{t}-{p}.parquet"),) for p in ("dev", "test")} for t in TARGETS}
    targets = {
        t: Target(signal=parts[t]["dev"], dev=parts[t]["dev"], test=parts[t]["test"])
        for t in TARGETS
    }
    fixed = {
        f"{'training' if key == 'online' else 'selection'}.{key}": value
        for key, value in way.items()
    }
    fixed |= {"selection.seed": seed, "training.seed": seed, "training.max_length": 512}
    return Asked(
        model=str(data / "stories260K-hf"),
        pool=(str(pool),),
        targets=targets,
        budget=Budget(flops=flops),
        fixed=fixed,
    )


def measured(
    data: Path, home: Path, flops: float, share: float, name: str, seed: int
) -> dict[str, Any]:
    """One run, and what the hidden columns say of its choice."""
    folder = home / f"run-{name.replace(' ', '-').replace(',', '')}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(home / "cache" / "scores", ignore_errors=True)  # every choice is paid for
    way = {"max_tokens": 0.0, **WAYS[name]}
    if way["max_tokens"] is None:
        del way["max_tokens"]
    else:
        way["max_tokens"] = share * pool_tokens(data, home)
    plan_run(asked(data, home, flops, way, seed), folder, quiet)
    with stages.at_work(RunFolder(folder), quiet) as work:
        stages.select(work, work.main)
        stages.train(work, work.main)
        stages.test(work, work.main)
        book = work.ledger
        selected = book.spent(stage="select")
        (tested,) = [s["detail"] for s in book.stages() if s["name"] == "test"]
        dev = [e["objective"] for e in book.evaluations()]
        found = {
            "name": name,
            "seed": seed,
            "dev": min(dev),
            "before": dev[0],
            **{f"test {t}": tested["by_target"][t] for t in TARGETS},
            "select_flops": selected.flops,
            "select_seconds": selected.seconds,
            "predicted_flops": work.plan.predicted["select"]["flops"],
            "predicted_seconds": work.plan.predicted["select"]["seconds"],
            "flops": book.spent().flops,
        }
    hidden = pq.read_table(data / "mix" / "pool.parquet", columns=["domain", "corrupt"])
    hidden = hidden.take(np.load(home / "rows.npy"))
    domain, corrupt = (np.asarray(hidden[c].to_pylist()) for c in ("domain", "corrupt"))
    ids = np.load(RunFolder(folder).selected("budget") / "ids.npy")
    found["on_target"] = float(np.isin(domain[ids], TARGETS).mean())
    found["damaged"] = float((corrupt[ids] != "").mean())
    found["auroc"] = separation(RunFolder(folder), corrupt)
    shutil.rmtree(folder)
    return found


def separation(run: RunFolder, corrupt: np.ndarray) -> dict[str, float]:
    """Kind of damage -> probability that an undamaged row scores above a damaged one."""
    (scores,) = run.scores("budget").iterdir()
    tables = [pq.read_table(file) for file in sorted(scores.glob("shard-*.parquet"))]
    ids = np.concatenate([t["id"].to_numpy() for t in tables])
    columns = [n for n in tables[0].column_names if n != "id"]
    score = np.concatenate([np.mean([t[c].to_numpy() for c in columns], axis=0) for t in tables])
    ids, score = ids[~np.isnan(score)], score[~np.isnan(score)]
    kinds = corrupt[ids]
    clean = score[kinds == ""]
    found = {}
    for kind in sorted(set(kinds.tolist()) - {""}):
        worse = score[kinds == kind]
        n, m = len(clean), len(worse)
        ranks = rankdata(np.concatenate([clean, worse]))
        found[kind] = float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
    return found


def pool_tokens(data: Path, home: Path) -> float:
    file = home / "tokens.json"
    if not file.exists():
        folder = home / "counting"
        plan = asked(data, home, 1e13, {"scorer": "uniform", "picker": "top_k"}, 0)
        plan_run(plan, folder, quiet)
        manifest = json.loads((folder / "pool" / "manifest.json").read_text())
        file.write_text(json.dumps(manifest["num_tokens"]))
        shutil.rmtree(folder)
    return float(json.loads(file.read_text()))


def quiet(line: str) -> None:
    """Says nothing."""


def table(results: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    def mean(rows: list[dict[str, Any]], key: str) -> str:
        values = [row[key] for row in rows]
        spread = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if values[1:] else ""
        return f"{statistics.fmean(values):.3f}{spread}"

    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        by_name.setdefault(row["name"], []).append(row)
    before = {row["before"] for row in results}
    yield ("untrained", "", f"{statistics.fmean(before):.3f}", *[""] * (len(COLUMNS) - 3))
    for name, rows in sorted(by_name.items(), key=lambda item: item[1][0]["dev"]):
        first = rows[0]
        off = [
            f"{100 * (r[f'select_{u}'] / r[f'predicted_{u}'] - 1):+.0f}%"
            if r[f"predicted_{u}"]
            else "-"
            for r in rows[:1]
            for u in ("flops", "seconds")
        ]
        yield (
            name,
            str(len(rows)),
            mean(rows, "dev"),
            *(mean(rows, f"test {t}") for t in TARGETS),
            *(f"{statistics.fmean(r[k] for r in rows):.0%}" for k in ("on_target", "damaged")),
            f"{statistics.fmean(r['flops'] for r in rows) / 1e9:,.0f}",
            f"{first['select_flops'] / 1e9:,.0f}",
            f"{statistics.fmean(r['select_seconds'] for r in rows):.1f}",
            *off,
            " ".join(f"{v:.2f}" for v in first["auroc"].values()),
        )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--flops", type=float, default=1.8e12)
    parser.add_argument("--rows", type=int, default=None, help="of the pool (default: all)")
    parser.add_argument("--share", type=float, default=0.05, help="of its tokens to keep")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=",".join(WAYS).replace(", ", "; "))
    parser.add_argument("--home", type=Path, default=None)
    parser.add_argument("--results", type=Path, default=None)
    options = parser.parse_args()
    display.quiet_libraries()
    home = options.home or Path(tempfile.mkdtemp(prefix="thrifty-selection-"))
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "rows.npy").exists():
        num_rows = pq.read_metadata(options.data / "mix" / "pool.parquet").num_rows
        order = np.random.default_rng(0).permutation(num_rows)[: options.rows]
        np.save(home / "rows.npy", np.sort(order))
    os.environ["THRIFTY_CACHE"] = str(home / "cache")
    results = options.results or home / "results.jsonl"
    names = [name.replace("; ", ", ") for name in options.only.split(",")]
    done = {(r["name"], r["seed"]) for r in read(results)}
    for seed in range(options.seeds):
        for name in names:
            if (name, seed) not in done:
                try:
                    row = measured(options.data, home, options.flops, options.share, name, seed)
                except NoPlanFits as refusal:
                    print(f"{name}: {str(refusal).partition(chr(10))[0]}", file=sys.stderr)
                    continue
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{name}, seed {seed}: dev {row['dev']:.3f}", file=sys.stderr, flush=True)
    num = len(np.load(home / "rows.npy"))
    print(
        heading(
            f"Ways to choose {options.share:.0%} of {num:,} rows, {options.flops:.1e} FLOPs in all"
        )
    )
    print(display.table(COLUMNS, list(table(read(results))), right="lrrrrrrrrrrrl"))
    return 0


def read(results: Path) -> list[dict[str, Any]]:
    lines = results.read_text().splitlines() if results.exists() else []
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    sys.exit(main())
