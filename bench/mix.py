"""The main job, through the commands, on a real pretrained model and a real mixed pool.

    python bench/mix.py SHARED/data [--flops 3e12] [--scorer auto]

Model: stories260K (a Llama of 260k parameters that writes children's stories). Pool: 49,719 rows of
mathematics, medicine, law, code and general questions, some of them damaged. Targets: mathematics
and general questions, their dev rows to steer by and their test rows for the end. The run folder
stays, for its report.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from material import heading

TARGETS = ("math", "general")


def write_targets(data: Path, folder: Path) -> list[str]:
    """A file for each target and part; the options that name them."""
    table = pq.read_table(data / "mix" / "targets.parquet")
    options = []
    for target in TARGETS:
        for part, option in (("dev", "--target"), ("test", "--test")):
            chosen = pc.and_(pc.equal(table["domain"], target), pc.equal(table["split"], part))
            file = folder / f"{target}-{part}.parquet"
            pq.write_table(table.filter(chosen).select(["prompt", "response"]), file)
            options += [option, f"{target}={file}"]
    return options


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--flops", default="3e12")
    parser.add_argument("--scorer", default="auto")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/mix"))
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    targets = options.output.with_name(options.output.name + "-targets")
    targets.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "thrifty", "plan", "--control", "--scorer", options.scorer]
    command += ["--model", str(options.data / "stories260K-hf")]
    # Rows without the columns that say which domain they are of and how they were damaged.
    pool = targets / "pool.parquet"
    table = pq.read_table(options.data / "mix" / "pool.parquet")
    pq.write_table(table.select(["prompt", "response"]), pool)
    command += ["--pool", str(pool), *write_targets(options.data, targets)]
    command += ["--flops", options.flops, "-o", str(options.output)]
    subprocess.run(command, check=True)
    print(heading("stories260K on the mixed pool"), flush=True)
    return subprocess.run([sys.executable, "-m", "thrifty", "run", str(options.output)]).returncode


if __name__ == "__main__":
    sys.exit(main())
