"""Sampling policies on recorded answers: accuracy against samples, whole frontiers, no model.

    OMP_NUM_THREADS=1 python bench/decoding.py TRACES [--orders 10] [--only FILE ...] [--rows FILE]
                                               [--tables-only]

TRACES: the folder of recordings (samples/*.jsonl.gz). Every file is split in two by a seed; what a
policy has to learn or to choose is learnt on one half and told of the other, both ways round, so
that every question is reported once. --rows: results so far, taken up again; each policy with each
of its settings on each file is one line of it.

Frontiers: each policy over a grid of its one setting. Rivals may toss a coin between two settings
of theirs, the single sample among them: their frontier is what lies between their points.
Tuned: the rival and the setting of it that reached a share of what voting gains with the fewest
samples on the one half, on the other half; beside it as many samples of ours.
Pools: one budget of so many samples a question on average, beside as many for every question.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from material import heading
from thrifty.core.contracts import DecodingPolicy
from thrifty.core.resolve import all_names, resolve
from thrifty.recordings import read_outcomes
from thrifty.replay import Recording, interval, means_of, replay, votes

Floats = NDArray[np.float64]

OURS = "marginal"
_PRICES = np.geomspace(2e-4, 0.06, 10)
PRICES = [1e-5, 5e-5, *sorted([*_PRICES, *(_PRICES[2:9] * 1.37)])]
PRICES = [round(float(price), 6) for price in PRICES]
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "marginal": [{"price": price} for price in PRICES],
    "fixed": [{"samples": n} for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40)],
    "adaptive_consistency": [
        {"threshold": t}
        for t in (0.7, 0.8, 0.88, 0.9, 0.92, 0.94, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
    ],
    "dirichlet": [
        {"threshold": t, "criterion": "dirichlet"}
        for t in (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99, 0.995)
    ],
    "early_stopping_consistency": [{"window": w} for w in range(2, 11)],
    "sequential_test": [{"error": e} for e in (0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)],
    "seen_twice": [{}],
}
FILE_OF = {"dirichlet": "adaptive_consistency"}
POOLS = (1.5, 2.0, 3.0, 5.0, 8.0)
SHARES = (0.5, 0.75, 0.9, 1.0)
"""Of what voting over all samples gains over one."""


def recordings(traces: Path, only: list[str]) -> Iterator[tuple[str, Recording]]:
    for path in sorted((traces / "samples").glob("*.jsonl.gz")):
        name = path.name.removesuffix(".jsonl.gz")
        if only and name not in only:
            continue
        yield name, Recording.of(read_outcomes([path]))


def halves(recording: Recording) -> list[tuple[Recording, Recording]]:
    """(to fit on, to tell of), both ways round."""
    one, other = recording.split(0.5, seed=0)
    return [(one, other), (other, one)]


class Rows:
    """Results in a file: what is there is not run again."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.rows: dict[tuple[str, ...], dict[str, Any]] = {}
        if path is not None and path.is_file():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self.rows[tuple(row["key"])] = row

    def has(self, key: tuple[str, ...]) -> bool:
        return key in self.rows

    def add(self, key: tuple[str, ...], **values: Any) -> None:
        row = json.loads(json.dumps({"key": list(key), **values}))
        self.rows[key] = row
        if self._path is not None:
            with self._path.open("a") as stream:
                stream.write(json.dumps(row) + "\n")


def run(name: str, recording: Recording, rows: Rows, num_orders: int) -> None:
    """Every policy with every setting on a file, and the pools."""
    orders = list(range(num_orders))
    for half, (fit_on, told) in enumerate(halves(recording)):
        means = means_of(told)
        longest = means.max_samples
        learnt: dict[str, dict[str, Any]] = {}
        for policy_name, settings in SETTINGS.items():
            for setting in settings:
                key = (name, str(half), policy_name, json.dumps(setting))
                if rows.has(key) or setting.get("samples", 1) > longest:
                    continue
                policy = resolve("policy", {FILE_OF.get(policy_name, policy_name): setting})
                if policy_name not in learnt:
                    learnt[policy_name] = policy.fit(fit_on.outcomes, means_of(fit_on))
                add(rows, key, policy, told, means, learnt[policy_name], orders)
        twice = rows.rows.get((name, str(half), "seen_twice", "{}"))
        means_of_twice = [] if twice is None else [("twice", float(np.mean(twice["samples"])))]
        for label, mean in [*((str(mean), mean) for mean in POOLS), *means_of_twice]:
            key = (name, str(half), "pool", label)
            if rows.has(key) or mean >= longest:
                continue
            policy = resolve("policy", OURS)
            means_then = replace(means, left=mean * len(told.questions))
            add(rows, key, policy, told, means_then, learnt.get(OURS, {}), orders)
        key = (name, str(half), "all", "")
        if not rows.has(key):
            model = means.offers[0].model
            voted = {
                str(n): votes(told, model, n, orders).mean(axis=0).tolist() for n in (1, longest)
            }
            rows.add(key, votes=voted, longest=longest)


