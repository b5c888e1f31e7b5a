"""A request answered by a policy: drawn again while that pays, and the answer chosen.

The loop is that of every decoding (``drawing.py``), with a pool of this one question and what those
before it taught (``one_by_one.py``); what is drawn is held and settled on the key's account, draw
by draw. What the loop cannot improve, or a backend cannot be told, is handed on as it is instead,
with the reason.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from thrifty.asked_questions import Answer, Questions
from thrifty.backends.backend import Answered, Asking, AskingFailed, Backend
from thrifty.backends.payload import RESERVED
from thrifty.core.budget import Cost
from thrifty.core.contracts import AnswerForm, DecodingPolicy
from thrifty.core.given import AddingUp
from thrifty.core.question_reading import ReadsQuestions
from thrifty.core.resolve import name_of
from thrifty.core.sampling import Asked, Draw, Means, Offer, Outcome, Sample
from thrifty.drawing import Drawing
from thrifty.prompts import Prompt
from thrifty.serving.errors import Refused
from thrifty.serving.event_stream import DONE, event_of
from thrifty.serving.key_budgets import Account
from thrifty.serving.metrics import ServeMetrics
from thrifty.serving.one_by_one import OneByOne
from thrifty.serving.request_limits import Wanted
from thrifty.serving.told import Told

_READERS = 8
"""Texts that are read at a time; one where a function of the user's scores them."""
_PIECE = 64
"""Characters of an event of a streamed answer."""
_OWN = RESERVED | {"temperature", "top_p", "stop", "seed", "user", "store", "metadata"}
"""Fields that are asked for by name, or say nothing about the answer."""


@dataclass(kw_only=True)
class Improver:
    """How requests are answered here."""

    policy: DecodingPolicy
    form: AnswerForm | None
    """How an answer is read in a text; None: texts are answers as they stand."""
    reward: Callable[[str, str], float] | None = None
    """Of a prompt and a text, higher is better."""
    worth: float = 0.0
    """Right answers that a unit of the resource must bring."""
    fit_on: Sequence[Outcome] = ()
    """Outcomes with gold answers, for policies that learn."""
    mean_samples: float | None = None
    """Of a question, on average, which a pooled policy shares out among those that come."""
    backends: Mapping[str, Backend]
    """By model, the cheapest first."""
    max_samples: int
    knows_flops: bool
    resource: str
    """That the policy weighs: dollars where all prices are known, else tokens."""
    metrics: ServeMetrics
    expected: dict[str, tuple[float, int]] = field(default_factory=dict)
    """model -> what its samples took so far, and how many there were."""
    _learnt: Mapping[str, Any] = field(default_factory=dict, init=False)
    _flow: OneByOne = field(init=False)

    def __post_init__(self) -> None:
        """Raises ValueError where the policy cannot work with what is at hand."""
        self._flow = OneByOne(self.mean_samples)
        if self.mean_samples is not None and not (self.policy.pooled and not self.worth):
            raise ValueError(
                "a mean of samples is shared out by a policy that weighs questions against each "
                "other, and sets what a sample is worth\n"
                "hint: --policy marginal without --worth, or no --samples"
            )
        means = Means(
            offers=tuple(Offer(model=model) for model in self.backends), resource=self.resource
        )
        if self.fit_on:
            self._learnt = self.policy.fit(self.fit_on, means)
        self.policy.check(replace(means, learnt=self._learnt))

    @property
    def name(self) -> str:
        return name_of(self.policy)

    @cached_property
    def readers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_READERS if self.reward is None else 1, "thrifty-read")

    def why_not(self, wanted: Wanted) -> str | None:
        """Why a request is handed on as it is; None where it is not."""
        body = wanted.body
        if wanted.kind != "chat":
            return "the policy answers chats"
        if wanted.choices > 1:
            return f"{wanted.choices} completions were asked for"
        if body.get("tools") or body.get("functions"):
            return "tools were offered"
        if body.get("logprobs"):
            return "log-probabilities were asked for"
        if body.get("temperature") == 0:
            return "at temperature 0 another sample says the same"
        for message in body["messages"]:
            if not isinstance(message.get("content"), str) or message.keys() - {"role", "content"}:
                return "a message holds more than text"
        known = set.intersection(*(set(each.settings_known) for each in self.backends.values()))
        for name, value in body.items():
            if name not in _OWN and name not in known and value is not None:
                return f"the policy cannot pass on {name}"
        return None

    async def answer(self, wanted: Wanted, account: Account) -> tuple[dict[str, Any], Told]:
        """The completion, in the usual shape, and what it says of itself. Raises Refused."""
        return await _Question(self, wanted, account).answered()

    def means(self, asking: Asking, account: Account) -> Means:
        offers = self._offers(asking)
        price = self._flow.price(account.client.name) / (offers[0].cost or 1.0)
        return Means(
            offers=offers,
            resource=self.resource,
            left=account.left().get(self.resource, math.inf),
            more_to_come=True,
            max_samples=self.max_samples,
            price=self.worth or price,
            past=self._flow.past if self.policy.pooled else (),
            learnt=self._learnt,
        )

    def _offers(self, asking: Asking) -> tuple[Offer, ...]:
        found = []
        for model, backend in self.backends.items():
            total, number = self.expected.get(model, (0.0, 0))
            most = backend.upper(asking).of(self.resource) or 0.0
            found.append(Offer(model=model, cost=total / number if number else most / 2))
        return tuple(found)

    def answered(self, asked: Asked, account: Account) -> None:
        """For those that come later."""
        if self.policy.pooled:
            self._flow.note(account.client.name, asked)

    def note(self, model: str, cost: float, number: int) -> None:
        total, before = self.expected.get(model, (0.0, 0))
        self.expected[model] = total + cost, before + number


