"""The options of ``thrifty serve``, and the server that they start."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from thrifty.core import quantities

if TYPE_CHECKING:
    from thrifty.serving.key_budgets import KeyBudgets

RENEW_SECONDS = 300.0
"""Between two times that the ledger is brought up to date."""
_NONE = "-"


def add_to(serve: argparse.ArgumentParser) -> None:
    """To the parser of ``thrifty serve``."""
    serve.add_argument(
        "--upstream",
        action="append",
        required=True,
        metavar="URL",
        help="an OpenAI-compatible server; once for each, the options of upstreams in that order",
    )
    serve.add_argument(
        "--model", action="append", metavar="NAME", help="of an upstream: the only one asked there"
    )
    serve.add_argument(
        "--upstream-key",
        action="append",
        metavar="VARIABLE",
        help="of an upstream: the environment variable with its key; - for none",
    )
    serve.add_argument(
        "--price",
        action="append",
        metavar="0.15,0.60",
        help="of an upstream: dollars per million tokens, prompts and completions; - for unknown",
    )
    serve.add_argument(
        "--config",
        action="append",
        metavar="FOLDER",
        help="of an upstream: the folder with its model's config.json, for FLOPs; - for unknown",
    )
    serve.add_argument(
        "--policy",
        default="first",
        metavar="NAME",
        help="a name, or {name: {option: value}} (default: first, handed on as it is)",
    )
    serve.add_argument(
        "--answer",
        default="exact",
        metavar="FORM",
        help="how an answer is read in a text: number, choice, exact, math, {callable: ...}, none",
    )
    serve.add_argument(
        "--worth", type=float, default=0.0, metavar="X", help="right answers that a unit must bring"
    )
    serve.add_argument(
        "--fit", action="append", metavar="SAMPLES", help="recorded samples to learn from"
    )
    serve.add_argument(
        "--reward",
        metavar="FOLDER",
        help="of a reward model; or MODULE:FUNCTION(prompt, text), higher is better",
    )
    serve.add_argument(
        "--max-samples", type=int, default=8, metavar="8", help="of a request, of any policy"
    )
    serve.add_argument(
        "--keys", metavar="FILE", help="who may ask, each with a budget (YAML, JSON)"
    )
    serve.add_argument(
        "--key-variable",
        default="THRIFTY_KEY",
        metavar="NAME",
        help="without --keys: the environment variable with the one key",
    )
    serve.add_argument("--dollars", metavar="20", help="without --keys: limit on money")
    serve.add_argument("--tokens", metavar="20M", help="without --keys: limit on tokens")
    serve.add_argument("--flops", metavar="3e17", help="without --keys: limit on FLOPs")
    serve.add_argument(
        "--ledger",
        default="runs/serve",
        metavar="FOLDER",
        help="what was spent, a folder or a .sqlite file (default: runs/serve)",
    )
    serve.add_argument("--host", default="127.0.0.1", help="others than loopback need keys")
    serve.add_argument("--port", type=int, default=8100, metavar="8100", help="0: any free one")
    serve.add_argument(
        "--allow-host", action="append", metavar="NAME", help="another name that may be asked for"
    )
    serve.add_argument(
        "--max-tokens", type=int, default=4096, metavar="4096", help="of a completion"
    )
    serve.add_argument("--max-body", default="4MiB", metavar="4MiB", help="of a request")
    serve.add_argument(
        "--context", type=int, metavar="32768", help="tokens that a prompt can have at the most"
    )
    serve.add_argument(
        "--max-connections", type=int, default=1024, metavar="1024", help="at a time"
    )
    serve.add_argument(
        "--timeout", default="10m", metavar="10m", help="of a request, from its first byte on"
    )


def serve(options: argparse.Namespace) -> None:
    """Until a signal ends it. Raises ValueError where something cannot be served so."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"serving needs {error.name}, which is not installed\n"
            "hint: pip install 'thrifty[serve]'"
        ) from None
    try:
        asyncio.run(_serve(options))
    except KeyboardInterrupt:  # how a server ends; what it held is settled by now
        return


async def _serve(options: argparse.Namespace) -> None:
    import uvicorn

    from thrifty import display
    from thrifty.serving import bounded_connections, setup
    from thrifty.serving.app import Serving, app_of
    from thrifty.serving.key_budgets import key_budgets
    from thrifty.serving.metrics import ServeMetrics
    from thrifty.serving.upstream import UpstreamClient

    upstreams = setup.upstreams(options)
    clients = setup.clients(options)
    setup.check_known(upstreams, clients)
    timeout = quantities.parse_seconds(options.timeout)
    metrics = ServeMetrics()
    async with AsyncExitStack() as stack:
        improver = setup.improver(options, upstreams, timeout, metrics)
        if improver is not None:
            for backend in improver.backends.values():
                stack.push_async_callback(backend.close)
        # First in, last out: accounts are closed when no request is under way any more.
        ledger = setup.ledger_file(options.ledger)
        budgets = stack.enter_context(key_budgets(clients, ledger, options.policy))
        asked = [UpstreamClient(upstream, timeout=timeout) for upstream in upstreams]
        for client in asked:
            stack.push_async_callback(client.close)
        serving = Serving(
            clients=asked,
            budgets=budgets,
            metrics=metrics,
            limits=setup.limits(options),
            improver=improver,
            hosts=setup.hosts(options),
            timeout=timeout,
        )
        listening = stack.enter_context(setup.listening_socket(options.host, options.port))
        most = setup.at_least("--max-connections", options.max_connections, 1)
        config = uvicorn.Config(app_of(serving), **bounded_connections.settings(most))
        renewing = asyncio.create_task(_renew(budgets))
        stack.callback(renewing.cancel)
        for line in setup.greeting(options, upstreams, budgets, listening):
            display.say(line)
        await uvicorn.Server(config).serve(sockets=[listening])


async def _renew(budgets: KeyBudgets) -> None:
    import sqlite3

    from thrifty.display import say

    while True:
        await asyncio.sleep(RENEW_SECONDS)
        try:
            for _ in budgets.renew():
                await asyncio.sleep(0)
        except (OSError, sqlite3.Error) as error:  # the counters have it all; next time, then
            say(f"the ledger was not brought up to date: {error}")
