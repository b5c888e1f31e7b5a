"""Connections to upstreams elsewhere: over TLS, and through a proxy of the environment's."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn

from tests.backends.stub_server import StubServer
from tests.serving.conftest import proxied
from thrifty.serving.upstream import Upstream


async def _app(scope, receive, send) -> None:
    body = b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}'
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def over_tls(folder: Path) -> Iterator[tuple[str, Path]]:
    """A server's URL, and its certificate, which nobody else trusts."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    name = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(
        [*command.split(), *name, "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    config = uvicorn.Config(
        _app, port=0, lifespan="off", ssl_keyfile=key, ssl_certfile=certificate, log_level="error"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield f"https://localhost:{server.servers[0].sockets[0].getsockname()[1]}/v1", certificate
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_an_upstream_over_tls_must_have_a_certificate_that_is_trusted(
    ledger, tmp_path, monkeypatch
):
    with over_tls(tmp_path) as (url, certificate):
        with proxied(ledger, upstream=lambda _: Upstream(url=url)) as proxy:
            response = proxy.ask()
            assert response.status_code == 502
            assert "cannot be reached" in response.text
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with proxied(ledger, upstream=lambda _: Upstream(url=url)) as proxy:
            for _ in range(2):
                assert proxy.ask().status_code == 200


def test_a_proxy_of_the_environment_is_used_except_to_this_machine(ledger, monkeypatch):
    with StubServer() as between:
        monkeypatch.setenv("http_proxy", between.url.replace("//", "//user:pass@"))
        elsewhere = Upstream(url="http://upstream.test/v1")
        with proxied(ledger, upstream=lambda _: elsewhere) as proxy:
            assert proxy.ask().status_code == 200
        (request,) = between.requests
        assert request.path == "http://upstream.test/v1/chat/completions"
        assert request.headers["host"] == "upstream.test"
        assert request.headers["proxy-authorization"].startswith("Basic ")
        with proxied(ledger) as proxy:
            assert proxy.ask().status_code == 200
        assert len(between.requests) == 1
