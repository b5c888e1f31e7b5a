"""Pools larger than memory: rows a second and resident memory, method by method, as a pool grows.

python bench/scale.py measure 100000 1000000 --references 100000
python bench/scale.py check 100000 1000000
python bench/scale.py measure 20000 --references 20000 --methods prepare embedding
python bench/scale.py paper docs/scale.md

``measure`` makes a jsonl of so many rows, plans on it, and selects by each method, each command of
thrifty in a process of its own; at the size of ``--references`` it also times the library that
people would use otherwise, on texts that lie in memory already. A row is two runs of five words
out of real rows (Python's own library, or the jsonl files given as ``--real``) and a word of its
own; one row in fifty repeats an earlier one, another one in fifty repeats it but for a full stop.

``check`` scores those pools again and sets the processor's seconds, which other work on the machine
does not stretch, beside those that the cost models say. ``paper`` renews the tables between the
marks in docs/scale.md: a billion documents from the cost models, and what was found last.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from material import heading, small_job
from startup import LLAMA_3_8B
from thrifty import display
from thrifty.core.budget import PoolStats
from thrifty.core.contracts import Work
from thrifty.core.resolve import all_names, resolve
from thrifty.costs.hardware import dollars_per_hour, load_device
from thrifty.costs.shape import ModelShape
from thrifty.data.store import open_store

REPEATED = 50
"""One row in so many repeats another, and as many nearly."""
RUN = 5
"""Words."""
BLOCK = 65536
METHODS = {
    "length": ("length", "[]"),
    "bm25": ("bm25", "[]"),
    "dsir": ("dsir", "[]"),
    "duplicates": ("length", "[duplicates]"),
    "near_duplicates": ("length", "[near_duplicates]"),
    "embedding": ("embedding", "[]"),
}
"""What is measured: scorer and filters."""
ASKS_A_MODEL = ("embedding",)
"""Measured where they are named: ten million rows take a day."""
REFERENCES = {
    "bm25": "bm25s",
    "dsir": "data-selection",
    "near_duplicates": "datasketch",
    "embedding": "sentence-transformers",
}
MIB = 2**20
HOME = Path(tempfile.gettempdir()) / "scale"
RESULTS = HOME / "results.jsonl"
DOCUMENTS, TOKENS = 10**9, 512
"""Of the pool that the paper prices, and of each of its documents."""
SMALLER = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
"""What makes Llama-3-8B about a billion parameters, as Llama-3.2-1B is."""
CORE_HOUR = 0.05
"""Dollars, about what clouds ask for a core with its memory; methods of no model need no GPU."""


# -- rows ---------------------------------------------------------------------------------------


def write_pool(path: Path, count: int, real: list[str], seed: int = 0) -> None:
    """``count`` rows of 11 words, prompt and completion."""
    words = [found for text in real if len(found := text.split()) > RUN]
    sizes = np.array([len(found) - RUN for found in words])
    rng = np.random.default_rng(seed)
    draft = path.with_suffix(".new")
    with draft.open("w", encoding="utf-8") as file:
        for start in range(0, count, BLOCK):
            rows = min(BLOCK, count - start)
            texts = rng.integers(len(words), size=(rows, 2))
            places = (rng.random((rows, 2)) * sizes[texts]).astype(int)
            lines: list[tuple[str, str]] = []
            for i, (chosen, begins) in enumerate(zip(texts.tolist(), places.tolist(), strict=True)):
                one, two = (
                    " ".join(words[text][begin : begin + RUN])
                    for text, begin in zip(chosen, begins, strict=True)
                )
                row = (one, f" {two} row{start + i}")
                if i % REPEATED == 1:
                    row = lines[-1]
                elif i % REPEATED == 2:
                    row = (lines[-1][0], f"{lines[-1][1]}.")
                lines.append(row)
            file.writelines(
                json.dumps({"prompt": one, "completion": two}) + "\n" for one, two in lines
            )
    draft.rename(path)


def texts_of(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield row["prompt"] + row["completion"]


# -- measured -----------------------------------------------------------------------------------


def peak_of(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds of a command and the peak of its resident memory, in bytes.

    Looked at ten times a second: scoring sets the kernel's own mark back for its ledger.
    """
    begin, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            found = re.search(r"VmHWM:\s+(\d+)", status.read_text())
            peak = max(peak, int(found[1]) * 1024 if found else 0)
            time.sleep(0.1)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)}\n{said.read()}")
    return time.perf_counter() - begin, float(peak)


