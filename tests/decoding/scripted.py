"""A model that says what it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from thrifty.backends.backend import Answered, Asking, AskingFailed, Backend, Completion
from thrifty.core.budget import Cost

PER_SAMPLE = 10.0
"""Tokens that each sample takes; ``upper`` says twice as many."""


class Scripted(Backend):
    """``says(prompt, number)``: the text of the prompt's sample ``number``, from 0; an exception is
    raised."""

    def __init__(
        self,
        says: Callable[[str, int], str | Exception],
        model: str = "model",
        seconds: float = 0.0,
        dollars: float | None = None,
    ) -> None:
        self.model = model
        self.says = says
        self.seconds = seconds
        self.dollars = dollars
        self.asked: list[Asking] = []
        self.drawn: dict[str, int] = {}
        self.most_at_once = self.at_once = 0
        self.tokens = 0.0

    def upper(self, asking: Asking) -> Cost:
        return self._cost(2 * PER_SAMPLE * asking.count)

    async def ask(self, asking: Asking) -> Answered:
        self.asked.append(asking)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.seconds)
            prompt = str(asking.prompt)
            said = []
            for _ in range(asking.count):
                number = self.drawn.get(prompt, 0)
                self.drawn[prompt] = number + 1
                text = self.says(prompt, number)
                if isinstance(text, Exception):
                    raise text
                said.append(Completion(text=text, tokens=PER_SAMPLE))
            self.tokens += PER_SAMPLE * len(said)
            return Answered(completions=tuple(said), cost=self._cost(PER_SAMPLE * len(said)))
        finally:
            self.at_once -= 1

    def _cost(self, tokens: float) -> Cost:
        dollars = 0.0 if self.dollars is None else self.dollars * tokens
        return Cost(tokens=tokens, dollars=dollars if self.dollars is not None else None)


def failing(prompt: str, number: int) -> AskingFailed:
    return AskingFailed("no answer", Cost(tokens=PER_SAMPLE, dollars=None))
