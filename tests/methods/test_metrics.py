"""What every metric must fulfil, and what each of them counts as right."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_jsonl
from thrifty.core.contracts import AnswerMetric
from thrifty.core.objective import Objective
from thrifty.core.resolve import all_names, resolve
from thrifty.metrics.number import last_number

METRICS = all_names("metric")
OPTIONS = {"callable": {"function": "tests.methods.test_metrics:same_length"}}
TEXTS = [
    "",
    " ",
    "42",
    "the answer is 42.",
    "#### 1,234",
    "Ünïcode ½",
    "line\nbreak",
    "-0.5",
    "x" * 5000,
]


def same_length(prompt: str, answer: str, gold: str) -> float:
    return float(len(answer) == len(gold))


def metric_of(name: str) -> AnswerMetric:
    found = resolve("metric", {name: OPTIONS.get(name)} if name in OPTIONS else name)
    if not isinstance(found, AnswerMetric) or found.asks_own:
        pytest.skip("it scores no answers of others")
    return found


@pytest.mark.parametrize("name", METRICS)
def test_the_unit_names_it_and_the_objective_takes_it_over(name):
    metric = resolve("metric", name)
    assert metric.unit
    assert Objective(metric=name).unit == metric.unit
    assert Objective(metric=name, unit="nats/pair").unit == (
        "nats/pair" if name == "dev_loss" else metric.unit
    )


@pytest.mark.parametrize("name", METRICS)
def test_a_score_is_between_0_and_1_pure_and_full_for_the_gold_answer(name):
    metric = metric_of(name)
    metric.check()
    for gold in TEXTS:
        for answer in TEXTS:
            score = metric.score("how many?", answer, gold)
            assert 0.0 <= score <= 1.0
            assert score == metric.score("how many?", answer, gold)
    for gold in ("42", "the answer is 42.", "#### 1,234"):
        assert metric.score("how many?", gold, gold) == 1.0
        assert metric.score("how many?", "no idea", gold) == 0.0


TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{train: {data}, test: {data}}}}}
output_type: {kind}
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
num_fewshot: 1
generation_kwargs: {{until: ["Question:"], do_sample: false}}
metric_list: [{{metric: {score}, aggregation: mean, higher_is_better: true}}]
filter_list:
  - name: strict
    filter: [{{function: regex, regex_pattern: "#### (\\\\-?[0-9]+)"}}, {{function: take_first}}]
"""


def task_in(
    folder: Path, kind: str = "generate_until", score: str = "exact_match"
) -> dict[str, Any]:
    """A task file of lm-evaluation-harness and its data."""
    data = write_jsonl(
        folder / "sums.jsonl",
        [{"question": f"2 + {i}?", "answer": str(2 + i)} for i in range(20)],
    )
    (folder / "sums.yaml").write_text(TASK.format(data=data, kind=kind, score=score))
    return {"lm_eval": {"task": "sums", "include_path": str(folder)}}


@pytest.fixture
def harness(tmp_path, monkeypatch) -> Path:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_a_task_of_lm_eval_brings_its_questions_and_scores_by_its_rules(harness):
    metric = resolve("metric", task_in(harness))
    metric.check()
    dev, test = metric.questions("dev"), metric.questions("test")
    assert len(dev) + len(test) == 20
    assert not {q.prompt for q in dev} & {q.prompt for q in test}
    first = dev[0]
    assert first.prompt.count("Question: ") == 2, "one example before it"
    number = first.gold.strip()
    for answer, score in (
        (f" so #### {number}", 1.0),
        (f" #### {number}\nQuestion: more? #### 99", 1.0),
        (f" {number}", 0.0),
        ("", 0.0),
    ):
        assert metric.score(first.prompt, answer, first.gold) == score
    brief = resolve("metric", {"lm_eval": {**task_in(harness)["lm_eval"], "limit": 3}})
    assert brief.questions("dev") == dev[:3]


@pytest.mark.filterwarnings("ignore")
def test_a_task_without_answers_or_of_no_such_name_is_refused(harness):
    options = task_in(harness, "loglikelihood", "acc")["lm_eval"]
    with pytest.raises(ValueError, match="sums asks for loglikelihood, not for answers"):
        resolve("metric", {"lm_eval": options}).check()
    with pytest.raises(
        ValueError, match=r"task summs .* cannot be loaded: [\s\S]*hint: is its name"
    ):
        resolve("metric", {"lm_eval": {**options, "task": "summs"}}).check()
    with pytest.raises(ValueError, match="needs a task"):
        resolve("metric", "lm_eval").check()


def test_lm_eval_that_is_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=r"not installed\nhint: pip install 'thrifty\[lm-eval\]'"):
        resolve("metric", {"lm_eval": {"task": "absent"}}).check()


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        (" Five  five.\n", "five five.", True),
        ("five five", "five five.", False),
        ("ﬁve", "FIVE", True),
        ("1.5", "15", False),
        ("", "five", False),
    ],
)
def test_exact_match_but_for_case_and_white_space(answer, gold, same):
    assert resolve("metric", "exact_match").score("", answer, gold) == same


def test_exact_match_options():
    loose = resolve("metric", {"exact_match": {"ignore_punctuation": True}})
    assert loose.score("", "«five», five!", "five five.") == 1.0
    strict = resolve("metric", {"exact_match": {"ignore_case": False}})
    assert strict.score("", "Five", "five") == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 + 7 = 12 apples", 12),
        ("so $1,234.50.", 1234.5),
        ("12 #### -3", -3),
        ("#### 7\n(not 8) #### 9 and 10", 10),
        ("no digits", None),
        ("#### none 5?", 5),
        (".5", 0.5),
        ("1,23", 23),
        ("-12,345", -12345),
        ("1,2345", 2345),
        ("between 3-4", 4),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("answer", "gold", "score"),
    [
        ("It is 18.", "She has 9 * 2 = <<9*2=18>>18\n#### 18", 1.0),
        ("18.0", "#### 18", 1.0),
        ("18 or 19", "#### 18", 0.0),
        ("1,000", "1000", 1.0),
        ("", "#### 18", 0.0),
        ("18", "eighteen", 0.0),
    ],
)
def test_number_by_the_rule_of_gsm8k(answer, gold, score):
    assert resolve("metric", "number").score("", answer, gold) == score
