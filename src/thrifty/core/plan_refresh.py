"""``selection.refresh`` in plan.yaml: whether rows are chosen anew while a model is trained, and
what stands against it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from thrifty.core.contracts import OnlineMethod, Scorer
from thrifty.core.resolve import Spec, name_of, resolve

if TYPE_CHECKING:
    from thrifty.core.plan import Plan

_LOOKS = ("forward", "gradient")
"""Cost classes of scorers that look at a model as it is, and train none of their own."""


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """Choosing the rows anew while the model is trained on them."""

    when: Literal["never", "governed", "fixed", "random"] = "never"
    """``governed``: where the forecast gain is worth its price. ``fixed`` and ``random`` do it
    ``times`` times whatever it brings, evenly spread or at evaluations drawn at random: what the
    governed one is to be compared with."""
    scorer: str = ""
    """Which looks at the model in training; empty: the selection's own, or its stand-in."""
    others: tuple[str, ...] = ()
    """Scorers that may take over from it where that is worth more; of ``governed``."""
    times: int = 3
    """Of ``fixed`` and ``random``; of ``governed`` at most."""
    probe_rows: int = 256
    """Drawn at random and scored again at evaluations, to see how far the scores have drifted."""
    probe_share: float = 0.02
    """Of the FLOPs that the run has spent, that probes may take."""
    shortlist: float = 0.15
    """The share of the rows that is scored again: those of which cheaper signals promise most."""
    momentum: float = 0.5
    """The weight of the new look in what is believed of a row, the old one has the rest."""
    dwell: int = 2
    """Evaluations after a choice before the next."""
    z: float = 1.0
    """Standard errors by which the gain must beat its price."""
    seed: int = 0


def looks_again(plan: Plan) -> Scorer:
    """The scorer that looks at the model in training."""
    return _looking(plan.selection.refresh.scorer or plan.selection.scorer)


def may_take_over(plan: Plan) -> list[Scorer]:
    """Scorers that may look in its place."""
    return [_looking(name) for name in plan.selection.refresh.others]


def looking_in(fixed: Mapping[str, Any], own: Scorer) -> list[Scorer]:
    """All that may look at the model in training under the keys that a user set, where the
    selection's is ``own``; none where rows are chosen once."""
    if fixed.get("selection.refresh.when", "never") == "never":
        return []
    first = fixed.get("selection.refresh.scorer") or own.stand_in
    others = fixed.get("selection.refresh.others", ())
    return [_looking(first) if first else own, *(_looking(name) for name in others)]


def _looking(spec: Spec) -> Scorer:
    scorer: Scorer = resolve("scorer", spec)
    return resolve("scorer", scorer.stand_in) if scorer.stand_in else scorer


def wrong_refresh(plan: Plan) -> Iterator[str]:
    """What stands against choosing anew, each with what to do."""
    refresh = plan.selection.refresh
    if refresh.when == "never":
        return
    ranges = {
        "times": (1, 1000),
        "probe_rows": (8, 1e6),
        "probe_share": (0, 1),
        "shortlist": (0, 1),
        "momentum": (0, 1),
        "dwell": (1, 1e6),
        "z": (0, 100),
    }
    for name, (least, most) in ranges.items():
        if not least <= getattr(refresh, name) <= most:
            value = getattr(refresh, name)
            yield f"selection.refresh.{name} must be in [{least:g}, {most:g}], not {value}"
    looking = [("scorer", looks_again(plan)), *(("others", each) for each in may_take_over(plan))]
    for key, scorer in looking:
        if why := _sees_nothing_new(scorer):
            yield (
                f"selection.refresh.when is {refresh.when}, and {name_of(scorer)} {why}: "
                f"selection.refresh.{key}: grad_cosine, or when: never"
            )
        elif scorer.needs_target and not plan.targets:
            yield f"selection.refresh: {name_of(scorer)} needs a target, and there is none"
    if len({name_of(scorer) for _, scorer in looking}) < len(looking):
        yield "selection.refresh.others: a scorer is named twice, or looks already"
    if plan.task == "preference":
        yield "selection.refresh: rows of pairs are chosen once"
    if plan.training.devices > 1 and plan.training.parallel == "fsdp":
        yield "selection.refresh: no device can look by a model that is cut over several: use ddp"
    trained = resolve("trained", plan.training.memory.trained)
    if trained.short:
        yield f"selection.refresh: {name_of(trained)} draws short and long rows apart, once"
    online: OnlineMethod = resolve("online", plan.training.online)
    if _keeps_books(online):
        yield (
            f"training.online: {name_of(online)} keeps books on the rows of the first choice: "
            "use shuffled or ordered where selection.refresh chooses anew"
        )


def _sees_nothing_new(scorer: Scorer) -> str | None:
    if not scorer.needs_model:
        return "does not look at the model: its scores would be the same"
    if scorer.model:
        return f"looks at {scorer.model}, which nobody trains: its scores would be the same"
    if scorer.cost_class not in _LOOKS:
        return "trains a model of its own"
    return None


def _keeps_books(online: OnlineMethod) -> bool:
    prepares = type(online).prepare is not OnlineMethod.prepare
    return (
        prepares or online.watches or online.weighs_tokens or online.chooses or online.renewals > 0
    )
