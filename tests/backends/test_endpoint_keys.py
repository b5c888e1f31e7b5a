"""Keys, which go to one host and are shown nowhere; URLs, redirects, cookies and proxies."""

import copy
import json
import logging
import pickle
import traceback
from typing import Any

import pytest

from tests.backends.asking import KEY, QUESTION, answered, asked, with_stub
from tests.backends.stub_server import Received, Reply, Script, StubServer
from thrifty.backends.backend import AskingFailed
from thrifty.backends.connections import base_url
from thrifty.backends.endpoint import Endpoint
from thrifty.backends.secret import Secret


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(status, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with StubServer() as elsewhere:
        location = {"location": elsewhere.url + "/v1/chat/completions"}
        failure, stub, _ = asked([Reply(status=status, headers=location)])
        assert stub.requests[0].headers["authorization"] == f"Bearer {KEY}"
        assert elsewhere.requests == []
    assert failure.fatal
    assert failure.cost.tokens == 0
    assert elsewhere.url in str(failure)


def echo(request: Received, **options: Any) -> dict[str, Any]:
    """The key everywhere in a reply."""
    said = request.headers["authorization"]
    choice = {"message": {"content": said}, "text": said, "finish_reason": said}
    return {"model": said, "choices": [choice], "error": {"message": said}, **options}


def leaks() -> list[Script]:
    usage = {"prompt_tokens": 5, "completion_tokens": 4}
    return [
        lambda request: Reply(body=echo(request, usage=usage)),
        lambda request: Reply(body={**echo(request), "choices": request.headers["authorization"]}),
        lambda request: Reply(body={"error": request.headers["authorization"]}),
        lambda request: Reply(body=request.headers["authorization"]),
        lambda request: Reply(body="x" * 590 + request.headers["authorization"], status=400),
        lambda request: Reply(
            status=302, headers={"location": f"http://x/?k={request.headers['authorization']}"}
        ),
        *(lambda request, s=s: Reply(status=s, body=echo(request)) for s in (400, 401, 429, 500)),
        [Reply(cut=-1)],
        [Reply(cut=9)],
        [Reply(delay=1)],
    ]


@pytest.mark.parametrize("number", range(len(leaks())))
def test_the_key_is_shown_nowhere(number, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.INFO, "httpcore2")  # at DEBUG it writes headers as they come
    monkeypatch.setenv("MY_KEY", KEY)
    seen: list[str] = []

    async def ask(endpoint: Endpoint) -> None:
        try:
            seen.append(repr(await endpoint.ask(QUESTION)))
        except AskingFailed as failure:
            shown = traceback.TracebackException.from_exception(failure, capture_locals=True)
            seen.extend([repr(failure), *shown.format()])
        try:
            seen.append(repr(await endpoint.models()))
        except AskingFailed as failure:
            seen.extend(traceback.format_exception(failure))

    _, stub, endpoint = with_stub(leaks()[number], ask, key_variable="MY_KEY", timeout_seconds=0.2)
    assert stub.requests[0].headers["authorization"] == f"Bearer {KEY}"
    seen += [
        repr(endpoint),
        repr(vars(endpoint)),
        str(endpoint.notes),
        caplog.text,
        *capfd.readouterr(),
    ]
    assert KEY not in "\n".join(seen)
    assert seen[0]


def test_a_key_is_not_written_down(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    endpoint = Endpoint("https://example.org/v1", "m", key_variable="MY_KEY")
    for writing in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="not written down"):
            writing(endpoint)
    with pytest.raises(TypeError):
        json.dumps(vars(endpoint))


def test_a_key_that_was_not_given_is_missed(monkeypatch):
    with pytest.raises(ValueError, match=r"MY_KEY is not set\nhint: "):
        Endpoint("http://localhost:1", "m", key_variable="MY_KEY")
    monkeypatch.setenv("MY_KEY", f"{KEY}\nx")
    with pytest.raises(ValueError, match=r"\$MY_KEY is empty or has") as raised:
        Endpoint("http://localhost:1", "m", key_variable="MY_KEY")
    assert KEY not in str(raised.value)


def test_a_line_end_after_the_key_does_no_harm(monkeypatch):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    _, stub, _ = asked([Reply()], key_variable="MY_KEY")
    assert stub.requests[0].headers["authorization"] == f"Bearer {KEY}"


def test_the_usual_key_does_not_go_over_plain_http_to_others(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert "gets no key" in Endpoint("http://10.0.0.1:8000", "m").notes[0]
    assert Endpoint("https://example.org", "m").notes == ()
    assert Endpoint("http://[::1]:8000", "m").notes == ()
    assert Endpoint("http://10.0.0.1", "m", key_variable="OPENAI_API_KEY").notes == ()


def test_a_key_that_is_none_is_no_secret():
    assert Secret("EMPTY").scrub("the set is EMPTY") == "the set is EMPTY"
    assert Secret(KEY).scrub(f"a {KEY}b") == "a ***b"


def test_no_cookie_is_kept():
    async def twice(endpoint: Endpoint) -> None:
        await endpoint.ask(QUESTION)
        await endpoint.ask(QUESTION)

    _, stub, _ = with_stub([Reply(headers={"set-cookie": "a=b; Path=/"})], twice)
    assert all("cookie" not in request.headers for request in stub.requests)


def test_a_server_on_this_machine_is_not_asked_through_a_proxy(monkeypatch):
    with StubServer() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        answered([Reply()])
        assert proxy.requests == []


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        (" http://localhost:8000/v1/ ", "http://localhost:8000/v1"),
        ("http://h/v1/chat/completions", "http://h/v1"),
        ("https://h/openai/v1", "https://h/openai/v1"),
        ("https://h/v1beta/openai/", "https://h/v1beta/openai"),
        ("http://[::1]:80/v1/models", "http://[::1]:80/v1"),
    ],
)
def test_a_url_is_taken_as_users_give_it(url, base):
    assert base_url(url) == base


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost:8000", "ftp://h/v1", "http://", "http://h:99999", "http://h:x"),
        *("http://[::1", f"http://user:{KEY}@h/v1", "http://h/v1?key=1", "http://h/v1#x"),
        *("http://a b/", "http://\0/", "http://h:0"),
    ],
)
def test_a_url_that_cannot_be_is_refused(url):
    with pytest.raises(ValueError, match="hint: ") as raised:
        base_url(url)
    assert KEY not in str(raised.value)
