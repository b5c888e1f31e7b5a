"""``thrifty decode`` against a server on loopback: what it writes, spends and refuses."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from tests.backends.stub_server import Received, Reply, StubServer
from tests.runs import finish, ledger, planned
from thrifty.cli import main
from thrifty.core.ledger import Ledger
from thrifty.report.summary import summarize
from thrifty.run_folder import RunFolder

KEY = "sk-a-secret-that-nobody-must-see"


def right(request: Received) -> Reply:
    number = int(request.prompt.split()[2])
    return Reply(texts=(f"that makes {2 * number}",))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "q.jsonl"
    rows = [{"id": i, "prompt": f"what is {i} + {i}?", "gold": 2 * i} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(prompts: Path, server: StubServer, folder: Path, *more: str) -> list[str]:
    return [
        *("decode", "--endpoint", server.url, "--model", "m", "--prompts", str(prompts)),
        *("--answer", "number", "-o", str(folder), *more),
    ]


def test_answers_are_written_and_what_they_took(
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    folder = tmp_path / "out"
    with StubServer(right) as server:
        more = ("--samples", "2", "--price", "1,2", "--dollars", "1", "--key", "MY_KEY", "--json")
        assert main(asked(prompts, server, folder, *more)) == 0
        requests = len(server.requests)
        assert all(KEY in r.headers["authorization"] for r in server.requests)
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert facts["accuracy"] == 1.0
    assert facts["num_questions"] == facts["answered"] == 12
    assert facts["samples"] == requests <= 24
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [answer["answer"] for answer in answers] == [str(2 * i) for i in range(12)] or all(
        answer["correct"] for answer in answers
    )
    assert all(answer["reason"] and 0 < answer["confidence"] <= 1 for answer in answers)
    with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
        assert 0 < ledger.spent().dollars < 0.01
        assert ledger.spent().tokens == facts["spent"]["tokens"]
        (decision,) = [row for row in ledger.decisions() if row["name"] == "decode"]
        assert decision["chosen"] == "marginal"
    kept = "".join(path.read_text(errors="replace") for path in folder.iterdir() if path.is_file())
    assert KEY not in kept + said.out + said.err


def test_the_same_command_goes_on(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    lock, answered = threading.Lock(), [0]

    def breaks(request: Received) -> Reply:
        with lock:
            answered[0] += 1
            return right(request) if answered[0] <= 5 else Reply(status=401)

    with StubServer(breaks) as server:
        assert main(asked(prompts, server, folder, "--concurrency", "2")) == 5
    assert "the same command then goes on" in capsys.readouterr().err
    kept = (folder / "samples.jsonl").read_bytes().count(b"\n")
    assert 4 <= kept <= 5  # one may have been under way
    with StubServer(right) as server:
        assert main(asked(prompts, server, folder, "--json")) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["samples"] == len(server.requests) + kept
    assert facts["accuracy"] == 1.0


def test_two_models_and_what_is_known_of_them(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cheap one is right of small numbers alone; recorded outcomes tell when."""

    def says(request: Received) -> Reply:
        number = int(request.prompt.split()[2])
        wrong = request.json["model"] == "small" and number > 5
        return Reply(texts=tuple(f"{2 * number + wrong * (1 + i)}" for i in range(5)))

    recorded = tmp_path / "dev.jsonl"
    rows = []
    for i in range(60):
        small = [str(2 * i)] * 5 if i % 2 else [str(900 + k) for k in range(5)]
        rows.append({"id": i, "gold": str(2 * i), "model": "small", "answers": small})
        rows.append({"id": i, "gold": str(2 * i), "model": "large", "answers": [str(2 * i)]})
    for row in rows:
        row["correct"] = [int(answer == row["gold"]) for answer in row["answers"]]
    recorded.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with StubServer(says) as server:
        command = [
            *("decode", "--endpoint", server.url, "--model", "small", "--model", "large"),
            *("--prompts", str(prompts), "--answer", "number", "-o", str(tmp_path / "out")),
            *("--price", "small=1,1", "--price", "large=20,20", "--fit", str(recorded), "--json"),
        ]
        assert main(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "cascade" in str(facts["policy"])
    assert facts["accuracy"] == 1.0
    lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    asked_large = [json.loads(line)["models"].get("large", 0) > 0 for line in lines]
    assert 6 <= sum(asked_large) < 12


WRONG = [
    (["--samples", "0"], "mean of samples"),
    (["--temperature", "-1"], "temperature"),
    (["--top-p", "2"], "top_p"),
    (["--max-samples", "0"], "at least 1"),
    (["--policy", "margnal"], "marginal"),
    (["--answer", "numbr"], "number"),
    (["--price", "1"], "two prices"),
    (["--price", "other=1,2"], "names no model"),
    (["--dollars", "2"], "not known"),
    (["--tokens", "200"], "not one sample can be paid for: it may take"),
    (["--dollars", "0.000001", "--price", "1,1"], "raise the budget, or lower --max-tokens"),
    (["--flops", "1e12"], "not known"),
    (["--key", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
    (["--endpoint", "http://localhost:1"], "2 endpoints for 1 models"),
    (["--fit", "nowhere.jsonl"], "no file"),
    (["--reward", "nomodule"], "function"),
    (["--generation", "early_exit"], "no mapping"),
]


@pytest.mark.parametrize(("more", "said"), WRONG)
def test_what_cannot_be_is_refused_before_anything_is_asked(
    prompts: Path, tmp_path: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with StubServer(right) as server:
        assert main(asked(prompts, server, tmp_path / "out", *more)) == 4
        assert not server.requests
    error = capsys.readouterr().err
    assert said in error
    assert "hint:" in error


def test_a_folder_that_holds_no_sample_yet_takes_another_asking(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    with StubServer(right) as server:
        assert main(asked(prompts, server, folder, "--policy", "pandora")) == 4
        assert main(asked(prompts, server, folder, "--policy", "first")) == 0
        assert main(asked(prompts, server, folder, "--policy", "fixed")) == 4
    assert "answers something else: policy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "x"}', "prompt"),
        ('{"prompt": "  "}', "empty"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "role"),
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}', "twice"),
        ("nothing", "bad_json"),
        ("", "no prompt"),
    ],
)
def test_bad_prompts_are_named(
    tmp_path: Path, line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    assert (
        main(["decode", "--model", "m", "--endpoint", "http://localhost:1", "--prompts", str(path)])
        == 4
    )
    assert said in capsys.readouterr().err


@pytest.mark.long
def test_a_run_answers_on_what_its_budget_has_left(
    tiny_model: Path,
    tiny_data: dict[str, Path],
    tmp_path: Path,
    prompts: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    planned(run, tiny_model, tiny_data)
    command = ["decode", str(run), "--prompts", str(prompts), "--answer", "exact"]
    limited = [*command, "--max-tokens", "4", "--max-samples", "2", "--json"]
    assert main(limited) == 4
    assert "no model yet" in capsys.readouterr().err
    finish(run)
    before = ledger(run).spent()
    more = f"--set=budget.flops={before.flops + 2e8:.0f}"
    assert main([*limited, more]) == 0
    facts = json.loads(capsys.readouterr().out)
    after = ledger(run).spent()
    assert 0 < facts["spent"]["flops"] == after.flops - before.flops <= 2e8
    assert facts["resource"] == "flops"
    assert facts["samples"] > 0
    reported = summarize(RunFolder(run))["decoding"]
    assert reported["samples"] == facts["samples"]
    assert reported["num_questions"] == facts["num_questions"] == 12
    assert main([*command, "--tokens", "100"]) == 4
    assert "a run has its budget" in capsys.readouterr().err


def test_nobody_to_ask(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", "--prompts", str(prompts)]) == 4
    assert "nobody to ask" in capsys.readouterr().err
