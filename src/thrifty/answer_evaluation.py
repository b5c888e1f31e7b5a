"""The objective on generated answers, measured: what a metric says of the answer to each row.

A row's prompt is its tokens before its last answer, as training sees them (chat templates
included), so that the model is asked as it was taught; its gold answer is that answer. Where a
token straddles the border of the two, it belongs to the answer, whose first characters are then the
prompt's last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty import ranks
from thrifty.core.budget import Cost
from thrifty.core.contracts import AnswerMetric, Meter, Rows
from thrifty.costs.shape import ModelShape
from thrifty.evaluation import share_of
from thrifty.signals.forward import Losses
from thrifty.signals.generation import Decoding, answers_flops, generate


@dataclass(frozen=True)
class Asked:
    """One row's question."""

    ids: NDArray[np.int32]
    """Of the prompt."""
    prompt: str
    gold: str
    end_id: int
    """The last token of the gold answer."""


@dataclass(frozen=True)
class Said:
    """One of several answers to a row."""

    text: str
    score: float
    prompt_tokens: int
    num_tokens: int
    """Generated."""


@dataclass(frozen=True)
class AnswerEvaluation:
    """How answers are asked for and scored."""

    metric: AnswerMetric
    max_new_tokens: int
    tokenizer: Any

    def measured(
        self,
        model: Any,
        shape: ModelShape,
        rows: Mapping[str, Rows],
        meter: Meter,
        max_tokens: int | None = None,
        *,
        together: bool = False,
    ) -> tuple[dict[str, Losses], int]:
        """Each target's losses, 1 - score, and the number of tokens that were generated for them.
        ``together`` as for ``losses_of``."""
        found, num_tokens = {}, 0
        for name, some in rows.items():
            scores, count = self._scores(model, shape, some, meter, max_tokens, share_of(together))
            ones = np.ones(len(scores), dtype=np.int64)
            found[name] = Losses(1.0 - scores, ones, least_change=1.0)
            num_tokens += count
        return found, num_tokens

    def samples(
        self,
        model: Any,
        shape: ModelShape,
        rows: Rows,
        meter: Meter,
        max_tokens: int | None,
        *,
        times: int,
        temperature: float,
    ) -> list[list[Said]]:
        """So many answers to each row at a temperature, by random numbers that are the same at
        every evaluation."""
        asked, decoding = self._questions(rows, model)
        decoding = replace(decoding, temperature=temperature)
        prompts = [each.ids for each in asked] * times
        said: list[list[Said]] = [[] for _ in asked]
        answers = generate(model, shape, prompts, decoding, meter, max_tokens)
        for place, answer in enumerate(answers):
            assert answer is not None, "all of them are this process's"
            each = asked[place % len(asked)]
            text = self.tokenizer.decode(answer.ids, skip_special_tokens=True)
            score = self._checked(self.metric.score(each.prompt, text, each.gold))
            said[place % len(asked)].append(Said(text, score, len(each.ids), answer.num_tokens))
        return said

    def _scores(
        self,
        model: Any,
        shape: ModelShape,
        rows: Rows,
        meter: Meter,
        max_tokens: int | None,
        share: tuple[int, int],
    ) -> tuple[NDArray[np.float64], int]:
        asked, decoding = self._questions(rows, model)
        spent = _Counted(meter)
        answers = generate(
            model, shape, [each.ids for each in asked], decoding, spent, max_tokens, share
        )
        scores, num_tokens = np.zeros(len(asked)), 0
        for place, (each, answer) in enumerate(zip(asked, answers, strict=True)):
            if answer is None:  # another rank's
                continue
            said = self.tokenizer.decode(answer.ids, skip_special_tokens=True)
            scores[place] = self._checked(self.metric.score(each.prompt, said, each.gold))
            num_tokens += answer.num_tokens
        if share == (0, 1):
            return scores, num_tokens
        sums = ranks.added(np.array([spent.flops, float(num_tokens)]))
        meter.tick(Cost(flops=float(sums[0]) - spent.flops))
        return ranks.added(scores), int(sums[1])

    def _checked(self, score: float) -> float:
        if not 0.0 <= score <= 1.0:
            raise ValueError(
                f"metric {self.metric.unit} gave a score of {score!r}\n"
                "hint: a score is from 0 (wrong) to 1 (right)"
            )
        return float(score)

    def flops(
        self,
        shape: ModelShape,
        rows: Mapping[str, Rows],
        max_tokens: int | None = None,
        times: int = 1,
    ) -> float:
        """The most that ``measured`` can take, or so many ``samples`` of each row: as if each
        answer had all that it may have."""
        decoding = Decoding(max_new_tokens=self.max_new_tokens)
        prompts = [[answer_span(t)[0] for t in r.tokens] * times for r in rows.values()]
        return sum(answers_flops(shape, lengths, decoding, max_tokens) for lengths in prompts)

    def _questions(self, rows: Rows, model: Any) -> tuple[list[Asked], Decoding]:
        asked = [
            self._question(tokens, prompt, completion)
            for tokens, prompt, completion in zip(
                rows.tokens, rows.prompts, rows.completions, strict=True
            )
        ]
        special = set(self.tokenizer.all_special_ids)
        ends = {each.end_id for each in asked} & special | _end_ids(model)
        if self.tokenizer.eos_token_id is not None:
            ends.add(self.tokenizer.eos_token_id)
        return asked, Decoding(max_new_tokens=self.max_new_tokens, end_ids=frozenset(ends))

    def _question(self, tokens: Any, prompt: str, completion: str) -> Asked:
        start, end = answer_span(tokens)
        ids = np.asarray(tokens.input_ids)
        if start > int(np.argmax(tokens.loss_mask)):  # a conversation: its last answer is asked for
            prompt, completion = (
                self.tokenizer.decode(part, skip_special_tokens=True)
                for part in (ids[:start], ids[start:end])
            )
        return Asked(ids[:start], prompt, completion, int(ids[end - 1]))


def answer_span(tokens: Any) -> tuple[int, int]:
    """Where the last answer of a row begins and ends among its tokens."""
    mask = np.asarray(tokens.loss_mask)
    end = len(mask) - int(np.argmax(mask[::-1]))
    before = np.flatnonzero(~mask[:end])
    return (int(before[-1]) + 1 if len(before) else 0), end


def _end_ids(model: Any) -> set[int]:
    """What the model's own settings say ends an answer."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set(found) if isinstance(found, (list, tuple)) else set() if found is None else {found}


class _Counted:
    """A meter that also adds up."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.flops = 0.0

    def tick(self, cost: Cost, *, steps: int = 0) -> None:
        self._meter.tick(cost, steps=steps)
        self.flops += cost.flops
