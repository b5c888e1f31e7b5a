"""A decoding under way: the draws that a policy wants, asked of the models, within the purse."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from heapq import nlargest

from thrifty.asked_questions import Answer, Questions
from thrifty.backends.backend import Answered, Asking, AskingFailed, Backend
from thrifty.core.budget import Cost
from thrifty.core.contracts import DecodingPolicy
from thrifty.core.given import AddingUp
from thrifty.core.purse import Hold, Purse
from thrifty.core.quantities import FORMATS
from thrifty.core.question_reading import ReadsQuestions
from thrifty.core.sampling import Asked, Draw, Means, Offer, Outcome, Sample
from thrifty.core.spending import BudgetExceeded
from thrifty.decode_record import Record
from thrifty.drawing import Drawing

MAX_FAILED = 3
"""Draws of a question that brought nothing, after which it is answered with what there is."""
MAX_FAILED_IN_A_ROW = 20
"""Over all questions: then nobody is there, and the run ends, to be gone on with."""


class NobodyAnswers(RuntimeError):
    """What was asked keeps failing; the same command goes on once that is mended."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How answers are generated, and how many at most."""

    max_tokens: int = 1024
    temperature: float = 0.7
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    max_samples: int = 40
    """Of a question."""
    mean_samples: float | None = None
    """Of all questions, on average: a budget that they share."""
    price: float = 0.0
    """Right answers that a unit of the resource must bring."""
    concurrency: int = 16
    """Questions with a draw under way."""

    def __post_init__(self) -> None:
        if min(self.max_tokens, self.max_samples, self.concurrency) < 1:
            raise ValueError(
                "max_tokens, max_samples and concurrency are at least 1\nhint: --max-samples 40"
            )
        if not all(0 <= number < math.inf for number in (self.temperature, self.price)):
            raise ValueError("temperature and price are at least 0\nhint: --temperature 0.7")
        if self.mean_samples is not None and not 0 < self.mean_samples < math.inf:
            raise ValueError("--samples is a mean of samples of more than 0\nhint: --samples 3")
        if not 0 < self.top_p <= 1:
            raise ValueError("top_p is more than 0, and at most 1\nhint: --top-p 1")


