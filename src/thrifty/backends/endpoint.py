"""A model behind an OpenAI-compatible server: vLLM, transformers serve, llama.cpp, Ollama, hosted.

    backend = Endpoint("http://localhost:8000/v1", "Qwen/Qwen3-8B")
    await backend.models()                          # is it there, what does it serve
    answered = await backend.ask(Asking(prompt="What is 6 x 7?", count=5))

A request is held to what it was asked for: bytes, seconds, attempts and cost have limits, whatever
the server does, and nothing but AskingFailed is raised. Replies are not streamed: the budget is
held for all of an answer anyway, and a whole reply says what it took.

What is charged: ``usage`` where it can be true, else the most that the request can have taken.
An attempt that may have been answered though nothing came (a time-out, a connection that broke)
is charged at its most too; one that was refused is not. With m the most that one request can take,

    upper = (1 + retries.lost) m    in tokens m = bytes sent + template_tokens + count max_tokens

No attempt is begun, be it again or for completions that a server without ``n`` left out, that could
take the sum above ``upper``. Of a question that is cancelled nothing is known: it took ``upper``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from thrifty.backends.allowance import Allowance
from thrifty.backends.backend import Answered, Asking, AskingFailed, Backend, Completion
from thrifty.backends.connections import Connections, base_url, is_here
from thrifty.backends.payload import SETTINGS, Kind, Payload, prompt_bytes
from thrifty.backends.replies import Reply, read_models, read_reply
from thrifty.backends.retries import AttemptFailed, Retries, tried
from thrifty.backends.secret import USUAL, Secret, secret_of
from thrifty.backends.usage import Tariff, Usage, believed, shares
from thrifty.core.budget import Cost
from thrifty.data.inert import visible

if TYPE_CHECKING:
    from thrifty.costs.shape import ModelShape

_TEXT_BYTES, _LOGPROB_BYTES = 64, 1024
_WRAPPING_BYTES = 2**20
"""Of a token as JSON without and with its log-probability, and of all that is around them: a reply
needs fewer. What it grows to when it is read is some twenty times its bytes at most."""
_MODELS_SECONDS, _MODELS_BYTES = 15.0, 2**22
_MAX_NOTES = 20
_KNOCKS = 3
"""Attempts to reach a server that never answered."""


class Endpoint(Backend):
    """One model of one server.

    ``key_variable``: the environment variable that has the key; left out, OPENAI_API_KEY is used
    where it is set, though not over plain http to another machine; None: no key. ``prompt_price``,
    ``completion_price``: dollars per million tokens; left out, its dollars are unknown. ``shape``:
    of the model, for its FLOPs. ``concurrency``: questions at a time. ``timeout_seconds``: of one
    attempt. ``template_tokens``: that the server's chat template may add to a prompt. ``logprobs``:
    ask for them, for the completions' confidence. ``fields``: further ones of every request's body.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        kind: Kind = "chat",
        key_variable: str | None = "",
        prompt_price: float | None = None,
        completion_price: float | None = None,
        shape: ModelShape | None = None,
        concurrency: int = 16,
        timeout_seconds: float = 600.0,
        connect_seconds: float = 10.0,
        retries: Retries | None = None,
        max_response_bytes: int = 64 * 2**20,
        template_tokens: int = 256,
        logprobs: bool = False,
        limit_name: str = "max_tokens",
        fields: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        if not model or min(concurrency, timeout_seconds, connect_seconds) <= 0:
            raise ValueError(
                "an endpoint needs a model's name, and more than no time and no requests at a time"
                "\nhint: concurrency, timeout_seconds and connect_seconds are above 0"
            )
        self.url = base_url(url)
        self.model = model
        self.retries = retries or Retries()
        self._payload = Payload(
            model=model, kind=kind, logprobs=logprobs, limit_name=limit_name, fields=fields or {}
        )
        self._tariff = Tariff(
            prompt_price=prompt_price, completion_price=completion_price, shape=shape
        )
        self._notes: dict[str, None] = {}
        self._key = self._read_key(key_variable)
        self._concurrency, self._connect_seconds = concurrency, connect_seconds
        self._timeout_seconds = timeout_seconds
        self._max_response_bytes = max_response_bytes
        self._template_tokens = template_tokens
        self._random = Random(seed)
        self._reached, self._num_unreached = False, 0
        self._one_each = False
        """The server gives, or counts, one completion a request, whatever ``n`` says."""
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self.model!r})"

    @property
    def settings_known(self) -> frozenset[str]:
        return SETTINGS | self._payload.fields.keys()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was odd about replies that were taken nevertheless, each once."""
        return tuple(self._notes)

    def upper(self, asking: Asking) -> Cost:
        most = self._most(asking) * (1 + self.retries.lost)
        return replace(most, seconds=self.retries.total_seconds)

    async def ask(self, asking: Asking) -> Answered:
        try:
            self._payload.content(asking)
        except (TypeError, ValueError) as error:
            raise AskingFailed(str(error)) from None
        connections, places = self._connected()
        async with places:
            return await self._answered(asking, connections)

    async def models(self) -> list[str]:
        """The names of those that the server serves. Raises AskingFailed where it is not there."""
        connections, _ = self._connected()
        seconds = min(self._timeout_seconds, _MODELS_SECONDS)
        try:
            body = await connections.send("GET", "/models", None, seconds, _MODELS_BYTES)
            return [self._shown(name, 200) for name in read_models(body)]
        except AttemptFailed as failed:
            raise self._failure(failed, Cost()) from None

    async def close(self) -> None:
        """Those of this event loop; one that has ended has taken its own along."""
        if self._loop is asyncio.get_running_loop():
            await self._connections.close()
        self._loop = None

    async def _answered(self, asking: Asking, connections: Connections) -> Answered:
        """All completions, by one request where the server can."""
        allowance = Allowance(self.upper(asking))
        completions: list[Completion] = []
        trusted = True
        while len(completions) < asking.count:
            rest = self._rest(asking, len(completions))
            most = self._most(rest)
            if completions and not allowance.fits(most):
                break
            attempt = partial(self._reply, rest, allowance, connections)
            try:
                reply = await tried(attempt, most, allowance, self.retries, self._random)
            except AttemptFailed as failed:
                if completions:
                    break
                raise self._failure(failed, allowance.spent) from None
            usage = self._believed(rest, reply)
            allowance.spend(most if usage is None else self._measured(rest, reply, usage))
            trusted = trusted and usage is not None
            completions += self._completions(rest, reply, usage)
        return Answered(
            completions=tuple(completions),
            cost=allowance.spent,
            trusted=trusted and not allowance.num_lost,
        )

    def _rest(self, asking: Asking, done: int) -> Asking:
        """What to ask for next, so many completions being there; seeds go on, for the same one
        would bring the same answer."""
        count = 1 if self._one_each else asking.count - done
        seed = None if asking.seed is None else asking.seed + done
        return replace(asking, count=count, seed=seed)

    async def _reply(self, asking: Asking, allowance: Allowance, connections: Connections) -> Reply:
        """Of one attempt."""
        token_bytes = _LOGPROB_BYTES if self._payload.logprobs else _TEXT_BYTES
        enough = _WRAPPING_BYTES + asking.count * asking.max_tokens * token_bytes
        try:
            body = await connections.send(
                "POST",
                self._payload.path,
                self._payload.content(asking),
                min(self._timeout_seconds, allowance.seconds_left),
                min(enough, self._max_response_bytes),
            )
        except AttemptFailed as failed:
            self._knocked(failed)
            raise
        self._reached = True
        return read_reply(body, self._payload.kind)

    def _knocked(self, failed: AttemptFailed) -> None:
        """A server that was there will be there again; one that never was is not waited for."""
        self._reached |= not failed.unreached
        self._num_unreached += failed.unreached
        if not self._reached and self._num_unreached >= _KNOCKS:
            failed.again, failed.fatal = False, True

    def _believed(self, asking: Asking, reply: Reply) -> Usage | None:
        """What it took, if it says so."""
        if len(reply.choices) == 1 < asking.count:
            self._one_each = True
            self._note("gives one completion a request, whatever n says: each is asked for alone")
        if reply.model and reply.model != self.model:
            self._note(f"says that {self._shown(reply.model, 100)!r} answers")
        texts = [choice.text for choice in reply.choices]
        cut_off = asking.max_tokens * sum(not choice.ended for choice in reply.choices)
        said = (reply.usage, self._bound(asking), prompt_bytes(asking))
        usage = believed(*said, texts, cut_off)
        if usage is None and len(texts) > 1 and believed(*said, texts[:1]):
            self._one_each = True  # then each says what it took itself
            self._note("does not count all completions of a request: each is asked for alone")
        elif usage is None:
            self._note(
                "does not say what a request took, or nothing that can be, so that it is charged "
                "its most; should its chat template be long, raise template_tokens"
            )
        return usage

    def _measured(self, asking: Asking, reply: Reply, usage: Usage) -> Cost:
        """Of what was generated there may be more than came."""
        least = -(-usage.generated // asking.max_tokens)
        return self._tariff.cost(usage, min(max(len(reply.choices), least), asking.count))

    def _completions(self, asking: Asking, reply: Reply, usage: Usage | None) -> list[Completion]:
        choices = reply.choices[: asking.count]
        tokens = [float(asking.max_tokens)] * len(choices)
        if usage is not None:
            tokens = shares(usage.generated, [choice.text for choice in reply.choices])
        return [
            Completion(
                text=self._scrubbed(choice.text),
                tokens=number,
                ended=choice.ended,
                confidence=choice.confidence,
            )
            for choice, number in zip(choices, tokens, strict=False)
        ]

    def _bound(self, asking: Asking) -> Usage:
        """The most tokens of one request."""
        try:
            size = len(self._payload.content(asking))
        except (TypeError, ValueError):  # it will not be sent
            size = len(repr(asking).encode("utf-8", "replace"))
        return Usage(
            prompt=size + self._template_tokens,
            generated=max(asking.count, 1) * max(asking.max_tokens, 1),
        )

    def _most(self, asking: Asking) -> Cost:
        """That one request can take."""
        return self._tariff.cost(self._bound(asking), max(asking.count, 1))

    def _connected(self) -> tuple[Connections, asyncio.Semaphore]:
        """Those of the running event loop; an endpoint may live through several."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._connections = Connections(
                self.url, self._key, self._concurrency, self._connect_seconds
            )
            self._places = asyncio.Semaphore(self._concurrency)
            self._loop = loop
        return self._connections, self._places

    def _read_key(self, variable: str | None) -> Secret | None:
        if variable is None:
            return None
        key = secret_of(variable)
        if key and not variable and self.url.startswith("http:") and not is_here(self.url):
            self._note(f"gets no key: ${USUAL} goes over https alone unless it is named")
            return None
        return key

    def _failure(self, failed: AttemptFailed, cost: Cost) -> AskingFailed:
        attempts = f"{failed.attempts} attempts failed; " if failed.attempts > 1 else ""
        message = f"{self.model} at {self.url}: {attempts}{self._shown(str(failed), 600)}"
        hint = f"\nhint: {failed.hint}" if failed.hint else ""
        return AskingFailed(message + hint, cost, fatal=failed.fatal)

    def _note(self, note: str) -> None:
        if len(self._notes) < _MAX_NOTES:
            self._notes[f"{self.url} {note}"] = None

    def _shown(self, text: str, limit: int) -> str:
        """Of what a server says, what can be shown."""
        return visible(self._scrubbed(text), limit)

    def _scrubbed(self, text: str) -> str:
        return text if self._key is None else self._key.scrub(text)
