"""The cascade on recorded answers of GPT-3.5 and GPT-4: calibrated on one half of the questions,
told of the other; and how often its bounds hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forecasts import print_table
from thrifty.core.sampling import Means
from thrifty.decoding.cascade import Cascade, _thresholds
from thrifty.recordings import read_outcomes
from thrifty.replay import Recording, interval, means_of, replay
from thrifty.scaling.escalation import Recorded
from thrifty.signals.stage_votes import recorded_blocks

Floats = NDArray[np.float64]

PROMPTS = ("cot1", "cot2", "pot1", "pot2")
WEAK = tuple(f"mot_gpt35_date_{prompt}" for prompt in PROMPTS)
STRONG = "mot_gpt4_date_greedy_cot2"
DEARER = 20.0
"""A GPT-4 call in GPT-3.5 calls, as both were sold in 2023: $0.03 and $0.0015 for 1000 tokens."""


def shown(low_high: Sequence[float]) -> str:
    return f"{low_high[0]:+.3f} to {low_high[1]:+.3f}"


def cascade_files(traces: Path, suffix: str, strong: str) -> Recording:
    names = [*(f"{weak}{suffix}" for weak in WEAK), strong]
    outcomes = read_outcomes([traces / "samples" / f"{name}.jsonl.gz" for name in names])
    outcomes = [replace(o, model=o.model.removesuffix(suffix)) for o in outcomes]
    recording = Recording.of(outcomes)
    return Recording({i: of for i, of in recording.questions.items() if len(of) == len(names)})


def cascade(strong: str = STRONG, **options: Any) -> Cascade:
    return Cascade(stages=(WEAK, (strong,)), **options)


def cascade_means(recording: Recording, strong: str = STRONG, price: float = 0.0) -> Means:
    return means_of(recording, prices={strong: DEARER}, price=price)


def over_splits(
    recording: Recording, policy: Cascade, splits: int, price: float = 0.0
) -> dict[str, Any]:
    """Calibrated on one half, told of the other, both ways round; against the last model alone."""
    (strong,) = policy.stages[-1]
    ids = list(recording.questions)
    place = {each: i for i, each in enumerate(ids)}
    known = recorded_once(recording, policy)
    right, calls = (np.full((2 * splits, len(ids)), np.nan) for _ in range(2))
    accuracies, thresholds, weighted = [], [], 0
    for row in range(2 * splits):
        one, other = recording.split(0.5, seed=row // 2)[:: 1 if row % 2 else -1]
        means = cascade_means(one, strong, price)
        try:
            means = replace(means, learnt=policy.fit(one.outcomes, means))
        except ValueError:
            continue
        columns = [place[each] for each in other.questions]
        at = _thresholds(policy._point(means, policy.stages))
        last = known.last_asked(at)[columns]
        right[row, columns] = known.right[last, columns]
        calls[row, columns] = last == 1
        if means.learnt["vote"] == "weighted" or row == 0:
            played = replay(policy, other, means).correct[0]
            assert means.learnt["vote"] == "weighted" or (played == right[row, columns]).all()
            right[row, columns] = played
            weighted += means.learnt["vote"] == "weighted"
        accuracies.append(np.nanmean(right[row]))
        thresholds.append(min(at[0], 1.05))
    if not accuracies:
        return {"fitted": 0}
    seen = ~np.isnan(right).all(axis=0)
    per_question = np.nanmean(right[:, seen], axis=0)
    alone = known.right[1, seen]
    return {
        "fitted": len(accuracies) / (2 * splits),
        "accuracy": float(per_question.mean()),
        "interval": list(interval(per_question)),
        "of_splits": [float(x) for x in np.quantile(accuracies, [0.05, 0.95])],
        "calls": float(np.nanmean(calls[:, seen], axis=0).mean()),
        "alone": float(alone.mean()),
        "gain": float((per_question - alone).mean()),
        "gain_interval": list(interval(per_question - alone)),
        "threshold": float(np.median(thresholds)),
        "weighted": weighted / len(accuracies),
    }


def recorded_once(recording: Recording, policy: Cascade) -> Recorded:
    """What every question brings with the first samples of each model, as a replay has it."""
    counts = policy._counts(policy.stages)
    blocks, left_out = recorded_blocks(recording.outcomes, policy.stages, counts, policy.signal, 1)
    assert not left_out
    scores = np.array([[v.score for v in q.verdicts] for q in blocks[0]]).T
    right = np.array([q.right for q in blocks[0]]).T
    weak = float(sum(counts[model] for model in policy.stages[0]))
    return Recorded(scores, right, (weak, DEARER))


CASCADE_HEAD = (
    "calibrated for",
    "accuracy",
    "95%",
    "5-95% of splits",
    "GPT-4 calls",
    "GPT-4 alone",
    "ahead by",
    "95%",
    "threshold (median)",
    "weighted vote",
    "fitted",
)


def cascade_row(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    if not found["fitted"]:
        return (name, "refused: nothing keeps it", *[""] * 9)
    low, high = found["interval"]
    return (
        name,
        f"{found['accuracy']:.3f}",
        f"{low:.3f} to {high:.3f}",
        "{:.3f} to {:.3f}".format(*found["of_splits"]),
        f"{found['calls']:.2f}",
        f"{found['alone']:.3f}",
        f"{found['gain']:+.3f}",
        shown(found["gain_interval"]),
        "never" if found["threshold"] > 1 else f"{found['threshold']:.2f}",
        f"{found['weighted']:.0%}",
        f"{found['fitted']:.0%}",
    )


def cascade_tables(traces: Path, splits: int) -> dict[str, Any]:
    recording = cascade_files(traces, "", STRONG)
    result: dict[str, Any] = {}
    print(f"\n## Cascade: 4 prompts of GPT-3.5, 5 samples each, to GPT-4 ({STRONG})\n")
    settings: list[tuple[str, dict[str, Any], float]] = [
        ("accuracy (price 0)", {}, 0.0),
        ("price .001 a GPT-3.5 call", {}, 1e-3),
        ("price .003", {}, 3e-3),
        ("price .01", {}, 1e-2),
        *(
            (f"calls at most {c:g}, {g}", {"target": "calls", "at_most": c, "guarantee": g}, 0.0)
            for g in ("mean", "probability")
            for c in (0.1, 0.2, 0.27, 0.35, 0.5)
        ),
        *(
            (f"lost at most {c:g}", {"target": "lost", "at_most": c}, 0.0)
            for c in (0.01, 0.02, 0.03, 0.05, 0.1)
        ),
        *((f"wrong at most {c:g}", {"target": "wrong", "at_most": c}, 0.0) for c in (0.15, 0.2)),
    ]
    rows = []
    for name, options, price in settings:
        found = over_splits(recording, cascade(**options), splits, price)
        result[name] = found
        rows.append(cascade_row(name, found))
    print_table(CASCADE_HEAD, rows)

    print("Other recordings of the same questions, calibrated for accuracy:\n")
    rows = []
    for suffix in ("", "_t=0.4", "_t=0.8"):
        for prompt in PROMPTS:
            strong = f"mot_gpt4_date_greedy_{prompt}"
            name = f"GPT-3.5{suffix.replace('_', ' ')} to GPT-4 {prompt}"
            other = cascade_files(traces, suffix, strong)
            found = over_splits(other, cascade(strong), max(splits // 4, 2))
            result[name] = found
            rows.append(cascade_row(name, found))
    print_table(CASCADE_HEAD, rows)

    print(f"Fewer weak samples (cost in GPT-4 calls, of which one is {DEARER:g} of GPT-3.5):\n")
    rows = []
    for count in (1, 2, 3, 5):
        found = over_splits(recording, cascade(samples=count), max(splits // 2, 2))
        cost = len(WEAK) * count / DEARER + found["calls"]
        result[f"{count} samples"] = found | {"cost": cost}
        rows.append((*cascade_row(f"4 x {count}", found)[:7], f"{cost:.2f}"))
    print_table((*CASCADE_HEAD[:7], "cost"), rows)
    result["coverage"] = coverage(recording, 5 * splits)
    return result


def coverage(recording: Recording, times: int) -> list[dict[str, Any]]:
    """How often a bound did not hold, where the truth is known: the risk on all 369 questions, of
    a calibration on questions drawn from them with replacement."""
    found = []
    ids = list(recording.questions)
    for size in (100, 200):
        for target, level in (("lost", 0.03), ("lost", 0.05), ("wrong", 0.2), ("calls", 0.3)):
            policy = cascade(target=target, at_most=level)
            known = recorded_once(recording, policy)
            risks, refused = [], 0
            for time_ in range(times):
                rng = np.random.default_rng([size, time_])
                drawn = [
                    replace(o, id=f"{i}.{ids[j]}")
                    for i, j in enumerate(rng.integers(len(ids), size=size))
                    for o in recording.questions[ids[j]].values()
                ]
                means = cascade_means(recording)
                try:
                    learnt = policy.fit(drawn, means)
                except ValueError:
                    refused += 1
                    continue
                at = _thresholds(policy._point(replace(means, learnt=learnt), policy.stages))
                risks.append(float(known.losses(target, at).mean()))
            broken = float(np.mean(np.array(risks) > level + 1e-9)) if risks else 0.0
            found.append(
                {
                    "target": target,
                    "at_most": level,
                    "questions": size,
                    "broken": broken * len(risks) / times,
                    "mean_risk": float(np.mean(risks)) if risks else None,
                    "refused": refused / times,
                }
            )
    print(f"Coverage, {times} calibrations each, promised to fail in no more than 10%:\n")
    print_table(
        ("bound", "calibration questions", "does not hold in", "mean risk", "refused"),
        [
            (
                f"{row['target']} at most {row['at_most']:g}",
                f"{row['questions']}",
                f"{row['broken']:.1%}",
                "" if row["mean_risk"] is None else f"{row['mean_risk']:.3f}",
                f"{row['refused']:.0%}",
            )
            for row in found
        ],
    )
    return found
