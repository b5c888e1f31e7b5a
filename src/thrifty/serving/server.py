"""The server that ``thrifty serve`` starts: what it is made of, and in which order it ends."""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
from contextlib import AsyncExitStack

import uvicorn

from thrifty import display
from thrifty.core import quantities
from thrifty.serving import bounded_connections, setup
from thrifty.serving.app import Serving, app_of
from thrifty.serving.key_budgets import KeyBudgets, key_budgets
from thrifty.serving.metrics import ServeMetrics
from thrifty.serving.upstream import UpstreamClient

RENEW_SECONDS = 300.0
"""Between two times that the ledger is brought up to date."""


def run(options: argparse.Namespace) -> None:
    """Until a signal ends it, with the parsed options of ``thrifty serve``.

    Raises ValueError where something cannot be served so.
    """
    asyncio.run(_serve(options))


async def _serve(options: argparse.Namespace) -> None:
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
    while True:
        await asyncio.sleep(RENEW_SECONDS)
        try:
            for _ in budgets.renew():
                await asyncio.sleep(0)
        except (OSError, sqlite3.Error) as error:  # the counters have it all; next time, then
            display.say(f"the ledger was not brought up to date: {error}")
