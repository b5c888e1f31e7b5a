"""Which model for which question, on recorded answers: the cascade and the router.

    OMP_NUM_THREADS=1 python bench/routing.py TRACES [--only cascade nine two] [--splits 20]
                                              [--json FILE]

cascade: samples/mot_gpt35_date_* to mot_gpt4_date_*; calibrated on a random half of the questions,
told of the other, many times; intervals are paired bootstraps over questions, of what each one
brought in the splits that it was not calibrated in. Coverage: calibrated on questions drawn from
the 369 with replacement, whose true risk is then that on the 369.
nine: routing/llmrouter_dcrouter_*, nine models; fitted on the train file, told of the test file.
two: routing/routellm_gsm8k_mmlu, Mixtral 8x7B and GPT-4; half of the questions, or half of the
tasks, to fit on.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
from numpy.typing import NDArray

from forecasts import print_table
from material import heading
from routing_cascade import cascade_tables, shown
from thrifty.core.sampling import Asked, Draw, Means, Offer, Outcome
from thrifty.decoding.router import Router, predict_accuracies
from thrifty.replay import interval

Floats = NDArray[np.float64]

NINE_COSTS = {
    "codegemma-7b": 7,
    "gemma-2-9b-it": 9,
    "llama-3.1-8b-instruct": 8,
    "llama-3.1-nemotron-51b-instruct": 51,
    "llama-3.3-nemotron-super-49b-v1": 49,
    "llama3-chatqa-1.5-70b": 70,
    "llama3-chatqa-1.5-8b": 8,
    "mistral-7b-instruct-v0.3": 7,
    "qwen2.5-7b-instruct": 7,
}
"""Parameters in billions, for want of prices."""
DRAWS = 1000


# -- router -------------------------------------------------------------------------------------


def csv_rows(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(2**26)
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def outcomes_of(
    rows: Iterable[Mapping[str, str]], models: Sequence[str], prompt: str
) -> list[Outcome]:
    return [
        Outcome(
            id=str(i),
            model=model,
            answers=(f"of {model}",),
            correct=(float(row[model]),),
            prompt=row[prompt],
        )
        for i, row in enumerate(rows)
        for model in models
    ]


def routed(policy: Router, learnt: Mapping[str, Any], means: Means, prompts: Sequence[str]) -> Any:
    """[prompts]: place of the model that the policy asks."""
    asked = [Asked(str(i), prompt) for i, prompt in enumerate(prompts)]
    actions = policy.decide_all(asked, replace(means, learnt=learnt))
    models = learnt["terms"]["models"]
    return np.array([models.index(a.model) if isinstance(a, Draw) else -1 for a in actions])


def nine_tables(traces: Path, splits: int) -> dict[str, Any]:
    folder = traces / "routing"
    train = csv_rows(folder / "llmrouter_dcrouter_train.csv.gz")
    models = list(NINE_COSTS)
    y = np.array([[float(row[model]) for model in models] for row in train])
    policy = Router()
    offers = [Offer(model=model, cost=float(NINE_COSTS[model])) for model in models]
    means = Means(offers=tuple(sorted(offers, key=lambda offer: offer.cost)))
    started = time.perf_counter()
    learnt = json.loads(json.dumps(policy.fit(outcomes_of(train, models, "question"), means)))
    took = time.perf_counter() - started
    order = [models.index(model) for model in learnt["terms"]["models"]]
    y = y[:, order]
    names = learnt["terms"]["models"]
    costs = np.array([NINE_COSTS[name] for name in names], dtype=float)
    single, oracle = y.mean(axis=0).max(), y.max(axis=1).mean()
    print(f"\n## Router: nine open models (fitted in {took:.0f} s, {_size(learnt)} of JSON)\n")
    print("Predictors on the train file, out of fold (share of how models differ explained):\n")
    print_table(
        ("predictor", "explained"),
        [(f"{t['kind']} {t['setting']:g}", f"{t['explained']:.4f}") for t in learnt["tried"]],
    )
    result: dict[str, Any] = {k: v for k, v in learnt.items() if k != "state"}
    gain, error = learnt["gain"]
    room = oracle - single
    print(
        f"Train, out of fold: best single {single:.3f}, router {single + gain:.3f} "
        f"(+{gain:.4f} ± {error:.4f}), oracle {oracle:.3f}: {gain / room:.0%} of the gap.\n"
    )
    result |= {"train_single": single, "train_oracle": oracle, "ceiling": nine_ceiling(train, y)}

    test = csv_rows(folder / "llmrouter_dcrouter_test.csv.gz")
    yt = np.array([[float(row[name]) for name in names] for row in test])
    prompts = [row["question"] for row in test]
    chosen_on_train = int(y.mean(axis=0).argmax())
    base, best = yt[:, chosen_on_train], yt.mean(axis=0).max()
    rows, curve = [], []
    for price in (0.0, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2):
        chosen = routed(policy, learnt, replace(means, price=price), prompts)
        got = yt[np.arange(len(test)), chosen]
        cost = float(costs[chosen].mean())
        # the oracle at this price
        top = (yt - price * costs).argmax(axis=1)
        point = {
            "price": price,
            "accuracy": float(got.mean()),
            "interval": list(interval(got)),
            "cost": cost,
            "ahead": float((got - base).mean()),
            "ahead_interval": list(interval(got - base)),
            "oracle": float(yt[np.arange(len(test)), top].mean()),
            "oracle_cost": float(costs[top].mean()),
        }
        curve.append(point)
        rows.append(
            (
                f"{price:g}",
                f"{point['accuracy']:.3f}",
                f"{cost:.1f}",
                f"{point['ahead']:+.3f}",
                shown(point["ahead_interval"]),
                f"{(point['accuracy'] - best) / (yt.max(axis=1).mean() - best):.0%}",
                f"{point['oracle']:.3f} @ {point['oracle_cost']:.1f}",
            )
        )
    print(
        f"Test file ({len(test)} questions): best single {best:.3f}, chosen on train "
        f"({names[chosen_on_train]}) {base.mean():.3f}, oracle {yt.max(axis=1).mean():.3f}; cost "
        "in billions of parameters a question.\n"
    )
    head = ("price", "router", "cost", "ahead by", "95%", "of the gap")
    print_table((*head, "oracle @ cost"), rows)
    singles = sorted(zip(names, yt.mean(axis=0), costs, strict=True), key=lambda x: x[2])
    print_table(
        ("single model", "test accuracy", "cost"),
        [(name, f"{accuracy:.3f}", f"{cost:g}") for name, accuracy, cost in singles],
    )
    return result | {"test": curve, "test_single": best, "took": took}


def nine_ceiling(train: list[dict[str, str]], y: Floats) -> dict[str, Any]:
    """Where the oracle's gap lies, and how the router's share of it grows with questions."""
    from thrifty.signals.accuracy_predictors import out_of_fold
    from thrifty.signals.question_vectors import learn_vectors, vectors

    single = int(y.mean(axis=0).argmax())
    gap = y.max(axis=1) - y[:, single]
    num_right = (y >= 0.5).sum(axis=1)
    shares = [float(gap[num_right == n].sum() / gap.sum()) for n in range(len(y[0]) + 1)]
    print("The gap of the oracle to the best single model, by how many of the nine are right:\n")
    print_table(
        ("models right", *(str(n) for n in range(1, 9))),
        [("share of the gap", *(f"{s:.0%}" for s in shares[1:9]))],
    )
    clusters = np.array([row["cluster"] for row in train])
    of_cluster = sum(y[clusters == c].sum(axis=0).max() for c in set(clusters)) / len(y)
    share = (of_cluster - y[:, single].mean()) / gap.mean()
    print(
        "The best model of each of the file's three clusters, which the test file has not (in "
        f"sample): {of_cluster:.3f}, {share:.0%} of the gap.\n"
    )
    rows = []
    prompts = [row["question"] for row in train]
    order = np.random.default_rng(0).permutation(len(y))
    growth = []
    for size in (350, 700, 1400, 2800, len(y)):
        part = order[:size]
        texts = [prompts[i] for i in part]
        out = out_of_fold(("forest", 5), vectors(texts, learn_vectors(texts)), y[part])
        got = y[part][np.arange(size), out.argmax(axis=1)]
        base = y[part][:, int(y[part].mean(axis=0).argmax())]
        room = y[part].max(axis=1).mean() - base.mean()
        growth.append([size, float((got - base).mean() / room)])
        low, high = interval(got - base)
        rows.append((f"{size}", f"{growth[-1][1]:.0%}", f"{low / room:.0%} to {high / room:.0%}"))
    print("The forest's share of the gap, out of fold, by questions to learn from:\n")
    print_table(("questions", "of the gap", "95%"), rows)
    return {"gap_by_num_right": shares, "growth": growth, "per_cluster": float(share)}


def _size(learnt: Mapping[str, Any]) -> str:
    return f"{len(json.dumps(learnt)) / 2**20:.1f} MiB"


# -- two models ---------------------------------------------------------------------------------


SHARES = np.linspace(0, 1, 11)


def shares_curve(weak: Floats, strong: Floats, told: Floats) -> Floats:
    """Accuracy with the highest ``told`` to the strong model, at each share of calls to it."""
    order = np.argsort(-told, kind="stable")
    total = np.concatenate([[0.0], np.cumsum((strong - weak)[order])]) + weak.sum()
    return np.interp(SHARES * len(weak), np.arange(len(weak) + 1), total) / len(weak)


def apgr(weak: Floats, strong: Floats, told: Floats) -> float:
    """Average performance gap recovered (RouteLLM): the area under (accuracy - weak's) over
    (strong's - weak's) along the share of calls; .5 for a random mix."""
    curve = shares_curve(weak, strong, told)
    recovered = (curve - weak.mean()) / (strong.mean() - weak.mean())
    return float(np.trapezoid(recovered, SHARES))


def two_tables(traces: Path, splits: int) -> dict[str, Any]:
    rows = csv_rows(traces / "routing" / "routellm_gsm8k_mmlu.csv.gz")
    models = ("mixtral_8x7b", "gpt4_1106")
    y = np.array([[float(row[model]) for model in models] for row in rows])
    tasks = np.array([row["task"] for row in rows])
    names = sorted(set(tasks))
    rng = np.random.default_rng(0)
    some = set(rng.permutation(names)[: len(names) // 2].tolist())
    parts = {
        "half of the questions": rng.permutation(len(rows)) % 2 == 0,
        "half of the tasks": np.array([task in some for task in tasks]),
    }
    offers = (Offer(model=models[0], cost=1e-9), Offer(model=models[1], cost=1.0))
    policy, result = Router(), {}
    for title, inside in parts.items():
        started = time.perf_counter()
        train = [row for row, i in zip(rows, inside, strict=True) if i]
        learnt = policy.fit(outcomes_of(train, models, "prompt"), Means(offers=offers))
        took = time.perf_counter() - started
        outside = np.flatnonzero(~inside)
        prompts = [rows[i]["prompt"] for i in outside]
        predicted = predict_accuracies(learnt, prompts)
        told = predicted[:, 1] - predicted[:, 0]
        kind = f"{learnt['kind']} {learnt['setting']:g}"
        print(f"\n## Router: Mixtral 8x7B and GPT-4, fitted on {title} ({kind}, {took:.0f} s)\n")
        groups = {
            "all": np.ones(len(outside), bool),
            "gsm8k": tasks[outside] == "gsm8k",
            "mmlu": tasks[outside] != "gsm8k",
        }
        curves, areas = [], []
        found: dict[str, Any] = {"kind": kind, "tried": learnt["tried"]}
        for name, mask in groups.items():
            if mask.sum() < 100 or (name != "all" and mask.all()):
                continue
            weak, strong = y[outside][mask, 0], y[outside][mask, 1]
            lines = {
                "router": shares_curve(weak, strong, told[mask]),
                "oracle": shares_curve(weak, strong, strong - weak),
                "random mix": weak.mean() + SHARES * (strong.mean() - weak.mean()),
            }
            area = apgr(weak, strong, told[mask])
            resampled = []
            for _ in range(DRAWS // 4):
                i = rng.integers(len(weak), size=len(weak))
                resampled.append(apgr(weak[i], strong[i], told[mask][i]))
            low, high = np.quantile(resampled, [0.025, 0.975])
            recovered = (lines["router"] - weak.mean()) / (strong.mean() - weak.mean())
            needed = [
                float(np.interp(p, np.maximum.accumulate(recovered), SHARES)) for p in (0.5, 0.8)
            ]
            top = apgr(weak, strong, strong - weak)
            found[name] = {
                "apgr": area,
                "interval": [low, high],
                "oracle_apgr": top,
                "cpt": needed,
                **{line: values.tolist() for line, values in lines.items()},
            }
            areas.append(
                (
                    name,
                    f"{mask.sum()}",
                    f"{weak.mean():.3f}",
                    f"{strong.mean():.3f}",
                    f"{area:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    f"{top:.3f}",
                    f"{needed[0]:.0%}",
                    f"{needed[1]:.0%}",
                )
            )
            curves += [
                (name, line, *(f"{v:.3f}" for v in values)) for line, values in lines.items()
            ]
        head = ("questions", "number", "Mixtral", "GPT-4", "APGR", "95%", "oracle's")
        print_table((*head, "calls for 50%", "calls for 80%"), areas)
        print_table(("questions", "calls to GPT-4", *(f"{s:.0%}" for s in SHARES)), curves)
        result[title] = found
    return result


PARTS = {"cascade": cascade_tables, "nine": nine_tables, "two": two_tables}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("traces", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{heading('Routing on recorded answers')}, scikit-learn {sklearn.__version__}")
    found = {}
    for name in options.only:
        started = time.perf_counter()
        found[name] = PARTS[name](options.traces, options.splits)
        print(f"({name}: {time.perf_counter() - started:.0f} s)\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
