"""Replay: what a policy would have answered, and spent, on samples that were recorded.

Of each question the samples come in an order drawn by a seed (or as they stand), one after the
other, to whoever draws; a question whose recording ends has no more. Accuracy is that of the
answers; beside it stand votes over a fixed number of samples each, on the same orders.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty.core.contracts import DecodingPolicy
from thrifty.core.sampling import Asked, Finish, Means, Offer, Outcome, Sample
from thrifty.drawing import Drawing

Floats = NDArray[np.float64]

FIXED = (1, 2, 3, 5, 8, 10, 20, 40)
"""Numbers of samples whose votes stand beside."""
DRAWS = 1000
"""Of the bootstrap over questions."""


@dataclass(frozen=True)
class Recording:
    """Questions with what each model said to them."""

    questions: Mapping[str, Mapping[str, Outcome]]
    """id -> model -> outcome, in the order of the file."""

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Recording:
        questions: dict[str, dict[str, Outcome]] = {}
        for outcome in outcomes:
            questions.setdefault(outcome.id, {})[outcome.model] = outcome
        return cls(questions)

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(m for of in self.questions.values() for m in of))

    @property
    def outcomes(self) -> list[Outcome]:
        return [outcome for of in self.questions.values() for outcome in of.values()]

    @property
    def most_samples(self) -> int:
        """Of a question, all models together."""
        return max(sum(len(o.answers) for o in of.values()) for of in self.questions.values())

    def split(self, share: float, seed: int) -> tuple[Recording, Recording]:
        """Two parts, the first with ``share`` of the questions."""
        order = np.random.default_rng(seed).permutation(len(self.questions))
        ids = list(self.questions)
        first = {ids[i] for i in order[: round(share * len(ids))]}
        parts: list[dict[str, Mapping[str, Outcome]]] = [{}, {}]
        for each, of in self.questions.items():
            parts[each not in first][each] = of
        return Recording(parts[0]), Recording(parts[1])


@dataclass(frozen=True, eq=False)
class Replayed:
    """One policy on one recording; arrays are [orders, questions]."""

    correct: Floats
    samples: Floats
    tokens: Floats
    cost: Floats
    finishes: list[list[Finish]]
    unreadable: int
    """Samples without an answer, over all orders."""


def means_of(
    recording: Recording,
    *,
    prices: Mapping[str, float] | None = None,
    resource: str = "samples",
    left: float = math.inf,
    price: float = 0.0,
    learnt: Mapping[str, Any] | None = None,
) -> Means:
    """``prices``: of a sample of each model, in the resource; without, 1 for samples, and what was
    recorded on average for tokens."""
    offers = []
    for model in recording.models:
        mine = [of[model] for of in recording.questions.values() if model in of]
        tokens = [cost for outcome in mine for cost in outcome.costs]
        mean = float(np.mean(tokens)) if tokens else 0.0
        cost = (prices or {}).get(model, mean if resource == "tokens" else 1.0)
        offers.append(Offer(model=model, cost=cost, tokens=mean))
    return Means(
        offers=tuple(sorted(offers, key=lambda offer: offer.cost)),
        resource=resource,
        left=left,
        num_open=len(recording.questions),
        max_samples=recording.most_samples,
        price=price,
        learnt=learnt or {},
    )


def replay(
    policy: DecodingPolicy,
    recording: Recording,
    means: Means,
    *,
    orders: Sequence[int | None] = (None,),
    at_once: int = 16,
) -> Replayed:
    """``orders``: seeds, None as recorded. ``at_once``: questions with a draw under way, after
    which the policy is asked again."""
    shape = (len(orders), len(recording.questions))
    correct, samples, tokens, cost = (np.zeros(shape) for _ in range(4))
    finishes, unreadable = [], 0
    for row, order in enumerate(orders):
        decks = _decks(recording, order, means)
        questions = [_asked(id, of) for id, of in recording.questions.items()]
        drawing = Drawing(policy, questions, means)
        while batch := drawing.next(at_once):
            for asked, draw in batch:
                deck = decks[asked.id].get(draw.model, [])
                drawn, deck[: draw.count] = deck[: draw.count], []
                if drawn:
                    drawing.came_back(asked, drawn, sum(sample.cost for sample in drawn))
                else:
                    drawing.failed(asked, draw.count)
        for column, asked in enumerate(questions):
            finish = drawing.finished[asked.id]
            correct[row, column] = _rightness(recording.questions[asked.id], finish)
            samples[row, column] = len(asked.samples)
            tokens[row, column] = sum(sample.tokens for sample in asked.samples)
            cost[row, column] = sum(sample.cost for sample in asked.samples)
            unreadable += sum(sample.answer is None for sample in asked.samples)
        finishes.append([drawing.finished[asked.id] for asked in questions])
    return Replayed(correct, samples, tokens, cost, finishes, unreadable)


def votes(recording: Recording, model: str, count: int, orders: Sequence[int | None]) -> Floats:
    """[orders, questions]: whether the vote over a model's first ``count`` samples is right."""
    found = np.zeros((len(orders), len(recording.questions)))
    for row, order in enumerate(orders):
        for column, (id, of) in enumerate(recording.questions.items()):
            if model not in of:
                continue
            outcome = of[model]
            tally: Counter[str] = Counter()
            for i in _order(id, model, len(outcome.answers), order)[:count]:
                answer = outcome.answers[i]
                if answer is not None:
                    tally[answer] += 1
            if tally:  # of equals the one that came first
                leader = max(tally, key=tally.__getitem__)
                found[row, column] = outcome.correct[outcome.answers.index(leader)]
    return found


