"""Connections without TLS: what came in order, held up where nobody reads, and every way to end."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpcore2
import pytest

from thrifty.serving.plain_stream import _FULL_BYTES, PlainBackend, PlainStream
from thrifty.serving.upstream_pool import upstream_pool

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[int]:
    """Its port."""
    writers: list[asyncio.StreamWriter] = []

    async def each(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            await answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.close()

    server = await asyncio.start_server(each, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


@asynccontextmanager
async def connected(answer: Answer) -> AsyncIterator[PlainStream]:
    async with serving(answer) as port:
        stream = await PlainBackend().connect_tcp("127.0.0.1", port, timeout=5)
        assert isinstance(stream, PlainStream)
        try:
            yield stream
        finally:
            await stream.aclose()


def run(work: Awaitable[Any]) -> Any:
    async def in_time() -> Any:
        return await asyncio.wait_for(work, 30)

    return asyncio.run(in_time())


def test_writes_go_out_as_one_when_something_is_read():
    seen = []

    async def answer(reader, writer):
        seen.append(await reader.read(1000))
        writer.write(b"well")

    async def work():
        async with connected(answer) as stream:
            await stream.write(b"head ")
            await stream.write(b"body")
            await asyncio.sleep(0.05)
            assert not seen
            assert await stream.read(2) == b"we"
            assert await stream.read(100) == b"ll"
            assert seen == [b"head body"]

    run(work())


def test_much_that_nobody_reads_is_held_up_and_comes_whole():
    text = bytes(range(256)) * 2**16  # 16 MiB

    async def answer(reader, writer):
        writer.write(text)
        await writer.drain()
        writer.close()

    async def work():
        async with connected(answer) as stream:
            first = await stream.read(1)
            await asyncio.sleep(0.3)
            held = len(stream._link.unread)
            assert _FULL_BYTES - 2**18 < held <= _FULL_BYTES + 2**18  # a socket's piece more
            pieces = [first]
            while piece := await stream.read(2**16):
                pieces.append(piece)
            assert b"".join(pieces) == text

    run(work())


def test_much_that_is_written_waits_until_it_is_taken():
    body = b"x" * 2**24
    took = []

    async def answer(reader, writer):
        await asyncio.sleep(0.2)
        took.append(len(await reader.readexactly(len(body))))
        writer.write(b"done")

    async def work():
        async with connected(answer) as stream:
            await stream.write(body)
            assert await stream.read(10, timeout=10) == b"done"
            assert took == [len(body)]

    run(work())


def test_an_answer_that_comes_before_the_body_is_taken_is_read():
    async def answer(reader, writer):
        await reader.read(10)
        writer.write(b"too large")
        await asyncio.sleep(30)

    async def work():
        async with connected(answer) as stream:
            await stream.write(b"x" * 2**24)
            began = time.monotonic()
            assert await stream.read(100, timeout=20) == b"too large"
            assert time.monotonic() - began < 10

    run(work())


def test_time_outs_are_told_apart():
    async def silent(reader, writer):
        await asyncio.sleep(30)

    async def work():
        async with connected(silent) as stream:
            with pytest.raises(httpcore2.ReadTimeout):
                await stream.read(1, timeout=0.1)
            await stream.write(b"x" * 2**24)
            with pytest.raises(httpcore2.WriteTimeout):
                await stream.read(1, timeout=0.3)
            assert not stream._link._waiting

    run(work())


def test_a_read_that_is_given_up_leaves_nothing_behind():
    async def late(reader, writer):
        await reader.read(1)
        writer.write(b"late")

    async def work():
        async with connected(late) as stream:
            reading = asyncio.create_task(stream.read(1))
            await asyncio.sleep(0.05)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            assert not stream._link._waiting
            await stream.write(b"x")
            assert await stream.read(10) == b"late"

    run(work())


def test_the_end_and_a_reset():
    async def ends(reader, writer):
        writer.write(b"bye")
        writer.close()

    async def resets(reader, writer):
        raw = writer.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async def work():
        async with connected(ends) as stream:
            assert await stream.read(10) == b"bye"
            assert await stream.read(10) == b""
        async with connected(resets) as stream:
            with pytest.raises(httpcore2.ReadError):
                await stream.read(10)
            await stream.write(b"more")
            with pytest.raises(httpcore2.WriteError):
                await stream.read(10)

    run(work())


def test_nobody_listens():
    async def work():
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and listens not
            with pytest.raises(httpcore2.ConnectError):
                await PlainBackend().connect_tcp("127.0.0.1", taken.getsockname()[1], timeout=5)
        with pytest.raises(httpcore2.ConnectError):
            await PlainBackend().connect_tcp("no-such-host.invalid", 80, timeout=20)

    run(work())


@pytest.mark.parametrize(
    "says", [b"", b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n"]
)
def test_a_connection_that_the_server_let_go_of_is_not_used_again(says):
    """Whatever it said as it did."""
    num_connections = 0

    async def answer(reader, writer):
        nonlocal num_connections
        num_connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await asyncio.sleep(0.05)
        writer.write(says)
        writer.close()

    async def work():
        async with serving(answer) as port, upstream_pool(f"http://127.0.0.1:{port}/v1") as pool:
            for number in range(1, 4):
                response = await pool.request("GET", f"http://127.0.0.1:{port}/v1/models")
                assert (response.status, response.content) == (200, b"ok")
                assert num_connections == number
                await asyncio.sleep(0.2)

    run(work())


def test_a_connection_that_is_kept_is_used_again():
    num_connections = 0

    async def answer(reader, writer):
        nonlocal num_connections
        num_connections += 1
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK)

    async def work():
        async with serving(answer) as port, upstream_pool(f"http://127.0.0.1:{port}/v1") as pool:
            for _ in range(5):
                assert (await pool.request("GET", f"http://127.0.0.1:{port}/")).status == 200
            assert num_connections == 1

    run(work())
