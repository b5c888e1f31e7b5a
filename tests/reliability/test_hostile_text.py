"""Names and rows that were made to do harm: no path leads out of the run's folder, no escape
reaches a terminal, and the report of a real run is inert in a real browser."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import sentences
from tests.report.test_page import ESCAPES, IMAGE, SCRIPT, STYLE, TEMPLATE, assert_inert
from thrifty.cli import main
from thrifty.core.redaction import redact
from thrifty.data.faults import excerpt
from thrifty.data.inert import for_terminal, visible
from thrifty.run_folder import RunFolder

LINKS = "<a href='javascript:alert(4)'>x</a> [x](javascript:alert(5)) =cmd|' /C calc'!A0 ${7*7}"
FETCH = "<img src='{url}/a'><script src='{url}/b'></script><link rel=stylesheet href='{url}/c'>"
FETCH += (
    "<iframe src='{url}/d'></iframe><svg onload=fetch('{url}/e')><style>@import '{url}/f'</style>"
)
HOSTILE = SCRIPT + IMAGE + STYLE + TEMPLATE + LINKS
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
OPTIONS = ["--flops", "4e9", "--scorer", "bm25", "--set", "training.max_length=64"]


def plan(
    model: Path, data: dict[str, Path], run: Path, *more: str, name: str = "sums", pool: Path
) -> int:
    target = [f"--target={name}={data['signal']}", f"--dev={name}={data['dev']}"]
    command = ["plan", "--model", str(model), "--pool", str(pool), *target, *OPTIONS]
    return main([*command, f"--output={run}", *more])


# -- names --------------------------------------------------------------------------------------

NAMES = ["../../x", "a/b", "/x", "..", ".", "", " ", "-rf", "x" * 4096, "new\nline", "\u202ertl"]
NAMES += ["\x1b[31mred", "nul", "CON", "com1.txt", "C:", "a\\b", "tab\there", "dot.", "\ud800"]


@pytest.mark.parametrize("name", NAMES)
def test_a_target_is_no_path(
    name: str, tiny_model: Path, tiny_data: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    home = tmp_path / "a" / "b"
    home.mkdir(parents=True)
    pool = tiny_data["small_pool"]
    assert plan(tiny_model, tiny_data, home / "run", name=name, pool=pool) == 4
    told = capsys.readouterr().err
    assert "the target name" in told
    assert "hint:" in told
    assert not CONTROL.search(told)
    assert [path for path in tmp_path.rglob("*") if path != home and path != home.parent] == []


def test_an_edited_plan_leads_nowhere_else(
    tiny_model: Path, tiny_data: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    run = RunFolder(tmp_path / "run")
    assert plan(tiny_model, tiny_data, run.path, pool=tiny_data["small_pool"]) == 0
    (run.path / "targets" / "sums").rename(tmp_path / "elsewhere")
    run.plan_file.write_text(run.plan_file.read_text().replace("  sums:", "  ../../elsewhere:"))
    assert main(["run", str(run.path)]) == 4
    assert "hint:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["-rf", "new\nline", "\u202ertl", "\U0001f600", "\x1b[31mred", "torch", "a b", "=1+1"]
)
def test_a_run_may_have_any_name_and_shows_none_raw(
    name: str, tiny_model: Path, tiny_data: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    pool = tmp_path / f"pool {name}.jsonl"
    pool.write_bytes(tiny_data["small_pool"].read_bytes() + b"null\n")
    run = tmp_path / name
    assert plan(tiny_model, tiny_data, run, pool=pool) == 0
    assert plan(tiny_model, tiny_data, run, pool=pool) == 0  # it is there, as asked for
    other = tiny_data["small_pool"]
    assert plan(tiny_model, tiny_data, run, pool=other) == 4  # which names it
    assert plan(tiny_model, tiny_data, tmp_path / "two", "--strict", pool=pool) == 4
    assert main(["report", str(run)]) == 0
    found = capsys.readouterr()
    assert not CONTROL.search(found.err)
    assert "set aside 1 bad rows" in found.err
    assert_inert((run / "report.html").read_text())


# -- terminals ----------------------------------------------------------------------------------


def test_rows_reach_a_terminal_without_their_escapes(
    tiny_model: Path, tiny_data: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    """By the errors, which quote files and rows, and by what explains a row."""
    text = f"\x1b]0;title\x07\x1b[2J\x9b31m\r{ESCAPES}".replace("\0", "")
    rows = [{"prompt": f"{text} {n}", "completion": f" {text}"} for n in range(40)]
    pool = tmp_path / "\x1b[31mpool\r.jsonl"
    pool.write_text("\n".join(map(json.dumps, rows)) + '\n{"prompt": "\x1b[1m"\n')
    assert plan(tiny_model, tiny_data, tmp_path / "run", "--strict", pool=pool) == 4
    (tmp_path / "bad.jsonl").write_text('{"\x1b[31m": 1}\n')
    assert plan(tiny_model, tiny_data, tmp_path / "run", pool=tmp_path / "bad.jsonl") == 4
    assert plan(tiny_model, tiny_data, tmp_path / "run", pool=pool) == 0
    assert main(["select", str(tmp_path / "run")]) == 0
    assert main(["select", str(tmp_path / "run"), "--explain", "0"]) == 0
    found = capsys.readouterr()
    assert not CONTROL.search(found.err), CONTROL.search(found.err)
    assert not CONTROL.search(found.out), CONTROL.search(found.out)
    assert r"\x1b[31mpool\r.jsonl" in found.err


def test_what_is_made_visible() -> None:
    assert visible(HOSTILE + ESCAPES, 10_000).isprintable()
    assert for_terminal("one\n\ttwo \x1b[31m\r") == "one\n\ttwo \\x1b[31m\\r"
    assert excerpt(ESCAPES).isprintable()
    assert redact("s3://me:word@host/x?X-Amz-Signature=0123&n=1") == (
        "s3://***@host/x?X-Amz-Signature=***&n=1"
    )


# -- a page in a browser ------------------------------------------------------------------------


class _Trap(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""


@contextmanager
def trap() -> Iterator[tuple[str, list[str]]]:
    """A server on loopback, and what it is asked for."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Trap)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(chromium: Any, path: Path) -> tuple[Any, list[str], list[str]]:
    """A page, the requests that left it, and what ran in it."""
    page = chromium.new_page()
    requests: list[str] = []
    ran: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("dialog", lambda dialog: (ran.append(dialog.message), dialog.dismiss()))
    page.goto(path.as_uri(), wait_until="load")
    page.wait_for_timeout(300)
    return page, [url for url in requests if url != path.as_uri()], ran


