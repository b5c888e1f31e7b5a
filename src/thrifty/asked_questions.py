"""The questions of a decoding: how answers are read in what was drawn, what each ended with."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.backends.backend import Answered, Completion
from thrifty.core.contracts import AnswerForm
from thrifty.core.sampling import Asked, Draw, Finish, Sample
from thrifty.prompts import Prompt


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a question ended with."""

    id: str
    answer: str | None
    """None: there is none."""
    text: str
    confidence: float
    reason: str
    given_up: bool
    samples: int
    failed: int
    unreadable: int
    """Samples in which no answer could be read."""
    models: Mapping[str, int]
    """Samples of each."""
    cost: float
    """In the run's resource."""
    tokens: float
    """Generated."""
    flops: float = 0.0
    """Of the samples that came, and of scoring them; of a model whose shape is not known nothing.
    """
    dollars: float | None = None
    """Of the samples that came; None: unknown."""
    reward: float | None = None
    """Of the text that was chosen; None: nobody scored it."""
    gold: str | None = None
    correct: bool | None = None


class Questions:
    """What is asked, how answers are read in texts, and what was drawn."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        form: AnswerForm | None,
        reward: Callable[[str, str], float] | None = None,
    ) -> None:
        if not prompts:
            raise ValueError("no prompts\nhint: one at least")
        self.prompts = {prompt.id: prompt for prompt in prompts}
        self.asked = {prompt.id: Asked(prompt.id, prompt.text) for prompt in prompts}
        self._form, self._reward = form, reward

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def digest(self) -> str:
        rows = [[p.id, p.content, p.gold] for p in self.prompts.values()]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def samples(self, asked: Asked, draw: Draw, answered: Answered, took: float) -> list[Sample]:
        """What a draw brought, read; ``took`` of it in the run's resource. Equal answers of one
        request find each other too. It may take seconds, and changes nothing."""
        twin = asked.copy()
        cost = took / len(answered.completions)
        for said in answered.completions:
            twin.add(self._sample(twin, draw, said, cost))
        return twin.samples[len(asked.samples) :]

    def _sample(self, asked: Asked, draw: Draw, said: Completion, cost: float) -> Sample:
        """Of a completion: the class of its answer, and its reward."""
        answer, reward = None, said.reward
        if draw.purpose != "thought":
            answer = self._class(asked, said.text)
        if draw.purpose == "answer" and self._reward is not None:
            reward = float(self._reward(asked.prompt, said.text))
        return Sample(
            model=draw.model,
            answer=answer,
            cost=cost,
            reward=None if reward is None or math.isnan(reward) else reward,
            confidence=said.confidence,
            tokens=said.tokens,
            text=said.text,
            ended=said.ended,
            purpose=draw.purpose,
        )

    def answer(self, id: str, finish: Finish) -> Answer:
        asked, gold = self.asked[id], self.prompts[id].gold
        said = asked.answers()
        same = [sample for sample in said if sample.answer == finish.answer]
        text = finish.text or next((sample.text for sample in same), "")
        rewards = [s.reward for s in same if s.text == text and s.reward is not None]
        return Answer(
            id=id,
            answer=finish.answer,
            text=text,
            confidence=finish.confidence,
            reason=finish.reason,
            given_up=finish.given_up,
            samples=len(asked.samples),
            failed=asked.failed,
            unreadable=sum(sample.answer is None for sample in said),
            models=dict(Counter(sample.model for sample in asked.samples)),
            cost=sum(sample.cost for sample in asked.samples),
            tokens=sum(sample.tokens for sample in asked.samples),
            reward=max(rewards, default=None),
            gold=gold,
            correct=None if gold is None else self._right(finish.answer, gold),
        )

    def recording(self) -> Iterator[dict[str, Any]]:
        """The samples of the questions whose gold answers are known, as ``replay`` reads them."""
        for id, asked in self.asked.items():
            gold = self.prompts[id].gold
            if gold is None:
                continue
            for model in dict.fromkeys(sample.model for sample in asked.answers()):
                said = asked.answers(model)
                row = {
                    "id": id,
                    "question": asked.prompt,
                    "gold": gold,
                    "model": model,
                    "answers": [sample.answer for sample in said],
                    "correct": [int(self._right(sample.answer, gold)) for sample in said],
                    "tokens": [sample.tokens for sample in said],
                }
                if all(sample.reward is not None for sample in said):
                    row["rewards"] = [sample.reward for sample in said]
                if all(sample.confidence is not None for sample in said):
                    row["confidences"] = [sample.confidence for sample in said]
                yield row

    def _class(self, asked: Asked, text: str) -> str | None:
        """The answer in a text, as the first that said the same put it."""
        if self._form is None:
            return text.strip() or None
        read = self._form.read(text, asked.prompt)
        if read is None or read in asked.counts:
            return read
        return next((known for known in asked.counts if self._form.same(known, read)), read)

    def _right(self, answer: str | None, gold: str) -> bool:
        if answer is None:
            return False
        if self._form is None:
            return answer == gold.strip()
        return self._form.same(answer, self._form.read(gold) or gold)
