"""What the proxy costs and holds, against a stub upstream on loopback.

    python bench/serving.py [--pairs 1000] [--streams 200] [--requests 20000] [--clients 64]

The stub and the proxy are processes of their own; whoever asks is a third one. A request asked of
the stub and the same one asked of the proxy take turns, so that what else runs on the machine meets
both alike; what the proxy adds is the difference within a pair. 0 leaves a part out.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx2
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.backends.stub_server import Received, Reply, StubServer

from material import heading
from thrifty import display
from thrifty.core.ledger import Ledger

KEY = "a key that nobody guesses"
ASKED = {"model": "m", "messages": [{"role": "user", "content": "What is 6 x 7?"}]}
PATH = "/v1/chat/completions"
WORDS = 20


@contextmanager
def process(command: Sequence[str], ready: str) -> Iterator[tuple[str, psutil.Process]]:
    """Its URL, from the line in which it tells it."""
    started = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "THRIFTY_KEY": KEY},
        cwd=Path(__file__).resolve().parents[1],
    )
    try:
        assert started.stdout is not None
        said, found = "", None
        while found is None:
            line = started.stdout.readline()
            said += line
            assert line, f"it ended before it was ready: {said}"
            found = re.search(ready, line)
        yield found[1], psutil.Process(started.pid)
    finally:
        started.terminate()
        started.communicate(timeout=60)


@contextmanager
def stub(pace: float = 0.0) -> Iterator[str]:
    command = ["-m", "tests.backends.stub_server", "--words", str(WORDS), "--pace", str(pace)]
    with process(command, r"(http://\S+)") as (url, _):
        yield url


@contextmanager
def proxy(upstream: str, ledger: Path, *more: str) -> Iterator[tuple[str, psutil.Process]]:
    command = ["-m", "thrifty", "serve", "--upstream", upstream, "--port", "0"]
    command += ["--model", "m", "--price", "1,2", "--ledger", str(ledger), *more]
    with process(command, r"serving (http://\S+)/v1") as (url, running):
        until_healthy(url)
        yield url, running


def until_healthy(url: str) -> None:
    with httpx2.Client(base_url=url) as http:
        for _ in range(200):
            try:
                http.get("/health")
                return
            except httpx2.TransportError:
                time.sleep(0.05)


@asynccontextmanager
async def asking(url: str, most: int) -> AsyncIterator[httpx2.AsyncClient]:
    limits = httpx2.Limits(max_connections=most, max_keepalive_connections=most)
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx2.AsyncClient(
        base_url=url, headers=headers, limits=limits, timeout=120.0
    ) as http:
        yield http


async def timed(http: httpx2.AsyncClient, stream: bool) -> tuple[float, float]:
    """Seconds to the first byte of the body and to the last."""
    began = time.perf_counter()
    first = 0.0
    async with http.stream("POST", PATH, json={**ASKED, "stream": stream}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for _ in answer.aiter_raw():
            first = first or time.perf_counter() - began
    return first, time.perf_counter() - began


async def added(direct: str, through: str, stream: bool, pairs: int) -> list[tuple[str, ...]]:
    """Rows of the table: what a request takes, and what the proxy adds."""
    kinds = [("first word", 0), ("whole stream", 1)] if stream else [("whole answer", 1)]
    rows = []
    async with asking(direct, 1) as one, asking(through, 1) as other:
        for _ in range(20):
            await timed(one, stream)
            await timed(other, stream)
        took = [(await timed(one, stream), await timed(other, stream)) for _ in range(pairs)]
    for name, place in kinds:
        plain = [1e3 * pair[0][place] for pair in took]
        proxied = [1e3 * pair[1][place] for pair in took]
        more = [b - a for a, b in zip(plain, proxied, strict=True)]
        columns = [statistics.median(plain), statistics.median(proxied)]
        columns += [statistics.median(more), at(more, 0.95), at(more, 0.99)]
        rows.append((f"{name}, {pairs} pairs", *(f"{value:.2f}" for value in columns)))
    return rows


def at(values: Sequence[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]


async def streams(url: str, count: int) -> tuple[list[float], list[float]]:
    """Of so many at once: seconds to their ends, and the longest silence within each."""
    ends, gaps = [], []

    async def one(http: httpx2.AsyncClient) -> None:
        began = last = time.perf_counter()
        gap, said = 0.0, b""
        async with http.stream("POST", PATH, json={**ASKED, "stream": True}) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for piece in answer.aiter_raw():
                now = time.perf_counter()
                gap, last = max(gap, now - last) if said else 0.0, now
                said += piece
        assert said.endswith(b"data: [DONE]\n\n"), said[-300:]
        ends.append(time.perf_counter() - began)
        gaps.append(gap)

    async with asking(url, count) as http:
        await asyncio.gather(*(one(http) for _ in range(count)))
    return ends, gaps


async def many(url: str, count: int, at_once: int) -> None:
    """So many requests, every other one a stream."""
    left = iter(range(count))
    async with asking(url, at_once) as http:

        async def client() -> None:
            for number in left:
                await timed(http, bool(number % 2))

        await asyncio.gather(*(client() for _ in range(at_once)))


async def budgets(clients: int, each: int, tokens: int, folder: Path) -> str:
    """All of them on one key, with a budget for some of what they ask."""

    def says(request: Received) -> Reply:
        return Reply(texts=(" ".join(["word"] * (1 + request.json["seed"] % 60)),), delay=0.005)

    statuses: list[int] = []
    with (
        StubServer(says) as upstream,
        proxy(upstream.url, folder, "--tokens", str(tokens), "--max-tokens", "64") as (url, _),
    ):
        async with asking(url, clients) as http:

            async def client(number: int) -> None:
                drawn = random.Random(number)
                for _ in range(each):
                    more = {"seed": drawn.randint(0, 10**6), "stream": drawn.random() < 0.5}
                    statuses.append((await http.post(PATH, json={**ASKED, **more})).status_code)

            await asyncio.gather(*map(client, range(clients)))
        took = sum(
            len(request.prompt.split()) + 1 + request.json["seed"] % 60
            for request in upstream.requests
        )
    with Ledger(folder / "ledger.sqlite", read_only=True) as journal:
        booked = journal.spent(account="key one").tokens
    counts = ", ".join(f"{statuses.count(code)} x {code}" for code in sorted(set(statuses)))
    return (
        f"{clients} clients on one key, {len(statuses)} requests ({counts}): budget {tokens:,} "
        f"tokens, computed {took:,}, booked {booked:,.0f}, overspent {max(took - tokens, 0):,}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=64)
    given = parser.parse_args()
    versions = ", ".join(f"{name} {_version(name)}" for name in ("fastapi", "uvicorn", "httpx2"))
    print(f"{heading('serving')}, {versions}; load {os.getloadavg()[0]:.1f} of {os.cpu_count()}\n")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if given.pairs:
            _added(folder, given.pairs)
        if given.requests:
            with stub() as direct, proxy(direct, folder / "m", "--tokens", "1B") as (url, running):
                _memory(url, running, given.requests)
        if given.streams:
            with stub(0.1) as direct, proxy(direct, folder / "b") as (url, running):
                _streams(direct, url, running, given.streams)
        if given.clients:
            print(asyncio.run(budgets(given.clients, 20, 20_000, folder / "c")), flush=True)


def _added(folder: Path, pairs: int) -> None:
    """Answers that are there at once, and streams of a word every 10 ms: one whose words are all
    there at once would have the stub, the proxy and the client fight for two cores."""
    rows = []
    for stream, pace, count in ((False, 0.0, pairs), (True, 0.01, max(pairs // 4, 1))):
        place = folder / f"added-{stream}"
        with stub(pace) as direct, proxy(direct, place, "--tokens", "1B") as (url, _):
            rows += asyncio.run(added(direct, url, stream, count))
    headers = ("milliseconds", "direct", "proxied", "added", "added p95", "added p99")
    print(display.table(headers, rows, right=" rrrrr") + "\n", flush=True)


def _memory(url: str, running: psutil.Process, requests: int) -> None:
    asyncio.run(many(url, requests // 20, 16))
    levels = [running.memory_info().rss / 2**20]
    began, cpu = time.perf_counter(), sum(running.cpu_times()[:2])
    for _ in range(4):
        asyncio.run(many(url, requests // 4, 16))
        levels.append(running.memory_info().rss / 2**20)
    seconds, cpu = time.perf_counter() - began, sum(running.cpu_times()[:2]) - cpu
    shown = " ".join(f"{level:.1f}" for level in levels)
    print(
        f"{requests:,} requests, 16 at once: {requests / seconds:.0f}/s, "
        f"{1e3 * cpu / requests:.2f} ms of the proxy's CPU each; "
        f"resident set {shown} MiB (before, and after each quarter)\n",
        flush=True,
    )


def _streams(direct: str, url: str, running: psutil.Process, count: int) -> None:
    for name, where in (("direct", direct), ("proxied", url), ("direct", direct), ("proxied", url)):
        cpu = sum(running.cpu_times()[:2])
        ends, gaps = asyncio.run(streams(where, count))
        cpu = sum(running.cpu_times()[:2]) - cpu
        print(
            f"{count} streams of {WORDS} words at once, {name}: all whole; seconds to the end "
            f"{statistics.median(ends):.2f} median, {max(ends):.2f} longest; longest silence "
            f"{max(gaps):.2f}; the proxy's CPU {cpu:.2f} s",
            flush=True,
        )
    print()


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


if __name__ == "__main__":
    main()
