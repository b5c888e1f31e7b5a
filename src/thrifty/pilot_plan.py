"""Whether a pilot pays, who enters it and what it takes: planned before a FLOP is spent.

A candidate is a scorer, a picker, a share of the pool to keep, and through the scorer's ``model`` a
proxy. All are tried as scale models of the run: on the same sample of the pool, a share f of its
rows, each keeps f times the tokens that it would keep of the pool, under the run's own memory plan
and batch, f = pilot steps / run steps. What that takes is worked out in ``pilot_layout.py``; the
run that would follow each is planned as any other, on what the pilot leaves of the budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thrifty import planner
from thrifty.affordable import minus
from thrifty.core.budget import CONSUMED, Budget, Cost
from thrifty.core.contracts import MEMORY_KINDS, Scorer
from thrifty.core.plan import put, read_pilot
from thrifty.core.plan_pilot import Pilot, PilotCandidate
from thrifty.core.quantities import show
from thrifty.core.resolve import Spec, name_of, parse_spec, resolve
from thrifty.pilot_layout import LEAST_STEPS, PLANNED_SHARE, Layout, amounts_of, lay_out
from thrifty.planner import Planned
from thrifty.pricing import Candidate
from thrifty.request import Request

SHARE = 0.1
"""Of the budget, at most, where the user says nothing."""
MOST = 4
"""Candidates, unless the user names more or what to cross them with."""
MOST_CROSSED = 8
_SAME = (
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
    "training.max_length",
)
_SHORTER = (
    "selection.max_tokens",
    "training.max_steps",
    "training.warmup_steps",
    "training.cooldown_steps",
    "training.eval_steps",
)
"""What follows from the length of a run."""


@dataclass(frozen=True, kw_only=True)
class Piloted:
    """A plan with its pilot, or without one; why is among its reasons."""

    planned: Planned
    pilot: Pilot


class _NoPilot(Exception):
    """Why there is none."""


def with_pilot(request: Request, planned: Planned) -> Piloted:
    """``planned`` as it is, or as what a pilot leaves of the budget allows. Raises ValueError where
    the user asks for a pilot that cannot be."""
    wish = _wish(request)
    asked = "pilot.share" in request.fixed
    try:
        if asked and not wish.share:
            raise _NoPilot("none, as asked")
        _check_possible(request, planned)
        if not asked:
            _check_open(request, planned)
        return _piloted(request, planned, replace(wish, share=wish.share or SHARE))
    except _NoPilot as reason:
        told = {**planned.why, "pilot": str(reason)}
        return Piloted(planned=replace(planned, why=told), pilot=replace(wish, share=0.0))


def _wish(request: Request) -> Pilot:
    """What the user set under ``pilot``."""
    values: dict[str, Any] = {}
    for key, value in request.fixed.items():
        if key == "pilot" or key.startswith("pilot."):
            put(values, key, value)
    return read_pilot(values.get("pilot") or {})


def _check_possible(request: Request, planned: Planned) -> None:
    if request.task == "preference":
        raise _NoPilot("none: pairs are not piloted")
    if planned.chosen.held.num_ranks > 1:
        raise _NoPilot("none: several devices train, and a pilot uses one")
    if not any(name in request.budget.limited for name in CONSUMED):
        raise _NoPilot("none: nothing is limited that it could take a share of")


def _check_open(request: Request, planned: Planned) -> None:
    """Whether there is anything to find out."""
    if "selection.scorer" in request.fixed:
        raise _NoPilot("none: the scorer was named (--pilot 0.1 puts it to the test)")
    near = _near(planned)
    if len(near) < 2:
        raise _NoPilot(f"none: by the prior {near[0].scorer} is best by more than its error")


def _near(planned: Planned) -> list[Candidate]:
    """The best of each scorer whose prior gain is within error of the best, best first."""
    best: dict[str, Candidate] = {}
    for candidate in planned.candidates:
        best.setdefault(candidate.scorer, candidate)
    ranked = sorted(best.values(), key=lambda c: -c.gain.mean)
    top = ranked[0].gain
    return [
        c
        for c in ranked
        if top.mean - c.gain.mean <= math.hypot(top.stderr, c.gain.stderr) or c is ranked[0]
    ]


# -- who enters ---------------------------------------------------------------------------------


def _entrants(request: Request, planned: Planned, wish: Pilot) -> list[PilotCandidate]:
    """In the order in which they win ties: `uniform`, `bm25` where there is a target, the planner's
    own choice, and those that the prior puts next or the user named."""
    first: list[Spec] = ["uniform", *(["bm25"] if request.targets else [])]
    always = [PilotCandidate(scorer=spec) for spec in first]
    named = request.fixed.get("selection.scorer")
    if wish.candidates:
        return _named([*always, *wish.candidates])
    if named is not None:
        return _named(_crossed([*first, named], wish))
    near = [c.scorer_spec for c in _near(planned)]
    crossed = _crossed([*first, planned.chosen.scorer_spec, *near], wish)
    own_axes = wish.pickers or wish.keeps or wish.proxies
    return _named(crossed)[: MOST_CROSSED if own_axes else MOST]


def _crossed(specs: Sequence[Spec], wish: Pilot) -> list[PilotCandidate]:
    """Each scorer as it is, then with each picker, share and proxy that the user named."""
    found = []
    for spec in specs:
        forms = [spec, *(_looking_at(spec, proxy) for proxy in wish.proxies)]
        for form in (form for form in forms if form is not None):
            for picker in (None, *wish.pickers):
                for keep in (None, *wish.keeps):
                    found.append(PilotCandidate(scorer=form, picker=picker, keep=keep))
    return found


def _looking_at(spec: Spec, proxy: str) -> Spec | None:
    """The scorer with a smaller model to look at; None where it looks at none, or at its own."""
    name, options = parse_spec("scorer", spec)
    scorer: Scorer = resolve("scorer", spec)
    takes_one = any(field.name == "model" for field in dataclasses.fields(scorer))  # type: ignore[arg-type]
    if not takes_one or scorer.model or not scorer.needs_model:
        return None
    return {name: {**options, "model": proxy}}


def _named(candidates: Sequence[PilotCandidate]) -> list[PilotCandidate]:
    """Each once, with a name that tells it apart."""
    found: dict[str, PilotCandidate] = {}
    for each in candidates:
        scorer, options = parse_spec("scorer", each.scorer)
        parts = [scorer, *(f"{key}={_short(value)}" for key, value in options.items())]
        if each.picker is not None:
            parts.append(parse_spec("picker", each.picker)[0])
        if each.keep is not None:
            parts.append(f"{100 * each.keep:g}%")
        name = " ".join(parts)
        found.setdefault(name, replace(each, name=name))
    return list(found.values())


def _short(value: Any) -> str:
    """Of a model's folder its own name."""
    return Path(value).name if isinstance(value, str) else show(value)