class Answering:
    """Asks the models what the policy wants to know, many questions at a time."""

    def __init__(
        self,
        questions: Questions,
        backends: Sequence[Backend],
        policy: DecodingPolicy,
        settings: Settings,
        record: Record,
        purse: Purse,
    ) -> None:
        self._backends = {backend.model: backend for backend in backends}
        if not backends or len(self._backends) < len(backends):
            raise ValueError("models to ask must be there, and have different names\nhint: --model")
        self._questions, self._policy, self._settings = questions, policy, settings
        self._record, self._purse = record, purse
        self._failed_in_a_row = 0
        self._broken: NobodyAnswers | None = None
        self._on_samples: Callable[[int], None] | None = None
        self._num_holds = 0
        self._settled = asyncio.Condition()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="thrifty-read")
        self.resource = self._binding()

    def begin(self, fit_on: Sequence[Outcome] = ()) -> None:
        """Take up what came before, and let the policy learn. Raises ValueError where it cannot
        work with what is at hand."""
        if not self._record.restore(self._questions.asked):
            self._check_begins()
        asked = list(self._questions.asked.values())
        spent = sum(sample.cost for each in asked for sample in each.samples)
        left = math.inf
        if self.resource != "samples":
            left = self._purse.remaining(self.resource) or 0.0
        elif self._settings.mean_samples is not None:
            left = max(self._settings.mean_samples * len(asked) - spent, 0.0)
        means = Means(
            offers=tuple(
                Offer(model=model, cost=self._upper(backend, self.resource) or 0.0)
                for model, backend in self._backends.items()
            ),
            resource=self.resource,
            left=left,
            num_open=len(asked),
            max_samples=self._settings.max_samples,
            price=self._settings.price,
        )
        self._let_read(
            [*(asked.prompt for asked in asked), *(outcome.prompt for outcome in fit_on)]
        )
        if fit_on:
            means = replace(means, learnt=self._policy.fit(fit_on, means))
        self._drawing = Drawing(self._policy, asked, means, spent)

    def _let_read(self, prompts: Sequence[str]) -> None:
        """Where the policy has a model of its own. Raises BudgetExceeded where that is too dear."""
        policy = self._policy
        if isinstance(policy, ReadsQuestions) and (most := policy.reading(prompts)) != Cost():
            hold, took = self._purse.hold(most), AddingUp()
            try:
                policy.read(prompts, took)
            finally:
                hold.settle(took.cost, kept=False)  # whoever goes on reads again

    async def run(
        self,
        on_answer: Callable[[Answer, int], None] | None = None,
        on_samples: Callable[[int], None] | None = None,
    ) -> tuple[Answer, ...]:
        """Every question's answer. Raises NobodyAnswers."""
        self._on_samples = on_samples
        told = 0
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                for asked, draw in self._drawing.next(self._settings.concurrency):
                    tasks.add(asyncio.create_task(self._draw(asked, draw)))
                for id in self._drawing.newly_finished():
                    told += 1
                    if on_answer is not None:
                        on_answer(self._answer(id), told)
                if not tasks:
                    break
                left = self._purse.remaining("seconds")
                done, tasks = await asyncio.wait(
                    tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED
                )
                errors = [error for task in done if (error := task.exception()) is not None]
                for error in [*errors, self._broken]:
                    if error is not None:
                        raise error
                if not done:
                    await _cancel(tasks)
                    tasks = set()
                    self._drawing.close_all("the time is up")
        finally:
            await _cancel(tasks)
            self._reader.shutdown(wait=False)
        return tuple(self._answer(id) for id in self._questions.prompts)

    def _answer(self, id: str) -> Answer:
        took = self._record.took(id)
        answer = self._questions.answer(id, self._drawing.finished[id])
        return replace(answer, flops=took.flops, dollars=took.dollars)

    async def _draw(self, asked: Asked, draw: Draw) -> None:
        """Ask, and hand the policy what came. However it ends, its question is under way no more
        and what it held is settled."""
        backend = self._backends[draw.model]
        took, failed = 0.0, 0
        before = self._record.took(asked.id)
        samples: list[Sample] = []
        try:
            held = await self._hold(backend, asked, draw)
            if held is None:
                return
            hold, asking = held
            cost = backend.upper(asking)  # where it is cancelled nobody knows better
            try:
                answered = await backend.ask(asking)
                cost = answered.cost
                took = self._amount(cost, len(answered.completions))
                samples = await self._read(asked, draw, answered, took)
                self._failed_in_a_row = 0
            except AskingFailed as failure:
                cost = failure.cost
                took, failed = self._amount(cost, 0), 1
                self._note(failure)
            finally:
                self._record.add(asked, samples, cost)
                await self._settle(hold, cost, kept=self._record.took(asked.id) != before)
        finally:
            if samples:
                self._drawing.came_back(asked, samples, took)
                if self._on_samples is not None:
                    self._on_samples(len(samples))
            else:
                self._drawing.failed(asked, failed, took)
                if asked.failed >= MAX_FAILED:
                    self._drawing.close(asked, f"{asked.failed} draws failed")

    async def _hold(self, backend: Backend, asked: Asked, draw: Draw) -> tuple[Hold, Asking] | None:
        """Set aside what it can take, waiting for others to settle where need be; None where there
        is not enough even so, which ends the run."""
        while True:
            asking = self._asking(asked, draw)
            try:
                hold = self._purse.hold(backend.upper(asking))
            except BudgetExceeded as error:
                if draw.count > 1:
                    draw = replace(draw, count=1)
                elif self._num_holds:
                    async with self._settled:
                        await self._settled.wait()
                else:
                    self._drawing.close_all(f"the budget's {error.resource} are spent")
                    return None
                continue
            self._num_holds += 1
            return hold, asking

    async def _read(
        self, asked: Asked, draw: Draw, answered: Answered, took: float
    ) -> list[Sample]:
        """On a thread, one at a time: reading and scoring a text may take seconds, and functions
        of the user's own need not stand being called twice at once."""
        loop = asyncio.get_running_loop()
        work = partial(self._questions.samples, asked, draw, answered, took)
        try:
            return await loop.run_in_executor(self._reader, work)
        except asyncio.CancelledError:  # it is paid for: kept for whoever goes on
            self._record.add(asked, work(), answered.cost)
            raise

    async def _settle(self, hold: Hold, cost: Cost, *, kept: bool) -> None:
        hold.settle(cost, kept=kept)
        self._num_holds -= 1
        async with self._settled:
            self._settled.notify_all()

    def _asking(self, asked: Asked, draw: Draw) -> Asking:
        settings = dict(draw.settings)
        ours = self._settings
        return Asking(
            prompt=self._questions.prompts[asked.id].content,
            count=draw.count,
            prefix=draw.prefix,
            max_tokens=min(draw.max_tokens or ours.max_tokens, ours.max_tokens),
            temperature=settings.pop("temperature", ours.temperature),
            top_p=settings.pop("top_p", ours.top_p),
            stop=draw.stop or ours.stop,
            seed=_seed(ours.seed, asked),
            settings=settings,
        )

    def _note(self, failure: AskingFailed) -> None:
        """End the run where more of the same would fail alike."""
        self._failed_in_a_row += 1
        if failure.fatal or self._failed_in_a_row == MAX_FAILED_IN_A_ROW:
            times = "" if failure.fatal else f"{self._failed_in_a_row} requests failed in a row: "
            self._broken = self._broken or NobodyAnswers(
                f"{times}{failure}\nhint: mend that; the same command then goes on"
            )

    def _amount(self, cost: Cost, num_samples: int) -> float:
        """In the run's resource."""
        if self.resource == "samples":
            return float(num_samples)
        return cost.of(self.resource) or 0.0

    def _binding(self) -> str:
        """The resource that runs out first if every sample takes its most; time alone is no
        reason to weigh samples by it, for many are under way at once.

        Raises ValueError where what a sample takes of a limited resource is not known.
        """
        for backend in self._backends.values():
            for resource in self._purse.left:
                upper = self._upper(backend, resource)
                if upper is None or (resource == "flops" and not upper):
                    raise ValueError(
                        f"the budget limits {resource}, and what {backend.model} takes of them is "
                        "not known\nhint: say what it costs (--price for dollars, --config for "
                        "flops), or limit something else"
                    )
        if self._settings.mean_samples is not None:
            return "samples"
        limited = {name: left for name, left in self._purse.left.items() if name != "seconds"}
        if not limited:
            return "samples"
        cheapest = next(iter(self._backends.values()))
        return min(limited, key=lambda name: limited[name] / (self._upper(cheapest, name) or 1.0))

    def _check_begins(self) -> None:
        """Raises ValueError where not even the shortest question can be asked once."""
        shortest = min(self._questions.prompts.values(), key=lambda prompt: len(prompt.text))
        asking = Asking(prompt=shortest.content, max_tokens=self._settings.max_tokens)
        uppers = [backend.upper(asking) for backend in self._backends.values()]
        for resource, left in self._purse.left.items():
            least = min(upper.of(resource) or 0.0 for upper in uppers)
            if resource != "seconds" and least > left:
                show = FORMATS[resource]
                raise ValueError(
                    f"not one sample can be paid for: it may take {show(least)} of the "
                    f"{show(max(left, 0.0))} that are left\n"
                    "hint: raise the budget, or lower --max-tokens"
                )

    def _upper(self, backend: Backend, resource: str) -> float | None:
        """The most that a sample of the longest prompt takes, of those that can be answered: what
        cannot takes nothing."""
        if resource == "samples":
            return 1.0
        longest = nlargest(8, self._questions.prompts.values(), key=lambda p: len(p.text))
        for prompt in longest:
            asking = Asking(prompt=prompt.content, max_tokens=self._settings.max_tokens)
            if (amount := backend.upper(asking).of(resource)) != 0:
                return amount
        return 0.0


def _seed(seed: int, asked: Asked) -> int:
    """Of its own for every draw of every question."""
    text = f"{seed}\0{asked.id}\0{len(asked.samples)}\0{asked.failed}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) & 0x7FFFFFFF


async def _cancel(tasks: Collection[asyncio.Task[None]]) -> None:
    """And wait until they are, so that all that was held is settled."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
