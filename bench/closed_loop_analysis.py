"""What the results of ``closed_loop.py`` say: differences, regrets and the verdicts on the claims.

Runs of two arms are paired by seed and by test row. A bootstrap draws seeds and rows anew, the same
rows for every run, so that what a hard row adds to both falls out of their difference. Numbers that
decide stand here, and were fixed before a full run: docs/closed_loop.md says why.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

LEAST_SEEDS = 5
"""Paired, in each cell that a verdict rests on."""
ALPHA = 0.05
DRIFTED = 0.3
"""1 - the rank correlation of scores taken again half-way: from here on a cell has drift."""
MOST_REGRET = 0.1
"""Of the gap between uniform and the hindsight-best static choice; the median over cells."""
DRAWS = 4000

UNIFORM, LOOP, SEQUENCE = "uniform", "the loop", "in sequence"
CONTROLS = ("fixed refresh", "random refresh")
STATIC = ("uniform", "dsir", "embedding", "less", "less, smaller model", "cascade", "grad_cosine")
"""Among which the hindsight-best static choice is looked for."""

Verdict = Literal["holds", "withdrawn", "too few seeds"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """A run that is done."""

    cell: str
    arm: str
    budget: int
    seed: int
    dev: float
    """The loss that it was stopped and kept by."""
    nll: Mapping[str, Sequence[float]]
    """target -> nats of each test row"""
    tokens: Mapping[str, Sequence[float]]
    flops: float
    limit: float
    pilot_flops: float = 0.0
    drifts: Sequence[float] = ()
    """At each look, since the look before."""
    refreshes: int = 0
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Nats a token on the test rows, the mean over targets."""
        return statistics.fmean(sum(self.nll[t]) / sum(self.tokens[t]) for t in self.nll)


@dataclass(frozen=True)
class Difference:
    """Of losses: negative is better than what is compared with."""

    mean: float
    lower: float
    upper: float
    p: float
    """That it is not below zero, one-sided."""
    num_seeds: int


@dataclass(frozen=True)
class Results:
    """All that is done, by cell, budget and arm."""

    runs: Sequence[Result]

    def of(self, cell: str, budget: int, arm: str) -> dict[int, Result]:
        """By seed."""
        wanted = (cell, budget, arm)
        return {r.seed: r for r in self.runs if (r.cell, r.budget, r.arm) == wanted}

    @property
    def places(self) -> list[tuple[str, int]]:
        """Cell and budget, in the order in which they came."""
        return list(dict.fromkeys((r.cell, r.budget) for r in self.runs))

    def arms(self, cell: str, budget: int) -> list[str]:
        found = (r.arm for r in self.runs if (r.cell, r.budget) == (cell, budget))
        return list(dict.fromkeys(found))

    def loss(self, cell: str, budget: int, arm: str) -> float:
        return statistics.fmean(r.loss for r in self.of(cell, budget, arm).values())

    def best_static(self, cell: str, budget: int) -> str | None:
        """By the dev rows, whose losses a static choice could have been chosen by."""
        dev = {
            arm: statistics.fmean(r.dev for r in found.values())
            for arm in STATIC
            if (found := self.of(cell, budget, arm))
        }
        return min(dev, key=dev.__getitem__) if dev else None

    def drift(self, cell: str) -> float | None:
        """The median over the cell's runs of what the first look half-way found; None: no look."""
        first = [r.drifts[0] for r in self.runs if r.cell == cell and r.drifts]
        return statistics.median(first) if first else None


# -- differences ----------------------------------------------------------------------------------


def difference(
    ones: Mapping[int, Result], others: Mapping[int, Result], *, draws: int = DRAWS
) -> Difference | None:
    """Of the seeds that both have; None where there is none."""
    drawn = _drawn_differences(ones, others, draws)
    return None if drawn is None else _summed(*drawn, len(set(ones) & set(others)))


def pooled(
    pairs: Sequence[tuple[Mapping[int, Result], Mapping[int, Result]]], *, draws: int = DRAWS
) -> Difference | None:
    """The mean over several places of each one's difference; None where one has none."""
    found = [_drawn_differences(ones, others, draws) for ones, others in pairs]
    known = [each for each in found if each is not None]
    if not known or len(known) < len(found):
        return None
    mean = statistics.fmean(each[0] for each in known)
    drawn = np.mean([each[1] for each in known], axis=0)
    return _summed(mean, drawn, min(len(set(a) & set(b)) for a, b in pairs))