# -- the runs that would follow ------------------------------------------------------------------


def _piloted(request: Request, planned: Planned, wish: Pilot) -> Piloted:
    allowed = part_of(request.budget, wish.share * PLANNED_SHARE)
    rest = part_of(request.budget, 1 - wish.share)
    runs: dict[str, Planned] = {}
    refused = []
    entrants = _entrants(request, planned, wish)
    for each in entrants:
        try:
            runs[each.name] = planner.search(_run_of(request, planned, each, rest))
        except ValueError as error:
            refused.append(f"{each.name}: {str(error).partition(chr(10))[0]}")
    able = [each for each in entrants if each.name in runs]
    own = planned.chosen.scorer_spec
    always = {each.name for each in able if each.scorer in ("uniform", "bm25", own)}
    while len(able) > 1:
        found = lay_out(request, able, [runs[each.name].chosen for each in able], allowed)
        if isinstance(found, Layout):
            return _written(request, planned, wish, found)
        refused.append(f"{found}: too dear to try")
        if found in always:
            break
        able = [each for each in able if each.name != found]
    raise _NoPilot(
        f"none: {wish.share:.0%} of the budget does not buy the scoring of the candidates and "
        f"{LEAST_STEPS} steps of each, and fewer would tell nothing ({'; '.join(refused)})"
    )


def part_of(budget: Budget, share: float) -> Budget:
    """That share of every limit that is consumed."""
    limits = {name: limit for name in CONSUMED if (limit := budget.limit(name)) is not None}
    return replace(budget, **{name: limit * share for name, limit in limits.items()})


