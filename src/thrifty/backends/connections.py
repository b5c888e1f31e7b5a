"""Requests to one server over HTTP, each bounded in bytes and in time.

No redirect is followed and no cookie is kept. Proxies of the environment are used, except for a
server on this machine.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import ssl
from contextlib import suppress
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from urllib.parse import urlsplit

import httpx2

from thrifty.backends.refusals import refusal
from thrifty.backends.retries import AttemptFailed
from thrifty.backends.secret import Secret

_UNSENT = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.ProxyError,
    httpx2.WriteError,
    httpx2.WriteTimeout,
)
"""Nothing that could be answered reached the server."""
_SPACE = re.compile(r"\s")
_IDLE_SECONDS = 2.0
"""After which a connection is closed, before a server does (many after 5 s), which looks like one
that broke."""
_REFUSAL_BYTES = 65536
_REFUSAL_SECONDS = 5.0
"""That are read of a reply which is none, and for how long."""


def base_url(url: str) -> str:
    """Where ``/chat/completions`` and the like are, of what users give: a server's address, or any
    of its URLs. Raises ValueError."""
    try:
        parts = urlsplit(url.strip())
        host, port, userinfo = parts.hostname, parts.port, "@" in parts.netloc
        httpx2.URL(url.strip())
    except (ValueError, httpx2.InvalidURL):
        host = None
    if not host or port == 0 or parts.scheme not in ("http", "https") or _SPACE.search(host):
        raise ValueError(
            "the endpoint's URL cannot be read\nhint: it looks like http://localhost:8000/v1"
        )
    if userinfo or parts.query or parts.fragment:
        raise ValueError(
            f"the endpoint's URL on {host} has a user, a query or a fragment, and should not\n"
            "hint: a key comes from an environment variable, other settings from fields"
        )
    path = parts.path.rstrip("/")
    for end in ("/chat/completions", "/completions", "/models"):
        path = path.removesuffix(end)
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def is_here(url: str) -> bool:
    """Whether it is on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def no_cookies() -> CookieJar:
    """A jar that takes none: what one request was told is nothing to the next."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=()))


@cache
def _certificates(environment: bool) -> ssl.SSLContext:
    """Of authorities that are trusted; reading them takes a while."""
    return httpx2.create_ssl_context(trust_env=environment)


class Connections:
    """Of one event loop: ``most`` questions at a time, and another for what is no question."""

    def __init__(self, base: str, key: Secret | None, most: int, connect_seconds: float) -> None:
        self._base = base
        self._key = key
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key.reveal()}"
        environment = not is_here(base)
        self._client = httpx2.AsyncClient(
            headers=headers,
            follow_redirects=False,
            trust_env=environment,
            verify=_certificates(environment),
            cookies=no_cookies(),
            timeout=httpx2.Timeout(None, connect=connect_seconds),  # the deadline has the rest
            limits=httpx2.Limits(
                max_connections=most + 1,
                max_keepalive_connections=most,
                keepalive_expiry=_IDLE_SECONDS,
            ),
        )

    async def send(
        self, method: str, path: str, content: bytes | None, seconds: float, max_bytes: int
    ) -> bytes:
        """The body of the reply. Raises AttemptFailed, whatever happens."""
        try:
            async with asyncio.timeout(seconds):
                return await self._sent(method, path, content, max_bytes)
        except AttemptFailed:
            raise
        except TimeoutError:
            raise AttemptFailed(
                f"it did not answer within {seconds:.4g} s",
                "a longer time-out, fewer tokens an answer or fewer requests at a time may help",
                again=True,
                computed=True,
            ) from None
        except _UNSENT as error:
            raise AttemptFailed(
                f"it cannot be reached: {_told(error)}",
                "is the server running, and is the URL right?",
                again=True,
                unreached=True,
            ) from None
        except httpx2.DecodingError as error:
            raise AttemptFailed(
                f"its reply cannot be unpacked: {_told(error)}", computed=True
            ) from None
        except httpx2.TransportError as error:
            raise AttemptFailed(
                f"it broke off: {_told(error)}",
                "did the server stop or restart? its log tells",
                again=True,
                computed=True,
            ) from None
        except Exception as error:  # none of a broken server's ways may end a run
            raise AttemptFailed(f"asking it failed: {_told(error)}", computed=True) from None

    async def _sent(self, method: str, path: str, content: bytes | None, max_bytes: int) -> bytes:
        headers = {} if content is None else {"Content-Type": "application/json"}
        async with self._client.stream(
            method, f"{self._base}{path}", content=content, headers=headers
        ) as response:
            if response.is_success:
                return await _read(response, max_bytes)
            body = b""
            # The status says enough, should the rest not come.
            with suppress(httpx2.HTTPError, TimeoutError):
                async with asyncio.timeout(_REFUSAL_SECONDS):
                    body = await _read(response, _REFUSAL_BYTES, whole=False)
            raise refusal(response.status_code, response.headers, body)

    async def close(self) -> None:
        await self._client.aclose()


async def _read(response: httpx2.Response, max_bytes: int, *, whole: bool = True) -> bytes:
    """At most ``max_bytes``; where there are more, those, or AttemptFailed if ``whole``."""
    body = bytearray()
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > max_bytes:
            if not whole:
                break
            raise AttemptFailed(
                f"its reply has more than {max_bytes:,} bytes, which no answer needs",
                "is it the right URL? else raise max_response_bytes",
                computed=True,
            )
    return bytes(body[:max_bytes])


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
