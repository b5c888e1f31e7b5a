"""Stopping rules on recorded curves: what they save and lose, beside patience and halving."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from recorded_curves import Curve
from thrifty.core.budget import Cost
from thrifty.core.contracts import Evaluation, Outlook, StoppingRule
from thrifty.core.resolve import resolve
from thrifty.scaling.annealing import CoolDown
from thrifty.scaling.halving import rungs, survivors
from thrifty.scaling.posterior import condition

EVALUATIONS = 20
WORTHS = (0.0, 0.05, 0.2)
"""Nats that a whole run's FLOPs would bring elsewhere."""
DEV_NOISE = (0.0, 0.01)
"""Nats, added to each evaluation and told to the rule."""
SEED_NOISE = 1e-3
"""Of the loss: what a run's improvement is told from."""
PATIENCE = (1, 3, 5)


def rules() -> dict[str, StoppingRule]:
    plain = {"z": 0.0, "min_delta": 0.0}
    return {
        "marginal_gain": resolve("stopping", "marginal_gain"),
        **{
            f"patience {p}": resolve("stopping", {"plateau": {"patience": p, **plain}})
            for p in PATIENCE
        },
        "plateau 3, with error bars": resolve("stopping", "plateau"),
    }


@dataclass(frozen=True)
class Stop:
    """How one rule ended one run."""

    stopped: bool
    saved: float
    regret: float
    """In the objective less the price of what was spent, against the best step in hindsight."""
    loss_regret: float
    false: bool


def stop_at(rule: StoppingRule, curve: Curve, worth: float, noise: float, seed: int) -> int:
    """Place of the evaluation at which ``rule`` ends the run."""
    steps, losses = _thinned(curve)
    shown = losses + noise * np.random.default_rng(seed).standard_normal(len(losses))
    end = float(steps[-1])
    history: list[Evaluation] = []
    for i, (step, loss) in enumerate(zip(steps[:-1], shown, strict=False)):
        error = noise * 2**0.5 if noise else inf
        history.append(Evaluation(step=int(step), flops=float(step), loss=loss, stderr=error))
        interval = int(steps[i + 1] - step)
        outlook = Outlook(
            resource="flops",
            next_interval=Cost(flops=float(interval)),
            remaining=Cost(flops=end - step),
            price=worth / end,
            unit="nats/token",
            interval_steps=interval,
        )
        if rule.decide(history, outlook).stop:
            return i
    return len(steps) - 1


def judged(curve: Curve, at: int, worth: float, noise: float) -> Stop:
    steps, losses = _thinned(curve)
    value = losses + worth * steps / steps[-1]
    later = value[at] - value[at:].min()
    return Stop(
        stopped=at < len(steps) - 1,
        saved=1 - float(steps[at] / steps[-1]),
        regret=float(value[at] - value.min()),
        loss_regret=float(losses[at] - losses.min()),
        false=bool(later > max(noise, SEED_NOISE * losses[at])),
    )


def _thinned(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """As a run evaluates, every so many steps; all where there are no more."""
    if len(curve.steps) <= EVALUATIONS:
        return curve.steps, curve.losses
    wanted = np.linspace(0, curve.steps[-1], EVALUATIONS + 1)[1:]
    places = np.unique(np.searchsorted(curve.steps, wanted - 1e-9).clip(0, len(curve.steps) - 1))
    return curve.steps[places], curve.losses[places]


def stop_rows(curves: Sequence[Curve]) -> Iterator[tuple[str, ...]]:
    held = [c for c in curves if c.kind in ("constant", "hot", "hot, lower rate", "flan")]
    ends: dict[tuple[str, float, float], list[int]] = {}
    for worth in WORTHS:
        for noise in DEV_NOISE:
            for name, rule in rules().items():
                priced = worth if name == "marginal_gain" else 0.0  # the others know no price
                if (name, noise, priced) not in ends:
                    ends[name, noise, priced] = [
                        stop_at(rule, curve, priced, noise, seed) for seed, curve in enumerate(held)
                    ]
                places = ends[name, noise, priced]
                found = [
                    judged(curve, at, worth, noise) for curve, at in zip(held, places, strict=True)
                ]
                yield (
                    f"{worth:g}",
                    f"{noise:g}",
                    name,
                    f"{100 * np.mean([f.stopped for f in found]):.0f}%",
                    f"{100 * np.mean([f.saved for f in found]):.1f}%",
                    f"{np.mean([f.regret for f in found]):.4f}",
                    f"{max(f.regret for f in found):.4f}",
                    f"{np.mean([f.loss_regret for f in found]):.4f}",
                    f"{100 * np.mean([f.false for f in found]):.1f}%",
                )


# -- one of several runs --------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecasted:
    """A candidate, more being better: less the loss that it is forecast to end with."""

    mean: float
    stderr: float


def halving_rows(curves: Sequence[Curve]) -> Iterator[tuple[str, ...]]:
    """Of runs as long as each other: by the loss so far, as halving has it, and by the forecast."""
    sets: dict[str, list[Curve]] = {"flan, 30 models": [c for c in curves if c.kind == "flan"]}
    lengths = defaultdict(list)
    for curve in curves:
        if curve.kind == "track 3":
            lengths[len(curve.shares)].append(curve)
    longest = max(lengths.values(), key=len, default=[])
    if len(longest) > 3:
        sets[f"nanogpt track 3, {len(longest[0].shares)} steps"] = longest
    for name, runs in sets.items():
        seeds = SEED_NOISE * float(np.min([run.losses[-1] for run in runs]))
        for rule in ("loss so far", "forecast"):
            for z in (0.0, 1.0):
                cost, regret = _halve(runs, by_forecast=rule == "forecast", z=z)
                label = f"halving by the {rule}" + (", ties within 1 s.e." if z else "")
                numbers = f"{100 * cost:.0f}%", f"{regret:.4f}", f"{seeds:.4f}"
                yield name, str(len(runs)), label, *numbers


def _halve(runs: Sequence[Curve], *, by_forecast: bool, z: float) -> tuple[float, float]:
    """The share of what all runs to the end cost, and the loss above the best run's."""
    rounds = len(rungs(len(runs), 1.0))
    left, spent, reached = list(range(len(runs))), 0.0, 0.0
    for number in range(rounds):
        share = 2.0 ** (number - rounds + 1)
        spent += len(left) * (share - reached)
        reached = share
        measured = [_measured(runs[i], share, by_forecast) for i in left]
        left = [left[i] for i in survivors(measured, max(len(left) // 2, 1), z)]
    best = min(run.losses[-1] for run in runs)
    chosen = min(left, key=lambda i: runs[i].losses[-1] if reached >= 1 else i)
    return spent / len(runs), float(runs[chosen].losses[-1] - best)


def _measured(run: Curve, share: float, by_forecast: bool) -> Forecasted:
    count = max(run.until(share), 1)
    noise = SEED_NOISE * float(run.losses[count - 1])
    if not by_forecast or count < 3 or share >= 1:
        return Forecasted(-float(run.losses[count - 1]), noise)
    none = np.zeros(count)
    found = condition(run.steps[:count], run.losses[:count], none, [run.shares], CoolDown())
    mean, stderr = found.loss(0)
    return Forecasted(-mean, float(np.hypot(stderr, noise)))
