"""Connections that cannot be piled up: so many at a time, and each must ask for something soon.

uvicorn's own ``limit_concurrency`` answers 503 to a request too many, but keeps a connection that
never asks for anything; ten thousand of those would use up all file descriptors.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 15.0
"""Until the first request's head must be there."""


class Gathering(asyncio.Transport):
    """What is written in one turn of the loop goes out at once: a head and its body are one
    packet and one system call, which under load is most of what an answer costs."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._pieces: list[bytes] = []

    def write(self, data: Any) -> None:
        if not self._pieces:
            self._loop.call_soon(self._flush)
        self._pieces.append(data)

    def _flush(self) -> None:
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            self._transport.write(b"".join(pieces))

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        self._pieces.clear()
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)


def bounded(most: int) -> type[H11Protocol]:
    """A protocol for uvicorn: connections past ``most`` are closed at once."""

    class Bounded(H11Protocol):
        _waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(Gathering(transport, self.loop))
            if len(self.connections) > most:
                transport.abort()
                return
            self._waiting = self.loop.call_later(HEAD_SECONDS, self._too_slow)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
            super().connection_lost(exc)

        def _too_slow(self) -> None:
            if self.cycle is None:  # no request yet
                self.transport.abort()

    return Bounded


def settings(most: int) -> dict[str, Any]:
    """For ``uvicorn.Config``."""
    return {
        "http": bounded(most),
        "ws": "none",
        "lifespan": "off",
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "date_header": False,
        "proxy_headers": False,
        "timeout_keep_alive": 30,
        "timeout_graceful_shutdown": 10,
        "backlog": 1024,
        "h11_max_incomplete_event_size": 32 * 1024,
    }
