"""Keys and passwords of the environment and of URLs are in no file that a run leaves and in nothing
that a command prints, also where it fails."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pyarrow.parquet as pq
import pytest

from tests.backends.stub_server import Reply, StubServer
from tests.conftest import write_jsonl
from tests.serving.test_serve_command import ended, served
from thrifty.cli import main
from thrifty.core.redaction import redact

VARIABLES = (
    "HF_TOKEN",
    "OPENAI_API_KEY",
    "WANDB_API_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
)
USER, PASSWORD, QUERY = "canary-user-0123", "canary-password-0123", "canary-query-0123"
OPTIONS = ["--flops", "4e9", "--scorer", "bm25", "--set", "training.max_length=64"]


@pytest.fixture(autouse=True)
def canaries(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    held = {name: f"canary-{name.lower().replace('_', '-')}-0123" for name in VARIABLES}
    for name, value in held.items():
        monkeypatch.setenv(name, value)
    return {**held, "user": USER, "password": PASSWORD, "query": QUERY}


def check_nowhere(canaries: dict[str, str], folder: Path, *told: str) -> None:
    """In no file under ``folder``, in no column of a table, and in nothing that was told."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for name, value in canaries.items():
        for text in told:
            assert value not in text, f"{name} was printed: {text}"
        for path in files:
            assert value.encode() not in path.read_bytes(), f"{name} is in {path}"
            assert value not in str(path)
    for path in files:
        if path.suffix == ".parquet":
            held = str(pq.read_table(path).to_pylist())
            assert not any(value in held for value in canaries.values()), path


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[str]:
    """Files on loopback, at a URL with user, password and a signed query to follow."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self, *, body: bool = True) -> None:
            content = files.get(self.path.partition("?")[0])
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if body:
                self.wfile.write(content or b"")

        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def log_message(self, *arguments: Any) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://{USER}:{PASSWORD}@127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def plan(model: Path, data: dict[str, Path], pool: str, run: Path, *more: str) -> int:
    target = ["--target", f"sums={data['signal']}", "--dev", f"sums={data['dev']}"]
    command = ["plan", "--model", str(model), "--pool", pool, *target, *OPTIONS]
    return main([*command, "-o", str(run), *more])


@pytest.mark.slow
def test_a_run_from_a_url_leaves_and_prints_no_secret(
    tiny_model: Path,
    tiny_data: dict[str, Path],
    tmp_path: Path,
    canaries: dict[str, str],
    capsys: Any,
) -> None:
    dirty = tiny_data["small_pool"].read_bytes() + b"null\n"
    with serving({"/pool.jsonl": dirty}) as url:
        source = f"{url}/pool.jsonl?X-Amz-Signature={QUERY}"
        run = tmp_path / "run"
        assert plan(tiny_model, tiny_data, source, run) == 0
        assert plan(tiny_model, tiny_data, source, tmp_path / "strict", "--strict") == 4
        assert plan(tiny_model, tiny_data, f"{url}/none.jsonl?token={QUERY}", tmp_path / "x") == 4
    for command in (["run"], ["report"], ["report", "--json"], ["verify"]):
        assert main([*command, str(run)]) == 0
    exported = ["export", str(run), "--to", "trl", "-o", str(tmp_path / "exported")]
    assert main(exported) == 0
    found = capsys.readouterr()
    assert "set aside 1 bad rows" in found.err
    check_nowhere(canaries, tmp_path, found.out, found.err)


def test_a_crash_prints_no_secret(
    tiny_model: Path,
    tiny_data: dict[str, Path],
    tmp_path: Path,
    canaries: dict[str, str],
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a library that puts all that it knows into its error."""
    run = tmp_path / "run"
    assert plan(tiny_model, tiny_data, str(tiny_data["small_pool"]), run) == 0
    from thrifty.scorers.baselines.bm25 import BM25

    def fails(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError(f"{canaries} https://{USER}:{PASSWORD}@host/x?sig={QUERY}&n=1")

    monkeypatch.setattr(BM25, "prepare", fails)
    assert main(["run", str(run)]) == 5
    assert main(["report", str(run)]) == 0
    found = capsys.readouterr()
    assert "Traceback" in found.err
    known = {name: value for name, value in canaries.items() if name in VARIABLES}
    check_nowhere(known, run, found.err, found.out)
    report = (run / "report.html").read_text()
    assert f":{PASSWORD}@" not in found.err + found.out + report
    assert f"sig={QUERY}" not in found.err + found.out + report


@pytest.mark.slow
def test_answers_from_an_endpoint_leave_no_secret(
    tmp_path: Path, canaries: dict[str, str], capsys: Any
) -> None:
    prompts = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "6 x 7?"}, {"prompt": "2 + 2?"}])
    key = canaries["OPENAI_API_KEY"]
    echoes = [Reply(), Reply(status=500, body=f"no: {key}".encode()), Reply(status=401)]
    for number, reply in enumerate(echoes):
        with StubServer([reply]) as server:
            endpoint = ["--endpoint", server.url + "/v1", "--model", "m", "--samples", "1"]
            out = tmp_path / f"out{number}"
            main(["decode", *endpoint, "--prompts", str(prompts), "-o", str(out)])
            url = f"{server.url}/v1".replace("://", f"://{USER}:{PASSWORD}@")
            endpoint[1] = url
            main(["decode", *endpoint, "--prompts", str(prompts), "-o", f"{out}-with-password"])
            assert any(key in request.headers["authorization"] for request in server.requests)
    found = capsys.readouterr()
    check_nowhere(canaries, tmp_path, found.out, found.err)


