"""Who wants to break it, or to spend what is not theirs."""

from __future__ import annotations

import resource
import socket
import threading
import time

import httpx2
import psutil
import pytest

from tests.backends.stub_server import Reply
from tests.serving.conftest import KEY, proxied
from thrifty.serving.key_budgets import KeyLimits
from thrifty.serving.request_limits import RequestLimits

MIB = 2**20


def raw(proxy, text: bytes, wait: float = 15.0) -> bytes:
    """What a connection answers to these bytes, until it is closed or silent."""
    host, port = proxy.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(text)
        connection.settimeout(wait)
        got = b""
        try:
            while piece := connection.recv(65536):
                got += piece
        except (TimeoutError, ConnectionResetError):
            pass
        return got


def head_of(line: str, *fields: str) -> bytes:
    """Of a request on a connection that ends with it."""
    lines = [f"{line} HTTP/1.1", "host: localhost", "connection: close", *fields, "", ""]
    return "\r\n".join(lines).encode()


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    path = tmp_path_factory.mktemp("abuse") / "ledger.sqlite"
    with proxied(path, budget=KeyLimits(tokens=10_000)) as proxy:
        yield proxy
        assert all(request.prompt == "6 x 7?" for request in proxy.stub.requests)


@pytest.fixture(autouse=True)
def _nothing_held(request):
    """Whatever was tried, all of the budget is free again."""
    yield
    if "proxy" in request.fixturenames:
        account = request.getfixturevalue("proxy").budgets.accounts[0]
        assert account.left()["tokens"] == 10_000 - account.spent().tokens


@pytest.mark.parametrize("told", [True, False])
def test_a_body_of_100_mb_is_refused_and_not_held(proxy, told):
    """Whether its length is announced or it comes in chunks."""
    memory = psutil.Process()
    piece = b"x" * MIB

    def pieces():
        for _ in range(100):
            yield piece

    before, most = memory.memory_info().rss, 0
    stop = threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.005):
            most = max(most, memory.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    more = {"content-length": str(100 * MIB)} if told else {}
    response = proxy.post("/v1/chat/completions", content=pieces(), headers=more)
    stop.set()
    watching.join()
    assert response.status_code == 413
    assert "4 MiB" in response.json()["error"]["message"]
    assert most - before < 30 * MIB
    assert proxy.ask().status_code == 200


def test_a_body_that_comes_too_slowly(proxy, monkeypatch):
    monkeypatch.setattr("thrifty.serving.front_door.BODY_SECONDS", 0.2)
    head = head_of("POST /v1/completions", "content-length: 9", f"authorization: Bearer {KEY}")
    got = raw(proxy, head + b'{"a"')
    assert got.startswith(b"HTTP/1.1 408")


def test_a_body_is_not_read_before_the_key(proxy):
    head = head_of("POST /v1/completions", "content-length: 99")
    assert raw(proxy, head).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("length", ["9" * 30, "-1", "abc", "1e3", "0x10"])
def test_a_length_that_is_none(proxy, length):
    fields = f"authorization: Bearer {KEY}", f"content-length: {length}"
    got = raw(proxy, head_of("POST /v1/completions", *fields) + b"{}")
    assert got.split(b" ")[1] in (b"400", b"413")


@pytest.mark.parametrize(
    "flood",
    [
        b"x: " + b"a" * 200_000 + b"\r\n",
        b"".join(b"x-%d: a\r\n" % i for i in range(20_000)),
    ],
)
def test_a_flood_of_headers(proxy, flood):
    got = raw(
        proxy, b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n" + flood + b"\r\n"
    )
    assert not got.startswith(b"HTTP/1.1 200")
    assert proxy.get("/health").status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "[", "a@localhost:x"]
)
def test_dns_rebinding(proxy, host):
    for path in ("/v1/models", "/health", "/metrics"):
        answer = proxy.http.get(path, headers={"host": host, "authorization": f"Bearer {KEY}"})
        assert answer.status_code == 421


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8100", "127.0.0.1:1", "[::1]:8100"])
def test_this_machine_by_its_names(proxy, host):
    assert proxy.http.get("/health", headers={"host": host}).status_code == 200