def _summed(mean: float, drawn: NDArray[np.float64], num_seeds: int) -> Difference:
    lower, upper = np.quantile(drawn, [ALPHA / 2, 1 - ALPHA / 2])
    p = (1 + int((drawn >= 0).sum())) / (1 + len(drawn))
    return Difference(mean, float(lower), float(upper), p, num_seeds)


def _drawn_differences(
    ones: Mapping[int, Result], others: Mapping[int, Result], draws: int
) -> tuple[float, NDArray[np.float64]] | None:
    seeds = sorted(set(ones) & set(others))
    if not seeds:
        return None
    random = np.random.default_rng(len(seeds))
    total = np.zeros((draws, len(seeds)))
    targets = sorted(ones[seeds[0]].nll)
    for target in targets:
        num_rows = len(ones[seeds[0]].nll[target])
        times = random.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=draws)
        for runs, sign in ((ones, 1), (others, -1)):
            nll = np.array([runs[s].nll[target] for s in seeds])
            tokens = np.array([runs[s].tokens[target] for s in seeds])
            total += sign * (times @ nll.T) / (times @ tokens.T) / len(targets)
    weights = random.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=draws)
    drawn = (total * weights).sum(axis=1) / len(seeds)
    return statistics.fmean(ones[s].loss - others[s].loss for s in seeds), drawn


def interval(runs: Mapping[int, Result], *, draws: int = DRAWS) -> float:
    """Half of the width of the mean loss's interval."""
    nothing = {
        seed: Result(**{**vars(r), "nll": {t: [0.0] * len(x) for t, x in r.nll.items()}})
        for seed, r in runs.items()
    }
    found = difference(runs, nothing, draws=draws)
    return math.nan if found is None else (found.upper - found.lower) / 2