def charged(run: Path) -> dict[str, float]:
    """Seconds of the stage that a run was charged for last, by activity."""
    from thrifty.run_folder import RunFolder

    ledger = RunFolder(run).reading()
    charges, seconds = list(ledger.charges()), dict[str, float]()
    last = charges[-1]["stage_id"]
    for charge in charges:
        if charge["stage_id"] == last and not charge["lost"]:
            name = charge["activity"]
            seconds[name] = seconds.get(name, 0.0) + charge["seconds"]
    return seconds


def measure(
    rows: int, home: Path, real: list[Path], methods: list[str], references: bool
) -> Iterator[dict[str, Any]]:
    """One record for each method, the preparation first."""
    job = small_job(home, rows=100)
    (target,) = job["targets"].items()  # type: ignore[attr-defined]
    pool, run = home / f"pool-{rows}.jsonl", home / f"run-{rows}"
    if not pool.exists():
        sources = real or [home / "corpus" / "pool.jsonl"]
        write_pool(pool, rows, [text for source in sources for text in texts_of(source)])
    thrifty = [sys.executable, "-m", "thrifty"]
    environment = {**os.environ, "THRIFTY_ROWS_CACHE_GIB": "0"}  # nothing is taken over
    if "prepare" in methods:
        shutil.rmtree(run, ignore_errors=True)
    plan = [*thrifty, "plan", "--model", str(job["model"]), "--pool", str(pool), "-o", str(run)]
    for part in ("target", "dev", "test"):
        source = getattr(target[1], {"target": "signal"}.get(part, part))[0]
        plan += [f"--{part}", f"{target[0]}={source}"]
    plan += ["--tokens", "1M", "--set", "training.max_length=128", "--scorer", "length"]
    plan += ["--set", f"selection.max_tokens={8 * rows}"]
    seconds, peak = peak_of(plan, environment) if "prepare" in methods else (0.0, 0.0)
    held = [file.stat().st_size for file in (run / "pool").glob("*.parquet")]
    manifest = json.loads((run / "pool" / "manifest.json").read_text())
    about = {"rows": rows, "tokens": manifest["num_tokens"]}
    if "prepare" in methods:
        yield {
            **about,
            "method": "prepare",
            "seconds": seconds,
            "command_seconds": seconds,
            "peak_bytes": peak,
            "pool_bytes": pool.stat().st_size,
            "store_bytes": sum(held),
        }
    for method in (name for name in METHODS if name in methods):
        scorer, filters = METHODS[method]
        shutil.rmtree(run / "selected", ignore_errors=True)
        if filters == "[]":
            for scored in (run / "scores").glob(f"{scorer}-*"):
                shutil.rmtree(scored)
        select = [*thrifty, "select", str(run), "--set", f"selection.scorer={scorer}"]
        whole, peak = peak_of([*select, "--set", f"selection.filters={filters}"], environment)
        by_activity = charged(run)
        found = json.loads((run / "selected" / "manifest.json").read_text())
        own = ("pick",) if filters != "[]" else ("prepare", "score")
        record = {
            **about,
            "method": method,
            "seconds": sum(by_activity.get(name, 0.0) for name in own),
            "command_seconds": whole,
            "peak_bytes": peak,
            "dropped": sum(found["dropped"].values()),
            "selected": found["num_selected"],
        }
        if references and method in REFERENCES:
            command = [sys.executable, __file__, "reference", method, str(pool)]
            command += [target[1].signal[0], str(home / "reference.json")]
            _, record["reference_peak_bytes"] = peak_of(command, environment)
            record |= json.loads((home / "reference.json").read_text())
        yield record


