"""A model folder that answers in this process, through transformers, on a CPU or a GPU.

    backend = Local("RUN/model", settings={"kv_cache": {"bits": 8}})
    answered = await backend.ask(Asking(prompt="What is 6 x 7?", count=5))

Whoever asks within the same turn of the event loop shares batches, and while a batch is computed in
a thread, one at a time, the next ones gather. A prompt is read once for all of its answers. Batches
hold prompts that differ in length by at most an eighth of the work that each may be: what a request
takes is then bounded by

    upper = request_cost(L + (L + count n) / 8, n, count)          (costs/decoding.py)

for L tokens of prompt and n of each answer, and what it is charged is what was computed for it, the
padding included. The clock's seconds of a batch are shared out by FLOPs.

An answer's random numbers follow from the seed, the request's tokens and its place among the
request's answers, and from nothing that it shares a batch with; a batch of another size may round
the last bits of a logit otherwise, and with bad luck a token.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from thrifty.backends.backend import Answered, Asking, AskingFailed, Backend, Completion
from thrifty.backends.local_models import LocalModels
from thrifty.backends.local_request import Request, check
from thrifty.backends.prompting import Prompting
from thrifty.core.budget import Cost
from thrifty.core.given import AddingUp
from thrifty.costs.decoding import request_cost
from thrifty.costs.token_settings import NAMES, TokenSettings
from thrifty.signals.generation_batch import answered
from thrifty.signals.generation_rows import Answer, Wanted

MAX_BATCH_TOKENS = 16384
"""Of a batch, those to be generated included: 2 GiB of an 8B model's cache in bfloat16."""
_TURNS = 3
"""Of the event loop in which nobody asked any more, before a batch is begun."""


