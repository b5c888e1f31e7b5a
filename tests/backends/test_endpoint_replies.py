"""Replies that make no sense: a failure, or a cost at its most, in bounded memory and time."""

import asyncio
import gzip
import json
import math
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.backends.asking import (
    QUESTION,
    answered,
    asked,
    during,
    failed,
    most_tokens,
    outcome_of,
    within,
)
from tests.backends.stub_server import Reply, Script, StubServer
from thrifty.backends.backend import Answered, Asking, AskingFailed
from thrifty.backends.endpoint import Endpoint
from thrifty.backends.payload import Payload
from thrifty.backends.replies import read_reply
from thrifty.backends.retries import AttemptFailed, Retries
from thrifty.backends.usage import Usage, believed

# -- replies that make no sense -------------------------------------------------------------------

GARBAGE = {
    "nothing": b"",
    "a page": b"<html><body>hello</body></html>",
    "half": b'{"choices": [{"message": {"content": "4',
    "no utf-8": b'{"choices": [{"message": {"content": "\xff\xfe"}}]}',
    "nul": b'{"choices": [{"message": {"content": "\0"}}]}',
    "deep": b"[" * 200_000 + b"]" * 200_000,
    "deep in an error": b'{"error": ' + b"[" * 900 + b"]" * 900 + b"}",
    "deep choices": b'{"choices": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a number of a million digits": b'{"choices": ' + b"9" * 1_000_000 + b"}",
    "not an object": b"[1, 2]",
    "null": b"null",
    "no choices": b"{}",
    "choices are null": b'{"choices": null}',
    "choices are an object": b'{"choices": {"0": {"message": {"content": "42"}}}}',
    "no choice": b'{"choices": []}',
    "choices are texts": b'{"choices": ["42"]}',
    "no message": b'{"choices": [{"index": 0}]}',
    "a text for a message": b'{"choices": [{"message": "42"}]}',
    "a number for a content": b'{"choices": [{"message": {"content": 42}}]}',
    "an error": b'{"error": {"message": "out of memory", "code": 502}}',
}


@pytest.mark.parametrize("body", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_a_failure_that_is_charged(body):
    failure, stub, endpoint = asked([Reply(body=body)])
    assert "cannot be read" in str(failure)
    assert "\nhint: " in str(failure)
    assert len(str(failure)) < 1500
    assert failure.cost.tokens == most_tokens(endpoint)
    assert not failure.fatal
    assert len(stub.requests) == 1


@pytest.mark.parametrize("body", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_beside_a_status_is_shown_in_part(body):
    statuses = iter((400, 500, 401))

    async def thrice(endpoint: Endpoint) -> list[AskingFailed]:
        return [await outcome_of(endpoint, QUESTION) for _ in range(3)]

    script = lambda _: Reply(status=next(statuses), body=body)  # noqa: E731
    for failure, status in zip(
        during(script, thrice, retries=Retries(attempts=1)), (400, 500, 401), strict=True
    ):
        assert str(status) in str(failure)
        assert len(str(failure)) < 1500
        assert failure.cost.tokens == 0


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ("", ""),
        (
            [{"type": "text", "text": "4"}, {"type": "image"}, 7, {"type": "text", "text": "2"}],
            "42",
        ),
        ([], ""),
        ("\ud800 half", "? half"),
        ("\x1b[31mred", "\x1b[31mred"),
    ],
)
def test_a_content_may_be_nothing_or_parts(content, text):
    reply = Reply(body={"choices": [{"message": {"content": content}}]})
    assert [c.text for c in answered([reply]).completions] == [text]


def test_what_can_be_read_of_a_reply_is_taken():
    choices = [None, {"message": {"content": "42"}}, {"message": {}}, 7, {"text": "x"}]
    usage = {"prompt_tokens": 5, "completion_tokens": 9}
    asking = Asking(prompt="x", count=2, max_tokens=9)
    outcome = answered([Reply(body={"choices": choices, "usage": usage})], asking)
    assert [c.text for c in outcome.completions] == ["42", ""]
    assert outcome.cost.tokens == 14


def bounded_memory(script: Script) -> tuple[AskingFailed, int, float]:
    """The failure, the most bytes of memory that it took, and the seconds."""
    start = time.monotonic()
    tracemalloc.start()
    try:
        failure = failed(script)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return failure, peak, time.monotonic() - start


@pytest.mark.parametrize("status", [200, 500, 404])
def test_a_gigabyte_is_not_read(status):
    huge = Reply(status=status, body=b"x" * 65536, repeat=2**14)
    failure, peak, seconds = bounded_memory([huge])
    assert peak < 16 * 2**20
    assert seconds < 5
    assert ("more than" if status == 200 else str(status)) in str(failure)
    assert (failure.cost.tokens > 0) == (status == 200)


def test_a_gigabyte_that_was_packed_is_not_unpacked():
    packed = gzip.compress(gzip.compress(b"\0" * 2**27))
    bomb = Reply(body=packed, headers={"content-encoding": "gzip, gzip"})
    failure, peak, seconds = bounded_memory([bomb])
    assert "more than" in str(failure)
    assert peak < 32 * 2**20
    assert seconds < 5


def test_what_is_not_packed_as_it_says_is_a_failure():
    failure = failed([Reply(headers={"content-encoding": "gzip"})])
    assert "cannot be unpacked" in str(failure)


def test_a_flood_of_headers_is_a_failure():
    flood = {f"x-{number}": "y" * 1000 for number in range(1000)}
    assert "broke off" in str(failed([Reply(headers=flood)]))


# -- what was told of the cost --------------------------------------------------------------------

ABSURD: list[Any] = [
    None,
    7,
    [],
    {},
    {"prompt_tokens": 5},
    {"completion_tokens": 5},
    {"prompt_tokens": None, "completion_tokens": 5},
    {"prompt_tokens": "5", "completion_tokens": "5"},
    {"prompt_tokens": True, "completion_tokens": True},
    {"prompt_tokens": 5.5, "completion_tokens": 5},
    {"prompt_tokens": [5], "completion_tokens": {"a": 5}},
    {"prompt_tokens": -5, "completion_tokens": 5},
    {"prompt_tokens": 5, "completion_tokens": -5},
    {"prompt_tokens": 0, "completion_tokens": 5},
    {"prompt_tokens": 5, "completion_tokens": 0},
    {"prompt_tokens": 5, "completion_tokens": 17},
    {"prompt_tokens": 1000, "completion_tokens": 5},
    {"prompt_tokens": 10**400, "completion_tokens": 5},
    {"prompt_tokens": 5, "completion_tokens": 1e300},
    {"prompt_tokens": math.nan, "completion_tokens": 5},
    {"prompt_tokens": 5, "completion_tokens": math.inf},
]


@pytest.mark.parametrize("usage", ABSURD, ids=lambda usage: str(usage)[:60])
def test_an_absurd_usage_is_charged_at_its_most(usage):
    options = dict(prompt_price=1, completion_price=2)
    outcome, _, endpoint = asked([Reply(usage=usage)], **options)
    assert outcome.completions[0].text == "the answer is 42"
    assert not outcome.trusted
    assert outcome.cost.tokens == most_tokens(endpoint)
    assert outcome.cost.dollars == pytest.approx(endpoint.upper(QUESTION).dollars / 2)
    assert "is charged its most" in endpoint.notes[0]


def test_an_infinite_number_spoils_only_the_usage():
    body = (
        b'{"choices": [{"message": {"content": "42"}}],'
        b' "usage": {"prompt_tokens": 1e400, "completion_tokens": 1}}'
    )
    outcome = answered([Reply(body=body)])
    assert outcome.completions[0].text == "42"
    assert not outcome.trusted


@pytest.mark.parametrize(("prompt", "generated"), [(5, 4), (5.0, 4.0), (5, 16), (1, 1), (256, 16)])
def test_a_plausible_usage_is_believed(prompt, generated):
    usage = {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": "?"}
    outcome = answered([Reply(usage=usage)])
    assert outcome.trusted
    assert outcome.cost.tokens == prompt + generated


@pytest.mark.parametrize(
    ("generated", "texts", "cut_off", "is_believed"),
    [
        (8, ["so it is four", "and so these are"], 0, True),
        (4, ["so it is four", "and so these are"], 0, False),
        (4, ["so it is four"], 0, True),
        (12, ["Lears", "Miabyes", "One"], 36, False),
        (36, ["Lears", "Miabyes", "One"], 36, True),
    ],
)
def test_tokens_of_one_of_several_completions_are_not_believed(
    generated, texts, cut_off, is_believed
):
    most = Usage(prompt=1000, generated=36)
    said = {"prompt_tokens": 46, "completion_tokens": generated}
    assert (believed(said, most, 60, texts, cut_off) is not None) == is_believed


def test_few_tokens_for_a_long_text_are_not_believed():
    most = Usage(prompt=10_000, generated=10_000)
    said = {"prompt_tokens": 100, "completion_tokens": 3}
    assert believed(said, most, 100, ["x" * 500])
    assert believed(said, most, 100, ["x" * 5000]) is None
    assert believed(said, most, 10**6, ["x"]) is None


# -- anything at all ------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["length", "content", "42"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                (
                    *("choices", "message", "content", "text", "logprobs", "token_logprobs"),
                    *("logprob", "usage", "error", "model", "finish_reason", "data", "id"),
                    *("prompt_tokens", "completion_tokens"),
                )
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=25,
)


