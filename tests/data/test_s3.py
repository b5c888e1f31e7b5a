"""Pools on a real S3 server (moto's, a process of its own), also behind a network that fails."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from thrifty.data import remote
from thrifty.data.pool import Row, read_rows

ROWS = [{"prompt": f"row {i}:", "completion": f" {'word ' * 40}{i}."} for i in range(3000)]
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


class FaultyProxy(BaseHTTPRequestHandler):
    """Hands requests on to ``server``, but for the next ``faults``, each of which spoils a GET of
    rows: ``busy`` answers 503, ``cut`` breaks off half-way, ``reset`` says nothing."""

    protocol_version = "HTTP/1.1"
    server_at = ""
    faults: list[str] = []  # noqa: RUF012 (set by each test)
    asked: list[str] = []  # noqa: RUF012

    def _handed_on(self) -> None:
        body = self._body()
        is_rows = self.command == "GET" and ".jsonl" in self.path
        fault = self.faults.pop(0) if is_rows and self.faults else ""
        self.asked.append(f"{self.command} {fault}")
        self.close_connection = True
        if fault == "reset":
            return
        if fault == "busy":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.send_header("Connection", "close")
            self.end_headers()
            return
        headers = {"Content-Type": "application/octet-stream", **self.headers}
        for name in ("Expect", "Transfer-Encoding"):
            headers.pop(name, None)
        request = urllib.request.Request(
            self.server_at + self.path, data=body, headers=headers, method=self.command
        )
        try:
            answer = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            answer = error
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)

    def _body(self) -> bytes | None:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            size = int(self.headers.get("Content-Length", 0))
            return self.rfile.read(size) if size else None
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handed_on

    def log_message(self, *_: Any) -> None:
        pass


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of moto's server."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(address, timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def proxy(server: str) -> Iterator[str]:
    FaultyProxy.server_at, FaultyProxy.faults, FaultyProxy.asked = server, [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), FaultyProxy) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


@pytest.fixture
def bucket(server: str, proxy: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket with rows.jsonl, reached through the proxy as a user would."""
    for name, value in {
        "AWS_ENDPOINT_URL": proxy,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    files = fsspec.filesystem("s3")
    if not files.exists("pools"):
        files.mkdir("pools")
    files.pipe_file("pools/rows.jsonl", CONTENT, ACL="public-read")
    FaultyProxy.asked.clear()
    return "s3://pools"


def texts(url: str) -> list[str]:
    rows = list(read_rows([url]))
    assert all(isinstance(row, Row) for row in rows)
    return [row.text for row in rows if isinstance(row, Row)]


WHOLE = [row["prompt"] + row["completion"] for row in ROWS]


@pytest.mark.parametrize("source", ["rows.jsonl", "*.jsonl", ""])
@pytest.mark.long
def test_rows_are_read_from_s3(bucket: str, source: str) -> None:
    assert texts(f"{bucket}/{source}") == WHOLE


@pytest.mark.parametrize("faults", [["busy"] * 3, ["cut", "reset", "busy", "cut"]])
@pytest.mark.long
def test_faults_of_the_network_pass_by(bucket: str, faults: list[str]) -> None:
    FaultyProxy.faults = list(faults)
    assert texts(f"{bucket}/rows.jsonl") == WHOLE
    assert not FaultyProxy.faults, "all faults were met"


@pytest.mark.parametrize("fault", ["cut", "reset", "busy"])
def test_http_is_read_again_too(server: str, bucket: str, proxy: str, fault: str) -> None:
    """fsspec's own http gives up at the first fault."""
    rows = read_rows([f"{proxy}/pools/rows.jsonl"])
    FaultyProxy.faults = [fault, fault]
    assert [row.text for row in rows if isinstance(row, Row)] == WHOLE
    assert not FaultyProxy.faults


def test_a_network_that_stays_away_is_told_and_loses_no_rows(
    bucket: str, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    rows = read_rows([f"{proxy}/pools/rows.jsonl"])
    FaultyProxy.faults = ["cut"] * 1000
    with pytest.raises(ValueError, match=r"rows.jsonl': 3 attempts failed, the last .*\nhint: "):
        list(rows)
    assert 980 < len(FaultyProxy.faults) < 1000


def test_what_is_not_there_is_told_at_once(bucket: str) -> None:
    with pytest.raises(ValueError, match=r"there is no file or folder 's3://pools/other"):
        read_rows([f"{bucket}/other.jsonl"])


@pytest.mark.long
def test_a_run_from_s3_to_s3(
    bucket: str,
    tiny_model: Path,
    tiny_data: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through the command line: plan from URLs, select, copy; a second copy is none."""
    from thrifty.cli import main

    files = fsspec.filesystem("s3")
    for part in ("pool", "signal", "dev", "test"):
        files.put_file(str(tiny_data[part]), f"pools/run/{part}.jsonl")
    run, home = str(tmp_path / "run"), f"{bucket}/run"
    plan = ["plan", "--model", str(tiny_model), "--pool", f"{home}/pool.jsonl", "-o", run]
    plan += ["--target", f"sums={home}/signal.jsonl", "--dev", f"sums={home}/dev.jsonl"]
    plan += ["--flops", "4e9", "--set", "training.max_length=64", "--scorer", "bm25"]
    plan += ["--set", "selection.max_tokens=3000"]
    FaultyProxy.faults = ["cut", "busy"]
    assert main(plan) == 0
    assert not FaultyProxy.faults
    select = ["select", run, "--copy-to", f"{home}/chosen/"]
    assert main(select) == 0
    local = Path(run, "selected")
    names = {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()}
    files.invalidate_cache()
    there = {path.removeprefix("pools/run/chosen/") for path in files.find("pools/run/chosen")}
    assert there == names >= {"manifest.json", "selected.jsonl", "data/state.json"}
    for name in names:
        assert files.cat_file(f"pools/run/chosen/{name}") == (local / name).read_bytes()
    written = [asked for asked in FaultyProxy.asked if asked.startswith("PUT")]
    assert main(select) == 0
    assert [asked for asked in FaultyProxy.asked if asked.startswith("PUT")] == written
    assert "lies already at s3://pools/run/chosen" in capsys.readouterr().err
    chosen = [json.loads(line) for line in (local / "selected.jsonl").read_text().splitlines()]
    assert texts(f"{home}/chosen/data") == [row["prompt"] + row["completion"] for row in chosen]
