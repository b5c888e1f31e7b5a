"""The page: complete in every state of a run, inert whatever the data say, and on its own."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.report import runs
from thrifty.core.ledger import Ledger
from thrifty.core.plan import Target
from thrifty.report.figures import histogram_figure
from thrifty.report.page import render, write_report
from thrifty.run_folder import RunFolder

SCRIPT = "</script><script>alert(1)</script>"
IMAGE = "<img src=x onerror=alert(2)>"
STYLE = "</style></title></pre><style>*{display:none}</style>"
TEMPLATE = "{{7*7}}{% raw %}"
ESCAPES = "\x1b[31mred\x1b[0m \x00 \u202eright to left\u2066 \u200bzero"
HOSTILE = SCRIPT + IMAGE + STYLE + TEMPLATE + ESCAPES
LONG = HOSTILE + "A" * 1_000_000


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text outside of styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.text += data


def assert_inert(text: str) -> Page:
    """No script, no handler, nothing to fetch, no hidden character, no foreign style."""
    page = Page(text)
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "img", "iframe", "object", "embed", "link", "base", "form", "a"} & {*tags}
    assert tags.count("style") == 1
    assert tags.count("title") == 1
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert value is not None
                assert value.startswith("#"), value
            if "url(" in (value or ""):
                assert set(re.findall(r"url\((.)", value or "")) == {"#"}, value
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\u200b]", text)
    return page


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return runs.finished(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="module")
def text(finished: RunFolder) -> str:
    return render(finished)


def test_one_file_on_its_own(finished: RunFolder, text: str) -> None:
    before = {path.name for path in finished.path.iterdir()}
    path = write_report(finished)
    assert path == finished.path / "report.html"
    assert path.read_text(encoding="utf-8") == text  # the same run, the same bytes
    assert {p.name for p in finished.path.iterdir()} == before | {"report.html", "SHA256SUMS"}
    assert text.startswith("<!DOCTYPE html>")
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text
    assert set(re.findall(r"https?://[\w./-]+", text)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert_inert(text)


def test_contents_in_order(text: str) -> None:
    page = Page(text)
    wanted = (
        "finished Asked Supervised fine-tuning of models/small towards asyncio;"
        "had guessed a gain of 0.42 ± 0.05;beat a uniform choice;cool-down;Dev loss against FLOPs;"
        "Budget;FLOPs bound 10 TFLOP 9.04 TFLOP 960 GFLOP 9.2 TFLOP -1.7%;"
        "Stages;control-train;What each stage brought;whole run;Decisions;grad_cosine;"
        "Rule version 1;While it ran;Values of the plan;"
        "Scores for asyncio;Selected;Rejected;duplicate of row 17;Quarantined;an empty answer;"
        "How the numbers are defined;predicted;measured;thrifty report RUN --json"
    )
    shown, position = " ".join(page.text.split()), 0
    for words in wanted.split(";"):
        found = shown.find(words, position)
        assert found >= 0, f"{words!r} does not come after {shown[position - 60 : position]!r}"
        position = found + len(words)
    assert sum(tag == "svg" for tag, _ in page.elements) == 4
    assert sum(tag == "details" for tag, _ in page.elements) == 41


def test_each_decision_shows_its_forecast_and_the_odds(text: str) -> None:
    row = re.search(r"<tr>(?:(?!</tr>).)*interval gains 0\.04.*?</tr>", text, re.DOTALL)
    assert row is not None
    assert "97.3%" in row[0]
    assert "+0.040" in row[0]
    assert "its end as last forecast, 95%" in text
    assert "Diamond: where the last of them saw the run end" in text


def test_figures_take_their_colours_from_the_page(text: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    colours = {c for f in figures for c in re.findall(r"(?:fill|stroke): ([^;\"]+)", f)}
    assert all(c == "none" or c.startswith("var(--") for c in colours), colours
    assert "font-family" not in "".join(figures)
    declared = set(re.findall(r"(--[\w-]+):", text[: text.index("</style>")]))
    assert {c[4:-1] for c in colours if c != "none"} <= declared


def states(path: Path, name: str) -> RunFolder:
    if name == "lost to its control":
        return runs.finished(path, difference=-0.05)
    if name == "no control, no price":
        return runs.finished(path, with_control=False, price=False)
    if name == "without predictions":
        run, ledger = runs.start(path, runs.plan(predicted={}, why={}, targets={}, **UNLIMITED))
        with ledger:
            runs.train(ledger)
        return run
    run, ledger = runs.start(path, runs.plan(control=True))
    if name == "leases open":
        stage = ledger.stage("train", "full").__enter__()
        stage.lease("train", runs.cost(1e12, 60.0))
        copy = RunFolder(path.with_name("copy"))  # as another process sees it
        copy.path.mkdir()
        for file in path.iterdir():
            (copy.path / file.name).write_bytes(file.read_bytes())
        return copy
    with ledger:
        if name == "selected":
            runs.select(run, ledger)
        if name == "stopped":
            with pytest.raises(KeyboardInterrupt):
                runs.train(ledger, losses=(2.5, 2.4), end=False)
        if name == "one evaluation":
            with ledger.stage("train", "full") as stage:
                stage.evaluate(0, 0.0, 2.5, 0.1, {})
    return run


UNLIMITED: dict[str, Any] = {"budget": runs.Budget(), "selection": runs.Selection()}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("planned", "Nothing has been run yet"),
        ("selected", "thrifty run` does the rest"),
        ("stopped", "train stopped (KeyboardInterrupt: signal 2)"),
        ("leases open", "Reserved by work in progress"),
        ("one evaluation", "The control has not been run yet"),
        ("lost to its control", "LOST to a uniform choice"),
        ("no control, no price", "what the selection itself gained was not measured"),
        ("without predictions", "without a limit"),
    ],
)
def test_every_state_of_a_run(tmp_path: Path, name: str, words: str) -> None:
    page = assert_inert(render(states(tmp_path / "run", name)))
    assert words in " ".join(page.text.split())
    assert "None" not in page.text.replace("None was run", "")
    assert "nan" not in page.text


def fail(ledger: Ledger, text: str) -> None:
    """A stage that names everything ``text``, then raises it."""
    with ledger.stage(text, text) as stage:
        runs.spend(stage, text, runs.cost(1e12, 10.0))
        stage.evaluate(0, 1e12, 2.0, 0.1, {text: 2.0})
        stage.decide(text, text, text, step=1, detail={"forecast": {"flops": text}})
        raise RuntimeError(LONG)


def test_hostile_text_is_inert_and_bounded(tmp_path: Path) -> None:
    name = "run </title><script>alert(3)</script> \u202e"
    targets = {HOSTILE.replace("\x00", ""): Target(signal=("signal.jsonl",))}
    run, ledger = runs.start(tmp_path / name.replace("/", "\u2044"), runs.plan(targets=targets))
    text = LONG.replace("\x00", "")
    with ledger:
        runs.select(run, ledger)
        options = [
            runs.Option(HOSTILE + str(i), runs.Estimate(0.1 * i, 0.0, "nats/token", "prior"),
                        runs.cost(1e12, 1.0), text)
            for i in range(3)
        ]  # fmt: skip
        choice = runs.choose(options, resource="flops", incumbent=options[0].name)
        ledger.decide(text, choice.chosen, text, choice=choice)
        ledger.decide(text, None, text)
        with pytest.raises(RuntimeError):
            fail(ledger, text)
    fields = ("file", "number", "text_prompt", "text_completion", "reason")
    long = runs.example(1, 1.0, **dict.fromkeys(fields, LONG))
    short = runs.example(2, 2.0, **dict.fromkeys(fields, HOSTILE))
    rows = [long, short, {"text_prompt": ["no", "text"]}, {}, 7, *[short] * 200]
    runs.write_selected(
        run,
        **{
            "manifest.json": {"scorer": LONG, "picker": [LONG], "dropped": {LONG: 1, "x": "1"}},
            "examples.json": {"selected": rows, "rejected": rows},
            "histogram.json": {LONG: {"edges": [0, 1], "all": [2], "selected": [1]}, "bad": 1},
        },
    )
    (run.pool / "manifest.json").write_text(
        runs.json.dumps({"num_bad": {LONG: 3, "\ud800": 1}}), encoding="utf-8"
    )
    found = write_report(run).read_text(encoding="utf-8")
    page = assert_inert(found)
    assert len(found) < 400_000
    assert sum(tag == "details" for tag, _ in page.elements) == 41
    assert "alert(1)" in page.text
    assert "{{7*7}}" in page.text
    assert "49" not in re.sub(
        r"<svg.*?</svg>|<style.*?</style>|\d+,\d+", "", found, flags=re.DOTALL
    )
    assert r"\x1b[31m" in page.text
    assert r"\u202e" in page.text
    assert r"\x00" in page.text
    assert r"\ud800" in page.text


@pytest.mark.parametrize(
    "histogram",
    [
        None,
        {},
        {"edges": [], "all": [], "selected": []},
        {"edges": [0, 1], "all": [1], "selected": []},
        {"edges": [1, 0], "all": [1], "selected": [1]},
        {"edges": [0, float("inf")], "all": [1], "selected": [1]},
        {"edges": [0, 1], "all": ["<b>"], "selected": [1]},
        {"edges": list(range(5000)), "all": [1] * 4999, "selected": [1] * 4999},
    ],
)
def test_nonsense_counts_draw_nothing(histogram: Any) -> None:
    assert histogram_figure(histogram) == ""


def test_too_large_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, ledger = runs.start(tmp_path / "run", runs.plan())
    ledger.close()
    runs.write_selected(run)
    monkeypatch.setattr("thrifty.report.files.MAX_BYTES", 500)
    assert "left out: selected/examples.json, selected/histogram.json" in Page(render(run)).text


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    run, ledger = runs.start(tmp_path / "run", runs.plan())
    ledger.close()
    runs.write_selected(run, **{"examples.json": "{", "histogram.json": "\x00"})
    text = Page(render(run)).text
    assert "selected/examples.json, selected/histogram.json" in text