def like_a_reply(value: Any) -> Any:
    return st.fixed_dictionaries(
        {},
        optional={
            "choices": st.lists(
                value
                | st.fixed_dictionaries(
                    {},
                    optional={
                        "message": value | st.fixed_dictionaries({"content": value}),
                        "text": value,
                        "logprobs": value
                        | st.fixed_dictionaries({"content": value | st.lists(value, max_size=3)})
                        | st.fixed_dictionaries({"token_logprobs": value}),
                        "finish_reason": value,
                    },
                ),
                max_size=4,
            ),
            "usage": value
            | st.fixed_dictionaries({"prompt_tokens": value, "completion_tokens": value}),
            "model": value,
            "error": value,
        },
    )


BODIES = st.binary(max_size=80) | (VALUES | like_a_reply(VALUES)).map(
    lambda value: json.dumps(value).encode()
)


@settings(max_examples=100, deadline=None)
@given(body=BODIES, kind=st.sampled_from(["chat", "completions"]))
@example(body=b'{"choices": [{"message": {"content": "x"}, "finish_reason": {}}]}', kind="chat")
@example(
    body=b'{"choices": [{"text": "x", "logprobs": {"token_logprobs": {}}}]}', kind="completions"
)
def test_no_body_raises_anything_but_a_failed_attempt(body, kind):
    try:
        reply = read_reply(body, kind)
    except AttemptFailed:
        return
    assert reply.choices
    for choice in reply.choices:
        assert choice.confidence is None or 0 <= choice.confidence <= 1
        choice.text.encode()
    most = Usage(prompt=100, generated=100)
    usage = believed(reply.usage, most, 10, [choice.text for choice in reply.choices])
    assert usage is None or (1 <= usage.prompt <= 100 and 0 <= usage.generated <= 100)