def hostile_rows(text: str) -> list[dict[str, str]]:
    return [{"text": f"{text} {row['completion']}"} for row in sentences("sums", 60, 9)]


@pytest.mark.slow
def test_the_report_of_a_hostile_pool_is_inert_in_chromium(
    tiny_model: Path, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    with trap() as (url, asked), browser() as chromium:
        text = HOSTILE + FETCH.format(url=url)
        bare = tmp_path / "bare.html"  # what a page without care would do
        bare.write_text(f"<html><body>{text}<script>alert(0)</script>")
        _, requests, ran = opened(chromium, bare)
        assert "1" in ran
        assert "0" in ran
        assert len(requests) >= 4
        assert len(asked) >= 3
        asked.clear()

        pool = tmp_path / "pool <img src=x onerror=alert(6)>.jsonl"
        rows = "\n".join(map(json.dumps, hostile_rows(text)))
        broken = json.dumps({text: text}) + f"\n{text}\n"
        pool.write_text(f"{rows}\n{broken}")
        name = "sums'`&lt;b&gt; {{7+7}}"
        run = RunFolder(tmp_path / "run <script>alert(8)<" / "run")
        more = ("--set", "selection.max_tokens=1e9", "--set", "training.max_length=128")
        assert plan(tiny_model, tiny_data, run.path, *more, name=name, pool=pool) == 0
        assert main(["run", str(run.path)]) == 0
        source = run.report.read_text()
        assert "alert(1)" in source  # the rows are shown
        assert_inert(source)

        page, requests, ran = opened(chromium, run.report)
        assert (requests, ran, asked) == ([], [], [])
        assert page.evaluate("document.scripts.length") == 0
        assert page.evaluate("document.querySelectorAll('img, iframe, a, link, form').length") == 0
        assert "{{7*7}}" in (page.text_content("body") or "")
        policy = "meta[http-equiv='Content-Security-Policy']"
        assert page.get_attribute(policy, "content").startswith("default-src 'none'")
        # Even what got into the page would neither run nor ask for anything.
        page.evaluate(
            """url => {
                const put = (tag, set) => document.body.append(
                    Object.assign(document.createElement(tag), set));
                put("img", {src: url + "/image"});
                put("script", {src: url + "/script"});
                put("script", {textContent: "document.title = 'ran'"});
                put("iframe", {src: url + "/frame"});
                put("link", {rel: "stylesheet", href: url + "/style"});
                fetch(url + "/fetched").catch(() => {});
            }""",
            url,
        )
        page.wait_for_timeout(500)
        assert page.title() != "ran"
        assert asked == []