def _run_of(
    request: Request, planned: Planned, candidate: PilotCandidate, budget: Budget
) -> Request:
    """The run that follows where ``candidate`` wins, held in memory as ``planned``."""
    techniques = dict(zip(MEMORY_KINDS, planned.chosen.held.techniques, strict=True))
    aside = ("pilot", "training.memory.")
    fixed = {
        **{key: value for key, value in request.fixed.items() if not key.startswith(aside)},
        # With all options, or a search would try other forms.
        **{
            f"training.memory.{kind}": {name_of(each): dataclasses.asdict(each)}  # type: ignore[call-overload]
            for kind, each in techniques.items()
        },
        **{key: getattr(planned.training, key.removeprefix("training.")) for key in _SAME},
        "selection.scorer": candidate.scorer,
    }
    if candidate.picker is not None:
        fixed["selection.picker"] = candidate.picker
    if candidate.keep is not None and request.pool is not None:
        fixed["selection.max_tokens"] = candidate.keep * request.pool.num_tokens
    return replace(request, budget=budget, fixed=fixed)


def _written(request: Request, planned: Planned, wish: Pilot, layout: Layout) -> Piloted:
    """The pilot as plan.yaml has it, and the plan of the candidate that the prior likes best."""
    runs, candidates = {}, []
    for each in layout.candidates:
        # What it scores for keeps is not paid for again.
        kept = Cost.from_dict(each.scoring) if each.whole_pool else Cost()
        other = layout.cost_but(each.name) if each.whole_pool else layout.cost
        run = planner.search(_run_of(request, planned, each, minus(request, other)))
        runs[each.name] = run = replace(run, chosen=_paid(run.chosen, kept, request))
        to_come = amounts_of(run.chosen.by_stage["select"])
        settings = _settings(request, each, run, layout)
        candidates.append(replace(each, to_come=to_come, settings=settings))
    own = planned.chosen.scorer_spec
    like = next((c for c in candidates if c.scorer == own), candidates[0])
    run = runs[like.name]
    chosen = replace(run.chosen, by_stage={"pilot": layout.cost, **run.chosen.by_stage})
    others = [chosen if c is planned.chosen else c for c in planned.candidates]
    pilot = replace(
        wish,
        candidates=tuple(candidates),
        sample=layout.sample,
        rungs=layout.rungs,
        eval_steps=layout.eval_steps,
    )
    return Piloted(
        planned=replace(
            planned,
            chosen=chosen,
            candidates=tuple(others),
            training=run.training,
            why={**planned.why, **{key: run.why[key] for key in _SHORTER}, "pilot": _why(pilot)},
        ),
        pilot=pilot,
    )


def _paid(candidate: Candidate, scoring: Cost, request: Request) -> Candidate:
    """With ``scoring`` off its price."""
    stage = candidate.by_stage["select"]
    left = replace(
        stage,
        flops=max(stage.flops - scoring.flops, 0.0),
        seconds=max(stage.seconds - scoring.seconds, 0.0),
        joules=0.0,
        dollars=0.0,
    )
    return replace(candidate, by_stage={**candidate.by_stage, "select": request.rates.of(left)})


def _settings(
    request: Request, candidate: PilotCandidate, run: Planned, layout: Layout
) -> dict[str, Any]:
    """plan.yaml keys of the run that follows; those that the user fixed stay."""
    chosen, training = run.chosen, run.training
    pool = request.pool.num_tokens if request.pool else math.inf
    names = ("max_steps", "epochs", "warmup_steps", "cooldown_steps", "eval_steps", "save_steps")
    found: dict[str, Any] = {f"training.{name}": getattr(training, name) for name in names}
    found["selection.max_tokens"] = None if chosen.keep_tokens >= pool else chosen.keep_tokens
    found = {key: value for key, value in found.items() if key not in request.fixed}
    found["training.max_steps"] = training.max_steps  # at most what was fixed
    found["selection.scorer"] = candidate.scorer
    if candidate.picker is not None:
        found["selection.picker"] = candidate.picker
    if candidate.keep is not None:
        found["selection.max_tokens"] = chosen.keep_tokens
    costs = {"pilot": layout.cost, **chosen.by_stage}
    return found | {"predicted": {name: amounts_of(cost) for name, cost in costs.items()}}


def _why(pilot: Pilot) -> str:
    rounds = ", then ".join(f"{r.candidates} until step {r.steps}" for r in pilot.rungs)
    return (
        f"{pilot.share:.0%} of the budget at most: the prior cannot tell these apart, so "
        f"{', '.join(c.name for c in pilot.candidates)} are tried on {pilot.sample:.1%} of the "
        f"pool's rows ({rounds}); the winner is what the rest is spent on (docs/pilot.md)"
    )
