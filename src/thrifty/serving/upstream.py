"""A server that answers, as the proxy sees it: where it is, what it costs, how it fails.

Nothing of the client's request goes there but its body, with the upstream's own key; nothing comes
back but the body, with that key blotted out should an error quote it. Redirects are not followed:
a key goes to the host that it was given for and to no other.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpcore2
import orjson

from thrifty.backends.refusals import refusal
from thrifty.backends.secret import Secret
from thrifty.backends.usage import Tariff, Usage
from thrifty.core.budget import Cost
from thrifty.serving.errors import Refused
from thrifty.serving.request_limits import Wanted
from thrifty.serving.upstream_pool import upstream_pool

_CONNECT_SECONDS = 10.0
_MAX_ANSWER_BYTES = 64 * 2**20
_MAX_ERROR_BYTES = 64 * 2**10
_CLIENTS_OWN = frozenset((400, 404, 409, 413, 422, 429))
"""Statuses that are the client's to mend."""
_UNSENT = (
    httpcore2.ConnectError,
    httpcore2.ConnectTimeout,
    httpcore2.PoolTimeout,
    httpcore2.ProxyError,
)
_BROKEN = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException)


@dataclass(frozen=True, kw_only=True)
class Upstream:
    url: str
    """Up to and including ``/v1``, as ``base_url`` has it."""
    model: str = ""
    """The only one that may be asked there; empty: whichever a request names."""
    key: Secret | None = None
    tariff: Tariff = field(default_factory=Tariff)

    def cost(self, usage: Usage, wanted: Wanted) -> Cost:
        return self.tariff.cost(usage, wanted.choices)


class UpstreamFailed(Exception):
    """``begun``: it may have worked on the request nevertheless. ``refused``: what the client is
    told."""

    def __init__(self, refused: Refused, *, begun: bool) -> None:
        super().__init__(str(refused))
        self.refused = refused
        self.begun = begun


class UpstreamClient:
    """Connections to one upstream."""

    def __init__(self, upstream: Upstream, *, timeout: float) -> None:
        self.upstream = upstream
        self.pool = upstream_pool(upstream.url)
        waits = {"connect": _CONNECT_SECONDS, "read": timeout, "write": timeout}
        self.extensions = {"timeout": {**waits, "pool": _CONNECT_SECONDS}}
        self.headers = [
            (b"host", urlsplit(upstream.url).netloc.encode()),
            (b"content-type", b"application/json"),
            (b"accept-encoding", b"identity"),
        ]
        if upstream.key is not None:
            self.headers.append((b"authorization", f"Bearer {upstream.key.reveal()}".encode()))

    async def close(self) -> None:
        await self.pool.aclose()

    async def models(self) -> list[Any]:
        """What it says that it serves. Raises UpstreamFailed."""
        async with Exchange(self, "GET", "/models", None) as exchange:
            answer = await exchange.json()
        data = answer.get("data")
        return data if isinstance(data, list) else []

    def post(self, path: str, content: bytes) -> Exchange:
        return Exchange(self, "POST", path, content)


class Exchange:
    """One request and its answer, to be entered. Entering raises UpstreamFailed where it is no
    200."""

    def __init__(
        self, client: UpstreamClient, method: str, path: str, content: bytes | None
    ) -> None:
        self._client = client
        self._method = method
        self._path = path
        self._content = content
        self._response: httpcore2.Response | None = None

    async def __aenter__(self) -> Self:
        client, content = self._client, self._content
        length = [] if content is None else [(b"content-length", str(len(content)).encode())]
        request = httpcore2.Request(
            self._method,
            client.upstream.url + self._path,
            headers=[*client.headers, *length],
            content=content,
            extensions=client.extensions,
        )
        try:
            self._response = await client.pool.handle_async_request(request)
        except _UNSENT:
            raise _unreachable(begun=False) from None
        except _BROKEN as error:
            raise _broken(error) from None
        if self._response.status != 200:
            try:
                raise await self._failed(self._response)
            finally:
                await self._response.aclose()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._response is not None:
            await self._response.aclose()

    async def pieces(self, most: int | None = None) -> AsyncIterator[bytes]:
        """Bytes as they come. Raises UpstreamFailed."""
        assert self._response is not None
        read = 0
        try:
            async for piece in self._response.aiter_stream():
                read += len(piece)
                if most is not None and read > most:
                    raise UpstreamFailed(
                        Refused(502, "the upstream's answer is too long"), begun=True
                    )
                yield piece
        except _BROKEN as error:
            raise _broken(error) from None

    async def json(self) -> dict[str, Any]:
        """The whole answer. Raises UpstreamFailed."""
        raw = b"".join([piece async for piece in self.pieces(_MAX_ANSWER_BYTES)])
        try:
            answer = orjson.loads(raw)
        except orjson.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            raise UpstreamFailed(
                Refused(502, "the upstream's answer is no JSON object"), begun=True
            )
        return answer

    def scrubbed(self, text: str) -> str:
        """Without the key that the upstream was asked with."""
        key = self._client.upstream.key
        return key.scrub(text) if key else text

    async def _failed(self, response: httpcore2.Response) -> UpstreamFailed:
        status, said = response.status, b""
        try:
            async for piece in self.pieces(_MAX_ERROR_BYTES):
                said += piece
        except UpstreamFailed:
            pass  # the status says enough
        headers = {
            name.decode().lower(): value.decode("latin-1") for name, value in response.headers
        }
        failed = refusal(status, headers, said)
        if status in (401, 402, 403):  # of our key, not of the client's; some quote it
            message = f"the upstream does not take what this proxy asks it with ({status})"
        else:
            message = self.scrubbed(f"the upstream: {failed}")
        told = {"retry-after": f"{math.ceil(failed.told_seconds)}"} if failed.told_seconds else {}
        refused = Refused(status if status in _CLIENTS_OWN else 502, message, headers=told)
        return UpstreamFailed(refused, begun=failed.computed)


def _unreachable(*, begun: bool) -> UpstreamFailed:
    return UpstreamFailed(
        Refused(502, "the upstream cannot be reached", "is it running?"), begun=begun
    )


def _broken(error: Exception) -> UpstreamFailed:
    if isinstance(error, httpcore2.TimeoutException):
        return UpstreamFailed(Refused(504, "the upstream takes too long"), begun=True)
    return UpstreamFailed(
        Refused(502, f"the upstream broke off ({type(error).__name__})", "try again"), begun=True
    )
