"""Whether the prior alone names the published winner by budget: Compute-Constrained Data Selection.

    python bench/pilot_prior.py SHARED/traces

Data: ccds/points.json, read off the figures of arXiv:2410.16208 (scores of MMLU and BBH by total
FLOPs, three sizes of model, the scorers that look at a model look at the 7B). Worths are fitted on
two sizes and tested on the third: the budgets at which one method leads all others by more than the
noise of a run, 0.2 points, and the prior is right where it names that method. What it is given:
pool, sizes, prices and budget.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from thrifty.core.resolve import method_class
from thrifty.display import table
from thrifty.regime import Arm, break_even, price_of, winner, worth_from, worth_of_many

SHARES = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Of the pool trained on, one for each point of a curve."""
BUDGETS = SHARES[:-1]
"""Of one pass over the pool: with more, all of it is trained on and nothing is chosen."""
NOISE = 0.2
"""Points."""
SIZES = {"7B": 4.593e18, "13B": 8.638e18, "70B": 4.926e19}
"""FLOPs of training on the pool once, the last point of a curve of random rows."""
ONE_PASS = SIZES["7B"]
"""Of the model that scores."""
BENCHMARKS = ("MMLU", "BBH")
PASSES = {"Random": 0.0, "BM25": 0.0, "Embed": 0.0, "PPL": 1.53e18 / ONE_PASS,
          "LESS": 8.27e18 / ONE_PASS}  # fmt: skip
"""Scoring the pool with the 7B, in passes of training it."""
SCORERS = {"Random": "uniform", "BM25": "bm25", "Embed": "embedding", "PPL": "perplexity",
           "LESS": "less"}  # fmt: skip
Curves = dict[str, list[tuple[float, float]]]


def read(folder: Path) -> dict[tuple[str, str], Curves]:
    """(benchmark, size) -> method -> (share trained on, score)."""
    known = json.loads((folder / "ccds" / "points.json").read_text(encoding="utf-8"))
    return {
        (benchmark, size): {
            method: [(share, score) for share, (_, score) in zip(SHARES, points, strict=True)]
            for method, points in known[f"{benchmark} {size}"].items()
        }
        for benchmark in BENCHMARKS
        for size in SIZES
    }


def arms(worths: dict[str, float], size: str) -> dict[str, Arm]:
    ratio = SIZES[size] / ONE_PASS
    return {name: Arm(worths[name], price_of(PASSES[name], ratio)) for name in PASSES}


def fitted(curves: dict[tuple[str, str], Curves], sizes: list[str]) -> dict[str, float]:
    found = {"Random": 1.0}
    for method in list(PASSES)[1:]:
        points = [
            ln_worth
            for (_, size), curve in curves.items()
            if size in sizes
            for ln_worth in worth_from(curve["Random"], curve[method])
        ]
        found[method] = worth_of_many(points).mean
    return found


def score_at(points: list[tuple[float, float]], price: float, budget: float) -> float | None:
    """Interpolated in the logarithm of the total; None below the first point."""
    import numpy as np

    totals = [share + price for share, _ in points]
    if budget < totals[0] * (1 - 1e-3):
        return None
    return float(np.interp(np.log(budget), np.log(totals), [score for _, score in points]))


def led(curves: dict[tuple[str, str], Curves], size: str) -> list[tuple[str, float, str, float]]:
    """(benchmark, budget, winner, lead) where one method leads by more than noise."""
    found = []
    prices = {name: arm.price for name, arm in arms(dict.fromkeys(PASSES, 1.0), size).items()}
    for benchmark in BENCHMARKS:
        for budget in BUDGETS:
            scores = {
                method: score
                for method, points in curves[benchmark, size].items()
                if (score := score_at(points, prices[method], budget)) is not None
            }
            first, second = sorted(scores, key=lambda method: -scores[method])[:2]
            if (lead := scores[first] - scores[second]) > NOISE:
                found.append((benchmark, budget, first, lead))
    return found


def tested(curves: dict[tuple[str, str], Curves], size: str, worths: dict[str, float]) -> list[str]:
    """A word for each budget that somebody leads at; empty where the prior is right."""
    priced = arms(worths, size)
    words = []
    for benchmark, budget, first, lead in led(curves, size):
        said = winner(priced, budget)
        wrong = f"{benchmark} at {budget:g}: {said}, was {first} by {lead:.2f}"
        words.append("" if said == first else wrong)
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shared", type=Path, help="the folder of recorded data, ccds below it")
    curves = read(parser.parse_args().shared)
    rows, all_right, all_cells, embed = [], 0, 0, 0
    for size in SIZES:
        others = [other for other in SIZES if other != size]
        worths = fitted(curves, others)
        words = tested(curves, size, worths)
        right = words.count("")
        all_right, all_cells = all_right + right, all_cells + len(words)
        embed += sum(first == "Embed" for _, _, first, _ in led(curves, size))
        shown = [f"{worths[name]:.1f}" for name in list(PASSES)[1:]]
        wrong = "; ".join(word for word in words if word)
        rows.append((" + ".join(others), size, f"{right} of {len(words)}", *shown, wrong))
    headers = ("fitted on", "tested on", "right", "BM25", "Embed", "PPL", "LESS", "wrong")
    print(table(headers, rows))
    print(f"\nall three: {all_right} of {all_cells}; saying Embed always: {embed}")
    shipped = {name: method_class("scorer", SCORERS[name]).worth.mean for name in PASSES}
    right = sum(tested(curves, size, shipped).count("") for size in SIZES)
    print(f"the worths in the scorers' own files ({_shown(shipped)}): {right} of {all_cells}")
    every = fitted(curves, list(SIZES))
    print(f"fitted on all three sizes: {_shown(every)}")
    priced = arms(every, "7B")
    for name in ("PPL", "LESS"):
        ratio = break_even({k: priced[k] for k in ("Random", "BM25", "Embed", name)}, name,
                           PASSES[name], BUDGETS)  # fmt: skip
        print(f"{name} is best under some budget from a ratio of model to scorer of {ratio:.3g}")
    print(f"\n{_map(every)}")


def _map(worths: dict[str, float]) -> str:
    """Who wins, by target, ratio and budget."""
    rows = []
    for target, names in (("yes", list(PASSES)), ("no", ["Random", "PPL"])):
        for ratio in (1, 2, 5, 10, 30, 100):
            arms = {name: Arm(worths[name], price_of(PASSES[name], ratio)) for name in names}
            rows.append((target, f"{ratio}x", *(winner(arms, budget) for budget in BUDGETS)))
    return table(("target", "model / scorer", *(f"{b:g} passes" for b in BUDGETS)), rows)


def _shown(worths: dict[str, float]) -> str:
    return ", ".join(f"{name} {worth:.1f}" for name, worth in worths.items())


if __name__ == "__main__":
    main()
