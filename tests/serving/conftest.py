"""A proxy on loopback, as a thread of this process: its server, its ledger, its stub upstream."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

from tests.backends.stub_server import Reply, Script, StubServer
from thrifty.backends.usage import Tariff
from thrifty.serving import bounded_connections
from thrifty.serving.app import Serving, app_of
from thrifty.serving.front_door import LOOPBACK
from thrifty.serving.key_budgets import Client, KeyBudgets, KeyLimits, key_budgets
from thrifty.serving.metrics import ServeMetrics
from thrifty.serving.policy_answer import Improver
from thrifty.serving.request_limits import RequestLimits
from thrifty.serving.upstream import Upstream, UpstreamClient

KEY = "a key that nobody guesses"
WELL = (Reply(),)
PRICES = Tariff(prompt_price=1.0, completion_price=2.0)


@dataclass(kw_only=True)
class Proxy:
    """A running one."""

    url: str
    stub: StubServer
    ledger: Path
    serving: Serving
    http: httpx2.Client
    on_loop: Callable[[Callable[[], Any]], Any]
    """Run something in the server's thread."""

    @property
    def budgets(self) -> KeyBudgets:
        return self.serving.budgets

    def ask(self, key: str = KEY, **body: Any) -> httpx2.Response:
        body = {"model": "m", "messages": [{"role": "user", "content": "6 x 7?"}], **body}
        return self.post("/v1/chat/completions", key=key, json=body)

    def post(self, path: str, key: str = KEY, **request: Any) -> httpx2.Response:
        headers = {"authorization": f"Bearer {key}", **request.pop("headers", {})}
        return self.http.post(path, headers=headers, **request)

    def get(self, path: str, key: str = KEY) -> httpx2.Response:
        return self.http.get(path, headers={"authorization": f"Bearer {key}"})


@contextmanager
def proxied(
    ledger: Path,
    script: Script = WELL,
    *,
    budget: KeyLimits | None = None,
    clients: tuple[Client, ...] = (),
    upstream: Callable[[str], Upstream] | None = None,
    improver: Callable[[str], Improver] | None = None,
    most_connections: int = 1024,
    limits: RequestLimits | None = None,
    **settings: Any,
) -> Iterator[Proxy]:
    """``upstream`` and ``improver`` of the stub's URL."""
    with StubServer(script) as stub:
        ready, box = threading.Event(), {}
        clients = clients or (
            Client(name="alice", key=KEY, budget=budget or KeyLimits(), metrics=True),
        )

        async def serve() -> None:
            box["loop"] = asyncio.get_running_loop()
            metrics = ServeMetrics()
            url = f"{stub.url}/v1"
            made = upstream(url) if upstream else Upstream(url=url, model="m", tariff=PRICES)
            client = UpstreamClient(made, timeout=20.0)
            with ExitStack() as stack:
                box["serving"] = Serving(
                    clients=[client],
                    budgets=stack.enter_context(key_budgets(clients, ledger, "first")),
                    metrics=metrics,
                    limits=limits or RequestLimits(max_tokens=64),
                    improver=improver(url) if improver else None,
                    hosts=LOOPBACK,
                    **{"timeout": 20.0, **settings},
                )
                config = uvicorn.Config(
                    app_of(box["serving"]),
                    port=0,
                    **{
                        **bounded_connections.settings(most_connections),
                        "timeout_graceful_shutdown": 1,
                    },
                )
                server = box["server"] = uvicorn.Server(config)
                serving = asyncio.ensure_future(server.serve())
                while not server.started:
                    await asyncio.sleep(0.005)
                box["port"] = server.servers[0].sockets[0].getsockname()[1]
                ready.set()
                await serving
                await client.close()
                if box["serving"].improver is not None:
                    for backend in box["serving"].improver.backends.values():
                        await backend.close()

        thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        thread.start()
        assert ready.wait(20), "the proxy did not start"

        def on_loop(work: Callable[[], Any]) -> Any:
            async def now() -> Any:
                return work()

            return asyncio.run_coroutine_threadsafe(now(), box["loop"]).result(20)

        url = f"http://127.0.0.1:{box['port']}"
        try:
            with httpx2.Client(base_url=url, timeout=30, verify=False, trust_env=False) as http:
                yield Proxy(
                    url=url,
                    stub=stub,
                    http=http,
                    ledger=ledger,
                    serving=box["serving"],
                    on_loop=on_loop,
                )
        finally:
            box["server"].should_exit = True
            thread.join(20)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"