class _Question:
    """One request while it is answered."""

    def __init__(self, improver: Improver, wanted: Wanted, account: Account) -> None:
        self._improver = improver
        self._wanted = wanted
        self._account = account
        self._base = _asking(wanted)
        messages = tuple(wanted.body["messages"])
        prompt = Prompt(id="request", content=messages)
        self._questions = Questions([prompt], improver.form, improver.reward)
        self._asked = self._questions.asked[prompt.id]
        self._cost = Cost()
        self._generated = 0.0
        self._measured = True
        self._failure: Refused | None = None

    async def answered(self) -> tuple[dict[str, Any], Told]:
        await self._let_read()
        means = self._improver.means(self._base, self._account)
        drawing = Drawing(self._improver.policy, [self._asked], means)
        while batch := drawing.next(1):
            for asked, draw in batch:
                await self._draw(drawing, asked, draw)
        finish = drawing.finished[self._asked.id]
        said = self._questions.answer(self._asked.id, finish)
        chosen = self._first_of(said)
        if chosen is None:
            raise self._failure or Refused(502, f"there is no answer: {finish.reason}")
        self._improver.answered(self._asked, self._account)
        told = Told(
            policy=self._improver.name,
            model=chosen.model,
            samples=len(self._asked.samples),
            cost=self._cost,
            measured=self._measured,
            knows_flops=self._improver.knows_flops,
            confidence=finish.confidence,
            reason=finish.reason,
            left=self._account.left(),
        )
        return self._shaped(said.text or chosen.text, chosen, told), told

    async def _let_read(self) -> None:
        """Where the policy has a model of its own. Raises Refused."""
        policy, prompts = self._improver.policy, [self._asked.prompt]
        if not isinstance(policy, ReadsQuestions) or (most := policy.reading(prompts)) == Cost():
            return
        hold, took, cost = self._account.hold(most), AddingUp(), most
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._improver.readers, policy.read, prompts, took)
            cost = took.cost
        finally:
            self._cost += cost
            hold.settle(cost)

    async def _draw(self, drawing: Drawing, asked: Asked, draw: Draw) -> None:
        backend = self._improver.backends[draw.model]
        asking = replace(
            self._base,
            count=draw.count,
            prefix=draw.prefix,
            max_tokens=min(draw.max_tokens or self._base.max_tokens, self._base.max_tokens),
            stop=self._base.stop + draw.stop,
            seed=None if self._base.seed is None else self._base.seed + asked.num_drawn,
            settings={**self._base.settings, **draw.settings},
        )
        upper = backend.upper(asking)
        try:
            hold = self._account.hold(replace(upper, seconds=0.0))
        except Refused as refused:
            self._failure = refused
            drawing.failed(asked, draw.count)
            drawing.close_all("what the key has left does not pay for another sample")
            return
        cost = upper  # where it is cancelled on the way
        try:
            self._improver.metrics.samples += draw.count
            answered = await backend.ask(asking)
            cost = answered.cost
            samples = await self._read(draw, answered)
            self._came_back(drawing, answered, samples)
        except AskingFailed as failed:
            self._improver.metrics.failures += 1
            cost = failed.cost
            message = "the upstream does not answer" if failed.fatal else str(failed)
            self._failure = Refused(502, message)
            drawing.failed(asked, draw.count, self._of(cost))
            drawing.close_all(f"{draw.model} failed")  # somebody waits: no further tries
        finally:
            self._cost += replace(cost, seconds=0.0, joules=None)
            hold.settle(replace(cost, seconds=0.0))

    async def _read(self, draw: Draw, answered: Answered) -> list[Sample]:
        """On a thread: others are answered meanwhile."""
        took = self._of(answered.cost)
        work = partial(self._questions.samples, self._asked, draw, answered, took)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._improver.readers, work)

    def _came_back(self, drawing: Drawing, answered: Answered, samples: Sequence[Sample]) -> None:
        improver = self._improver
        self._measured &= answered.trusted
        improver.metrics.untrusted += not answered.trusted
        self._generated += sum(completion.tokens for completion in answered.completions)
        improver.note(samples[0].model, self._of(answered.cost), len(samples))
        drawing.came_back(self._asked, samples, self._of(answered.cost))

    def _of(self, cost: Cost) -> float:
        return cost.of(self._improver.resource) or 0.0

    def _first_of(self, said: Answer) -> Sample | None:
        """The first sample with the text that is answered; where none has it, the first one."""
        samples = self._asked.answers() or self._asked.samples
        same = (sample for sample in samples if sample.text == said.text)
        return next(same, samples[0] if samples else None)

    def _shaped(self, text: str, chosen: Sample, told: Told) -> dict[str, Any]:
        prompt = max(round(self._cost.tokens - self._generated), 0)
        generated = round(self._generated)
        message = {"role": "assistant", "content": text}
        reason = "stop" if chosen.ended else "length"
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": chosen.model,
            "choices": [
                {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
            ],
            "usage": {  # of all samples: what was paid for
                "prompt_tokens": prompt,
                "completion_tokens": generated,
                "total_tokens": prompt + generated,
            },
            "thrifty": told.facts(),
        }