def interval(per_question: Floats, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Of the mean over questions, by the bootstrap. ``per_question``: [questions]."""
    count = len(per_question)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS) / count
    low, high = np.quantile(weights @ per_question, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def facts_of(
    recording: Recording, means: Means, replayed: Replayed, orders: Sequence[int | None]
) -> dict[str, Any]:
    """What ``thrifty replay --json`` prints."""
    per_question = replayed.correct.mean(axis=0)
    mean_samples = float(replayed.samples.mean())
    first = means.offers[0].model
    longest = max(len(o.answers) for o in recording.outcomes if o.model == first)
    numbers = [n for n in FIXED if n < longest] + [longest]
    fixed = {}
    for number in numbers:
        beside = votes(recording, first, number, orders).mean(axis=0)
        ahead = per_question - beside
        fixed[str(number)] = {
            "accuracy": float(beside.mean()),
            "ahead_by": float(ahead.mean()),
            "ahead_by_interval": list(interval(ahead)),
        }
    ends = Counter(_kind(finish) for row in replayed.finishes for finish in row)
    total = sum(ends.values())
    return {
        "accuracy": float(per_question.mean()),
        "interval": list(interval(per_question)),
        "mean_samples": mean_samples,
        "mean_tokens": float(replayed.tokens.mean()),
        "mean_cost": float(replayed.cost.mean()),
        "resource": means.resource,
        "num_questions": len(per_question),
        "num_orders": len(orders),
        "models": {offer.model: offer.cost for offer in means.offers},
        "fixed": fixed,
        "fixed_model": first,
        "unreadable_share": replayed.unreadable / max(float(replayed.samples.sum()), 1.0),
        "ended": {kind: number / total for kind, number in ends.most_common()},
    }


def _asked(id: str, of: Mapping[str, Outcome]) -> Asked:
    return Asked(id, next((o.prompt for o in of.values() if o.prompt), ""))


def _decks(
    recording: Recording, order: int | None, means: Means
) -> dict[str, dict[str, list[Sample]]]:
    costs = {offer.model: offer.cost for offer in means.offers}
    of_tokens = means.resource == "tokens"
    return {
        id: {
            model: _deck(outcome, order, None if of_tokens else costs[model])
            for model, outcome in of.items()
            if model in costs
        }
        for id, of in recording.questions.items()
    }


def _deck(outcome: Outcome, order: int | None, cost: float | None) -> list[Sample]:
    """Its samples in an order; ``cost`` None: each its tokens."""
    places = _order(outcome.id, outcome.model, len(outcome.answers), order)
    return [
        Sample(
            model=outcome.model,
            answer=outcome.answers[i],
            cost=(outcome.costs[i] if outcome.costs else 0.0) if cost is None else cost,
            reward=outcome.rewards[i] if outcome.rewards else None,
            confidence=outcome.confidences[i] if outcome.confidences else None,
            tokens=outcome.costs[i] if outcome.costs else 0.0,
        )
        for i in places
    ]


def _order(id: str, model: str, count: int, order: int | None) -> NDArray[np.intp] | range:
    """Of a question's samples: the same whichever other questions are there."""
    if order is None:
        return range(count)
    seed = [order, *f"{id}\0{model}".encode()]
    return np.random.default_rng(seed).permutation(count)


def _rightness(of: Mapping[str, Outcome], finish: Finish) -> float:
    """Of what was answered; an answer that nobody gave is wrong."""
    for outcome in of.values():
        if finish.answer is not None and finish.answer in outcome.answers:
            return outcome.correct[outcome.answers.index(finish.answer)]
    return 0.0


def _kind(finish: Finish) -> str:
    if finish.answer is None:
        return "without an answer"
    return "given up" if finish.given_up else "answered"
