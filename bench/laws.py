"""Scaling laws on recorded runs: fits, decisions, and predictions of runs that were not fitted.

    python bench/laws.py SHARED/traces [--draws 200]

The recordings lie beside the project and are described in their README.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from material import heading
from thrifty.display import table
from thrifty.scaling import allocation, bootstrap, fits, outliers
from thrifty.scaling.allocation import Conditions
from thrifty.scaling.huber import huber
from thrifty.scaling.laws import Law
from thrifty.scaling.points import Points, read_points
from thrifty.scaling.published import PUBLISHED

BUDGETS = (1e21, 1e23, 5.76e23)
"""The last is Gopher's, for which Chinchilla was trained."""


def interval(values: np.ndarray, form: Callable[[float], str]) -> str:
    low, high = bootstrap.interval(values)
    return f"{'-' if low is None else form(low)} to {'-' if high is None else form(high)}"


def numbers(law: Law) -> tuple[str, ...]:
    names = ("E", "A", "B", "alpha", "beta")
    return tuple(f"{getattr(law, name):.5g}" for name in names)


def billions(value: float) -> str:
    return f"{value / 1e9:.1f}B"


def missed(law: Law, points: Points) -> float:
    """Mean of |predicted / measured - 1|, percent."""
    return 100 * float(np.abs(np.exp(-fits.log_errors(law, points)) - 1).mean())


def busy() -> str:
    return f"load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores before it"


def chinchilla(folder: Path, draws: int) -> fits.Fit:
    points = read_points(folder / "chinchilla" / "svg_extracted_data.csv").points
    load, start = busy(), time.perf_counter()
    fit = fits.fit_law(points, "chinchilla", num_draws=draws)
    seconds = time.perf_counter() - start
    by_hand = points.take(np.argsort(points.loss)[:-5])
    print(heading(f"Chinchilla's {len(points)} points, {draws} draws in {seconds:.2f} s ({load})"))
    found = [f"{points.loss[i]:.3f}" for i in np.flatnonzero(~fit.kept)]
    print(f"outliers found: losses {', '.join(found)}")
    chances = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    alike = [(chance, outliers_at(points, chance)) for chance in chances]
    print("by the chance given:", ", ".join(f"{chance:g}: {count}" for chance, count in alike))
    rows = []
    for name, law in (
        ("found here", fit.law),
        ("arXiv:2404.10102", PUBLISHED["besiroglu"].law),
        ("arXiv:2203.15556", PUBLISHED["hoffmann"].law),
    ):
        rows.append((name, *numbers(law), f"{huber(fits.log_errors(law, by_hand)).sum():.8f}"))
    print(table(("law", "E", "A", "B", "alpha", "beta", "on the 240"), rows, right="lrrrrrr"))
    rows = []
    for flops in BUDGETS:
        best, drawn = (allocation.best_for_flops(law, flops) for law in (fit.law, fit.draws))
        rows.append(
            (
                f"{flops:g}",
                f"{billions(best.N)} ({interval(drawn.N, billions)})",
                f"{billions(best.D)} ({interval(drawn.D, billions)})",
                f"{best.loss:.4f} ({interval(drawn.loss, '{:.4f}'.format)})",
                f"{best.price:.3g} ({interval(drawn.price, '{:.3g}'.format)})",
                f"{allocation.own_slope(fit.law, best.N, best.D) / best.price:.6f}",
            )
        )
    heads = ("FLOPs", "N*", "D*", "loss", "price", "own slope / price")
    print(table(heads, rows, right="rrrrrr"))
    intervals = {name: interval(getattr(fit.draws, name), "{:.4g}".format) for name in ("A", "B")}
    print(f"beside A {intervals['A']}, B {intervals['B']}\n")
    return fit


def outliers_at(points: Points, chance: float) -> int:
    before = outliers.CHANCE
    outliers.CHANCE = chance
    try:
        return int((~fits.fit_law(points, "chinchilla", num_draws=0).kept).sum())
    finally:
        outliers.CHANCE = before