def add(
    rows: Rows,
    key: tuple[str, ...],
    policy: DecodingPolicy,
    told: Recording,
    means: Any,
    learnt: dict[str, Any],
    orders: list[int],
) -> None:
    replayed = replay(policy, told, replace(means, learnt=learnt), orders=orders, at_once=16)
    rows.add(
        key,
        correct=replayed.correct.mean(axis=0).round(4).tolist(),
        samples=replayed.samples.mean(axis=0).round(4).tolist(),
    )


# -- tables -------------------------------------------------------------------------------------


class Results:
    """Of a file: per policy its points, over the questions of both halves."""

    def __init__(self, name: str, rows: Rows) -> None:
        self.name = name
        self.points: dict[str, dict[str, list[tuple[Floats, Floats]]]] = defaultdict(dict)
        for (file, half, policy, setting), row in rows.rows.items():
            if file != name:
                continue
            if policy == "all":
                continue
            found = self.points[policy].setdefault(setting, [None, None])  # type: ignore[arg-type]
            found[int(half)] = (np.array(row["correct"]), np.array(row["samples"]))
        ends = [rows.rows[name, half, "all", ""] for half in ("0", "1")]
        self.longest = ends[0]["longest"]
        self.one, self.full = (
            [np.array(end["votes"][str(n)]) for end in ends] for n in (1, self.longest)
        )

    def frontier(self, policy: str, half: int | None = None) -> list[tuple[float, float, str]]:
        """(samples, accuracy, setting), from the fewest samples on, and the single sample."""
        parts = (0, 1) if half is None else (half,)
        found = [(1.0, float(np.concatenate([self.one[p] for p in parts]).mean()), "one")]
        for setting, points in self.points[policy].items():
            if any(point is None for point in points):
                continue
            correct = np.concatenate([points[p][0] for p in parts])
            samples = np.concatenate([points[p][1] for p in parts])
            found.append((float(samples.mean()), float(correct.mean()), setting))
        return sorted(found)

    def gain(self, half: int | None = None) -> tuple[float, float]:
        parts = (0, 1) if half is None else (half,)
        one = np.concatenate([self.one[p] for p in parts]).mean()
        full = np.concatenate([self.full[p] for p in parts]).mean()
        return float(one), float(full - one)


def needed(frontier: list[tuple[float, float, str]], accuracy: float) -> float:
    """The fewest samples at which a frontier, mixing two neighbours, reaches an accuracy; infinite
    where it never does."""
    best = float("inf")
    for i, (n0, a0, _) in enumerate(frontier):
        if a0 >= accuracy - 1e-12:
            best = min(best, n0)
        for n1, a1, _ in frontier[i + 1 :]:
            if a0 < accuracy <= a1:
                best = min(best, n0 + (n1 - n0) * (accuracy - a0) / (a1 - a0))
    return best


def at(frontier: list[tuple[float, float, str]], samples: float) -> float:
    """The best accuracy, mixing two settings, with so many samples."""
    best = max((a for n, a, _ in frontier if n <= samples), default=float("nan"))
    for i, (n0, a0, _) in enumerate(frontier):
        for n1, a1, _ in frontier[i + 1 :]:
            if n0 < samples < n1:
                best = max(best, a0 + (a1 - a0) * (samples - n0) / (n1 - n0))
    return best


RIVALS = [name for name in SETTINGS if name != OURS]


def frontier_table(results: list[Results]) -> None:
    print(
        "\nSamples to reach a share of what voting over all of them gains over one (both halves):"
    )
    print(f"{'file':<28}{'one':>7}{'all':>7}{'share':>7}{'marginal':>10}", end="")
    print("".join(f"{short(name):>10}" for name in RIVALS))
    sums: dict[float, dict[str, float]] = {share: defaultdict(float) for share in SHARES}
    for result in results:
        one, gain = result.gain()
        if gain < 0.01:
            print(
                f"{result.name:<28}{one:>7.3f}{one + gain:>7.3f}   voting gains less than a point"
            )
            continue
        fronts = {name: result.frontier(name) for name in SETTINGS}
        for share in SHARES:
            wanted = one + share * gain
            need = {name: needed(front, wanted) for name, front in fronts.items()}
            cells = "".join(f"{need[name]:>10.2f}" for name in [OURS, *RIVALS])
            label = f"{result.name:<28}{one:>7.3f}{one + gain:>7.3f}"
            print(f"{label if share == SHARES[0] else ' ' * 42}{share:>7.0%}{cells}")
            best = min(need[name] for name in RIVALS)
            if np.isfinite(best) and np.isfinite(need[OURS]):
                sums[share]["ours"] += need[OURS]
                sums[share]["best"] += best
                for name in RIVALS:
                    sums[share][name] += min(need[name], result.longest)
                sums[share]["files"] += 1
    print("\nPooled over files, beside the rival that is best on each file, and beside each alone:")
    for share in SHARES:
        total = sums[share]
        if not total:
            continue
        alone = ", ".join(f"{short(n)} {1 - total['ours'] / total[n]:+.1%}" for n in RIVALS)
        saved = 1 - total["ours"] / total["best"]
        print(f"{share:>5.0%} of {total['files']:.0f} files: {saved:+.1%} samples saved; {alone}")


