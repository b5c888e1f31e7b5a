"""What docs/costs.md shows: every table of predicted costs against their truth, one command.

    OMP_NUM_THREADS=1 python bench/costs.py [--parameters] [--flops] [--memory] [--published]
        [--search] [--seconds] [--tables FILE.csv ...] [--ftuneai PYTHON] [--deepspeed PYTHON]

Without a flag all of them, which takes about half an hour, most of it ``--memory``.

    --parameters   of every architecture, against the model built on the meta device
    --flops        against torch's flop counter with eager attention and experts: tiny models of
                   every architecture under every technique, published ones on the meta device,
                   and where 6 N is off on one small model
    --memory       against the real step on fake tensors (fake_memory.py), at most --minutes
    --published    against published peaks, beside other estimators (published_memory.py)
    --search       combinations priced a second, and `thrifty plan --json` from start to end
    --seconds      12 training steps against predictions after `thrifty device`, interleaved

Where a clock is read, a fixed loop of arithmetic is timed beside it: what another process takes of
the machine shows there first, and 'machine busy' stands where it or a repeat differs by over 10%.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

from transformers.utils import logging

import accuracy
import counts
import fake_memory
import published_memory
from material import AS_INSTALLED, heading
from startup import LLAMA_3_8B
from thrifty import display
from thrifty.combinations import price_all
from thrifty.costs.hardware import load_device
from thrifty.costs.operations import Adapter
from thrifty.costs.shape import ModelShape

# -- memory ---------------------------------------------------------------------------------------


def memory(minutes: float) -> None:
    """The grid of ``fake_memory.py``."""
    with mock.patch.object(sys, "argv", ["fake_memory.py", "--minutes", str(minutes)]):
        fake_memory.main()


# -- speed of the search --------------------------------------------------------------------------

REPEATS = 7
LAYOUTS = ({"masked": True}, {"masked": False})


def arithmetic() -> float:
    """Seconds of a loop that is always the same."""
    start = time.perf_counter()
    sum(i * i for i in range(2_000_000))
    return time.perf_counter() - start


def _price_once() -> None:
    """In a process of its own, where nothing is cached yet; prints JSON."""
    shape, device = ModelShape.from_config(LLAMA_3_8B), load_device("h100")
    loop = arithmetic()
    wall, cpu = time.perf_counter(), time.process_time()
    found = price_all(shape, device, sequence=2048, layouts=LAYOUTS)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    numbers = {"wall": wall, "cpu": cpu, "loop": loop, "combinations": found.num_combinations}
    print(json.dumps(numbers))


def _planned(folder: str) -> dict[str, float]:
    command = [sys.executable, "-m", "thrifty", "plan", "--model", folder, "--json"]
    command += ["--flops", "3e18", "--memory", "80GiB", "--device", "h100"]
    loop, before = arithmetic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=AS_INSTALLED)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    combinations = json.loads(done.stdout)["num_combinations"]
    return {"wall": wall, "cpu": cpu, "loop": loop, "combinations": combinations}


def search() -> None:
    once = [sys.executable, __file__, "--price-once"]
    priced = [
        json.loads(subprocess.check_output(once, text=True, env=AS_INSTALLED))
        for _ in range(REPEATS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_3_8B), encoding="utf-8")
        planned = [_planned(folder) for _ in range(REPEATS)]
    print(heading(f"Speed of the search, Llama-3-8B on an H100, {REPEATS} fresh processes each"))
    rows = [_speed("all combinations priced", priced), _speed("thrifty plan --json", planned)]
    headers = ("what", "combinations", "wall s", "CPU s", "a CPU second", "CPU / loop", "the loop")
    print(display.table(headers, rows, right="lrrrrrr"))


def _speed(what: str, runs: Sequence[dict[str, float]]) -> tuple[str, ...]:
    wall, cpu, loop = (statistics.median(r[key] for r in runs) for key in ("wall", "cpu", "loop"))
    combinations = int(runs[0]["combinations"])
    loops = [run["loop"] for run in runs]
    spread = (max(loops) - min(loops)) / loop
    ratio = statistics.median(run["cpu"] / run["loop"] for run in runs)
    least = min(run["wall"] for run in runs)
    busy = ", machine busy" if spread > 0.1 else ""
    return (
        what,
        f"{combinations:,}",
        f"{wall:.2f} (least {least:.2f})",
        f"{cpu:.2f}",
        f"{combinations / cpu:,.0f}",
        f"{ratio:.1f}",
        f"{loop:.3f} s ± {spread:.0%}{busy}",
    )


# -- seconds --------------------------------------------------------------------------------------

ALL, QUERIES = Adapter(rank=8), Adapter(rank=4, targets=("q_proj", "v_proj"))
TIMED = (
    *(case for case in accuracy.SETTINGS if case.dtype == "float32"),
    accuracy.Case("float32", 256, 4, 704, 4096, 4, 4, 256, recompute=1),
    accuracy.Case("float32", 256, 4, 704, 4096, 4, 4, 256, adapter=ALL),
    accuracy.Case("float32", 256, 6, 704, 4096, 8, 4, 512, adapter=QUERIES),
    accuracy.Case("float32", 384, 4, 1024, 4096, 6, 2, 512, adapter=ALL, recompute=1),
    accuracy.Case("float32", 512, 2, 1408, 8192, 8, 4, 128),
    # Small: without instructions of its own a CPU takes 40 times as long for bf16.
    accuracy.Case("bfloat16", 128, 4, 344, 2048, 4, 4, 128),
    accuracy.Case("bfloat16", 128, 4, 344, 2048, 4, 4, 128, adapter=ALL),
    accuracy.Case("bfloat16", 128, 4, 344, 2048, 4, 4, 128, recompute=1),
)


def seconds(rounds: int) -> None:
    found, busy = accuracy.interleaved(TIMED, rounds, calibrate_every=4)
    rows = [
        (
            f"{case.hidden} x {case.layers}, {case.micro_batch} x {case.sequence} {case.dtype}",
            case.technique,
            f"{statistics.median(each.predicted):.3f}",
            f"{statistics.median(each.measured):.3f}",
            f"{each.off:+.0%}",
            each.repeats,
        )
        for case, each in zip(TIMED, found, strict=True)
    ]
    print(heading(f"Seconds of a training step, predicted and measured, {rounds} rounds"))
    if busy:
        print("machine busy during a calibration: repeats differed by more than 10%")
    headers = ("width x layers, batch", "technique", "predicted", "measured", "off", "repeats")
    print(display.table(headers, rows, right="llrrrr"))
    within = Counter(abs(each.off) <= 0.2 for each in found)[True]
    print(
        f"\nwithin 20%: {within} of {len(found)}; worst {max((e.off for e in found), key=abs):+.0%}"
    )


TABLES = ("parameters", "flops", "memory", "published", "search", "seconds")


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in TABLES:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--tables", type=Path, nargs="+", default=[published_memory.TABLES])
    parser.add_argument("--ftuneai", default="", help="a Python that has the package ftuneai")
    parser.add_argument("--deepspeed", default="", help="a Python that has deepspeed")
    parser.add_argument("--minutes", type=float, default=20.0, help="of --memory at most")
    parser.add_argument("--rounds", type=int, default=3, help="of --seconds")
    parser.add_argument("--price-once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.price_once:
        _price_once()
        return 0
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    peers = options.ftuneai, options.deepspeed
    shown: dict[str, Callable[[], int | None]] = {
        "parameters": counts.parameters,
        "flops": counts.flops,
        "memory": lambda: memory(options.minutes),
        "published": lambda: published_memory.show(options.tables, *peers),
        "search": search,
        "seconds": lambda: seconds(options.rounds),
    }
    asked = [name for name in TABLES if getattr(options, name)] or TABLES
    status = 0
    for name in asked:
        status = shown[name]() or status
        print(flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
