"""What a run's first half says of its end: forecasts beside a power-law ensemble that knows nothing
of the learning rate, on curves that others recorded; whether their intervals cover; what stopping
by them saves and loses beside patience and successive halving.

    OMP_NUM_THREADS=1 python bench/forecasts.py TRACES [--own FILE] [--only TABLE ...]

TRACES: the recordings' folder (`bench/recorded_curves.py` says what is read). --own: runs of
`bench/cooldowns.py`. Tables: errors, heldout, cooled, stops, halving.

The project's constants were chosen on one part of the recordings (25M and 100M of
curves_multipowerlaw; runs, groups and models with an even CRC of their name): "chosen on". All else
is "kept aside", but for what docs/forecasts.md tells.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from cooldown_prior import prior_without
from material import heading
from recorded_curves import Curve, blind, own, power_law_ensemble, read_all
from stopping_replay import halving_rows, stop_rows
from thrifty.scaling.annealing import CoolDown
from thrifty.scaling.posterior import Posterior, condition

Z90 = 1.645
LEAST = 5
"""Evaluations that a forecast has to go by."""


def seen(curve: Curve, count: int, cool_down: CoolDown | None = None) -> Posterior:
    """What the first ``count`` evaluations say of the curve's end."""
    none = np.zeros(count)
    cool_down = cool_down or CoolDown()
    return condition(curve.steps[:count], curve.losses[:count], none, [curve.shares], cool_down)


class Errors:
    """Of forecasts of one kind: relative, beside the ensemble's, in their own standard errors."""

    def __init__(self) -> None:
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.z: list[float] = []
        self.runs: list[str] = []

    def add(self, curve: Curve, count: int, cool_down: CoolDown | None = None) -> None:
        posterior, end = seen(curve, count, cool_down), curve.losses[-1]
        mean, stderr = posterior.loss(0)
        self.ours.append(abs(mean / end - 1))
        self.z.append((end - mean) / float(np.hypot(stderr, posterior.noise)))
        base, _ = power_law_ensemble(curve.steps[:count], curve.losses[:count], curve.steps[-1])
        self.theirs.append(abs(base / end - 1))
        self.runs.append(curve.run)

    def row(self) -> tuple[str, ...]:
        ours, theirs = 100 * np.mean(self.ours), 100 * np.mean(self.theirs)
        return (
            str(len(self.ours)),
            f"{theirs:.2f}",
            f"{ours:.2f}",
            f"{theirs / ours:.1f}",
            f"{100 * np.median(self.theirs):.2f}",
            f"{100 * np.median(self.ours):.2f}",
            f"{100 * self.covered():.0f}%",
        )

    def covered(self) -> float:
        return float(np.mean(np.abs(self.z) < Z90))


def coverage_interval(errors: Iterable[Errors], resamples: int = 1000) -> tuple[float, float]:
    """5% and 95% of the coverage, runs drawn with replacement."""
    by_run = defaultdict(list)
    for each in errors:
        for run, z in zip(each.runs, each.z, strict=True):
            by_run[run].append(abs(z) < Z90)
    hits = np.array([sum(run) for run in by_run.values()])
    counts = np.array([len(run) for run in by_run.values()])
    draws = np.random.default_rng(0).integers(0, len(hits), (resamples, len(hits)))
    shares = hits[draws].sum(1) / counts[draws].sum(1)
    return float(np.quantile(shares, 0.05)), float(np.quantile(shares, 0.95))


HEAD = ("forecasts", "ensemble %", "ours %", "times", "median", "median", "in 90%")


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(f"| {' | '.join(head)} |\n| {' | '.join('---' for _ in head)} |")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    print()


def errors_table(curves: Sequence[Curve]) -> None:
    """Mean error of the forecast loss at a run's end, in % of it, from half and from 75% of it."""
    found: dict[tuple[str, ...], Errors] = defaultdict(Errors)
    pooled: dict[str, list[Errors]] = {"chosen on": [], "kept aside": []}
    started = time.perf_counter()
    count = 0
    for curve in curves:
        shares = (1.0,) if curve.kind == "cooled" else (0.5, 0.75)
        before = 0
        for share in shares:
            n = len(curve.steps) - 1 if share == 1.0 else curve.until(share)
            if n < LEAST or n == before or curve.source == "fine-tuning here":
                continue
            before = n
            part = "chosen on" if curve.tuned else "kept aside"
            where = "before the fall" if share == 1.0 else f"{100 * share:.0f}%"
            key = curve.source, curve.kind, where, part
            if key not in found:
                pooled[part].append(found[key])
            found[key].add(curve, n)
            count += 1
            if curve.kind == "track 1":
                found[curve.source, "track 1, rate not told", where, part].add(blind(curve), n)
    taken = time.perf_counter() - started
    rows = ((*key, *errors.row()) for key, errors in sorted(found.items()))
    print_table(("source", "schedule", "from", "part", *HEAD), rows)
    pooled["all"] = [*pooled["chosen on"], *pooled["kept aside"]]
    for part, errors in pooled.items():
        low, high = coverage_interval(errors)
        total = sum(len(e.z) for e in errors)
        hits = sum(e.covered() * len(e.z) for e in errors) / total
        print(f"90% intervals, {part}: {100 * hits:.1f}% [{100 * low:.1f}, {100 * high:.1f}] cover")
        print(f"  of {total} forecasts, runs resampled whole")
    print(f"{1000 * taken / count:.0f} ms a forecast, the ensemble's time included\n")