class Local(Backend):
    """One model folder, or one with an adapter, whose base is then loaded too.

    ``name``: that policies know it by, by default the folder's. ``device``: "cpu" or "cuda", by
    default where there is one; ``dtype``: by default the checkpoint's on a GPU and float32 on a
    CPU. ``max_batch_tokens``: of the prompts and answers of a batch. ``templated``: whether a text
    is a message, by default where the tokenizer has a chat template. ``settings``: of requests that
    bring none. ``priced_on``: a device of the table, for predicted seconds; by default this
    machine. Weights are loaded when the first question comes. One event loop at a time.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str = "",
        device: str = "",
        dtype: str = "",
        max_batch_tokens: int = MAX_BATCH_TOKENS,
        templated: bool | None = None,
        settings: Mapping[str, Any] | None = None,
        priced_on: str | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if max_batch_tokens < 1:
            raise ValueError("max_batch_tokens must be at least 1\nhint: the default is 16384")
        self.models = LocalModels(Path(folder).expanduser(), name, device, dtype, priced_on, say)
        self.model = self.models.name
        self.shape = self.models.shape
        self.num_batches = 0
        self._max_batch_tokens = max_batch_tokens
        self._prompting = Prompting(self.models.tokenizer, templated)
        self._waiting: list[tuple[Request, asyncio.Future[Answered]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._one_at_a_time = threading.Lock()
        self._settings = TokenSettings.read(settings or {})
        self.models.check(self._settings)

    def __repr__(self) -> str:
        return f"Local({str(self.models.folder)!r})"

    @property
    def settings_known(self) -> frozenset[str]:
        return NAMES

    @property
    def notes(self) -> tuple[str, ...]:
        """What its settings brought until now, measured, and whether they pay, predicted."""
        return tuple(self.models.notes())

    def upper(self, asking: Asking) -> Cost:
        """Nothing where it would be refused: then nothing is computed."""
        try:
            request = self._request(asking)
        except AskingFailed:
            return Cost()
        most = request_cost(
            self.shape,
            request.widest,
            request.max_new_tokens,
            self.models.dtype,
            self.models.priced,
            count=asking.count,
            settings=request.settings,
            draft=self.models.draft(request.settings),
        )
        return replace(most, tokens=float(request.whole))

    async def ask(self, asking: Asking) -> Answered:
        request = self._request(asking)
        answer: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await answer

    async def close(self) -> None:
        """Let go of the weights, when what is under way is done."""
        if self._worker is not None and not self._worker.done():
            await self._worker
        self.models.release()

    # -- requests ---------------------------------------------------------------------------------

    def _request(self, asking: Asking) -> Request:
        """Raises AskingFailed where it cannot be answered."""
        try:
            check(asking)
            settings = self._settings
            if asking.settings:  # in the place of the usual ones, which may not go with them
                settings = TokenSettings.read(asking.settings)
                self.models.check(settings)
            context = self.shape.max_position_embeddings
            draft = self.models.draft(settings)
            if draft is not None:
                context = min(context, draft.max_position_embeddings)
            ids = self._prompting.ids(asking, context - 1)
        except ValueError as error:
            raise AskingFailed(f"{self.model}: {error}") from None
        limit = min(asking.max_tokens, context - len(ids))
        return Request(asking=asking, settings=settings, ids=ids, max_new_tokens=limit)

    # -- batches ----------------------------------------------------------------------------------

    async def _work(self) -> None:
        """Answers whoever waits, until nobody does."""
        while self._waiting:
            await self._gathered()
            self._waiting = [(r, answer) for r, answer in self._waiting if not answer.done()]
            if not self._waiting:
                return
            batch = self._next_batch()
            try:
                found = await asyncio.to_thread(self._answered, [request for request, _ in batch])
            except AskingFailed as failed:
                for _, answer in batch:
                    if not answer.done():  # each its own, for tracebacks grow
                        copy = AskingFailed(str(failed), failed.cost, fatal=failed.fatal)
                        answer.set_exception(copy)
                continue
            for (_, answer), brought in zip(batch, found, strict=True):
                if not answer.done():
                    answer.set_result(brought)

    async def _gathered(self) -> None:
        """When nobody has asked for some turns of the event loop."""
        quiet, number = 0, len(self._waiting)
        while quiet < _TURNS:
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._waiting) == number else 0
            number = len(self._waiting)

    def _next_batch(self) -> list[tuple[Request, asyncio.Future[Answered]]]:
        """Whoever waits longest, and all that go with it and have room; those wait no more."""
        (first, _), *_ = self._waiting
        chosen: list[int] = []
        width = rows = longest = 0
        narrowest = first.widest
        for place, (request, _) in enumerate(self._waiting):
            if request.alike != first.alike:
                continue
            wider = max(width, len(request.ids))
            bound = min(narrowest, request.widest)
            more = rows + request.asking.count
            new = max(longest, request.max_new_tokens)
            fits = wider <= bound and more * (wider + new) <= self._max_batch_tokens
            if fits or not chosen:
                chosen.append(place)
                width, rows, longest, narrowest = wider, more, new, bound
        batch = [self._waiting[place] for place in chosen]
        taken = set(chosen)
        self._waiting = [w for place, w in enumerate(self._waiting) if place not in taken]
        return batch

    def _answered(self, batch: Sequence[Request]) -> list[Answered]:
        """In a thread. Raises AskingFailed, with what was computed by then."""
        spent, start = AddingUp(), time.monotonic()
        try:
            with self._one_at_a_time:
                start = time.monotonic()
                found, prompt_flops = self._generated(batch, spent)
                seconds = time.monotonic() - start
            self.num_batches += 1
            flops = [prompt_flops + sum(answer.flops for answer in answers) for answers in found]
            return [
                self._brought(request, answers, own, seconds * own / sum(flops))
                for request, answers, own in zip(batch, found, flops, strict=True)
            ]
        except Exception as error:  # torch and transformers raise many; who waits must hear of it
            took = Cost(flops=spent.cost.flops, seconds=time.monotonic() - start)
            share = took * (1 / len(batch))
            raise AskingFailed(
                _told(self.model, error), share, fatal=not spent.cost.flops
            ) from None

    def _generated(
        self, batch: Sequence[Request], spent: AddingUp
    ) -> tuple[list[list[Answer]], float]:
        import torch

        model, end_ids = self.models.weights(""), self.models.end_ids()
        longest = max(len(request.ids) + request.max_new_tokens for request in batch)
        with torch.inference_mode():
            return answered(
                model,
                self.shape,
                [self._wanted(request, end_ids) for request in batch],
                spent,
                self.models.way(batch[0].settings),
                max_rows=max(1, self._max_batch_tokens // longest),
            )

    def _wanted(self, request: Request, end_ids: frozenset[int]) -> Wanted:
        asking = request.asking
        stop = tuple(filter(None, asking.stop))
        return Wanted(
            ids=request.ids,
            max_new_tokens=request.max_new_tokens,
            end_ids=end_ids,
            temperature=asking.temperature,
            top_p=asking.top_p,
            random=request.random(),
            stops=(lambda said: self._prompting.stopped(request.ids, said, stop)) if stop else None,
        )

    def _brought(
        self, request: Request, answers: Sequence[Answer], flops: float, seconds: float
    ) -> Answered:
        completions = []
        for answer in answers:
            text = self._prompting.answer(request.ids, answer.ids.tolist())
            ends = [at for each in request.asking.stop if each and (at := text.find(each)) >= 0]
            completions.append(
                Completion(
                    text=text[: min(ends)] if ends else text,
                    tokens=answer.num_tokens,
                    ended=answer.ended or answer.stopped,
                    confidence=float(np.exp(answer.log_probability / answer.num_tokens)),
                )
            )
        tokens = len(request.ids) + sum(answer.num_tokens for answer in answers)
        cost = Cost(flops=flops, tokens=float(tokens), seconds=seconds)
        return Answered(completions=tuple(completions), cost=cost)


def _told(model: str, error: Exception) -> str:
    text = str(error)
    if "out of memory" in text.lower() or "not enough memory" in text.lower():
        return f"{model} ran out of memory\nhint: lower max_batch_tokens, or kv_cache: {{bits: 8}}"
    hint = "" if "\nhint: " in text else f"\nhint: a {type(error).__name__} of the model's own code"
    return f"{model} could not answer: {text[:500]}{hint}"
