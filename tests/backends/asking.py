"""Asking an endpoint on a stub server, and what came back."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from tests.backends.stub_server import Script, StubServer
from thrifty.backends.backend import Answered, Asking, AskingFailed
from thrifty.backends.endpoint import Endpoint
from thrifty.backends.retries import Retries
from thrifty.core.budget import Cost

T = TypeVar("T")
KEY = "sk-verysecret-0123456789"
QUESTION = Asking(prompt="what is 6 x 7", max_tokens=16)
SOON = Retries(first_wait_seconds=0.001, longest_wait_seconds=0.05)


def during(script: Script, do: Callable[[Endpoint], Awaitable[T]], **options: Any) -> T:
    """What ``do`` returns, of an endpoint on a stub with that script."""
    return with_stub(script, do, **options)[0]


def with_stub(
    script: Script, do: Callable[[Endpoint], Awaitable[T]], **options: Any
) -> tuple[T, StubServer, Endpoint]:
    options = {"retries": SOON, "timeout_seconds": 5.0, **options}
    with StubServer(script) as stub:
        endpoint = Endpoint(stub.url, "m", **options)

        async def doing() -> T:
            try:
                return await do(endpoint)
            finally:
                await endpoint.close()

        return asyncio.run(doing()), stub, endpoint


async def outcome_of(endpoint: Endpoint, asking: Asking) -> Answered | AskingFailed:
    try:
        return await endpoint.ask(asking)
    except AskingFailed as failure:
        return failure


def asked(
    script: Script, asking: Asking = QUESTION, **options: Any
) -> tuple[Answered | AskingFailed, StubServer, Endpoint]:
    """What came back, be it a failure. Its cost was held for, whatever it was."""
    outcome, stub, endpoint = with_stub(script, lambda e: outcome_of(e, asking), **options)
    assert within(outcome.cost, endpoint.upper(asking))
    return outcome, stub, endpoint


def answered(script: Script, asking: Asking = QUESTION, **options: Any) -> Answered:
    outcome = asked(script, asking, **options)[0]
    assert isinstance(outcome, Answered), outcome
    return outcome


def failed(script: Script, asking: Asking = QUESTION, **options: Any) -> AskingFailed:
    outcome = asked(script, asking, **options)[0]
    assert isinstance(outcome, AskingFailed), outcome
    return outcome


def within(cost: Cost, upper: Cost) -> bool:
    amounts = [
        (cost.of(name), upper.of(name)) for name in ("flops", "tokens", "dollars", "seconds")
    ]
    return all(b is None or 0 <= a <= b * (1 + 1e-9) for a, b in amounts)


def most_tokens(endpoint: Endpoint, asking: Asking = QUESTION) -> float:
    """Of one request."""
    return endpoint.upper(asking).tokens / (1 + endpoint.retries.lost)