def tuned_table(results: list[Results]) -> None:
    """Rivals tuned on one half for a share of the gain, told of the other; ours with as many
    samples there."""
    print("\nThe best rival tuned on one half, told of the other, beside as many samples of ours:")
    worse = better = count = 0
    for result in results:
        for share in SHARES:
            ours, rivals, samples, names = [], [], [], []
            for told in (0, 1):
                one, gain = result.gain(1 - told)
                if gain < 0.01:
                    break
                policy, setting = choose(result, RIVALS, 1 - told, one + share * gain)
                correct, drawn = result.points[policy][setting][told]
                names.append(short(policy))
                rivals.append(correct)
                samples.append(drawn)
                ours.append(with_samples(result, told, float(drawn.mean())))
            if len(names) == 2:
                label = f"{result.name:<28}{share:>6.0%}  {'/'.join(names):<20}"
                low, high = tell(label, ours, rivals, samples)
                worse, better, count = worse + (high < 0), better + (low > 0), count + 1
    print(f"of {count}: ours better beyond the interval {better} times, worse {worse} times")


def saved_table(results: list[Results]) -> None:
    """The share of the tuned rival's samples, the same on every file, that ours takes to be as
    accurate on the mean over files and halves."""
    print("\nSamples saved at the accuracy of the best rival tuned on the other half:")
    both = [r for r in results if min(r.gain(0)[1], r.gain(1)[1]) >= 0.01]
    for share in SHARES:
        rivals = []
        for result in both:
            for told in (0, 1):
                one, gain = result.gain(1 - told)
                policy, setting = choose(result, RIVALS, 1 - told, one + share * gain)
                correct, drawn = result.points[policy][setting][told]
                rivals.append((result, told, float(correct.mean()), float(drawn.mean())))
        wanted = np.mean([accuracy for _, _, accuracy, _ in rivals])
        took = sum(samples for *_, samples in rivals)
        for part in np.arange(0.3, 1.31, 0.01):
            allowed = [max(1.0, part * samples) for *_, samples in rivals]
            ours = [
                with_samples(result, told, most).mean()
                for (result, told, _, _), most in zip(rivals, allowed, strict=True)
            ]
            if np.mean(ours) >= wanted:
                print(f"{share:>5.0%} of {len(both)} files: {1 - sum(allowed) / took:+.0%}")
                break
        else:
            print(f"{share:>5.0%} of {len(both)} files: not reached")


def tell(
    label: str, ours: list[Floats], rivals: list[Floats], samples: list[Floats]
) -> tuple[float, float]:
    """A line; the interval of the paired difference."""
    mine, theirs = np.concatenate(ours), np.concatenate(rivals)
    low, high = interval(mine - theirs)
    print(
        f"{label}{theirs.mean():.4f} @ {np.concatenate(samples).mean():5.2f}   ours "
        f"{mine.mean():.4f}   {(mine - theirs).mean():+.4f} [{low:+.4f}, {high:+.4f}]"
    )
    return low, high


def with_samples(result: Results, half: int, samples: float) -> Floats:
    """[questions of the half]: of ours with so many samples, a coin tossed between the two prices
    (or the single sample) beside it; the lowest price where that has fewer."""
    points = [(1.0, result.one[half])]
    for point in result.points[OURS].values():
        points.append((float(point[half][1].mean()), point[half][0]))
    points.sort(key=lambda point: point[0])
    below = [point for point in points if point[0] <= samples][-1]
    above = [point for point in points if point[0] > samples]
    if not above:
        return below[1]
    share = (samples - below[0]) / (above[0][0] - below[0])
    mixed: Floats = (1 - share) * below[1] + share * above[0][1]
    return mixed


def choose(result: Results, names: list[str], half: int, wanted: float) -> tuple[str, str]:
    """(policy, setting) that reaches it with the fewest samples on a half; the most accurate where
    none does."""
    points = [
        (n, a, name, setting)
        for name in names
        for n, a, setting in result.frontier(name, half)
        if setting != "one"
    ]
    reach = [point for point in points if point[1] >= wanted - 1e-9]
    best = min(reach) if reach else max(points, key=lambda point: (point[1], -point[0]))
    return best[2], best[3]


