"""Probe exit: think in chunks, ask for the answer after each, and stop once the answers agree.

After each chunk of thought a short draw, ``probe``, asks what the answer would be by now; the
thought goes on without it. Once the last ``agreeing`` of them are the same answer, and none has a
word of doubt in it, or the thought ends by itself, or at ``max_thinking`` tokens, the thought is
closed and the answer given (Dynasor, arXiv:2412.20993). Where the limit of samples leaves too few
draws for chunks so small, they are larger.

It takes somebody who can continue a text that was begun: draws have a ``prefix``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from thrifty.core.contracts import DecodingPolicy
from thrifty.core.ranges import check_ranges
from thrifty.core.sampling import Action, Asked, Draw, Means, Sample, vote


@dataclass(frozen=True, kw_only=True)
class ProbeExit(DecodingPolicy):
    """Stop thinking once the answers that it would give on the way agree."""

    agreeing: int = 3
    """Probes, one after the other."""
    chunk: int = 256
    """Tokens of thought between probes, at least."""
    max_thinking: int = 4096
    """Tokens."""
    probe_tokens: int = 24
    answer_tokens: int = 512
    """Of what follows the thought, at most."""
    begin: str = "<think>\n"
    end: str = "</think>"
    probe: str = "\n\nI can answer by now. Final Answer:"
    """Asks for the answer in the midst of a thought."""
    cue: str = "\n\nFinal Answer:"
    """Follows ``end`` where the thought did not end by itself."""
    doubts: tuple[str, ...] = ("wait", "hmm", "hold on", "not sure", "alternatively", "however")
    """An answer with one of these in it agrees with none."""
    model: str = ""
    """The one that is asked; empty: the cheapest."""

    source: ClassVar[str] = "arXiv:2412.20993"
    needs: ClassVar = "thoughts"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            agreeing=(1, math.inf),
            chunk=(1, math.inf),
            max_thinking=(1, math.inf),
            probe_tokens=(1, math.inf),
            answer_tokens=(1, math.inf),
        )
        if not self.end:
            raise ValueError("end must be the text that ends a thought, not ''\nhint: </think>")

    def decide(self, asked: Asked, means: Means) -> Action:
        model = self.model or means.offers[0].model
        left = means.max_samples - len(asked.samples) - asked.failed
        thoughts = [sample for sample in asked.samples if sample.purpose == "thought"]
        probes = [sample for sample in asked.samples if sample.purpose == "probe"]
        spent = sum(thought.tokens for thought in thoughts)
        text = self.begin + "".join(thought.text.partition(self.end)[0] for thought in thoughts)
        agree = self._agree(probes)
        told = f"{spent:.0f} tokens of thought, {len(probes)} probes"
        if agree:
            told += f", the last {self.agreeing} agree"
        if asked.answers():
            return vote(asked, told)
        if left <= 0:
            return vote(asked, f"{told}; {means.max_samples} draws, the most")
        room = math.floor(self.max_thinking - spent)
        ended = bool(thoughts) and thoughts[-1].ended
        stuck = bool(thoughts) and not thoughts[-1].text
        if not (ended or agree or stuck) and left > 1:
            if len(probes) < len(thoughts) and room > 0:
                return Draw(
                    model=model,
                    purpose="probe",
                    prefix=text + self.probe,
                    max_tokens=self.probe_tokens,
                    reason=told,
                )
            if room > 0:
                rounds = max(1, left // 2)  # a chunk and its probe; the answer comes last
                return Draw(
                    model=model,
                    purpose="thought",
                    prefix=text,
                    max_tokens=min(room, max(self.chunk, math.ceil(room / rounds))),
                    stop=(self.end,),
                    reason=told,
                )
        return Draw(
            model=model,
            prefix=text + self.end + ("" if ended else self.cue),
            max_tokens=self.answer_tokens,
            reason=told if ended or agree else f"{told}, cut",
        )

    def _agree(self, probes: list[Sample]) -> bool:
        last = probes[-self.agreeing :]
        return (
            len(last) == self.agreeing
            and last[0].answer is not None
            and len({probe.answer for probe in last}) == 1
            and not any(doubt in probe.text.casefold() for probe in last for doubt in self.doubts)
        )