@pytest.mark.slow
def test_a_proxy_leaves_and_tells_no_secret(
    tmp_path: Path, canaries: dict[str, str], capsys: Any
) -> None:
    """Its upstream tells the key that it was asked with."""
    key, own = canaries["OPENAI_API_KEY"], "canary-client-key-0123"
    echo = f'{{"error": {{"message": "no such key: {key}"}}}}'.encode()
    replies = [Reply(), Reply(status=500, body=f"no: {key}".encode()), Reply(status=401, body=echo)]
    replies.append(Reply(headers={"x-key": key}))
    ask = {"model": "m", "messages": [{"role": "user", "content": "6 x 7?"}]}
    told = []
    with StubServer(replies) as stub:
        options = ["--upstream-key", "OPENAI_API_KEY", "--ledger", str(tmp_path / "spent")]
        with_password = stub.url.replace("://", f"://{USER}:{PASSWORD}@")
        assert main(["serve", "--upstream", f"{with_password}?token={QUERY}", *options]) == 4
        with served("--upstream", stub.url, *options, THRIFTY_KEY=own) as (url, process):
            with httpx2.Client(headers={"authorization": f"Bearer {own}"}, timeout=60) as http:
                for body in [*[ask] * 4, {**ask, "stream": True}]:
                    answer = http.post(f"{url}/v1/chat/completions", json=body)
                    told += [answer.text, str(answer.headers)]
                told += [http.get(f"{url}{path}").text for path in ("/metrics", "/v1/models", "/x")]
            told += [httpx2.get(f"{url}/metrics").text, ended(process, signal.SIGTERM)[1]]
        asked = [request.headers.get("authorization", "") for request in stub.requests]
        assert any(key in each for each in asked)
    found = capsys.readouterr()
    check_nowhere({**canaries, "client": own}, tmp_path, found.out, found.err, *told)


@pytest.mark.slow
def test_a_report_to_weights_and_biases_holds_no_secret(
    tiny_model: Path,
    tiny_data: dict[str, Path],
    tmp_path: Path,
    canaries: dict[str, str],
) -> None:
    """Offline, where it writes down what it would send."""
    pytest.importorskip("wandb")
    with serving({"/pool.jsonl": tiny_data["small_pool"].read_bytes()}) as url:
        source = f"{url}/pool.jsonl?X-Amz-Signature={QUERY}"
        more = ["--set", "training.report_to=[wandb]"]
        assert plan(tiny_model, tiny_data, source, tmp_path / "run", *more) == 0
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "thrifty", "run", str(tmp_path / "run")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = [path for path in (tmp_path / "wandb").rglob("*.wandb") if path.is_file()]
    assert any(b"eval/loss" in path.read_bytes() for path in written)
    check_nowhere(canaries, tmp_path, done.stdout, done.stderr)


def test_redaction_is_of_secrets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "0123456789")
    monkeypatch.setenv("SHORT_KEY", "a")
    monkeypatch.setenv("MONKEY_BUSINESS", "bananas-everywhere")
    text = "a 0123456789 bananas-everywhere https://u:p@h/x?token=t&keyboard=q&n=1"
    assert redact(text) == "a *** bananas-everywhere https://***@h/x?token=***&keyboard=***&n=1"
    assert json.loads(redact(json.dumps({"url": "s3://a:b@c/d?sig=e"})))["url"] == (
        "s3://***@c/d?sig=***"
    )