def reference(method: str, pool: Path, signal: Path) -> dict[str, Any]:
    """Seconds that the obvious library takes, each called as its users would call it."""
    texts, asked = list(texts_of(pool)), list(texts_of(signal))[:256]
    begin = time.perf_counter()
    if method == "bm25":
        import bm25s

        index = bm25s.BM25()
        index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
        queries = bm25s.tokenize(asked, return_ids=False, show_progress=False)
        np.mean([index.get_scores(query) for query in queries], axis=0)
    elif method == "near_duplicates":
        from datasketch import MinHash, MinHashLSH

        from thrifty.signals.minhash import shingles

        near = MinHashLSH(threshold=0.8, num_perm=128)
        for place, text in enumerate(texts):
            signature = MinHash(num_perm=128)
            signature.update_batch([part.encode() for part in shingles(text, 5)])
            if not near.query(signature):
                near.insert(place, signature)
    elif method == "embedding":
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Pooling, Transformer

        torch.set_num_threads(1)
        inner = Transformer(str(pool.parent / "base-64"), max_seq_length=128)
        inner.tokenizer.pad_token = inner.tokenizer.pad_token or inner.tokenizer.eos_token
        pooling = Pooling(inner.get_word_embedding_dimension(), pooling_mode="weightedmean")
        model = SentenceTransformer(modules=[inner, pooling], device="cpu")
        rows, target = (
            model.encode(some, normalize_embeddings=True, show_progress_bar=False)
            for some in (texts, asked)
        )
        (rows @ target.T).max(axis=1)
    else:
        from data_selection import HashedNgramDSIR

        with tempfile.TemporaryDirectory() as cache:
            dsir = HashedNgramDSIR(
                [str(pool)],
                [str(signal)],
                cache,
                raw_parse_example_fn=lambda row: row["prompt"] + row["completion"],
                target_parse_example_fn=lambda row: row["prompt"] + row["completion"],
                num_proc=1,
                min_example_length=0,
            )
            dsir.fit_importance_estimator(num_tokens_to_fit="all")
            dsir.compute_importance_weights()
    return {"reference": REFERENCES[method], "reference_seconds": time.perf_counter() - begin}


# -- predicted ----------------------------------------------------------------------------------


def stats(rows: int, tokens: int) -> PoolStats:
    return PoolStats(
        num_examples=rows,
        num_tokens=rows * tokens,
        max_tokens=tokens,
        num_loss_tokens=rows * tokens,
        num_squared_tokens=rows * tokens**2,
    )


def check(rows: int, home: Path) -> Iterator[dict[str, Any]]:
    """Seconds of the processor that scoring takes, and those that its cost model says."""
    run = home / f"run-{rows}"
    pool = open_store(run / "pool")
    (signal,) = (run / "targets").glob("*/signal")
    asked = open_store(signal)
    target = {signal.parent.name: asked.take(np.concatenate([s.ids for s in asked.shards()]))}
    shape = ModelShape.from_config(LLAMA_3_8B)
    work = Work(
        pool=pool.manifest.stats,
        targets={},
        shape=shape,
        device=load_device("h100"),
        max_length=128,
    )
    for name in ("bm25", "dsir"):
        scorer = resolve("scorer", name)
        begin = time.process_time()
        state = scorer.prepare(pool, target, None, None)
        for shard in pool.shards():
            scorer.score(shard, state, None)
        yield {
            "check": name,
            "rows": rows,
            "tokens": pool.manifest.num_tokens,
            "cpu_seconds": time.process_time() - begin,
            "predicted_seconds": scorer.cost(work).seconds,
        }


def billion() -> str:
    """What a billion documents cost, method by method."""
    device = load_device("h100")
    price = dollars_per_hour(device) or 0.0
    eight = ModelShape.from_config(LLAMA_3_8B)
    one = ModelShape.from_config({**LLAMA_3_8B, **SMALLER, "tie_word_embeddings": True})
    rows = []
    for name in all_names("scorer"):
        scorer = resolve("scorer", name)
        cells = []
        for shape in (eight, one):
            work = Work(
                pool=stats(DOCUMENTS, TOKENS),
                targets={"target": stats(500, TOKENS)},
                shape=shape,
                device=device,
                dtype="bfloat16",
                max_length=TOKENS,
            )
            cost = scorer.cost(work)
            hours = cost.seconds / 3600
            paid = hours * (price if scorer.needs_model else CORE_HOUR)
            cells += [f"{cost.flops:.2g}", f"{hours:,.0f}", f"${paid:,.0f}"]
        rows.append((name, *(cells if scorer.needs_model else [*cells[:3], "", "", ""])))
    head = ("scorer", "FLOPs, 8B", "hours", "dollars", "FLOPs, 1B", "hours", "dollars")
    return table(head, rows)


