"""``pilot`` in plan.yaml: short trainings before the run, and what they are of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from thrifty.core.method_specs import PickerSpec, ScorerSpec

MAX_PILOT_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class PilotCandidate:
    """A choice of data that a pilot tries, and what the run would be if it won."""

    scorer: ScorerSpec = "uniform"
    picker: PickerSpec | None = None
    """None: as the plan has it."""
    keep: float | None = None
    """Share of the pool's tokens to keep; None: as many as are worth most by the prior."""
    name: str = ""
    whole_pool: bool = False
    """Whether all of the pool is scored, for keeps, or the sample alone."""
    scoring: Mapping[str, float | None] = field(default_factory=dict)
    """``Cost`` of that, as predicted."""
    to_come: Mapping[str, float | None] = field(default_factory=dict)
    """``Cost`` of the scoring that is still to be paid for where it wins."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """plan.yaml keys of the run that follows where it wins."""


@dataclass(frozen=True, kw_only=True)
class PilotRung:
    """A round of a pilot: so many candidates are trained until ``steps``."""

    candidates: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """Short trainings that tell, before the run, which choice of data it should make."""

    share: float = 0.0
    """Of every limit that is consumed, at most; 0: no pilot."""
    candidates: tuple[PilotCandidate, ...] = ()
    """In order: the first-named wins ties."""
    pickers: tuple[PickerSpec, ...] = ()
    keeps: tuple[float, ...] = ()
    """Shares of the pool's tokens."""
    proxies: tuple[str, ...] = ()
    """Models that scorers may look at instead of the one to be trained. Like ``pickers`` and
    ``keeps`` what planning tries each of its scorers with."""
    sample: float = 0.0
    """Share of the pool's rows among which the candidates pick."""
    rungs: tuple[PilotRung, ...] = ()
    eval_steps: int = 1


def wrong_pilot(pilot: Pilot) -> Iterator[str]:
    """What types cannot say of it."""
    if not 0 <= pilot.share <= MAX_PILOT_SHARE:
        yield (
            f"pilot.share must be in [0, {MAX_PILOT_SHARE}], not {pilot.share}: it is the part of "
            "the budget that may go into finding out what to do with the rest"
        )
    if not 0 <= pilot.sample <= 1:
        yield f"pilot.sample must be in [0, 1], not {pilot.sample}"
    for keep in (*pilot.keeps, *(c.keep for c in pilot.candidates if c.keep is not None)):
        if not 0 < keep <= 1:
            yield f"a pilot keeps a share of the pool in (0, 1], not {keep}"
    if pilot.rungs and pilot.share and not all(c.name for c in pilot.candidates):
        yield "pilot.candidates need a name each: `thrifty plan` gives it"
    if not pilot.eval_steps > 0:
        yield f"pilot.eval_steps must be more than zero, not {pilot.eval_steps}"