def pool_table(results: list[Results]) -> None:
    print("\nOne budget over a pool: accuracy, beside a vote of as many for each, and of five:")
    header = f"{'file':<28}{'mean':>6}{'pooled':>9}{'fixed':>9}  ahead by, 95%"
    print(header + f"{'':<14}{'fixed 5':>9}  ahead by, 95%")
    below = 0
    for result in results:
        for mean in POOLS:
            points = result.points["pool"].get(str(mean))
            if points is None or any(point is None for point in points):
                continue
            ours = np.concatenate([point[0] for point in points])
            line = f"{result.name:<28}{mean:>6}{ours.mean():>9.4f}"
            same = fixed(result, mean)
            for beside in (same, fixed(result, 5)):
                if beside is None:
                    line += f"{'-':>9}{'':<26}"
                    continue
                low, high = interval(ours - beside)
                if beside is same:
                    below += high < 0
                line += f"{beside.mean():>9.4f}  {(ours - beside).mean():+.4f}"
                line += f" [{low:+.3f}, {high:+.3f}]"
            print(line)
    print(f"below as many for each beyond the interval: {below}")
    print("\nThe rule 'seen twice, five at most', beside one budget of as many samples:")
    for result in results:
        ours, twice = result.points["pool"].get("twice"), result.points["seen_twice"].get("{}")
        if ours and twice and all(point is not None for point in (*ours, *twice)):
            parts = ([p[0] for p in ours], [p[0] for p in twice], [p[1] for p in twice])
            tell(f"{result.name:<28}", *parts)


def fixed(result: Results, mean: float) -> Floats | None:
    """[questions]: of the votes over so many samples; between two numbers a coin is tossed."""
    low, high = int(np.floor(mean)), int(np.ceil(mean))
    found = []
    for n in (low, high):
        points = result.points["fixed"].get(json.dumps({"samples": n}))
        if points is None:
            return None
        found.append(np.concatenate([point[0] for point in points]))
    share = mean - low
    mixed: Floats = (1 - share) * found[0] + share * found[1]
    return mixed


def speed_table(traces: Path) -> None:
    """500 questions by 40 samples, every policy that can be replayed on one model."""
    outcomes = read_outcomes([traces / "samples" / "codex001_addsub.jsonl.gz"])
    outcomes += [replace(outcome, id=f"again-{outcome.id}") for outcome in outcomes]
    scored = [replace(o, rewards=tuple(o.correct)) for o in outcomes[:500]]
    recording = Recording.of(scored)
    print(
        "\nReplaying 500 questions by 40 samples, CPU seconds (best of 3), reading them left out:"
    )
    for name in all_names("policy"):
        options = {"pandora": {"cost_in_reward": 0.001}}.get(name)  # it wants a cost
        policy = resolve("policy", {name: options})
        means = means_of(recording)
        try:
            policy.check(means)
        except ValueError:
            continue
        if policy.needs == "thoughts":
            continue
        seconds = []
        for order in range(3):
            began = time.process_time()
            replayed = replay(policy, recording, means, orders=[order])
            seconds.append(time.process_time() - began)
        print(f"{name:<28}{min(seconds):>7.2f} s {replayed.samples.mean():>7.2f} samples each")


def short(name: str) -> str:
    return {
        "adaptive_consistency": "beta",
        "early_stopping_consistency": "windows",
        "sequential_test": "test",
        "seen_twice": "twice",
    }.get(name, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("traces", type=Path)
    parser.add_argument("--orders", type=int, default=10)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--part", help="1/2: every second file, from the first on")
    parser.add_argument("--tables-only", action="store_true")
    parser.add_argument("--speed", action="store_true", help="that alone")
    options = parser.parse_args()
    if options.speed:
        print(heading("Replay"))
        speed_table(options.traces)
        return
    rows = Rows(options.rows)
    names = []
    for name, recording in recordings(options.traces, options.only):
        if options.part:
            number, parts = (int(x) for x in options.part.split("/"))
            if zlib.crc32(name.encode()) % parts != number - 1:
                continue
        names.append(name)
        if not options.tables_only:
            run(name, recording, rows, options.orders)
            print(f"{name}: done", flush=True)
    print(heading("Sampling policies on recorded answers"))
    whole = [name for name in names if rows.has((name, "1", "all", ""))]
    results = [Results(name, rows) for name in whole]
    many = [result for result in results if result.longest >= 10]
    frontier_table(many)
    tuned_table(many)
    saved_table(many)
    pool_table(results)


if __name__ == "__main__":
    main()
