"""The loop of every decoding: ask the policy about a pool of questions, say which draws come next.

    drawing = Drawing(policy, questions, means)
    while batch := drawing.next(most):              # at most so many draws under way
        for asked, draw in batch:
            ...                                     # whoever answers
            drawing.came_back(asked, samples, cost)
    drawing.finished                                # question -> what was answered, and why

The policy hears of a question when something came back for it, and of all of them whenever the
samples of the run have grown by ``LEARN_EVERY``, for what it learns from the others. Where not all
draws can be paid for, those of the highest rate come first, of equals those of questions with the
fewest samples, so that what runs out runs out for all alike. A recording, an endpoint and a model
in this process are all driven from here.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace

from thrifty.core.contracts import DecodingPolicy
from thrifty.core.sampling import Asked, Draw, Finish, Means, Offer, Sample

LEARN_EVERY = 1.5
"""Growth of the number of samples between two times that a pooled policy sees them all."""
WORTH_BESIDE = 0.5
"""Of the best rate under way, the least of a draw that is begun beside it where not all can be paid
for: what is worth less waits for what the better ones leave over."""


class Drawing:
    """``means`` as they are at the start: ``left`` of its resource for the whole of it, and of each
    offer what a sample is expected to cost, for which the mean of those that came back stands as
    soon as there is one."""

    def __init__(
        self, policy: DecodingPolicy, questions: Sequence[Asked], means: Means, spent: float = 0.0
    ) -> None:
        self.finished: dict[str, Finish] = {}
        self.spent = spent
        """Of the resource, until now; what is under way left out."""
        self._policy = policy
        self._questions = list(questions)
        self._order = {asked.id: place for place, asked in enumerate(questions)}
        if len(self._order) < len(self._questions):
            raise ValueError("two questions have the same id\nhint: ids must be unique in a run")
        self._means = means
        self._before = tuple(means.past)
        self._limit = means.left + spent
        self._under_way: dict[str, float] = {}
        self._rates: dict[str, float] = {}
        self._held = 0.0
        self._heap: list[tuple[float, int, int, Draw]] = []
        self._stale: set[str] = set(self._order)
        self._costs = {offer.model: (0.0, 0) for offer in means.offers}
        for asked in questions:  # of a run that goes on
            for sample in asked.samples:
                self._note_cost(sample.model, sample.cost, 1)
        self._num_samples = sum(len(asked.samples) for asked in questions)
        self._learn_at = 0.0
        self._ended = ""
        self._news: list[str] = []
        policy.check(means)

    def next(self, most: int) -> list[tuple[Asked, Draw]]:
        """The draws to begin now, so that at most ``most`` questions are under way. Empty where
        something must come back first, or where all is finished."""
        self._ask_policy()
        begun: list[tuple[Asked, Draw]] = []
        while self._heap and len(self._under_way) < most:
            _, _, place, draw = heapq.heappop(self._heap)
            asked = self._questions[place]
            if self._waits(draw):
                heapq.heappush(self._heap, self._entry(place, draw))
                break
            cost = self._offer(draw.model).cost
            free = self._limit - self.spent - self._held
            count = draw.count
            if math.isfinite(free) and cost > 0:
                affordable = math.floor(free / cost + 1e-9)
                if draw.rate == math.inf:  # nobody is worth more than the others that wait
                    affordable = min(affordable, max(1, affordable // (len(self._heap) + 1)))
                count = min(count, affordable)
            if count < 1:
                if self._held:  # what is under way may take less than it was expected to
                    heapq.heappush(self._heap, self._entry(place, draw))
                    break
                self._too_dear(asked, draw)
                continue
            held = count * cost
            self._under_way[asked.id] = held
            self._rates[asked.id] = draw.rate
            self._held += held
            begun.append((asked, draw if count == draw.count else replace(draw, count=count)))
        return begun

    def came_back(self, asked: Asked, samples: Sequence[Sample], cost: float) -> None:
        """What a draw brought and took; fewer samples than it asked for count as failed."""
        self._end(asked, cost)
        for sample in samples:
            asked.add(sample)
        if samples:
            self._note_cost(samples[0].model, cost, len(samples))
        self._num_samples += len(samples)

    def failed(self, asked: Asked, times: int, cost: float = 0.0) -> None:
        """A draw brought nothing, but for what it may have taken."""
        self._end(asked, cost)
        asked.failed += times

    def close(self, asked: Asked, reason: str) -> None:
        """Answer it with what there is; no draw of it may be under way."""
        self._stale.discard(asked.id)
        self._finish(asked, self._policy.close(asked, self._now(), reason))

    def newly_finished(self) -> list[str]:
        """Questions that ended since this was asked last."""
        found, self._news = self._news, []
        return found

    def close_all(self, reason: str) -> None:
        """Answer what is open with what there is; what is under way as soon as it comes back."""
        self._ended = reason
        self._heap.clear()
        for asked in self._questions:
            if asked.id not in self.finished and asked.id not in self._under_way:
                self.close(asked, reason)

    # -- its own ----------------------------------------------------------------------------------

    def _ask_policy(self) -> None:
        if self._ended:
            self.close_all(self._ended)
            return
        alone = len(self._questions) == 1  # of itself it would learn that it is as it looks
        if self._policy.pooled and not alone and self._num_samples >= self._learn_at:
            past = tuple(asked.copy() for asked in self._questions if asked.samples)
            self._means = replace(self._means, past=(*self._before, *past))
            self._learn_at = LEARN_EVERY * max(self._num_samples, 1)
            open_ones = (asked.id for asked in self._questions if asked.id not in self.finished)
            self._stale = {each for each in open_ones if each not in self._under_way}
            self._heap.clear()
        if not self._stale:
            return
        asked_now = sorted(self._stale, key=self._order.__getitem__)
        self._stale = set()
        questions = [self._questions[self._order[each]] for each in asked_now]
        actions = self._policy.decide_all(questions, self._now())
        for asked, action in zip(questions, actions, strict=True):
            if isinstance(action, Finish):
                self._finish(asked, action)
            else:
                heapq.heappush(self._heap, self._entry(self._order[asked.id], action))

    def _finish(self, asked: Asked, finish: Finish) -> None:
        self.finished[asked.id] = finish
        self._news.append(asked.id)

    def _waits(self, draw: Draw) -> bool:
        if not self._rates or self._limit == math.inf:
            return False
        best = max(self._rates.values())
        return best < math.inf and draw.rate < WORTH_BESIDE * best

    def _entry(self, place: int, draw: Draw) -> tuple[float, int, int, Draw]:
        return -draw.rate, len(self._questions[place].samples), place, draw

    def _too_dear(self, asked: Asked, draw: Draw) -> None:
        reason = f"the {self._means.resource} are spent"
        if math.isfinite(draw.rate) and draw.rate > 0:
            reason += f" on others; one more here would bring {draw.rate:.2g} a unit"
        self.close(asked, reason)

    def _now(self) -> Means:
        """The means as they are: what is left, how many are open, what a sample has cost."""
        left = max(self._limit - self.spent - self._held, 0.0)
        return replace(
            self._means,
            left=left,
            num_open=len(self._questions) - len(self.finished),
            offers=tuple(self._offer(offer.model) for offer in self._means.offers),
        )

    def _offer(self, model: str) -> Offer:
        offer = self._means.offer(model)
        total, number = self._costs[model]
        return replace(offer, cost=total / number) if number else offer

    def _note_cost(self, model: str, cost: float, number: int) -> None:
        if model in self._costs and self._means.resource != "samples":
            total, before = self._costs[model]
            self._costs[model] = total + cost, before + number

    def _end(self, asked: Asked, cost: float) -> None:
        self._held -= self._under_way.pop(asked.id)
        del self._rates[asked.id]
        if not self._under_way:
            self._held = 0.0  # no rest of rounding
        self.spent += cost
        self._stale.add(asked.id)
