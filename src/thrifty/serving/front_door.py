"""What every request passes first: its host, its origin, its size; and how it is told no.

A page in a browser can send requests to this machine, and a name that it controls can be made to
point here (DNS rebinding). So on loopback the Host must be one of this machine's, and so must the
Origin, where a browser sends one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

import orjson

from thrifty.serving.errors import Refused
from thrifty.serving.event_stream import event_of
from thrifty.serving.metrics import ServeMetrics
from thrifty.serving.request_limits import RequestLimits, too_large

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
T = TypeVar("T")

LOOPBACK = ("localhost", "127.0.0.1", "::1")
BODY_SECONDS = 60.0
"""That a body may take to arrive."""

_log = logging.getLogger("thrifty.serve")


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class FrontDoor:
    """Around the app. ``hosts``: those that may be asked for; None: any."""

    def __init__(
        self, app: App, hosts: Iterable[str] | None, routes: Iterable[str], metrics: ServeMetrics
    ) -> None:
        self._app = app
        self._hosts = None if hosts is None else frozenset(hosts)
        self._routes = frozenset(routes)
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "neither WebSockets nor a lifespan are served"
        began, status = time.monotonic(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.in_flight += 1
        try:
            self._check(scope)
            await self._app(scope, receive, noting)
        except Refused as refused:
            await send_refused(noting, refused)
        finally:
            self._metrics.in_flight -= 1
            route = scope["path"] if scope["path"] in self._routes else "other"
            # nginx's number for a client that did not wait
            self._metrics.ended(route, status or 499, time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        """Raises Refused."""
        if self._hosts is None:
            return
        if host_of(f"//{header(scope, b'host')}") not in self._hosts:
            raise Refused(
                421, "this host is not served here", "ask localhost, or start with --allow-host"
            )
        origin = header(scope, b"origin")
        if origin and host_of(origin) not in self._hosts:
            raise Refused(403, "pages of this origin are not served", "start with --allow-host")


class Answering:
    """Around what answers a route: what it refuses is told in OpenAI's shape, and so is a fault."""

    def __init__(self, answer: App, metrics: ServeMetrics) -> None:
        self._answer = answer
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = False

        async def noting(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await self._answer(scope, receive, noting)
            return
        except ClientLeft:
            self._metrics.left += 1
            return
        except Refused as error:
            refused = error
        except Exception:
            _log.exception("a fault in thrifty")
            refused = Refused(500, "a fault in thrifty", "its log tells more")
        if began:  # only a stream can be in its middle
            last = {"type": "http.response.body", "body": event_of(refused.body())}
            await send(last)
        else:
            await send_refused(send, refused)


def host_of(url: str) -> str | None:
    """Without the port, in small letters; None where there is none, or more than that."""
    try:
        return None if "@" in url else urlsplit(url).hostname
    except ValueError:
        return None


def header(scope: Scope, name: bytes) -> str:
    """Its value, empty where it is missing or stands there twice."""
    values = [value for key, value in scope["headers"] if key == name]
    return values[0].decode("latin-1") if len(values) == 1 else ""


def bearer(scope: Scope) -> str | None:
    """The key that was presented."""
    kind, _, key = header(scope, b"authorization").partition(" ")
    return key.strip() or None if kind.lower() == "bearer" else None


async def read_body(scope: Scope, receive: Receive, limits: RequestLimits) -> bytes:
    """Never more of it than may be. Raises Refused and ClientLeft."""
    length = header(scope, b"content-length")
    if length.isdigit() and (len(length) > 18 or int(length) > limits.max_body_bytes):
        raise too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                body += message.get("body", b"")
                if len(body) > limits.max_body_bytes:
                    raise too_large(limits)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns, which must not end the response itself. Where the client leaves
    before, it is cancelled, has ended, and ClientLeft is raised."""
    task, left = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except BaseException:
        if not left:
            raise
        with suppress(asyncio.CancelledError):  # it may have ended before that reached it
            await asyncio.sleep(0)
        if task.uncancel():  # by others too
            raise
        raise ClientLeft from None
    finally:
        watching.cancel()


async def send_json(
    send: Send, status: int, value: Any, headers: dict[str, str] | None = None
) -> None:
    body = orjson.dumps(value)
    more = {**(headers or {}), "content-length": str(len(body))}
    await send_head(send, status, "application/json", more)
    await send({"type": "http.response.body", "body": body})


async def send_refused(send: Send, refused: Refused) -> None:
    await send_json(send, refused.status, refused.body(), refused.headers)


async def send_end(send: Send) -> None:
    """Of a stream."""
    await send({"type": "http.response.body", "body": b""})


async def send_head(send: Send, status: int, kind: str, headers: dict[str, str]) -> None:
    fields = {"content-type": kind, "x-content-type-options": "nosniff", **headers}
    pairs = [(name.encode(), value.encode("latin-1", "replace")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
