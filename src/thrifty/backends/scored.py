"""A model that answers, and a reward model that scores what it said: one cost for both.

    upper = that of the answers + count x a pass over the longest text that can come of one

so that a budget holds however many score at once. What scoring takes is charged with the answers
that it is of. Where the FLOPs of who answers are not known, those of both are not: ``upper`` says
0, and a limit on them is refused.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from thrifty.backends.backend import Answered, Asking, AskingFailed, Backend
from thrifty.core.budget import Cost
from thrifty.signals.reward_model import Judged, RewardModel


class Scored(Backend):
    """``inner`` answers, ``judge`` says how good each of its completions is."""

    def __init__(self, inner: Backend, judge: RewardModel) -> None:
        self.model = inner.model
        self._inner, self._judge = inner, judge
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="thrifty-score")

    @property
    def settings_known(self) -> frozenset[str]:
        return self._inner.settings_known

    @property
    def notes(self) -> tuple[str, ...]:
        return self._inner.notes

    def upper(self, asking: Asking) -> Cost:
        most = self._inner.upper(asking)
        return most + self._most(asking) if most.flops else most

    async def ask(self, asking: Asking) -> Answered:
        loop = asyncio.get_running_loop()
        try:  # before anything is paid for
            await loop.run_in_executor(self._thread, self._judge.load)
        except Exception as error:  # torch and transformers raise many
            raise AskingFailed(_told(error), fatal=True) from None
        answered = await self._inner.ask(asking)
        try:
            judged = await loop.run_in_executor(self._thread, self._judged, asking, answered)
        except Exception as error:
            raise AskingFailed(_told(error), answered.cost + self._most(asking)) from None
        completions = tuple(
            replace(completion, reward=reward)
            for completion, reward in zip(answered.completions, judged.rewards, strict=True)
        )
        cost = answered.cost + Cost(flops=judged.flops, seconds=judged.seconds)
        return replace(answered, completions=completions, cost=cost)

    async def close(self) -> None:
        await self._inner.close()

    def _judged(self, asking: Asking, answered: Answered) -> Judged:
        answers = [asking.prefix + completion.text for completion in answered.completions]
        return self._judge.judge(asking.prompt, answers, self._most_tokens(asking))

    def _most(self, asking: Asking) -> Cost:
        tokens = self._most_tokens(asking)
        return Cost(flops=asking.count * self._judge.flops(1, tokens) if tokens else 0.0)

    def _most_tokens(self, asking: Asking) -> int:
        return self._judge.most_tokens(asking.prompt, asking.prefix, asking.max_tokens)


def _told(error: Exception) -> str:
    return f"the reward model failed: {str(error).partition(chr(10))[0] or type(error).__name__}"
