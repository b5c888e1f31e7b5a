"""What a run's model answered, on its page and in its words."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.report import runs
from tests.report.test_page import HOSTILE, LONG, Page, assert_inert
from thrifty.asked_questions import Answer
from thrifty.core.budget import Cost
from thrifty.core.sampling import Asked, Sample
from thrifty.decode_record import Record
from thrifty.report.page import render
from thrifty.report.summary import summarize, text_summary
from thrifty.run_folder import RunFolder


def answer(number: int, **changes: Any) -> Answer:
    values: dict[str, Any] = {
        "id": f"q{number}",
        "answer": str(number),
        "text": f"It is {number}.",
        "confidence": 0.5 + number / 100,
        "reason": f"{number} more would bring {number / 1e4:.2g}, not worth it",
        "given_up": False,
        "samples": 1 + number,
        "failed": 0,
        "unreadable": 0,
        "models": {"m": 1 + number},
        "cost": 100.0,
        "tokens": 20.0,
        "flops": 1e9,
        "dollars": 0.001,
        "gold": str(number),
        "correct": True,
    }
    return Answer(**{**values, **changes})


def decoded(path: Path, answers: list[Answer] | None) -> RunFolder:
    """A finished run that answered; None: was killed on the way, after two samples."""
    run = runs.finished(path, with_control=False)
    record = Record(run.decoded, {"policy": {"marginal": {}}, "answer": "number", "models": ["m"]})
    asked = Asked("q1")
    record.add(asked, [Sample(model="m", answer="1")] * 2, Cost(tokens=9.0))
    record.close()
    if answers is not None:
        record.finish(asdict(each) for each in answers)
    return run


ANSWERS = [
    *(answer(i) for i in range(1, 8)),
    answer(8, answer="88", correct=False, text="Surely 88."),
    answer(9, correct=False, given_up=True, reason="given up, no answer is likely: 3 more"),
    answer(10, answer=None, correct=False, unreadable=11, text="no number"),
    answer(11, gold=None, correct=None, failed=2),
]


def test_the_page_says_what_was_answered(tmp_path: Path) -> None:
    run = decoded(tmp_path / "run", ANSWERS)
    found = summarize(run)["decoding"]
    wanted = {"num_questions": 11, "answered": 9, "given_up": 1, "without_an_answer": 1}
    assert {name: found[name] for name in wanted} == wanted
    assert (found["samples"], found["failed"], found["unreadable"]) == (77, 2, 11)
    assert (found["with_gold"], found["accuracy"]) == (10, 0.7)
    assert found["tokens_generated"] == 220
    assert found["flops_of_samples"] == pytest.approx(1.1e10)
    assert found["dollars_of_samples"] == pytest.approx(0.011)
    assert found["ended"] == {
        "… more would bring …, not worth it": 10,
        "given up, no answer is likely: … more": 1,
    }
    page = assert_inert(render(run))
    text = " ".join(page.text.split())
    assert "By marginal, 9 of 11 questions are answered, 1 given up, 1 without an answer" in text
    assert "70.0% of the 10 questions with a gold answer are right" in text
    assert "11 GFLOP" in text
    section = text[text.index("Why questions ended") :]
    wrong = section[section.index("Wrong, and sure") : section.index("Those that took most")]
    assert wrong.index("question q9, gold answer 9: wrong") < wrong.index("question q8")
    assert "q10" not in wrong, "nothing was answered"
    assert "question q11; 11 more would bring" in section
    assert "answers    By marginal, 9 of 11" in text_summary(summarize(run))


def test_a_run_that_answered_nothing_says_nothing_of_answers(tmp_path: Path) -> None:
    run = runs.finished(tmp_path / "run", with_control=False)
    assert summarize(run)["decoding"] is None
    assert "<h2>Answers" not in render(run)


def test_answering_that_was_killed(tmp_path: Path) -> None:
    run = decoded(tmp_path / "run", None)
    assert summarize(run)["decoding"]["samples"] == 2
    assert "marginal is not finished: 2 samples so far" in Page(render(run)).text


def test_hostile_answers_are_inert_and_bounded(tmp_path: Path) -> None:
    fields = ("id", "answer", "text", "reason", "gold")
    long = [answer(i, **dict.fromkeys(fields, LONG), correct=False) for i in range(2)]
    many = [answer(i, **dict.fromkeys(fields, f"{HOSTILE}{i}")) for i in range(40)]
    run = decoded(tmp_path / "run", [*long, *many])
    with (run.decoded / "answers.jsonl").open("a") as stream:
        stream.write('{"id": 7}\nno json\n[1]\n{"id": "x", "answer": NaN}\n')
    found = render(run)
    page = assert_inert(found)
    assert len(found) < 300_000
    assert "4 lines of answers.jsonl could not be read" in page.text
    assert "alert(1)" in page.text


@pytest.mark.parametrize("asked", ["{", "[]", '{"policy": 7, "models": 3}', "{}"])
def test_a_broken_record_is_no_reason_to_have_no_report(tmp_path: Path, asked: str) -> None:
    run = decoded(tmp_path / "run", ANSWERS[:1])
    (run.decoded / "decode.json").write_text(asked)
    page = assert_inert(render(run))
    told = asked.startswith("{}") or "policy" in asked
    assert ("Why questions ended" in page.text) is told
    assert ("decode/decode.json" in page.text) is not told


def test_what_training_left_stands_beside_it(tmp_path: Path) -> None:
    summary = summarize(decoded(tmp_path / "run", ANSWERS))
    summary["serving"] = {
        "questions": 3000,
        "flops_left": 2e12,
        "samples": 2.5,
        "accuracy": 0.8,
        "accuracy_of_one": 0.7,
        "most_useful_samples": 30,
    }
    told = text_summary(summary)
    assert "Training left 2 TFLOP for 3,000 questions: 2.5 samples each" in told
    assert json.dumps(summary["decoding"])
