"""Budget forcing: a chain of thought is cut at a limit, and told to go on where it is too short.

The model thinks behind ``begin`` (arXiv:2501.19393). Where it has not come to its end after
``max_thinking`` tokens the thought is closed, and ``cue`` makes it answer at once. Where it ends by
itself before ``min_thinking`` tokens its end is left out and ``wait`` stands in its place, which it
continues. A thought that ends in between is followed by the answer that the model likes to give.

It takes somebody who can continue a text that was begun: draws have a ``prefix``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.contracts import DecodingPolicy
from thrifty.core.ranges import check_ranges
from thrifty.core.sampling import Action, Asked, Draw, Means, vote


@dataclass(frozen=True, kw_only=True)
class BudgetForcing(DecodingPolicy):
    """Cut thinking that is too long and make the model answer; extend one that is too short."""

    max_thinking: int = 4096
    """Tokens."""
    min_thinking: int = 0
    """Tokens."""
    answer_tokens: int = 512
    """Of what follows the thought, at most."""
    begin: str = "<think>\n"
    end: str = "</think>"
    cue: str = "\n\nFinal Answer:"
    """Follows ``end`` where the thought was cut."""
    wait: str = "\nWait"
    model: str = ""
    """The one that is asked; empty: the cheapest."""

    source: ClassVar[str] = "arXiv:2501.19393"
    needs: ClassVar = "thoughts"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            max_thinking=(1, math.inf),
            min_thinking=(0, self.max_thinking),
            answer_tokens=(1, math.inf),
        )
        if not self.end:
            raise ValueError("end must be the text that ends a thought, not ''\nhint: </think>")

    def decide(self, asked: Asked, means: Means) -> Action:
        model = self.model or means.offers[0].model
        left = means.max_samples - len(asked.samples) - asked.failed
        spent, times, text, ended, stuck = 0.0, 0, self.begin, False, False
        for thought in asked.samples:
            if thought.purpose != "thought":
                continue
            if ended:  # too early, and it went on
                text, times = text + self.wait, times + 1
            text += thought.text.partition(self.end)[0]
            spent += thought.tokens
            ended, stuck = thought.ended, not thought.text
        told = f"{spent:.0f} tokens of thought"
        if times:
            told += f", told {times} times to go on"
        if asked.answers():
            return vote(asked, told)
        if left <= 0:
            return vote(asked, f"{told}; {means.max_samples} draws, the most")
        room = math.floor(self.max_thinking - spent)
        complete = ended and spent >= self.min_thinking
        if not complete and room > 0 and left > 1 and not stuck:
            return Draw(
                model=model,
                purpose="thought",
                prefix=text + self.wait if ended else text,
                max_tokens=room,
                stop=(self.end,),
                reason=told,
            )
        return Draw(
            model=model,
            prefix=text + self.end + ("" if ended else self.cue),
            max_tokens=self.answer_tokens,
            reason=told if ended else f"{told}, cut",
        )
