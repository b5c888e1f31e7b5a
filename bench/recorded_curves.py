"""Learning curves that others published, as `bench/forecasts.py` reads them: steps, losses and the
shares of the learning rate, from the recordings' folder.

What is not in a recording is stated here. curves_multipowerlaw: a linear warm-up of 2,000 steps,
before the first loss. nanogpt: track 3 holds the rate and lets it down to zero over the last 70%
(its `train_gpt_simple.py`), tracks 1 and 2 over the last 40%, as most of their scripts do; some
records of track 1 have other schedules. gemstones: the rate is held; the cooled ends come after a
fall to zero over a tenth more steps. finetune_scaling: runs of one model on ever more rows, taken
for one curve.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

PEAK, WARMUP = 3e-4, 2000
FLAN_STEP = 200
"""Rows of a step."""
NANOGPT_RUNS = 2
"""Of each group: the others are the same run under other seeds."""

GROWING_BATCHES = "2025-11-29"
"""From this record of track 1 on the batch grows within a run, which no law here knows of."""


@dataclass(frozen=True)
class Curve:
    """One run. ``tuned``: it is of the part on which the project's constants were chosen."""

    source: str
    kind: str
    run: str
    steps: np.ndarray
    losses: np.ndarray
    shares: np.ndarray
    tuned: bool
    size: float = 0.0

    def until(self, share: float) -> int:
        """Evaluations within the first ``share`` of the steps."""
        return int(np.searchsorted(self.steps, share * self.steps[-1], side="right"))


def _is_tuned(name: str) -> bool:
    return zlib.crc32(name.encode()) % 2 == 0


def read_all(folder: Path) -> list[Curve]:
    return [
        *multi_power_law(folder),
        *gemstones(folder),
        *cooled(folder),
        *nanogpt(folder),
        *flan(folder),
    ]


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        yield from csv.DictReader(io.TextIOWrapper(file, encoding="utf-8"))


def multi_power_law(folder: Path) -> Iterator[Curve]:
    runs = defaultdict(list)
    for row in _rows(folder / "curves_multipowerlaw" / "loss_curves.csv.gz"):
        point = int(row["step"]), float(row["loss"]), float(row["lr"]) / PEAK
        runs[int(row["model_M"]), row["schedule"]].append(point)
    for (size, schedule), points in sorted(runs.items()):
        steps, losses, rates = (np.array(each) for each in zip(*sorted(points), strict=True))
        every = np.arange(1, steps[-1] + 1)
        if schedule.startswith("wsdcon"):  # a jump, not a slope
            shares = rates[np.searchsorted(steps, every).clip(0, len(steps) - 1)]
        else:
            shares = np.interp(every, steps, rates)
        shares = np.where(every <= WARMUP, every / WARMUP, shares).clip(0, 1)
        kind = schedule.split("_")[0]
        name = f"{size}M {schedule}"
        yield Curve("multipowerlaw", kind, name, steps, losses, shares, size != 400, size)


def _gemstone_runs(path: Path) -> dict[str, dict[int, float]]:
    runs: dict[str, dict[int, float]] = defaultdict(dict)
    with path.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            runs[row["run_name"]][int(row["step"])] = float(row["final_loss"])
    return runs


def _hot(folder: Path) -> dict[str, dict[int, float]]:
    at = folder / "curves_gemstones"
    runs = _gemstone_runs(at / "wandb_df_for_fitting_hot_477.jsonl")
    for run, more in _gemstone_runs(at / "wandb_df_for_fitting_hot_100b+_477.jsonl").items():
        runs[run].update(more)
    return runs


def gemstones(folder: Path) -> Iterator[Curve]:
    lower = "wandb_df_for_fitting_lr_ablation_hot_477.jsonl"
    kinds = {
        "hot": _hot(folder),
        "hot, lower rate": _gemstone_runs(folder / "curves_gemstones" / lower),
    }
    for kind, runs in kinds.items():
        for run, points in runs.items():
            steps = np.array(sorted(points))
            losses = np.array([points[step] for step in steps])
            tuned = _is_tuned(run.replace("cooler_", ""))
            yield Curve("gemstones", kind, run, steps, losses, np.ones(steps[-1]), tuned)


def cooled(folder: Path) -> Iterator[Curve]:
    """A run until its rate falls, and its last loss after that."""
    hot = _hot(folder)
    ends = _gemstone_runs(folder / "curves_gemstones" / "wandb_df_for_fitting_cool_end.jsonl")
    for run, points in ends.items():
        for end, loss in sorted(points.items()):
            start = round(end / 1.1)
            steps = np.array([step for step in sorted(hot[run]) if step <= start])
            if len(steps) < 4:
                continue
            shares = np.ones(end)
            shares[start:] = 1 - (np.arange(end - start) + 1) / (end - start)
            yield Curve(
                "gemstones",
                "cooled",
                run,
                np.array([*steps, end]),
                np.array([*(hot[run][step] for step in steps), loss]),
                shares,
                _is_tuned(run),
            )


