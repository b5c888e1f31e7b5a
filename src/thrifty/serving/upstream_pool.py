"""Connections to an upstream: httpcore2, which lies below httpx2, without what a client adds.

That client looks at cookies, redirects, schemes of authentication and events that nothing here has:
1.3 ms a request where this took 0.8 (bench/serving.py's stub, one core). A request goes out as one
packet, its head and its body together.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore2
import httpx2

from thrifty.backends.connections import is_here
from thrifty.serving.plain_stream import PlainBackend

_LET_GO_SECONDS = 2.0
"""Of a connection that nothing asks on: before a server would, which would look like a failure."""
_MAX_IDLE = 1024


def upstream_pool(url: str) -> httpcore2.AsyncConnectionPool:
    """To ``url``: through a proxy of the environment's, except to this machine."""
    settings: dict[str, Any] = {
        "max_connections": None,
        "max_keepalive_connections": _MAX_IDLE,
        "keepalive_expiry": _LET_GO_SECONDS,
    }
    parts = urlsplit(url)
    if parts.scheme == "https":
        settings["ssl_context"] = httpx2.create_ssl_context()
    proxy = None if is_here(url) or proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)
    tls = parts.scheme == "https" or (proxy or "").startswith("https://")
    settings["network_backend"] = _Gathering() if tls else PlainBackend()
    if not proxy:
        return httpcore2.AsyncConnectionPool(**settings)
    at = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    auth = None
    if at.username is not None:
        auth = (unquote(at.username), unquote(at.password or ""))
    where = httpcore2.URL(
        scheme=at.scheme.encode(), host=(at.hostname or "").encode(), port=at.port, target=b"/"
    )
    return httpcore2.AsyncHTTPProxy(where, proxy_auth=auth, **settings)


class _Gathering(httpcore2.AsyncNetworkBackend):
    """anyio's connections, each with its writes gathered: where there is TLS."""

    def __init__(self) -> None:
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        return _Stream(
            await self._inner.connect_tcp(host, port, timeout, local_address, socket_options)
        )

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


class _Stream(httpcore2.AsyncNetworkStream):
    """What is written goes out when something is to be read, which is when all of it is there."""

    def __init__(self, inner: httpcore2.AsyncNetworkStream) -> None:
        self._inner = inner
        self._pieces: list[bytes] = []

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._pieces.append(buffer)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        await self._flush(timeout)
        return await self._inner.read(max_bytes, timeout)

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        await self._flush(timeout)
        return _Stream(await self._inner.start_tls(ssl_context, server_hostname, timeout))

    async def aclose(self) -> None:
        await self._inner.aclose()

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)

    async def _flush(self, timeout: float | None) -> None:
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            await self._inner.write(b"".join(pieces), timeout)