def small_runs(folder: Path, draws: int) -> None:
    points = read_points(folder / "chinchilla" / "kyo_takano_llm_df.csv").points
    fit = fits.fit_law(points, "chinchilla", num_draws=draws)
    size = points.N * points.D
    large = size > np.quantile(size, 0.8)
    held_out = fits.fit_law(points.take(~large), "chinchilla", num_draws=0)
    best = allocation.best_for_flops(fit.draws, 1e21)
    print(heading(f"kyo-takano's {len(points)} small runs"))
    rows = [("all", *numbers(fit.law), str(int((~fit.kept).sum())), "-")]
    rows.append(
        (
            "the 80% with the least compute",
            *numbers(held_out.law),
            str(int((~held_out.kept).sum())),
            f"{missed(held_out.law, points.take(large)):.2f}%",
        )
    )
    heads = ("fitted to", "E", "A", "B", "alpha", "beta", "outliers", "misses the largest 20% by")
    print(table(heads, rows, right="lrrrrrrr"))
    print(f"N* at 1e21: {interval(best.N, billions)}\n")


def repeated_data(folder: Path) -> None:
    points = read_points(folder / "datablations" / "datablations_c4.csv").points
    points = points.take(points.loss < 4)
    again = points.take(points.repeated)
    once = points.take(~points.repeated)
    published = PUBLISHED["muennighoff"].law
    fit = fits.fit_law(points, "data_constrained", num_draws=0)
    print(
        heading(f"datablations: {len(points)} runs below a loss of 4, {len(again)} repeat tokens")
    )
    plain = {"R_D": np.inf, "R_N": np.inf}
    rows = [
        ("published numbers, repeats as fresh", replace(published, **plain)),
        ("published numbers", published),
        ("fitted here, repeats as fresh", replace(fit.law, **plain)),
        ("fitted here, in sample", fit.law),
    ]
    shown = [
        (name, f"{missed(law, again):.2f}%", f"{missed(law, once):.2f}%") for name, law in rows
    ]
    held, plainly = left_out(points)
    shown.append(("fitted here, each group of unique tokens left out", f"{held:.2f}%", "-"))
    shown.append(("the same, repeats as fresh", f"{plainly:.2f}%", "-"))
    print(table(("law", "misses the repeated by", "the others"), shown, right="lrr"))
    print(f"R_D {fit.law.R_D:.1f}, R_N {fit.law.R_N:.1f}; published 15.4, 5.3\n")


def left_out(points: Points) -> tuple[float, float]:
    """Mean error on the repeated runs of each amount of unique tokens by a law of the others: with
    repeats weighed, and taken for fresh tokens."""
    errors, plain = [], []
    repeated = points.repeated
    for unique in np.unique(points.unique[repeated]):
        out = points.unique == unique
        law = fits.fit_law(points.take(~out), "data_constrained", num_draws=0).law
        asked = points.take(out & repeated)
        errors += [missed(law, asked)] * len(asked)
        plain += [missed(replace(law, R_D=np.inf, R_N=np.inf), asked)] * len(asked)
    return float(np.mean(errors)), float(np.mean(plain))


def larger_models(folder: Path) -> None:
    file = folder / "gadre_overtraining" / "models.csv"
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    loss = "loss__al_data_c4_val_shard_0000000_0000010_tar"
    found = []
    for dataset, target in (("c4_original", "3.4"), ("rpj", "1.8"), ("rw_original", "2.1")):
        some = [row for row in rows if row["dataset"] == dataset]
        columns = {"N": "params", "D": "tokens", "loss": loss}
        values = {k: np.array([float(row[v]) for row in some]) for k, v in columns.items()}
        points = Points(
            **values, unique=np.full(len(some), np.inf), lines=np.arange(2, len(some) + 2)
        )
        small, large = points.take(points.N < 0.5e9), points.take(points.N > 1e9)
        fit = fits.fit_law(small, "chinchilla")
        drawn = [missed(law, large) for law in each_of(fit.draws)]
        every = ", ".join(
            f"{billions(N)} {e:+.1f}%"
            for N, e in zip(
                large.N, 100 * (np.exp(-fits.log_errors(fit.law, large)) - 1), strict=True
            )
        )
        found.append(
            (
                dataset,
                f"{len(small)}, {len(large)}",
                str(int((~fit.kept).sum())),
                f"{missed(fit.law, large):.2f}%",
                interval(np.array(drawn), "{:.1f}%".format),
                f"{target}%",
                every,
            )
        )
    print(heading("Gadre et al.: fitted below 0.5B, loss on C4 predicted above 1B"))
    heads = ("data", "runs", "outliers", "mean error", "90%", "to reach", "each")
    print(table(heads, found, right="lrrrrr") + "\n")


