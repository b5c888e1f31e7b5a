"""An OpenAI-compatible server on loopback that behaves as a test says: well, badly or not at all.

    with StubServer() as server:                              # answers every request well
    with StubServer([Reply(status=429), Reply()]) as server:  # in turn, the last one ever after
    with StubServer(lambda request: Reply(texts=(request.prompt,))) as server:
        ask(server.url + "/v1/chat/completions")              # GET /v1/models too
        server.requests                                       # as they came in: Received

It speaks HTTP by hand over asyncio in a thread of its own, so that it can lie about lengths, stop
in the middle and reset. A token is a word. As a process of its own, for benches:

    python -m tests.backends.stub_server --words 20 --pace 0.01      prints its URL
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

COUNTED = "counted"
_HEAD_BYTES = 2**20


@dataclass(kw_only=True)
class Received:
    """A request as it came in."""

    method: str
    path: str
    headers: Mapping[str, str]
    """Names in small letters."""
    body: bytes
    at: float
    """time.monotonic()"""
    dropped: bool = False
    """The client left before the reply was whole."""

    @cached_property
    def json(self) -> dict[str, Any]:
        """Of a POST; empty where it has no body."""
        return json.loads(self.body) if self.body else {}

    @property
    def prompt(self) -> str:
        """The contents of all messages, or the prompt."""
        messages = self.json.get("messages")
        if messages is None:
            return self.json.get("prompt", "")
        return " ".join(message["content"] for message in messages)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a request gets. Without a ``body`` it is what the request asks for: a chat completion or
    a text completion, whole or as server-sent events, or the list of models."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    texts: Sequence[str] = ("the answer is 42",)
    """Of the choices, over and over again."""
    choices: int | None = None
    """How many; None: ``n`` of the request."""
    usage: Any = COUNTED
    """COUNTED: the words; None: left out; else as it is."""
    logprob: float | None = None
    """Of every token, where the request asks for them; None: they are not told."""
    finish_reason: str = "stop"
    model: str | None = None
    """That it says it is; None: as asked."""
    body: Any = None
    """Bytes and text go out as they are, anything else as JSON."""
    repeat: int = 1
    """Send ``body`` so many times, as one body."""
    declared_bytes: int | None = None
    """Content-Length, where it is a lie."""
    delay: float = 0.0
    """Seconds before the first byte."""
    pace: float = 0.0
    """Seconds between pieces: events of a stream, else ``piece_bytes`` of a body."""
    piece_bytes: int = 65536
    cut: int | None = None
    """Bytes of the body after which the connection is reset; -1: before any header."""


Script = Sequence[Reply] | Callable[[Received], Reply]


class StubServer:
    """Runs from ``with`` to its end. ``script``: replies in turn, the last one ever after, or a
    function of the request, called in the server's thread. ``GET`` does not take from a sequence
    while ``models`` are told."""

    def __init__(self, script: Script = (Reply(),), *, models: Sequence[str] | None = ("m",)):
        self._script = script
        self._models = models
        self._turn = 0
        self.requests: list[Received] = []
        self.num_open = 0
        """Connections, now."""
        self.most_at_once = 0
        """Requests that were being answered at the same time, at most."""
        self._busy = 0
        self._connections: set[asyncio.Task[None]] = set()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self._thread.start()
        assert self._ready.wait(10), "the stub did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(
            self._connected, "127.0.0.1", self.port, limit=_HEAD_BYTES, backlog=1024
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self.num_open += 1
        try:
            while await self._answered(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.num_open -= 1
            self._connections.discard(task)
            writer.transport.abort()

    async def _answered(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection can serve another."""
        request = await _received(reader)
        self.requests.append(request)
        self._busy += 1
        self.most_at_once = max(self.most_at_once, self._busy)
        try:
            return await _sent(self._reply(request), request, self._models, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            request.dropped = True
            raise
        finally:
            self._busy -= 1

    def _reply(self, request: Received) -> Reply:
        if callable(self._script):
            return self._script(request)
        if request.method == "GET" and self._models is not None:
            return Reply()
        reply = self._script[min(self._turn, len(self._script) - 1)]
        self._turn += 1
        return reply


async def _received(reader: asyncio.StreamReader) -> Received:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Received(method=method, path=path, headers=headers, body=body, at=time.monotonic())


async def _sent(
    reply: Reply,
    request: Received,
    models: Sequence[str] | None,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> bool:
    await _pause(reader, reply.delay)
    if reply.cut == -1:
        return _reset(writer)
    events = reply.body is None and bool(request.json.get("stream"))
    if events:
        pieces, size = iter(_events(reply, request)), None
    else:
        body = _bytes(_whole(reply, request, models) if reply.body is None else reply.body)
        pieces, size = _pieces(body, reply), len(body) * reply.repeat
    writer.write(_head(reply, size))
    sent = 0
    for number, piece in enumerate(pieces):
        await _pause(reader, reply.pace if number else 0.0)
        if reply.cut is not None and sent + len(piece) > reply.cut:
            writer.write(_framed(piece[: reply.cut - sent], events))
            await writer.drain()
            await _pause(reader, 0.01)
            return _reset(writer)
        sent += len(piece)
        writer.write(_framed(piece, events))
        await writer.drain()
    if events:
        writer.write(b"0\r\n\r\n")
    await writer.drain()
    return reply.declared_bytes is None


async def _pause(reader: asyncio.StreamReader, seconds: float) -> None:
    """Raises ConnectionResetError as soon as the client leaves."""
    if seconds <= 0:
        return
    try:
        early = await asyncio.wait_for(reader.read(1), seconds)
    except TimeoutError:
        return
    if not early:
        raise ConnectionResetError
    raise AssertionError("the stub answers one request at a time")


def _reset(writer: asyncio.StreamWriter) -> bool:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False


def _head(reply: Reply, size: int | None) -> bytes:
    if size is None:
        own = {"content-type": "text/event-stream", "transfer-encoding": "chunked"}
    else:
        length = size if reply.declared_bytes is None else reply.declared_bytes
        own = {"content-type": "application/json", "content-length": str(length)}
    lines = [f"{name}: {value}" for name, value in {**own, **reply.headers}.items()]
    return "\r\n".join([f"HTTP/1.1 {reply.status} Stub", *lines, "", ""]).encode()


def _framed(piece: bytes, chunked: bool) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece) if chunked and piece else piece


def _bytes(body: Any) -> bytes:
    if isinstance(body, bytes):
        return body
    return (body if isinstance(body, str) else json.dumps(body)).encode()


def _pieces(body: bytes, reply: Reply) -> Iterator[bytes]:
    for _ in range(reply.repeat):
        for start in range(0, len(body), reply.piece_bytes):
            yield body[start : start + reply.piece_bytes]


def _texts(reply: Reply, request: Received) -> list[str]:
    count = request.json.get("n", 1) if reply.choices is None else reply.choices
    return [reply.texts[number % len(reply.texts)] for number in range(count)]


def _usage(reply: Reply, request: Received) -> Any:
    if reply.usage != COUNTED:
        return reply.usage
    prompt = len(request.prompt.split())
    generated = sum(len(text.split()) for text in _texts(reply, request))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }


def _top(reply: Reply, request: Received, kind: str) -> dict[str, Any]:
    model = request.json.get("model", "m") if reply.model is None else reply.model
    return {"id": "stub-1", "object": kind, "created": 0, "model": model}


def _whole(reply: Reply, request: Received, models: Sequence[str] | None) -> dict[str, Any]:
    if reply.status >= 400:
        return {"error": {"message": f"the stub says {reply.status}", "type": "stub"}}
    if request.method == "GET":
        data = [{"id": name, "object": "model"} for name in models or ()]
        return {"object": "list", "data": data}
    chat = "messages" in request.json
    choices = [
        _choice(reply, request, number, text, chat)
        for number, text in enumerate(_texts(reply, request))
    ]
    answer = _top(reply, request, "chat.completion" if chat else "text_completion")
    answer["choices"] = choices
    usage = _usage(reply, request)
    return answer if usage is None else {**answer, "usage": usage}


def _choice(reply: Reply, request: Received, number: int, text: str, chat: bool) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": number, "finish_reason": reply.finish_reason}
    if chat:
        choice["message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    if reply.logprob is not None and request.json.get("logprobs"):
        words = text.split()
        if chat:
            tokens = [{"token": word, "logprob": reply.logprob} for word in words]
            choice["logprobs"] = {"content": tokens}
        else:
            choice["logprobs"] = {"token_logprobs": [reply.logprob] * len(words)}
    return choice


def _events(reply: Reply, request: Received) -> Iterator[bytes]:
    """A word an event, the choices in turn; usage in the end where it was asked for."""
    chat = "messages" in request.json
    top = _top(reply, request, "chat.completion.chunk" if chat else "text_completion")

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return f"data: {json.dumps({**top, 'choices': choices, **more})}\n\n".encode()

    def piece(number: int, text: str, reason: str | None = None) -> dict[str, Any]:
        said = {"delta": {"content": text} if text else {}} if chat else {"text": text}
        return {"index": number, **said, "finish_reason": reason}

    texts = _texts(reply, request)
    for number, text in enumerate(texts):
        for place, word in enumerate(text.split()):
            yield event([piece(number, f" {word}" if place else word)])
    yield event([piece(number, "", reply.finish_reason) for number in range(len(texts))])
    wanted = (request.json.get("stream_options") or {}).get("include_usage")
    if wanted and (usage := _usage(reply, request)) is not None:
        yield event([], usage=usage)
    yield b"data: [DONE]\n\n"


def main() -> None:
    options = argparse.ArgumentParser(description="A server that answers with so many words.")
    options.add_argument("--port", type=int, default=0)
    options.add_argument("--words", type=int, default=4)
    options.add_argument("--delay", type=float, default=0.0, help="seconds before the first byte")
    options.add_argument("--pace", type=float, default=0.0, help="seconds between words")
    given = options.parse_args()
    reply = Reply(texts=(" ".join(["word"] * given.words),), delay=given.delay, pace=given.pace)
    server = StubServer([reply])
    server.port = given.port
    with server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
