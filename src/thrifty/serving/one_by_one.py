"""What questions that come one by one teach about those to come: how answers spread, and the price.

A pool is not known beforehand here, so that the price of a sample, in right answers, is found on
the way: after a question that drew b samples where m are to be drawn on average

    log price  +=  STEP (b / m - 1)

(dual descent with multiplicative weights: Balseiro, Lu and Mirrokni, arXiv:2011.10124). Summed up,
the mean over T questions is off m by |log(price_T / price_0)| / (STEP T) of it, as long as the
price is within its bounds; questions that a sample helps most draw more of them. Each key has a
price of its own, so that nobody's hard questions make another's samples dear; how answers spread is
learnt from all.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

from thrifty.core.sampling import Asked
from thrifty.drawing import LEARN_EVERY

STEP = 0.1
FIRST_PRICE = 0.003
"""Right answers that a sample must bring at the start: some three samples a question."""
PRICES = (1e-6, 1.0)
"""From where everything is drawn that may change an answer to where nothing is; past them the price
would take as long to come back as it took to get there."""
REMEMBERED = 1000
"""Questions."""


class OneByOne:
    """``mean_samples`` of a question; None: there is no such mean, and no price."""

    def __init__(self, mean_samples: float | None = None) -> None:
        if mean_samples is not None and not 0 < mean_samples < math.inf:
            raise ValueError("--samples is a mean of more than 0\nhint: --samples 3")
        self._mean = mean_samples
        self._prices: dict[str, float] = {}
        self._seen: deque[Asked] = deque(maxlen=REMEMBERED)
        self._number, self._learn_at = 0, 1.0
        self.past: tuple[Asked, ...] = ()
        """Questions of before, without a word of them."""

    def price(self, key: str) -> float:
        """Of a sample of a question of ``key``, in right answers."""
        return 0.0 if self._mean is None else self._prices.get(key, FIRST_PRICE)

    def note(self, key: str, asked: Asked) -> None:
        """A question that is answered."""
        self._seen.append(_wordless(asked))
        self._number += 1
        if self._number >= self._learn_at:  # what is learnt is kept for a while, and soon found
            self.past = tuple(self._seen)
            self._learn_at = LEARN_EVERY * self._number
        if self._mean is not None:
            price = self.price(key) * math.exp(STEP * (asked.num_drawn / self._mean - 1))
            self._prices[key] = min(max(price, PRICES[0]), PRICES[1])


def _wordless(asked: Asked) -> Asked:
    """Which samples said the same, and nothing of what a client asked or was told."""
    names = {answer: str(place) for place, answer in enumerate(asked.counts)}
    twin = Asked("a question of before")
    for sample in asked.samples:
        said = None if sample.answer is None else names.get(sample.answer)
        twin.add(replace(sample, answer=said, text=""))
    twin.failed = asked.failed
    return twin
