"""Rows that were read from a URL: a change since the plan is refused with what the server said of
the file then and now; where the server tells too little, or nobody can ask it, that is said."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.runs import asked, silent
from thrifty import preparation
from thrifty.cli import main
from thrifty.data import remote_marks
from thrifty.preparation import plan_run


def plan(model: Path, data: dict[str, Path], pool: str, run: Path, say: Any = silent) -> None:
    plan_run(asked(model, {**data, "pool": pool}), run, say)


def noted(run: Path, name: str) -> dict[str, str]:
    return json.loads((run / "sources.json").read_text())[name]["mark"]


def test_a_file_in_memory_that_changed_is_refused(tiny_model, tiny_data, tmp_path, capsys):
    fs, content = fsspec.filesystem("memory"), tiny_data["small_pool"].read_bytes()
    run, url = tmp_path / "run", "memory://changed/pool.jsonl"
    fs.pipe_file("/changed/pool.jsonl", content)
    said: list[str] = []
    plan(tiny_model, tiny_data, url, run, said.append)
    assert not any("the server tells" in line for line in said)
    then = noted(run, url)
    assert set(then) == {"created", "size"}
    fs.pipe_file("/changed/pool.jsonl", content)  # the same again, at another time
    for command, told in ((["select"], "err"), (["verify"], "out")):
        assert main([*command, str(run)]) == 4
        line = getattr(capsys.readouterr(), told)
        assert f"{url}, which rows were read from, has changed since the plan: created " in line
        assert f"{then['created']}, size {len(content)} then, created " in line
        assert f"size {len(content)} now" in line


class Served:
    """A file on loopback, with what the server says of it."""

    def __init__(self, content: bytes, **headers: str) -> None:
        self.content, self.headers = content, headers


@pytest.fixture
def served() -> Iterator[tuple[str, Served]]:
    file = Served(b"")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self, *, body: bool = True) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(file.content)))
            for name, value in file.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(file.content)

        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def log_message(self, *arguments: Any) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/pool.jsonl", file
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_whose_checksum_changed_is_refused_and_one_out_of_reach_is_said(
    served, tiny_model, tiny_data, tmp_path, capsys, monkeypatch
):
    url, file = served
    run = tmp_path / "run"
    file.content, file.headers = tiny_data["small_pool"].read_bytes(), {"ETag": '"first"'}
    plan(tiny_model, tiny_data, url, run)
    assert noted(run, url) == {"ETag": '"first"', "size": str(len(file.content))}
    file.headers["Last-Modified"] = "Fri, 01 May 2026 00:00:00 GMT"  # it knows better by the other
    assert main(["verify", str(run)]) == 0
    file.headers["ETag"] = '"second"'
    assert main(["select", str(run)]) == 4
    told = f'since the plan: ETag "first", size {len(file.content)} then, ETag "second", size '
    assert told in capsys.readouterr().err
    monkeypatch.setattr(remote_marks, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(remote_marks, "_mark", lambda *_: threading.Event().wait())
    assert main(["verify", str(run)]) == 0
    assert f"{url}: cannot be asked: whether it has changed" in capsys.readouterr().err


def test_a_server_that_tells_a_size_alone_is_said(served, tiny_model, tiny_data, tmp_path, capsys):
    url, file = served
    run, said = tmp_path / "run", list[str]()
    file.content = tiny_data["small_pool"].read_bytes()
    plan(tiny_model, tiny_data, url, run, said.append)
    assert f"{url}: the server tells no checksum and no time: a change" in "\n".join(said)
    file.content = file.content[:-1] + b" "
    assert main(["verify", str(run)]) == 0
    file.content += b"\n"
    assert main(["verify", str(run)]) == 4
    assert f"size {len(file.content) - 1} then, size {len(file.content)} now" in (
        capsys.readouterr().out
    )


def test_a_file_that_changes_while_it_is_read_is_no_plan(
    served, tiny_model, tiny_data, tmp_path, monkeypatch
):
    url, file = served
    file.content, file.headers = tiny_data["small_pool"].read_bytes(), {"ETag": "1"}
    plain = preparation.read_asked

    def meanwhile(*arguments: Any) -> Any:
        found = plain(*arguments)
        file.headers["ETag"] = "2"
        return found

    monkeypatch.setattr(preparation, "read_asked", meanwhile)
    with pytest.raises(ValueError, match=r"pool.jsonl changed while it was read\nhint: "):
        plan(tiny_model, tiny_data, url, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
