"""What would have been planned one decision after the other, beside what was planned at once.

In sequence: the scorer whose picks the prior likes best, whatever it takes; then the fastest way to
hold a step that fits the memory; then as many steps as remain. The planner weighs all of it
together, under one budget and one peak. Both are compared by what they are surely worth, the prior
less its error: the rule that decided goes by that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from thrifty.choices import scorers_of
from thrifty.core.contracts import MEMORY_KINDS
from thrifty.core.quantities import format_seconds, format_tokens
from thrifty.core.resolve import name_of
from thrifty.effective_tokens import tokens_behind
from thrifty.planner import Planned
from thrifty.pricing import Candidate
from thrifty.priors import load_priors
from thrifty.request import Request


@dataclass(frozen=True, kw_only=True)
class InSequence:
    """The plan of the sequence and how the joint one differs."""

    scorer: str
    candidate: Candidate | None
    """None where the budget or the memory does not hold that scorer in any way."""
    differs: Mapping[str, tuple[str, str]]
    """What -> in sequence, jointly."""
    more_tokens: float | None
    """Effective tokens of the joint plan over the sequence's."""
    more_seconds: float | None
    """Seconds a useful token, likewise."""

    @property
    def text(self) -> str:
        """A line for people."""
        if self.candidate is None:
            return (
                f"one after the other would have ended at the first decision: {self.scorer}, which "
                "the prior likes best, fits neither budget nor memory in any way to train"
            )
        if not self.differs:
            return "one after the other would have planned the same"
        assert self.more_tokens is not None
        assert self.more_seconds is not None
        each = "; ".join(f"{what} {then}, not {now}" for what, (then, now) in self.differs.items())
        tokens = format_tokens(tokens_behind(_surely(self.candidate)))
        return (
            f"one after the other would have planned {each}: surely worth {tokens} random tokens "
            f"in {format_seconds(self.candidate.total.seconds)}; planned together "
            f"{100 * (self.more_tokens - 1):+.0f}% of those tokens, "
            f"{100 * (self.more_seconds - 1):+.0f}% time a token"
        )


def in_sequence(planned: Planned, request: Request) -> InSequence:
    """Of a plan that a search made."""
    priors = load_priors()
    first = max((scorer for _, scorer in scorers_of(request)), key=lambda s: priors.of(s).mean)
    name, own = name_of(first), planned.chosen
    able = [c for c in planned.candidates if c.scorer == name and c.runs >= own.runs]
    if not able:
        return InSequence(
            scorer=name, candidate=None, differs={}, more_tokens=None, more_seconds=None
        )
    then = min(able, key=lambda c: (c.seconds_per_useful_token, c.peak_memory_bytes))
    shown = {
        "scorer": (then.scorer, own.scorer),
        **{kind: (then.techniques[kind], own.techniques[kind]) for kind in MEMORY_KINDS},
        "micro-batch": tuple(f"{c.per_device_train_batch_size}" for c in (then, own)),
        "steps": tuple(f"{c.max_steps:,}" for c in (then, own)),
    }
    tokens = [tokens_behind(_surely(c)) for c in (then, own)]
    return InSequence(
        scorer=name,
        candidate=then,
        differs={what: (a, b) for what, (a, b) in shown.items() if a != b},
        more_tokens=tokens[1] / tokens[0] if tokens[0] > 0 else float("inf"),
        more_seconds=own.seconds_per_useful_token / then.seconds_per_useful_token,
    )


def _surely(candidate: Candidate) -> float:
    return candidate.gain.mean - candidate.gain.stderr