def heldout_table(curves: Sequence[Curve]) -> None:
    """curves_multipowerlaw: what a cool-down brings is fitted on two sizes, for the third."""
    ours = [c for c in curves if c.source == "multipowerlaw"]
    priors = {size: prior_without(ours, size) for size in (25, 100, 400)}
    for size, prior in priors.items():
        print(
            f"without {size}M: B = {100 * prior.gain:.1f} ± {100 * prior.gain_stderr:.1f}% of the "
            f"loss, C = {prior.rates[1]:.1f}, beta {prior.beta:.2f}, gamma {prior.gamma:.2f}"
        )
    print()
    rows = []
    for share in (0.5, 0.75):
        for kind in ("constant", "cosine", "wsd", "wsdld", "wsdcon"):
            found = Errors()
            for curve in ours:
                if curve.kind == kind:
                    found.add(curve, curve.until(share), priors[int(curve.size)])
            rows.append((kind, f"{100 * share:.0f}%", *found.row()))
    print_table(("schedule", "from", *HEAD), rows)


def cooled_table(curves: Sequence[Curve]) -> None:
    """Two ends of one run, let down at two steps: how well their difference is forecast at the
    first. It is what a stop is decided by."""
    by_run = defaultdict(list)
    for curve in curves:
        if curve.kind in ("cooled", "let down"):
            by_run[curve.source, curve.run].append(curve)
    pairs: dict[tuple[str, str], list[tuple[float, ...]]] = defaultdict(list)
    for (source, _), ends in by_run.items():
        ends.sort(key=lambda c: len(c.shares))
        for near, far in pairwise(ends):
            count = len(near.steps) - 1
            if count < LEAST:
                continue
            none = np.zeros(count)
            found = condition(
                near.steps[:count],
                near.losses[:count],
                none,
                [near.shares, far.shares],
                CoolDown(),
            )
            mean, stderr = found.gain(0, 1)
            truth = near.losses[-1] - far.losses[-1]
            end, end_stderr = found.loss(0)
            part = "chosen on" if near.tuned else "kept aside"
            z = (truth - mean) / np.hypot(stderr, 2**0.5 * found.noise)
            z_end = (near.losses[-1] - end) / np.hypot(end_stderr, found.noise)
            pairs[source, part].append((truth, mean, z, z_end, abs(end / near.losses[-1] - 1)))
    rows = []
    for (source, part), values in sorted(pairs.items()):
        truth, mean, z, z_end, off = np.array(values).T
        rows.append(
            (
                source,
                part,
                str(len(truth)),
                f"{truth.mean():.4f}",
                f"{mean.mean():.4f}",
                f"{np.abs(truth - mean).mean():.4f}",
                f"{100 * np.mean(np.abs(z) < Z90):.0f}%",
                f"{100 * off.mean():.2f}",
                f"{100 * np.mean(np.abs(z_end) < Z90):.0f}%",
            )
        )
    head = ("source", "part", "pairs", "measured gain", "forecast", "mean error", "in 90%")
    print_table((*head, "end off by %", "in 90%"), rows)


def stops_table(curves: Sequence[Curve]) -> None:
    """Each rule on its own run, at a held rate; the price makes all that remains worth so much."""
    head = ("worth elsewhere", "dev noise", "rule", "stopped", "FLOPs saved", "regret", "at most")
    print_table((*head, "regret of the loss", "false stops"), stop_rows(curves))


def halving_table(curves: Sequence[Curve]) -> None:
    """One of several runs is wanted: cost, and how much worse than the best the chosen one is."""
    head = ("set", "runs", "rule", "cost", "regret", "seed noise")
    print_table(head, halving_rows(curves))


TABLES: dict[str, Callable[[Sequence[Curve]], None]] = {
    "errors": errors_table,
    "heldout": heldout_table,
    "cooled": cooled_table,
    "stops": stops_table,
    "halving": halving_table,
}


def _recorded(options: argparse.Namespace) -> Iterator[Curve]:
    yield from read_all(options.traces)
    if options.own is not None:
        yield from own(options.own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("traces", type=Path)
    parser.add_argument("--own", type=Path, help="runs of bench/cooldowns.py")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    options = parser.parse_args()
    print(heading("forecasts and stops on recorded curves"))
    curves = list(_recorded(options))
    for name in options.only:
        doc = " ".join((TABLES[name].__doc__ or "").split())
        print(f"\n## {name}\n\n{doc}\n")
        TABLES[name](curves)


if __name__ == "__main__":
    main()
