"""``thrifty serve`` as a process: what it does not start with, what it leaves when it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.backends.stub_server import Reply, StubServer
from thrifty.cli import main
from thrifty.core.ledger import Ledger

KEY = "a key that nobody guesses"
ASKED = {"model": "m", "messages": [{"role": "user", "content": "6 x 7?"}]}


@contextmanager
def served(*arguments: str, **variables: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its URL, and the process; killed in the end if it still runs."""
    command = [sys.executable, "-m", "thrifty", "serve", "--port", "0", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.match(r"serving (http://\S+)/v1", line):
                break
        else:
            raise AssertionError("".join(lines))
        url = found[1]
        for _ in range(400):
            try:
                if httpx2.get(f"{url}/health").status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(0.05)
        yield url, process
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str], number: int) -> tuple[int, str]:
    """Its exit code, and what else it said."""
    process.send_signal(number)
    _, talk = process.communicate(timeout=60)
    return process.returncode, talk


def test_a_process_serves_until_it_is_told_to_stop(tmp_path):
    with StubServer() as stub:
        options = ["--upstream", stub.url, "--tokens", "10k", "--ledger", str(tmp_path / "spent")]
        with served(*options, THRIFTY_KEY=KEY) as (url, process):
            with httpx2.Client(headers={"authorization": f"Bearer {KEY}"}, timeout=60) as http:
                answer = http.post(f"{url}/v1/chat/completions", json=ASKED)
                assert answer.json()["thrifty"]["left"] == {"tokens": 9993}
                assert httpx2.post(f"{url}/v1/chat/completions", json=ASKED).status_code == 401
            code, talk = ended(process, signal.SIGTERM)
            assert code == 0
            assert "Traceback" not in talk
            assert KEY not in talk
    with Ledger(tmp_path / "spent" / "ledger.sqlite", read_only=True) as journal:
        assert journal.spent(account="key one").tokens == 7
        assert [charge["lost"] for charge in journal.charges()] == [False]


def test_what_was_under_way_at_a_kill_counts_as_the_most(tmp_path):
    keys, ledger = tmp_path / "keys.yaml", tmp_path / "ledger.sqlite"
    keys.write_text(f"keys: [{{name: alice, key: {KEY}, budget: {{tokens: 5000}}}}]")
    with StubServer(lambda r: Reply(delay=30 if r.json.get("seed") else 0)) as stub:
        options = ["--upstream", stub.url, "--keys", str(keys), "--ledger", str(ledger)]
        options += ["--max-tokens", "100"]
        headers = {"authorization": f"Bearer {KEY}"}
        with served(*options) as (url, process):
            post = f"{url}/v1/chat/completions"
            assert httpx2.post(post, json=ASKED, headers=headers, timeout=60).status_code == 200

            def wait() -> None:
                with pytest.raises(httpx2.TransportError):
                    httpx2.post(post, json={**ASKED, "seed": 1}, headers=headers, timeout=60)

            waiting = threading.Thread(target=wait)
            waiting.start()
            while len(stub.requests) < 2:
                time.sleep(0.01)
            process.kill()
            process.wait()
            waiting.join()
        with served(*options) as (url, process):
            answer = httpx2.post(
                f"{url}/v1/chat/completions", json=ASKED, headers=headers, timeout=60
            )
            left = answer.json()["thrifty"]["left"]["tokens"]
            held = 5000 - 14 - left
            assert 100 + 512 < held < 1000  # of the one that was killed
            ended(process, signal.SIGINT)
    with Ledger(ledger, read_only=True) as journal:
        assert journal.spent(account="key alice").tokens == 14 + held
        assert journal.spent(account="key alice", lost=True).tokens == held


@pytest.mark.long
def test_a_stream_in_its_middle_is_waited_for(tmp_path):
    with StubServer([Reply(texts=("a b c d e f g h",), pace=0.2)]) as stub:
        options = ["--upstream", stub.url, "--ledger", str(tmp_path)]
        with served(*options) as (url, process):
            post, said = f"{url}/v1/chat/completions", b""
            with httpx2.stream("POST", post, json={**ASKED, "stream": True}, timeout=60) as answer:
                for piece in answer.iter_raw():
                    if not said:
                        process.send_signal(signal.SIGTERM)
                    said += piece
            assert said.endswith(b"data: [DONE]\n\n")
            assert process.wait(60) == 0
    with Ledger(tmp_path / "ledger.sqlite", read_only=True) as journal:
        assert journal.spent(account="key anybody").tokens == 11


