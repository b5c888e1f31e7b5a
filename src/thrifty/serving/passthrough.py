"""A request handed on to an upstream as it is, and its answer handed back, charged.

The most that it can take is held before anything is sent; what the upstream counted is settled when
the answer is whole. Without a count that can be true, and where the answer breaks off because the
upstream fails or the client leaves, the most stands: nobody tells what was computed by then.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from thrifty.backends.payload import PATHS
from thrifty.backends.replies import is_cut_off
from thrifty.backends.usage import Usage, believed
from thrifty.core.budget import Cost
from thrifty.serving.errors import Refused
from thrifty.serving.event_stream import (
    DONE,
    EventCutter,
    TooLong,
    data_of,
    event_of,
    is_done,
    matters,
)
from thrifty.serving.key_budgets import Account
from thrifty.serving.metrics import ServeMetrics
from thrifty.serving.request_limits import Wanted, written
from thrifty.serving.told import Told
from thrifty.serving.upstream import Exchange, Upstream, UpstreamClient, UpstreamFailed


class Charge:
    """The hold of one request, settled once, whatever happens."""

    def __init__(self, account: Account, upstream: Upstream, wanted: Wanted) -> None:
        self.cost = upstream.cost(wanted.most, wanted)
        """The most that it can take, until it is known better."""
        self.measured = False
        self._upstream = upstream
        self._wanted = wanted
        self._hold = account.hold(self.cost)

    def settle(self, usage: Usage | None) -> None:
        """At what was counted, else at the most."""
        if usage is not None:
            self.cost = self._upstream.cost(usage, self._wanted)
            self.measured = True
        self._hold.settle(self.cost)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        nothing = isinstance(error, UpstreamFailed) and not error.begun
        self._hold.settle(Cost() if nothing else self.cost)


class Passthrough:
    """One request. ``policy`` and ``reason``: what the answer says of why it was handed on."""

    def __init__(
        self,
        client: UpstreamClient,
        wanted: Wanted,
        account: Account,
        metrics: ServeMetrics,
        *,
        policy: str,
        reason: str,
    ) -> None:
        self._client = client
        self._wanted = wanted
        self._account = account
        self._metrics = metrics
        self._policy = policy
        self._reason = reason

    async def whole(self) -> tuple[dict[str, Any], Told]:
        """The answer, and what it says of itself. Raises Refused and UpstreamFailed."""
        with self._charge() as charge:
            async with self._post(self._wanted.body) as exchange:
                answer = await exchange.json()
            usage = answer.get("usage")
            each = self._wanted.most.generated // self._wanted.choices
            cut_off = each * sum(is_cut_off(c.get("finish_reason")) for c in _choices(answer))
            charge.settle(self._believed(usage, list(_texts(answer)), cut_off))
        told = self._told(charge, answer.get("model"))
        return {**answer, "thrifty": told.facts()}, told

    async def events(self) -> AsyncGenerator[bytes]:
        """The stream, from an empty piece on when the upstream has taken the request. Until then
        raises Refused and UpstreamFailed; what fails later is an event of its own."""
        body, end = self._wanted.body, _End(self._wanted.usage_asked)
        options = {**(body.get("stream_options") or {}), "include_usage": True}
        taken = False
        with self._charge() as charge:
            try:
                async with self._post({**body, "stream_options": options}) as exchange:
                    taken = True
                    yield b""
                    async for piece in _passed(exchange, end):
                        yield piece
            except UpstreamFailed as failed:
                if not taken:
                    raise
                self._metrics.failures += 1
                yield event_of(failed.refused.body())
                return
            # Several for several choices: each of one completion, and not told of which.
            said = None if end.counts > 1 < self._wanted.choices else end.usage
            charge.settle(self._believed(said, ("x",) if end.pieces else ()))
        yield end.last(self._told(charge, end.model))

    # -- its own ----------------------------------------------------------------------------------

    def _charge(self) -> Charge:
        return Charge(self._account, self._client.upstream, self._wanted)

    def _post(self, body: dict[str, Any]) -> Exchange:
        self._metrics.samples += self._wanted.choices
        return self._client.post(PATHS[self._wanted.kind], written(body))

    def _believed(self, said: Any, texts: Sequence[str], cut_off: int = 0) -> Usage | None:
        wanted = self._wanted
        usage = believed(said, wanted.most, wanted.prompt_bytes, texts, cut_off)
        self._metrics.untrusted += usage is None
        return usage

    def _told(self, charge: Charge, model: Any) -> Told:
        return Told(
            policy=self._policy,
            model=model if isinstance(model, str) else self._wanted.model,
            samples=self._wanted.choices,
            cost=charge.cost,
            measured=charge.measured,
            knows_flops=self._client.upstream.tariff.shape is not None,
            reason=self._reason,
            left=self._account.left(),
        )


def _texts(answer: dict[str, Any]) -> Iterator[str]:
    """Of its choices, as far as they are text."""
    for choice in _choices(answer):
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else choice.get("text")
        if isinstance(text, str):
            yield text.encode("utf-8", "replace").decode()


def _choices(answer: dict[str, Any]) -> list[dict[str, Any]]:
    choices = answer.get("choices")
    return [c for c in choices if isinstance(c, dict)] if isinstance(choices, list) else []


class _End:
    """The end of a stream, kept back until it can say what the answer cost."""

    def __init__(self, usage_asked: bool) -> None:
        self.usage: Any = None
        self.model: Any = None
        self.pieces = 0
        """That had something in them."""
        self.counts = 0
        """Pieces that tell usage and nothing else; some servers send one a completion."""
        self.finished = False
        self.failed = False
        self._usage_asked = usage_asked
        self._kept: dict[str, Any] | None = None
        self._shape: dict[str, Any] = {}

    def pass_on(self, event: bytes) -> bytes:
        """What of it to send now."""
        if is_done(event):
            return b""
        value = data_of(event)
        if value is None:  # a comment, or nothing that a client could read either
            return event
        if value.get("error"):
            self.failed = True
            return event
        if isinstance(value.get("usage"), dict):
            self.usage = value["usage"]
            self.counts += value.get("choices") == []
        self.model = value.get("model", self.model)
        choices = value.get("choices")
        if choices or not isinstance(choices, list):
            self.pieces += 1
            self.finished |= isinstance(choices, list) and any(map(_finishes, choices))
        elif not self._usage_asked:  # asked for on our own account; some clients read choices[0]
            self._shape = {**value, "usage": None}
            return b""
        before, self._kept = self._kept, value
        return b"" if before is None else event_of(before)

    def last(self, told: Told) -> bytes:
        """The kept event with what the answer says of itself, and the end."""
        if self.failed:
            return DONE
        kept = self._kept or {"object": "chat.completion.chunk", "choices": [], **self._shape}
        return event_of({**kept, "thrifty": told.facts()}) + DONE


def _finishes(choice: Any) -> bool:
    return isinstance(choice, dict) and choice.get("finish_reason") is not None


async def _passed(exchange: Exchange, end: _End) -> AsyncIterator[bytes]:
    """Its events as they come, but for the end. Raises UpstreamFailed."""
    cutter = EventCutter()
    async for piece in exchange.pieces():
        try:
            whole = cutter.cut(piece)
        except TooLong as error:
            raise UpstreamFailed(Refused(502, f"the upstream sends {error}"), begun=True) from None
        now = []
        for event in whole:
            if matters(event):
                now.append(end.pass_on(event))
            else:
                end.pieces += 1
                now.append(event)
        if sent := b"".join(now):
            yield sent
    if rest := cutter.rest():
        yield end.pass_on(rest + b"\n\n")
    if not end.finished and not end.failed:
        raise UpstreamFailed(
            Refused(502, "the upstream broke off before the end of its answer", "try again"),
            begun=True,
        )
