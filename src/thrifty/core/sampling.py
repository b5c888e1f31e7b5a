"""What decoding policies are given, and what they answer.

A question is open until it is answered or given up. Of each open one a policy says what comes next:
draw from a model again, or finish. What came back is a ``Sample``: an answer (its class, where
several texts say the same), what it took, and what was said of it (a reward, a confidence).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Purpose = Literal["answer", "thought", "probe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One completion that came back."""

    model: str
    answer: str | None
    """The class of equal answers that it belongs to; None: no answer could be read in it, or it was
    none (a thought)."""
    cost: float = 1.0
    """In the resource of ``Means``."""
    reward: float | None = None
    """What a scorer or a reward model said of it; higher is better."""
    confidence: float | None = None
    """exp(mean log-probability of its tokens), from 0 to 1; None: the model does not tell."""
    tokens: float = 0.0
    """Generated."""
    text: str = ""
    """What was generated, what it continued left out; empty where it is replayed."""
    ended: bool = True
    """By the model itself, rather than at a limit."""
    purpose: Purpose = "answer"


class Asked:
    """A question that is being answered, and what was drawn for it so far."""

    __slots__ = ("_only_answers", "counts", "failed", "id", "prompt", "samples")

    def __init__(self, id: str, prompt: str = "") -> None:
        self.id = id
        self.prompt = prompt
        self.samples: list[Sample] = []
        self.counts: Counter[str] = Counter()
        """Answer -> how often it was given, by whichever model; in order of first appearance."""
        self.failed = 0
        """Draws that brought nothing, an endpoint being down."""
        self._only_answers = True

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)
        if sample.purpose != "answer":
            self._only_answers = False
        elif sample.answer is not None:
            self.counts[sample.answer] += 1

    def copy(self) -> Asked:
        """As it is now, whatever is added later."""
        twin = Asked(self.id, self.prompt)
        twin.samples = self.samples[:]
        twin.counts = self.counts.copy()
        twin.failed = self.failed
        twin._only_answers = self._only_answers
        return twin

    def answers(self, model: str | None = None) -> Sequence[Sample]:
        """The samples that were to be answers, of one model or of all, readable or not."""
        if model is None and self._only_answers:
            return self.samples
        return [
            sample
            for sample in self.samples
            if sample.purpose == "answer" and model in (None, sample.model)
        ]

    @property
    def num_drawn(self) -> int:
        """Draws for an answer, those that failed included: what limits count, so that an endpoint
        that is down is not asked for ever."""
        return len(self.answers()) + self.failed

    @property
    def num_readable(self) -> int:
        return self.counts.total()

    def leader(self) -> str | None:
        """The answer given most often, of equals the one that came first; None: none."""
        return max(self.counts, key=self.counts.__getitem__, default=None)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A model that can be asked."""

    model: str
    cost: float = 1.0
    """Of a sample, expected, in the resource of ``Means``."""
    tokens: float = 0.0
    """That a sample generates, expected."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """Who can be asked, what remains to be spent, and on how much."""

    offers: tuple[Offer, ...]
    """The models at hand, the cheapest first."""
    resource: str = "samples"
    """That costs are told in: samples, tokens, flops, dollars or seconds."""
    left: float = math.inf
    """Of it, for all questions together."""
    more_to_come: bool = False
    """Whether questions that nobody knows of yet are to live off it too."""
    num_open: int = 1
    """Questions, those not yet begun included."""
    max_samples: int = 40
    """Of a question, whatever a policy would like."""
    price: float = 0.0
    """Of a unit of the resource in expected correct answers: what it would buy elsewhere."""
    past: Sequence[Asked] = ()
    """The run's questions, to learn from: open, answered and given up; copies that stay as they
    are."""
    learnt: Mapping[str, Any] = field(default_factory=dict)
    """What ``fit`` made of outcomes with gold answers; empty: nothing was fitted."""

    def offer(self, model: str) -> Offer:
        """Raises ValueError where that model is not at hand."""
        for offer in self.offers:
            if offer.model == model:
                return offer
        names = ", ".join(offer.model for offer in self.offers)
        raise ValueError(f"there is no model {model!r} to ask\nhint: at hand: {names}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """Ask a model (again)."""

    model: str
    count: int = 1
    """Independent samples, at once."""
    rate: float = math.inf
    """Expected gain a unit of the resource: who comes first where not all can be paid for."""
    reason: str = ""
    purpose: Purpose = "answer"
    prefix: str = ""
    """The beginning of the answer, which the model continues: a thought so far."""
    max_tokens: int | None = None
    """That it may generate; None: the run's own limit."""
    stop: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of generation, of those that the backend knows: ``temperature``, ``early_exit``, ..."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """Answer, or give up."""

    answer: str | None
    """None: there is none."""
    confidence: float
    """That it is right, as the policy sees it: from 0 to 1."""
    reason: str
    given_up: bool = False
    """Unsettled, but more samples are not worth their price."""
    text: str = ""
    """The completion that is returned for it; empty: the first one that says so."""


Action = Draw | Finish


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A question whose gold answer is known, with samples: what policies are fitted on and
    replayed on."""

    id: str
    model: str
    answers: tuple[str | None, ...]
    correct: tuple[float, ...]
    """Of each answer, from 0 to 1."""
    costs: tuple[float, ...] = ()
    """Of each, in tokens (or characters); empty: unknown."""
    rewards: tuple[float | None, ...] = ()
    confidences: tuple[float | None, ...] = ()
    prompt: str = ""
    gold: str = ""

    def counts(self) -> Counter[str]:
        """Readable answer -> how often it was given."""
        return Counter(answer for answer in self.answers if answer is not None)

    def tally(self) -> tuple[int, ...]:
        return tuple(self.counts().values())


def vote(asked: Asked, reason: str, *, given_up: bool = False) -> Finish:
    """The answer given most often, its share of the readable ones as the confidence; the first text
    without an answer where none could be read."""
    leader = asked.leader()
    if leader is None:
        said = asked.answers()
        unread = f"{len(said)} without a readable answer" if said else "no sample"
        return Finish(
            answer=None,
            confidence=0.0,
            reason=f"{reason}; {unread}",
            given_up=True,
            text=said[0].text if said else "",
        )
    share = asked.counts[leader] / asked.num_readable
    return Finish(answer=leader, confidence=share, reason=reason, given_up=given_up)


def best(asked: Asked, reason: str) -> Finish:
    """The answer of the highest reward, of equals the one that came first; as confidence the share
    of the readable answers that say the same. Where none could be read the text of the highest
    reward; where none has a reward the vote."""
    said = asked.answers()
    judged = [
        (sample.reward, sample)
        for sample in said
        if sample.reward is not None and not math.isnan(sample.reward)
    ]
    if len(judged) < len(said):
        reason += f"; {len(said) - len(judged)} of {len(said)} have no reward"
    readable = [pair for pair in judged if pair[1].answer is not None]
    if not judged or (asked.counts and not readable):
        return vote(asked, f"{reason}: the vote" if said else reason)
    reward, chosen = max(readable or judged, key=lambda pair: pair[0])
    return Finish(
        answer=chosen.answer,
        confidence=0.0
        if chosen.answer is None
        else asked.counts[chosen.answer] / asked.num_readable,
        reason=f"{reason}; reward {reward:.4g}" + ("" if readable else "; no readable answer"),
        given_up=not readable,
        text=chosen.text,
    )
