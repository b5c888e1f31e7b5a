"""A connection without TLS, straight on asyncio's transport: what lies between httpcore2 and an
upstream on this machine or this network, where a request takes so little that anyio's streams,
their scopes and system calls would be a good part of it.

What is written is gathered and goes out when something is to be read, which is when all of it is
there: a head and its body are one packet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import httpcore2

_FULL_BYTES = 2**18
"""Unread, at which no more is taken from the socket."""
_SECOND_ADDRESS_SECONDS = 0.25
"""Until another address of the same name is tried beside the first."""


class PlainBackend(httpcore2.AsyncNetworkBackend):
    """Makes them."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                transport, link = await loop.create_connection(
                    _Link,
                    host,
                    port,
                    local_addr=None if local_address is None else (local_address, 0),
                    happy_eyeballs_delay=_SECOND_ADDRESS_SECONDS,
                )
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpcore2.ConnectError(str(error)) from error
        for option in socket_options or ():
            transport.get_extra_info("socket").setsockopt(*option)
        return PlainStream(transport, link)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _Link(asyncio.Protocol):
    """What came and was not read yet. One reader, one writer."""

    def __init__(self) -> None:
        self.unread = bytearray()
        self.ended = False
        """Nothing more will come."""
        self.lost: Exception | None = None
        self._transport: asyncio.Transport | None = None
        self._full = False
        self._held_up = False
        self._waiting: list[asyncio.Future[None]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.unread += data
        if len(self.unread) > _FULL_BYTES and self._transport is not None and not self._full:
            self._full = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        self.ended = True
        self._wake()
        return True  # whoever reads closes it

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended, self._held_up = True, False
        self.lost = exc
        self._wake()

    def pause_writing(self) -> None:
        self._held_up = True

    def resume_writing(self) -> None:
        self._held_up = False
        self._wake()

    async def readable(self, timeout: float | None) -> None:
        """Until something came, or ended."""
        while not self.unread and not self.ended:
            await self._woken(timeout)

    async def writable(self, timeout: float | None) -> None:
        """Until what was written went out, or is answered without."""
        while self._held_up and not self.unread and not self.ended:
            await self._woken(timeout)

    def take(self, most: int) -> bytes:
        data = bytes(self.unread[:most])
        del self.unread[:most]
        if self._full and len(self.unread) < _FULL_BYTES and self._transport is not None:
            self._full = False
            self._transport.resume_reading()
        return data

    async def _woken(self, timeout: float | None) -> None:
        """When something changed. Raises TimeoutError."""
        loop = asyncio.get_running_loop()
        change = loop.create_future()
        self._waiting.append(change)
        timer = None if timeout is None else loop.call_later(timeout, _too_late, change)
        try:
            await change
        finally:
            if timer is not None:
                timer.cancel()
            self._waiting.remove(change)

    def _wake(self) -> None:
        for change in self._waiting:
            if not change.done():
                change.set_result(None)


def _too_late(change: asyncio.Future[None]) -> None:
    if not change.done():
        change.set_exception(TimeoutError())


class PlainStream(httpcore2.AsyncNetworkStream):
    """One connection."""

    def __init__(self, transport: asyncio.Transport, link: _Link) -> None:
        self._transport, self._link = transport, link
        self._unsent: list[bytes] = []

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._unsent.append(buffer)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        link = self._link
        await self._flush(timeout)
        try:
            await link.readable(timeout)
        except TimeoutError as error:
            raise httpcore2.ReadTimeout(str(error)) from error
        if not link.unread and (link.lost is not None or self._transport.is_closing()):
            raise httpcore2.ReadError(str(link.lost or "closed"))
        return link.take(max_bytes)

    async def aclose(self) -> None:
        self._transport.abort()  # what nobody took will not be taken

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":  # of one that waits for its next request: it was closed
            return bool(self._link.unread) or self._link.ended
        names = {"client_addr": "sockname", "server_addr": "peername", "socket": "socket"}
        return self._transport.get_extra_info(names[info]) if info in names else None

    async def _flush(self, timeout: float | None) -> None:
        if not self._unsent:
            return
        pieces, self._unsent = self._unsent, []
        if self._link.lost is not None or self._transport.is_closing():
            raise httpcore2.WriteError(str(self._link.lost or "closed"))
        self._transport.write(b"".join(pieces))
        try:
            await self._link.writable(timeout)
        except TimeoutError as error:
            raise httpcore2.WriteTimeout(str(error)) from error