def in_events(answer: Mapping[str, Any], *, usage_asked: bool) -> Iterator[bytes]:
    """A whole answer as a stream; what it cost is in the last event."""
    (choice,) = answer["choices"]
    text = choice["message"]["content"]
    top = {name: answer[name] for name in ("id", "created", "model")}
    top["object"] = "chat.completion.chunk"

    def event(delta: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
        choices = [{"index": 0, "delta": delta, "finish_reason": reason}]
        return event_of({**top, "choices": choices, **more})

    yield event({"role": "assistant", "content": ""})
    for start in range(0, len(text), _PIECE):
        yield event({"content": text[start : start + _PIECE]})
    told = {"thrifty": answer["thrifty"]}
    yield event({}, choice["finish_reason"], **({} if usage_asked else told))
    if usage_asked:
        yield event_of({**top, "choices": [], "usage": answer["usage"], **told})
    yield DONE


def _asking(wanted: Wanted) -> Asking:
    body = wanted.body
    stop = body.get("stop") or ()
    own = {name: body[name] for name in ("temperature", "top_p") if body.get(name) is not None}
    return Asking(
        prompt=body.get("messages") or body.get("prompt") or "",
        max_tokens=wanted.max_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        seed=body.get("seed"),
        settings={
            name: value for name, value in body.items() if name not in _OWN and value is not None
        },
        **own,
    )