def test_no_body_raises_anything_but_asking_failed(shape):
    now: dict[str, Any] = {}
    asking = Asking(prompt="x", count=2, max_tokens=9)
    retries = Retries(attempts=2, first_wait_seconds=0.0)
    options = dict(prompt_price=1, completion_price=1, shape=shape, retries=retries)
    with StubServer(lambda _: Reply(**now)) as stub, asyncio.Runner() as runner:
        endpoint = Endpoint(stub.url, "m", **options)
        upper = endpoint.upper(asking)

        @settings(max_examples=50, deadline=None)
        @given(body=BODIES, status=st.sampled_from([200, 200, 200, 204, 302, 400, 429, 500]))
        def ask(body: bytes, status: int) -> None:
            now.update(body=body, status=status)
            outcome = runner.run(outcome_of(endpoint, asking))
            assert within(outcome.cost, upper)
            if isinstance(outcome, Answered):
                assert 1 <= len(outcome.completions) <= 2

        ask()
        runner.run(endpoint.close())


def test_the_payload_has_as_many_bytes_as_are_charged_for():
    asking = Asking(prompt="är ﷺ\n" * 50, prefix="hm")
    endpoint = Endpoint("http://localhost:1", "m", template_tokens=0)
    sent = len(Payload(model="m").content(asking))
    assert sent > len(asking.prompt.encode()) + 2
    assert most_tokens(endpoint, asking) == sent + asking.max_tokens