def checked(records: list[dict[str, Any]]) -> str:
    rows = [
        (
            r["check"],
            f"{r['rows']:,}",
            f"{r['predicted_seconds']:.1f}",
            f"{r['cpu_seconds']:.1f}",
            f"{r['predicted_seconds'] / r['cpu_seconds'] - 1:+.0%}",
        )
        for r in records
    ]
    return table(("scorer", "rows", "predicted seconds", "measured", "off by"), rows)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines)


def renew(paper: Path, records: list[dict[str, Any]]) -> None:
    """What is between the marks; where nothing was measured, what is there stays."""
    latest = {(r["rows"], r.get("method"), r.get("check")): r for r in records}
    records = sorted(latest.values(), key=lambda record: record["rows"])
    made = {"billion": billion()}
    if found := [record for record in records if "check" in record]:
        made["checked"] = checked(found)
    if found := [record for record in records if "method" in record]:
        made["measured"] = table(*cells(found))
    text = paper.read_text(encoding="utf-8")
    for name, part in made.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}{part}\n{end}{rest.partition(end)[2]}"
    paper.write_text(text, encoding="utf-8")


# -- told ---------------------------------------------------------------------------------------


def cells(records: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of a table of what was measured."""
    rows = [
        (
            f"{r['rows']:,}",
            r["method"],
            f"{r['seconds']:.1f}",
            f"{r['rows'] / max(r['seconds'], 1e-9):,.0f}",
            f"{r['peak_bytes'] / MIB:,.0f}",
            f"{r['dropped']:,}" if "dropped" in r else "",
            f"{r['reference_seconds'] / r['seconds']:.1f} x {r['reference']}, "
            f"{r['reference_peak_bytes'] / MIB:,.0f} MiB"
            if "reference" in r
            else "",
        )
        for r in records
    ]
    head = ("rows", "method", "seconds", "rows/s", "peak MiB", "dropped", "speed against")
    return head, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("measure")
    measured.add_argument("rows", type=int, nargs="+")
    measured.add_argument("--references", type=int, nargs="*", default=[])
    usual = [name for name in METHODS if name not in ASKS_A_MODEL]
    measured.add_argument("--methods", nargs="+", default=["prepare", *usual])
    measured.add_argument("--real", type=Path, nargs="*", default=[])
    measured.add_argument("--home", type=Path, default=HOME)
    measured.add_argument("--results", type=Path, default=RESULTS)
    again = commands.add_parser("check")
    again.add_argument("rows", type=int, nargs="+")
    again.add_argument("--home", type=Path, default=HOME)
    again.add_argument("--results", type=Path, default=RESULTS)
    paper = commands.add_parser("paper")
    paper.add_argument("paper", type=Path)
    paper.add_argument("--results", type=Path, default=RESULTS)
    single = commands.add_parser("reference")
    for name in ("method", "pool", "signal", "result"):
        single.add_argument(name, type=str if name == "method" else Path)
    options = parser.parse_args()
    if options.command == "reference":
        compared_with = reference(options.method, options.pool, options.signal)
        options.result.write_text(json.dumps(compared_with))
        return
    if options.command == "paper":
        results = options.results
        lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
        renew(options.paper, [json.loads(line) for line in lines])
        return
    options.home.mkdir(parents=True, exist_ok=True)
    print(heading("Pools larger than memory"))
    records = []
    for count in options.rows:
        if options.command == "check":
            found = check(count, options.home)
        else:
            compared = count in options.references
            found = measure(count, options.home, options.real, options.methods, compared)
        for record in found:
            records.append(record)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps(record), file=sys.stderr, flush=True)
    if options.command == "check":
        print(checked(records))
        return
    head, rows = cells(records)
    print(display.table(head, rows, right="rlrrrr"))


if __name__ == "__main__":
    main()