def nanogpt(folder: Path) -> Iterator[Curve]:
    runs = defaultdict(list)
    for row in _rows(folder / "curves_nanogpt" / "nanogpt_val_curves.csv.gz"):
        point = int(row["step"]), float(row["val_loss"]), int(row["total_steps"])
        runs[row["track"], row["group"], row["run"]].append(point)
    taken: dict[str, int] = defaultdict(int)
    for (track, group, run), points in sorted(runs.items()):
        steps, losses, totals = (np.array(each) for each in zip(*sorted(points), strict=True))
        total = int(totals[0])
        if steps[-1] < 0.98 * total or taken[group] == NANOGPT_RUNS:
            continue
        taken[group] += 1
        done = np.arange(total) / total
        falls = 0.7 if track.startswith("track_3") else 0.4
        shares = np.minimum(1.0, (1 - done) / falls)
        name = track[: len("track_1")].replace("_", " ")
        if name == "track 1" and group >= GROWING_BATCHES:
            name = "track 1, batches grow"
        yield Curve("nanogpt", name, f"{group}/{run}", steps, losses, shares, _is_tuned(group))


def flan(folder: Path) -> Iterator[Curve]:
    for row in _rows(folder / "finetune_scaling" / "flan.csv"):
        counts = sorted(int(name) for name in row if name and name.isdigit())
        losses = np.array([float(row[str(count)]) for count in counts])
        steps = np.array(counts) // FLAN_STEP
        name = row["config name"]
        shares = np.ones(steps[-1])
        yield Curve("finetune_scaling", "flan", name, steps, losses, shares, _is_tuned(name))


def own(path: Path) -> Iterator[Curve]:
    """Runs of `bench/cooldowns.py`: those that were let down."""
    with path.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["leave"] is None:
                continue
            yield Curve(
                "fine-tuning here",
                "let down",
                f"{row['run']} {row['rate']}",
                np.array(row["steps"]),
                np.array(row["losses"]),
                np.array(row["shares"]),
                tuned=False,
                size=row["leave"],
            )


def blind(curve: Curve) -> Curve:
    """As if nothing were known of the learning rate."""
    return replace(curve, shares=np.ones(len(curve.shares)))


# -- the baseline ---------------------------------------------------------------------------------

EXPONENTS = np.geomspace(0.03, 3, 40)
BURNS = (0.0, 0.1, 0.2, 0.3, 0.5)
"""Shares of what was seen that are left out at the start: a member of the ensemble each."""
RESAMPLES = 20


def power_law_ensemble(
    steps: np.ndarray, losses: np.ndarray, end: float, seed: int = 0
) -> tuple[float, float]:
    """Median and standard deviation at ``end`` of L = a + b t^-c, fitted by least squares on
    bootstrapped evaluations; it knows no learning rate."""
    random, found = np.random.default_rng(seed), []
    seen = steps > 0
    steps, losses = steps[seen].astype(float), losses[seen]
    for burn in BURNS:
        kept = steps >= burn * steps[-1]
        if kept.sum() < 3:
            kept[-3:] = True
        t, y = steps[kept], losses[kept]
        if len(t) > 60:
            thin = np.linspace(0, len(t) - 1, 60).astype(int)
            t, y = t[thin], y[thin]
        for _ in range(RESAMPLES):
            weights = np.bincount(random.integers(0, len(t), len(t)), minlength=len(t)) + 1e-9
            found.append(_power_law(t, y, weights, end))
    return float(np.median(found)), float(np.std(found))


def _power_law(t: np.ndarray, y: np.ndarray, weights: np.ndarray, end: float) -> float:
    x = (t[None] / t[-1]) ** -EXPONENTS[:, None]  # [c, n]
    total = weights.sum()
    middle_x, middle_y = (x @ weights) / total, (y @ weights) / total
    away_x, away_y = x - middle_x[:, None], y - middle_y
    slope = np.maximum((away_x * away_y) @ weights / ((away_x**2) @ weights + 1e-30), 0.0)
    miss = (away_y - slope[:, None] * away_x) ** 2 @ weights
    best = int(np.argmin(miss))
    at = (end / t[-1]) ** -EXPONENTS[best]
    return float(middle_y + slope[best] * (at - middle_x[best]))