def each_of(draws: Law) -> list[Law]:
    return [
        Law(**{name: float(getattr(draws, name)[i]) for name in vars(draws)})
        for i in range(len(draws.E))
    ]


def served(fit: fits.Fit) -> None:
    conditions = Conditions(served=2e12)
    rows = []
    for name, law in (
        ("Hoffmann as printed: .34, .28", PUBLISHED["hoffmann"].law),
        ("Hoffmann with .336, .283", PUBLISHED["sardana"].law),
        ("arXiv:2404.10102", PUBLISHED["besiroglu"].law),
        ("fitted here", fit.law),
        ("its draws, 90%", fit.draws),
    ):
        D = law.tokens_for(13e9)
        before, loss = conditions.flops(13e9, D), law.loss(13e9, D)
        best = allocation.least_for_loss(law, loss, conditions)
        saved = 100 * (best.flops / before - 1)
        amounts = (D, best.N, best.D)
        if np.ndim(loss):
            cells = [interval(each, billions) for each in amounts]
            rows.append((name, *cells, interval(saved, "{:+.1f}%".format)))
        else:
            rows.append((name, *map(billions, amounts), f"{saved:+.1f}%"))
    print(heading("A 13B's loss with 2T tokens to serve (arXiv:2401.00448: 7B, -17%)"))
    print(table(("law", "D of the 13B", "N", "D", "FLOPs in all"), rows, right="lrrrr") + "\n")


def fine_tuned(folder: Path) -> None:
    file = folder / "finetune_scaling" / "flan.csv"
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    sizes = [name for name in rows[0] if name.isdigit()]
    D = np.array([float(name) for name in sizes])
    losses = np.array([[float(row[name]) for name in sizes] for row in rows])
    shown = []
    for most in (102_400, 204_800, 409_600):
        seen = most >= D
        law, slope = [], []
        for loss in losses:
            nothing = np.full(int(seen.sum()), np.inf)
            points = Points(
                N=nothing,
                D=D[seen],
                loss=loss[seen],
                unique=nothing,
                lines=np.arange(len(nothing)),
            )
            fit = fits.fit_law(points, "fine_tuning", num_draws=0)
            law.append(float(fit.law.loss(D[-1])))
            line = np.polyfit(np.log(D[seen][-4:]), np.log(loss[seen][-4:]), 1)
            slope.append(float(np.exp(np.polyval(line, np.log(D[-1])))))
        last = losses[:, -1]
        cells = [f"{most:,} of {D[-1]:,.0f}"]
        for predicted in (np.array(law), np.array(slope)):
            error = 100 * np.abs(predicted / last - 1)
            regret = last[int(np.argmin(predicted))] - last.min()
            cells.append(f"{error.mean():.1f}%, {np.median(error):.1f}%, {regret:.3f}")
        shown.append(tuple(cells))
    print(heading(f"Fine-tuning on FLAN, {len(rows)} models: the loss at the end"))
    print("mean error, median error, regret of taking the model that is predicted best")
    print(table(("seen", "rectified law", "slope of the last four points"), shown, right="rrr"))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("traces", type=Path)
    parser.add_argument("--draws", type=int, default=fits.DRAWS)
    options = parser.parse_args()
    fit = chinchilla(options.traces, options.draws)
    small_runs(options.traces, options.draws)
    repeated_data(options.traces)
    larger_models(options.traces)
    served(fit)
    fine_tuned(options.traces)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
