"""The proxy: an OpenAI-compatible server in front of others, with a budget per key.

    POST /v1/chat/completions    POST /v1/completions    GET /v1/models  /health  /metrics

What a policy can improve is answered by it (``policy_answer.py``), all else is handed on as it is
(``passthrough.py``); either way the answer carries what it cost and no key ever spends more than
its budget.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Route

from thrifty.backends.payload import Kind
from thrifty.serving.errors import Refused
from thrifty.serving.event_stream import KEEP_ALIVE, event_of
from thrifty.serving.front_door import (
    Answering,
    App,
    FrontDoor,
    Receive,
    Scope,
    Send,
    bearer,
    read_body,
    send_end,
    send_head,
    send_json,
    while_connected,
)
from thrifty.serving.key_budgets import Account, KeyBudgets
from thrifty.serving.metrics import ServeMetrics
from thrifty.serving.passthrough import Passthrough
from thrifty.serving.policy_answer import Improver, in_events
from thrifty.serving.request_limits import RequestLimits, Wanted, read_request
from thrifty.serving.told import left_headers
from thrifty.serving.upstream import UpstreamClient, UpstreamFailed

ANY_MODEL = "thrifty"
"""The name of whichever model the policy asks."""
_PATHS = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/models": "GET",
    "/health": "GET",
    "/metrics": "GET",
}


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What is served, and to whom."""

    clients: Sequence[UpstreamClient]
    """The first one gets what is handed on, unless another has the model that is asked for."""
    budgets: KeyBudgets
    metrics: ServeMetrics
    limits: RequestLimits
    improver: Improver | None = None
    """None: everything is handed on."""
    hosts: Sequence[str] | None = None
    """That may be asked for; None: any."""
    timeout: float = 600.0
    """Seconds that a request may take in all."""
    keep_alive: float = 5.0
    """Seconds between two signs of life of a stream that has nothing to say yet."""


def app_of(serving: Serving) -> App:
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    endpoints: dict[str, App] = {
        "/v1/chat/completions": _Completions(serving, "chat"),
        "/v1/completions": _Completions(serving, "completions"),
        "/v1/models": _Models(serving),
        "/health": _Health(),
        "/metrics": _Metrics(serving),
    }
    for path, method in _PATHS.items():
        endpoint = Answering(endpoints[path], serving.metrics)
        app.router.routes.append(Route(path, endpoint, methods=[method]))
    app.add_exception_handler(HTTPException, _unknown)
    return FrontDoor(app, serving.hosts, _PATHS, serving.metrics)


async def _unknown(request: Any, error: Any) -> JSONResponse:
    """404 and 405 of the router, in OpenAI's shape."""
    known = ", ".join(f"{method} {path}" for path, method in _PATHS.items())
    refused = Refused(error.status_code, f"there is no such route: {error.detail}", known)
    return JSONResponse(refused.body(), error.status_code, error.headers)


class _Completions:
    """Both kinds."""

    def __init__(self, serving: Serving, kind: Kind) -> None:
        self._serving = serving
        self._kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        serving = self._serving
        account = serving.budgets.find(bearer(scope))
        raw = await read_body(scope, receive, serving.limits)
        wanted = read_request(raw, self._kind, serving.limits)
        del raw
        end = await while_connected(receive, self._in_time(wanted, account, send))
        await end

    async def _in_time(
        self, wanted: Wanted, account: Account, send: Send
    ) -> Coroutine[Any, Any, None]:
        """What is to be sent last."""
        try:
            async with asyncio.timeout(self._serving.timeout):
                return await self._answer(wanted, account, send)
        except UpstreamFailed as failed:
            self._serving.metrics.failures += 1
            raise failed.refused from None
        except TimeoutError:
            raise Refused(504, f"no answer within {self._serving.timeout:g} s") from None

    async def _answer(
        self, wanted: Wanted, account: Account, send: Send
    ) -> Coroutine[Any, Any, None]:
        serving, improver = self._serving, self._serving.improver
        client = self._client(wanted)
        why_not = "no policy was asked for" if improver is None else improver.why_not(wanted)
        if improver is None or why_not is not None:
            passing = Passthrough(
                client,
                wanted,
                account,
                serving.metrics,
                policy="first",
                reason=why_not or "",
            )
            if not wanted.stream:
                answer, told = await passing.whole()
                return send_json(send, 200, answer, told.headers())
            async with aclosing(passing.events()) as events:
                await anext(events)  # until here it can be refused
                await _stream(send, events, "first", account)
        elif wanted.stream:
            async with aclosing(self._sampled(improver, wanted, account)) as events:
                await _stream(send, events, improver.name, account)
        else:
            answer, told = await improver.answer(wanted, account)
            return send_json(send, 200, answer, told.headers())
        return send_end(send)

    def _client(self, wanted: Wanted) -> UpstreamClient:
        """Who has the model that is asked for. Raises Refused where nobody has."""
        clients = self._serving.clients
        for client in clients:
            if client.upstream.model == wanted.model and wanted.model:
                return client
        for client in clients:
            if not client.upstream.model:
                return client
        if wanted.model in ("", ANY_MODEL):
            wanted.body["model"] = clients[0].upstream.model
            return clients[0]
        names = ", ".join(client.upstream.model for client in clients)
        raise Refused(
            404,
            f"the model {wanted.model!r} is not served here",
            f"at hand: {names}",
            code="model_not_found",
            param="model",
        )

    async def _sampled(
        self, improver: Improver, wanted: Wanted, account: Account
    ) -> AsyncGenerator[bytes]:
        """The answer of a policy as a stream, with signs of life until there is one."""
        task = asyncio.ensure_future(improver.answer(wanted, account))
        try:
            yield KEEP_ALIVE
            while not task.done():
                await asyncio.wait((task,), timeout=self._serving.keep_alive)
                if not task.done():
                    yield KEEP_ALIVE
            answer, _ = task.result()
            for event in in_events(answer, usage_asked=wanted.usage_asked):
                yield event
        except Refused as refused:
            yield event_of(refused.body())
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _stream(send: Send, events: AsyncIterator[bytes], policy: str, account: Account) -> None:
    headers = {"x-thrifty-policy": policy, **left_headers(account.left())}
    headers["cache-control"] = "no-cache"
    first = await anext(events, b"")  # goes out with the head, as one packet
    await send_head(send, 200, "text/event-stream; charset=utf-8", headers)
    await send({"type": "http.response.body", "body": first, "more_body": True})
    async for piece in events:
        await send({"type": "http.response.body", "body": piece, "more_body": True})


class _Models:
    """The models that may be asked for."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._serving.budgets.find(bearer(scope))
        data: list[Any] = []
        if self._serving.improver is not None:
            data.append({"id": ANY_MODEL, "object": "model", "created": 0, "owned_by": "thrifty"})
        for client in self._serving.clients:
            if client.upstream.model:
                name = client.upstream.model
                data.append({"id": name, "object": "model", "created": 0, "owned_by": "upstream"})
                continue
            try:
                data += await client.models()
            except UpstreamFailed as failed:
                self._serving.metrics.failures += 1
                raise failed.refused from None
        await send_json(send, 200, {"object": "list", "data": data})


class _Health:
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, 200, {"status": "ok"})


class _Metrics:
    """For those whose key may read all keys' figures; the others get their own."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        serving = self._serving
        account = serving.budgets.find(bearer(scope))
        every = account.client.metrics
        text = serving.metrics.text(serving.budgets.accounts if every else [account])
        await send_head(send, 200, "text/plain; version=0.0.4; charset=utf-8", {})
        await send({"type": "http.response.body", "body": text.encode()})