def test_a_key_goes_nowhere_unless_it_is_named(tmp_path):
    """Neither the client's nor the usual one of the environment; the named one to its upstream."""
    with StubServer() as stub:
        options = ["--upstream", stub.url, "--model", "m", "--ledger", str(tmp_path)]
        options += ["--policy", "fixed", "--answer", "none", "--allow-host", "thrifty.test"]
        variables = {"OPENAI_API_KEY": "sk-usual-0123456789", "OWN": "sk-own-0123456789"}
        headers = {"authorization": f"Bearer {KEY}", "host": "thrifty.test"}
        for named, sent in (("-", None), ("OWN", "Bearer sk-own-0123456789")):
            with (
                served(*options, "--upstream-key", named, **variables) as (url, _),
                httpx2.Client(base_url=url, headers=headers, timeout=60) as http,
            ):
                for more in ({}, {"n": 2}):  # by the policy, and handed on
                    answer = http.post("/v1/chat/completions", json={**ASKED, **more})
                    assert answer.status_code == 200
                    assert stub.requests[-1].headers.get("authorization") == sent
        assert not any(KEY in str(request) for request in stub.requests)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--host", "0.0.0.0"], "anybody who reaches 0.0.0.0 could spend"),
        (["--dollars", "5"], "has no price"),
        (["--dollars", "5", "--price", "1,2"], "--model NAME"),
        (["--flops", "1e18"], "--config FOLDER"),
        (["--price", "cheap"], "is no two prices"),
        (["--price", "nan,1"], "prompt_price"),
        (["--price", "1,2", "--price", "3,4"], "2 times for 1 upstreams"),
        (["--keys", "nowhere.yaml"], "nowhere.yaml"),
        (["--keys", "nowhere.yaml", "--tokens", "5"], "beside --keys"),
        (["--tokens", "none"], "tokens"),
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["--max-samples", "0"], "--max-samples 0"),
        (["--policy", "fixed"], "--model NAME"),
        (["--policy", "best_of", "--model", "m"], "needs rewards"),
        (["--policy", "fixd"], "fixed"),
        (["--samples", "3"], "one sample"),
        (["--samples", "3", "--policy", "fixed", "--model", "m"], "--policy marginal"),
        (["--samples", "3", "--policy", "marginal", "--worth", "1", "--model", "m"], "--worth"),
        (["--samples", "0", "--policy", "marginal", "--model", "m"], "mean of more than 0"),
        (["--upstream-key", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE is not set"),
        (["--timeout", "soon"], "time"),
        (["--port", "70000"], "cannot listen"),
    ],
)
def test_what_it_does_not_start_with(arguments, told, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("THRIFTY_KEY", raising=False)
    options = ["--upstream", "http://127.0.0.1:9", "--answer", "none", *arguments]
    assert main(["serve", *options]) == 4
    said = capsys.readouterr().err
    assert told in said
    assert "\nhint: " in said


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a/v1", "http://user:pw@a/v1", "http://"])
def test_a_url_that_is_none(url, capsys):
    assert main(["serve", "--upstream", url]) == 4
    said = capsys.readouterr().err
    assert "hint: " in said
    assert "pw" not in said


def test_a_port_that_is_taken(capsys, tmp_path):
    with StubServer() as stub:
        options = ["--upstream", stub.url, "--ledger", str(tmp_path), "--port", str(stub.port)]
        assert main(["serve", *options]) == 4
    assert "another --port" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fastapi", "uvicorn"])
def test_what_is_not_installed_is_named(name, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["serve", "--upstream", "http://127.0.0.1:9"]) == 4
    said = capsys.readouterr().err
    assert name in said
    assert "pip install 'thrifty[serve]'" in said


def test_the_command_line_loads_no_server():
    """So that every other command starts as fast as before."""
    loaded = "import sys, thrifty.cli as c; c._parser(); print(json.dumps(list(sys.modules)))"
    out = subprocess.run(
        [sys.executable, "-c", f"import json; {loaded}"], capture_output=True, text=True, check=True
    )
    names = {name.partition(".")[0] for name in json.loads(out.stdout)}
    assert not names & {"fastapi", "uvicorn", "starlette", "httpx2", "torch"}


def test_answers_do_not_wait_for_acknowledgements():
    """asyncio turns Nagle's algorithm off for sockets that name their protocol alone."""
    from thrifty.serving.setup import listening_socket

    with listening_socket("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    assert "--upstream-key" in capsys.readouterr().out


def test_a_ledger_is_made_where_it_is_named(tmp_path: Path):
    from thrifty.serving.setup import ledger_file

    assert ledger_file(str(tmp_path)) == tmp_path / "ledger.sqlite"
    assert ledger_file("a/b.sqlite") == Path("a/b.sqlite")
