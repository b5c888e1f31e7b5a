"""An endpoint whose server is busy, breaks off or is not there: what is asked again and charged."""

import asyncio
import random
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.backends.asking import (
    QUESTION,
    SOON,
    answered,
    asked,
    failed,
    most_tokens,
)
from tests.backends.stub_server import Reply, StubServer
from thrifty.backends.backend import AskingFailed
from thrifty.backends.endpoint import Endpoint
from thrifty.backends.refusals import told_seconds
from thrifty.backends.retries import Retries


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(status):
    outcome, stub, endpoint = asked([Reply(status=status), Reply()])
    assert len(stub.requests) == 2
    # A time-out of someone in between may have been computed; the others were not.
    lost = most_tokens(endpoint) if status in (408, 504) else 0
    assert outcome.cost.tokens == 5 + 4 + lost
    assert outcome.trusted == (not lost)


@pytest.mark.parametrize("status", [400, 413, 418, 422, 501])
def test_what_cannot_be_done_is_not_asked_again(status):
    failure, stub, _ = asked([Reply(status=status)])
    assert len(stub.requests) == 1
    assert not failure.fatal
    assert failure.cost.tokens == 0
    assert f"{status}: the stub says {status}" in str(failure)
    assert "\nhint: " in str(failure)


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405])
def test_a_wrong_key_or_name_is_fatal(status):
    failure, stub, _ = asked([Reply(status=status)])
    assert len(stub.requests) == 1
    assert failure.fatal
    assert failure.cost.tokens == 0


def test_an_empty_account_is_fatal():
    body = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    failure, stub, _ = asked([Reply(status=429, body=body)])
    assert failure.fatal
    assert len(stub.requests) == 1


def test_attempts_are_bounded():
    failure, stub, _ = asked([Reply(status=503)])
    assert len(stub.requests) == SOON.attempts
    assert "6 attempts failed" in str(failure)
    assert failure.cost.tokens == 0


def test_time_is_bounded():
    patient = Retries(first_wait_seconds=0.1, total_seconds=0.5, attempts=1000)
    start = time.monotonic()
    failure = failed([Reply(status=503)], retries=patient)
    assert time.monotonic() - start < 2
    assert failure.cost.seconds <= 0.5
    assert failure.cost.tokens == 0


def test_the_last_attempt_has_what_time_is_left():
    start = time.monotonic()
    failure = failed([Reply(delay=9)], retries=Retries(total_seconds=0.3))
    assert time.monotonic() - start < 2
    assert "did not answer" in str(failure)


def test_it_waits_as_long_as_the_server_asks():
    patient = Retries(first_wait_seconds=0.001, longest_wait_seconds=5)
    busy = Reply(status=429, headers={"retry-after": "0.3"})
    _, stub, _ = asked([busy, Reply()], retries=patient)
    assert 0.3 <= stub.requests[1].at - stub.requests[0].at < 2


def test_but_no_longer_than_it_would_itself():
    start = time.monotonic()
    answered([Reply(status=429, headers={"retry-after": "86400"}), Reply()])
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("", 0, 0),
        ("7", 7, 7),
        ("-7", 0, 0),
        ("nan", 0, 0),
        ("inf", 0, 0),
        ("soon", 0, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 1e9, 1e12),
        ("9" * 400, 0, 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(header, least, most):
    assert least <= told_seconds(header) <= most


@given(attempt=st.integers(1, 1000), told=st.floats(0, 1e300), seed=st.integers(0, 99))
def test_waits_grow_and_are_bounded(attempt, told, seed):
    retries = Retries(first_wait_seconds=0.5, longest_wait_seconds=60)
    wait = retries.wait_seconds(attempt, told, random.Random(seed))
    assert wait == retries.wait_seconds(attempt, told, random.Random(seed))
    assert min(told + 0.25 * 2.0 ** min(attempt - 1, 9), 60) <= wait <= 60


def test_waits_are_random_but_repeat_under_a_seed():
    def times(seed: int) -> list[float]:
        waits = random.Random(seed)
        return [Retries().wait_seconds(1, 0, waits) for _ in range(5)]

    assert times(1) == times(1) != times(2)
    assert len(set(times(1))) == 5


@pytest.mark.parametrize(
    "broken",
    [
        Reply(cut=-1),
        Reply(cut=0),
        Reply(cut=30),
        Reply(delay=3),
        Reply(piece_bytes=1, pace=0.05),
        Reply(declared_bytes=100_000, pace=3, piece_bytes=100),
    ],
    ids=["no reply", "no body", "half a body", "silence", "slow loris", "too short a body"],
)
def test_what_may_have_been_computed_is_charged_and_asked_again_once(broken):
    start = time.monotonic()
    outcome, stub, endpoint = asked([broken, Reply()], timeout_seconds=0.2)
    assert len(stub.requests) == 2
    assert not outcome.trusted
    assert outcome.cost.tokens == 5 + 4 + most_tokens(endpoint)
    failure, stub, endpoint = asked([broken], timeout_seconds=0.2)
    assert len(stub.requests) == 2
    assert failure.cost.tokens == 2 * most_tokens(endpoint)
    assert not failure.fatal
    failure, stub, _ = asked([broken], timeout_seconds=0.2, retries=Retries(lost=0))
    assert len(stub.requests) == 1
    assert time.monotonic() - start < 5


def test_a_connection_that_ends_early_is_noticed():
    failure = failed(
        [Reply(body=b'{"choices": [', declared_bytes=99, headers={"connection": "close"})]
    )
    assert "broke off" in str(failure)


def test_a_length_that_is_too_short_leaves_half_a_reply():
    failure, stub, endpoint = asked([Reply(declared_bytes=20)])
    assert "cannot be read" in str(failure)
    assert failure.cost.tokens == most_tokens(endpoint)
    assert len(stub.requests) == 1


def test_no_server_is_told_and_costs_nothing():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = Endpoint(f"http://127.0.0.1:{unused.getsockname()[1]}", "m", retries=SOON)
        with pytest.raises(AskingFailed, match="cannot be reached") as raised:
            asyncio.run(endpoint.ask(QUESTION))
        assert raised.value.cost.tokens == 0
        assert "is the server running" in str(raised.value)
        with pytest.raises(AskingFailed, match="cannot be reached"):
            asyncio.run(endpoint.models())


def test_a_server_that_never_was_there_is_not_waited_for():
    """One that was is, though every attempt at it fails by now."""
    patient = Retries(attempts=6, first_wait_seconds=0.001)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = Endpoint(f"http://127.0.0.1:{unused.getsockname()[1]}", "m", retries=patient)
        with pytest.raises(AskingFailed, match="3 attempts failed") as raised:
            asyncio.run(endpoint.ask(QUESTION))
        assert raised.value.fatal

    async def goes_away() -> None:
        with StubServer([Reply(status=503), Reply()]) as server:
            endpoint = Endpoint(server.url, "m", retries=patient)
            await endpoint.ask(QUESTION)
        try:
            await endpoint.ask(QUESTION)
        finally:
            await endpoint.close()

    with pytest.raises(AskingFailed, match="attempts failed; it cannot be reached") as raised:
        asyncio.run(goes_away())
    assert not raised.value.fatal
