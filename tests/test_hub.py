"""Models from a hub: a real client against a small hub on this machine; the words of refusals."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSED = {
    "org/gated": (403, "GatedRepo"),
    "org/missing": (404, "RepoNotFound"),
    "org/broken": (500, ""),
}


class Hub(BaseHTTPRequestHandler):
    """``org/tiny`` with the files of ``folder``; the others are refused as the hub would."""

    folder: Path

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models").removeprefix("/")
        name = "/".join(path.split("/")[:2])
        if name in REFUSED:
            status, code = REFUSED[name]
            self._send(status, b"{}", {"X-Error-Code": code} if code else {}, body)
        elif "/revision/" in path:
            revision = path.rpartition("/")[2]
            files = [{"rfilename": file.name} for file in sorted(self.folder.iterdir())]
            if revision not in ("main", COMMIT):
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            facts = {"id": name, "sha": COMMIT, "siblings": files}
            self._send(200, json.dumps(facts).encode(), {}, body)
        elif "/tree/" in path:
            listed = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": COMMIT}
                for file in sorted(self.folder.iterdir())
            ]
            self._send(200, json.dumps(listed).encode(), {}, body)
        else:
            data = (self.folder / path.rpartition("/")[2]).read_bytes()
            mark = hashlib.sha256(data).hexdigest()
            self._send(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{mark}"'}, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture(scope="module")
def hub(tiny_model: Path) -> Iterator[str]:
    handler = type("TinyHub", (Hub,), {"folder": tiny_model})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def plan(model: str, endpoint: str, home: Path, *more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "thrifty", "plan", "--model", model, *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_hub_model_is_fetched_and_its_revision_recorded(hub, tiny_data, tmp_path):
    made = plan(
        "org/tiny", hub, tmp_path / "home", "--pool", str(tiny_data["small_pool"]),
        "--flops", "6e9", "--scorer", "uniform", "-o", str(tmp_path / "run"),
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    text = (tmp_path / "run" / "plan.yaml").read_text()
    assert f"revision: {COMMIT}" in text or f"revision: '{COMMIT}'" in text
    assert "path: org/tiny" in text
    fetched = {file.name for file in (tmp_path / "home").rglob("*") if file.is_file()}
    assert {"config.json", "tokenizer.json"} <= fetched
    assert "model.safetensors" not in fetched, "a plan needs no weights"
    # What was fetched serves without the hub.
    again = plan("org/tiny", "http://127.0.0.1:9", tmp_path / "home", "--json")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("model", "more", "says", "hint"),
    [
        ("org/gated", (), "org/gated is gated", "accept its terms"),
        ("org/missing", (), "no model org/missing on the hub, or it is private", "./NAME"),
        ("org/tiny", ("--revision", "v9"), "org/tiny has no revision v9", "check the name"),
        ("org/broken", (), "the hub did not answer", "hf download"),
        ("a b", (), "neither a folder nor a hub name", "ORG/NAME"),
    ],
)
def test_each_refusal_has_its_own_words(model, more, says, hint, hub, tmp_path):
    done = plan(model, hub, tmp_path / "home", *more)
    assert done.returncode == 4
    assert says in done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_no_network(tmp_path):
    done = plan("org/tiny", "http://127.0.0.1:9", tmp_path / "home")
    assert done.returncode == 4
    assert "not in the local cache and the hub did not answer" in done.stderr