def test_a_page_in_a_browser_cannot_spend(proxy):
    """A simple request, which no preflight asks about."""
    headers = {"origin": "https://evil.example", "content-type": "text/plain"}
    response = proxy.post("/v1/chat/completions", headers=headers, content="{}")
    assert response.status_code == 403
    assert proxy.post("/v1/completions", headers={"origin": "null"}, json={}).status_code == 403
    headers = {"origin": "http://localhost:3000"}
    assert proxy.post("/v1/completions", headers=headers, json={}).status_code == 400


@pytest.mark.parametrize(
    "path",
    [
        "/v1/..%2fmetrics",
        "/v1/%2e%2e/metrics",
        "/..%2f..%2fetc/passwd",
        "/v1/chat/completions/",
        "//v1/models",
        "/v1/models/m",
        "/docs",
        "/openapi.json",
        "/",
        "/v1/embeddings",
        "/%00",
    ],
)
def test_routes_that_are_not_there(proxy, path):
    got = raw(
        proxy, f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
    )
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404")
    assert body.startswith(b'{"error":{"message":"there is no such route')


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/completions"), ("DELETE", "/v1/models")])
def test_methods_that_are_not_there(proxy, method, path):
    answer = proxy.http.request(method, path)
    assert answer.status_code == 405
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_get_with_a_body(proxy):
    headers = {"authorization": f"Bearer {KEY}"}
    for _ in range(2):
        answer = proxy.http.request("GET", "/v1/models", content=b"x" * MIB, headers=headers)
        assert answer.status_code == 200


def test_a_request_in_the_body_of_another(proxy):
    """Smuggling: a length by two rules is refused, and a key that stands there twice is none."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
    inner = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    both = b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    got = raw(proxy, head + both + inner)
    # By the chunks the body ends before the inner one: a pipelined request, answered in its turn.
    assert got.count(b"HTTP/1.1 ") == 2 or b'"ok"' not in got
    twice = b"authorization: Bearer a\r\nauthorization: Bearer b\r\nconnection: close\r\n\r\n"
    assert raw(proxy, head + twice).startswith(b"HTTP/1.1 401")


def test_connections_past_the_limit_are_closed(ledger):
    """Others go on being answered, and those that ask for nothing do not stay."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = min(2000, soft // 3)
    with proxied(ledger, most_connections=100) as proxy:
        host, port = proxy.url.removeprefix("http://").split(":")
        with httpx2.Client(base_url=proxy.url) as regular:
            assert regular.get("/health").status_code == 200
            idle = [socket.create_connection((host, int(port)), timeout=5) for _ in range(many)]
            for _ in range(20):
                assert regular.get("/health").status_code == 200
            closed = 0
            for connection in idle:
                connection.settimeout(0.02)
                try:
                    closed += connection.recv(1) == b""
                except TimeoutError:
                    pass
                except ConnectionResetError:
                    closed += 1
            assert many - closed <= 100
            for connection in idle:
                connection.close()
        time.sleep(0.1)
        assert proxy.get("/health").status_code == 200


def test_a_connection_that_asks_for_nothing_is_closed(ledger, monkeypatch):
    monkeypatch.setattr("thrifty.serving.bounded_connections.HEAD_SECONDS", 0.2)
    with proxied(ledger) as proxy:
        began = time.monotonic()
        assert raw(proxy, b"GET /hea") == b""
        assert time.monotonic() - began < 10.0


def test_a_larger_body_where_it_is_allowed(ledger):
    limits = RequestLimits(max_tokens=64, max_body_bytes=100)
    with proxied(ledger, [Reply()], limits=limits) as proxy:
        assert proxy.ask().status_code == 200
        assert proxy.ask(user="a" * 100).status_code == 413


def test_faults_of_our_own_are_told_as_such_and_tell_nothing(ledger, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError(f"with {KEY} in it")

    monkeypatch.setattr("thrifty.serving.app.read_request", broken)
    with proxied(ledger) as proxy:
        response = proxy.ask()
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "api_error"
        assert KEY not in response.text