def holm(ps: Mapping[str, float]) -> dict[str, float]:
    """Adjusted so that among all of them one false finding is as rare as in one alone."""
    adjusted, largest = {}, 0.0
    for place, name in enumerate(sorted(ps, key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in ps}


def regret(results: Results, cell: str, budget: int, arm: str = LOOP) -> float | None:
    """By how much ``arm`` is worse than the best static choice, in shares of that one's gap to
    uniform; None where there is no such gap beyond chance, or not both were run."""
    best = results.best_static(cell, budget)
    if best in (None, UNIFORM) or not results.of(cell, budget, arm):
        return None
    assert best is not None
    gap = difference(results.of(cell, budget, best), results.of(cell, budget, UNIFORM))
    if gap is None or gap.upper >= 0:
        return None
    lost = results.loss(cell, budget, arm) - results.loss(cell, budget, best)
    return lost / -gap.mean


def pilot_allowance(results: Results, cell: str, budget: int) -> float:
    """What its pilot may cost the loop, in nats: what uniform would lose by so many FLOPs fewer, at
    the slope against log FLOPs between this budget and the next; 0 where there is no other."""
    others = [b for c, b in results.places if c == cell and b != budget]
    others = [b for b in others if results.of(cell, b, UNIFORM)]
    runs = results.of(cell, budget, LOOP).values()
    if not others or not runs or not results.of(cell, budget, UNIFORM):
        return 0.0
    other = min(others, key=lambda b: abs(math.log(b / budget)))
    here, there = (results.loss(cell, b, UNIFORM) for b in (budget, other))
    slope = max((here - there) / math.log(other / budget), 0.0)
    share = min(statistics.fmean(r.pilot_flops / r.limit for r in runs), 0.99)
    return -slope * math.log1p(-share)


# -- verdicts -------------------------------------------------------------------------------------


def dynamic(results: Results, drift_cells: Collection[str]) -> Verdict:
    """Choosing rows anew when it pays beats doing it by the clock and doing it at random, over the
    cells in which scores drifted as they were meant to."""
    places = [(c, b) for c, b in results.places if c in drift_cells]
    if _too_few(results, places, (LOOP, *CONTROLS)):
        return "too few seeds"
    drifted = [(c, b) for c, b in places if (results.drift(c) or 0.0) > DRIFTED]
    return _beats(results, drifted, CONTROLS)


def coupled(results: Results, both_bind: Collection[str]) -> Verdict:
    """Deciding data, memory and compute together beats deciding them one after the other, where
    memory and FLOPs bind."""
    places = [(c, b) for c, b in results.places if c in both_bind]
    if _too_few(results, places, (LOOP, SEQUENCE)):
        return "too few seeds"
    return _beats(results, places, (SEQUENCE,))


def safe(results: Results) -> Verdict:
    """Nowhere is the loop above uniform by more than its pilot cost, by the upper bound."""
    if _too_few(results, results.places, (LOOP, UNIFORM)):
        return "too few seeds"
    for cell, budget in results.places:
        found = difference(results.of(cell, budget, LOOP), results.of(cell, budget, UNIFORM))
        if found is None or found.upper > pilot_allowance(results, cell, budget):
            return "withdrawn"
    return "holds"


def near_best(results: Results) -> Verdict:
    """The loop's median regret to the hindsight-best static choice is a tenth of its gap."""
    if _too_few(results, results.places, (LOOP, UNIFORM)):
        return "too few seeds"
    found = [regret(results, cell, budget) for cell, budget in results.places]
    known = [each for each in found if each is not None]
    return "holds" if known and statistics.median(known) <= MOST_REGRET else "withdrawn"


def _too_few(results: Results, places: Sequence[tuple[str, int]], arms: Sequence[str]) -> bool:
    """Whether an arm lacks seeds anywhere, or there is nowhere."""
    return not places or any(
        len(set.intersection(*(set(results.of(*place, arm)) for arm in arms))) < LEAST_SEEDS
        for place in places
    )


def _beats(results: Results, places: Sequence[tuple[str, int]], arms: Sequence[str]) -> Verdict:
    """Whether the loop is better than each of ``arms`` over all ``places``; nowhere is a no: what
    no cell could show is not claimed."""
    ps = {}
    for arm in arms:
        found = pooled([(results.of(*p, LOOP), results.of(*p, arm)) for p in places])
        ps[arm] = 1.0 if found is None else found.p
    return "holds" if all(p < ALPHA for p in holm(ps).values()) else "withdrawn"


# -- tables ---------------------------------------------------------------------------------------

HEADERS = ("cell", "budget", "arm", "seeds", "test loss", "to uniform", "p (Holm)", "regret")
HEADERS += ("of budget", "pilot", "refreshes", "drift", "on target")
RIGHT = "lrlrrrrrrrrrr"


def table(results: Results, refused: Mapping[tuple[str, int, str], str]) -> list[tuple[str, ...]]:
    """A row for each cell, budget and arm; below them the arms that the budget does not pay for."""
    rows = []
    places = list(dict.fromkeys([*results.places, *((c, b) for c, b, _ in refused)]))
    for cell, budget in places:
        uniform, arms = results.of(cell, budget, UNIFORM), results.arms(cell, budget)
        compared = {
            arm: found
            for arm in arms
            if arm != UNIFORM and (found := difference(results.of(cell, budget, arm), uniform))
        }
        ps = holm({arm: found.p for arm, found in compared.items()})
        best = results.best_static(cell, budget)
        for arm in sorted(arms, key=lambda a: results.loss(cell, budget, a)):
            runs = results.of(cell, budget, arm)
            found = compared.get(arm)
            lost = regret(results, cell, budget, arm)
            drifts = [d for r in runs.values() for d in r.drifts]
            on_target = [r.detail["on_target"] for r in runs.values() if "on_target" in r.detail]
            rows.append(
                (
                    cell,
                    f"{budget}x",
                    arm + " (hindsight-best static)" * (arm == best),
                    str(len(runs)),
                    f"{results.loss(cell, budget, arm):.3f} ± {interval(runs):.3f}",
                    f"{found.mean:+.3f} [{found.lower:+.3f}, {found.upper:+.3f}]" if found else "",
                    f"{ps[arm]:.3f}" if found else "",
                    "" if lost is None else f"{lost:.0%}",
                    f"{statistics.fmean(r.flops / r.limit for r in runs.values()):.1%}",
                    f"{statistics.fmean(r.pilot_flops / r.limit for r in runs.values()):.0%}",
                    f"{statistics.fmean(r.refreshes for r in runs.values()):.1f}",
                    f"{statistics.fmean(drifts):.2f}" if drifts else "",
                    f"{statistics.fmean(on_target):.0%}" if on_target else "",
                )
            )
        for (c, b, arm), why in refused.items():
            if (c, b) == (cell, budget):
                rows.append((cell, f"{budget}x", arm, "0", why, *[""] * 8))
    return rows
