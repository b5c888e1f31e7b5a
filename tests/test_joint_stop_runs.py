"""A run whose budget is to answer questions as well: it stops where samples are the better buy."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import write_jsonl
from tests.methods.conftest import Tally
from tests.runs import finish, interrupt_at, ledger, planned, silent, weights
from thrifty import pipeline, plan_options, stages
from thrifty.core.budget import Budget
from thrifty.core.marginal import replay
from thrifty.evaluation import Measured
from thrifty.governor import COOL_DOWN, DECISION
from thrifty.interruption import Interrupted
from thrifty.metrics.exact_match import ExactMatch
from thrifty.metrics.number import Number
from thrifty.report.summary import summarize, text_summary
from thrifty.run_folder import RunFolder
from thrifty.sampling_price import curve_of
from thrifty.signals.models import load_model
from thrifty.vote_evaluation import votes_of

WORDS = ("one", "two", "red", "sun", "sky", "sum", "get", "add", "wet", "pear", "rain", "fog")
SAID = [" five five."] * 4 + [" red red.", " sky sky.", " wet wet.", " sum sum."]
"""What the pool answers, by chance: a vote is right more often than a sample can ever be."""


BUDGET = Budget(flops=2e10)


pytestmark = pytest.mark.xdist_group("joint_stop_runs")
"""Of two real runs, which take ten seconds to make: on one worker."""


@pytest.fixture(scope="module")
def torn(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("torn")
    random = np.random.default_rng(0)
    pool = [
        {"prompt": f"{i} say {word} please:", "completion": str(random.choice(SAID))}
        for i in range(120)
        for word in WORDS
    ]
    dev = [
        {"prompt": f"say {word} {other} please:", "completion": SAID[0]}
        for word in WORDS[:2]
        for other in WORDS
    ]
    parts = {"pool": pool, "dev": dev}
    for name, mark in (("signal", "x"), ("test", "y")):
        parts[name] = [{**row, "prompt": f"{mark} {row['prompt']}"} for row in dev]
    return {name: write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in parts.items()}


def serving(
    folder: Path,
    model: Path,
    torn: dict[str, Path],
    *,
    questions: int,
    fixed: dict[str, Any] | None = None,
    budget: Budget = BUDGET,
) -> Any:
    settings = {
        "objective.metric": "exact_match",
        "objective.max_new_tokens": 6,
        "selection.scorer": "uniform",
        "training.max_length": 128,
        "training.max_steps": 100,
        "training.eval_steps": 10,
        "training.save_steps": 10,
        "training.cooldown_steps": 10,
        "training.learning_rate": 5e-3,
        "stopping": {"marginal_gain": {"z": 2.0}},
        "objective.serving.questions": questions,
        **(fixed or {}),
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    return planned(folder, model, torn, budget=budget, fixed=settings)


FEW, MANY = 5, 3000


@pytest.fixture(scope="module")
def few(tmp_path_factory, tiny_model, torn) -> Path:
    folder = tmp_path_factory.mktemp("few") / "run"
    serving(folder, tiny_model, torn, questions=FEW)
    finish(folder)
    return folder


@pytest.fixture(scope="module")
def many(tmp_path_factory, tiny_model, torn) -> Path:
    folder = tmp_path_factory.mktemp("many") / "run"
    serving(folder, tiny_model, torn, questions=MANY)
    pipeline.run(folder, silent)
    return folder


def endings(folder: Path) -> list[dict[str, Any]]:
    return [d for d in ledger(folder).decisions() if d["name"] == DECISION]


@pytest.mark.long
def test_many_questions_stop_training_where_samples_are_the_better_buy(many):
    (stop,) = [d for d in endings(many) if d["chosen"] == COOL_DOWN]
    choice, told = stop["choice"], stop["detail"]["serving"]
    assert stop["step"] < 90, "before the cool-down that was planned"
    assert choice["price"] > 0
    gained = told["accuracy"] - told["accuracy_after_interval"]
    interval = choice["options"][0]["cost"]["flops"]
    assert choice["price"] == pytest.approx(gained / interval, rel=1e-9)
    assert replay(choice).chosen is None
    assert told["samples"] == pytest.approx(told["flops_left"] / MANY / told["flops_a_sample"])
    assert "what is left answers 3,000 questions with" in stop["reason"]
    # At no price it would have gone on.
    assert replay({**choice, "price": 0.0}).chosen == "train on"


@pytest.mark.long
def test_few_questions_do_not(few):
    assert all(d["choice"] is None or d["choice"]["price"] == 0 for d in endings(few))
    assert all(d["chosen"] == "train on" for d in endings(few))
    assert ledger(few).evaluations()[-1]["step"] == 100
    told = endings(few)[-1]["detail"]["serving"]
    assert told["samples"] == told["samples_after_interval"] == 40


def test_the_rule_weighs_votes_over_as_many_samples_as_are_left(many):
    """What training brings is told in what sampling brings: the forecast starts from the vote."""
    stop = [d for d in endings(many) if d["chosen"] == COOL_DOWN][-1]
    told, forecast = stop["detail"]["serving"], stop["detail"]["forecast"]
    rows = [r for r in ledger(many).evaluations() if r["step"] <= stop["step"]]
    votes = [curve_of(row["beside"]["votes"]).at(told["samples"]) for row in rows]
    greedy = [1.0 - row["objective"] for row in rows]
    assert votes[-1] == told["accuracy"]
    assert abs(1 - forecast["loss"] - votes[-1]) < abs(1 - forecast["loss"] - greedy[-1])


def test_what_is_measured_is_what_a_vote_is(many, tiny_model):
    """A checkpoint's curve at one sample is the mean score of the samples themselves, and what they
    took is counted."""
    with stages.at_work(RunFolder(many), silent) as work:
        yardstick, most = work.yardstick(work.plan), work.plan.training.micro_batch_tokens
        model = load_model(RunFolder(many).model("budget"), "float32", "cpu")
        meter = Tally()
        votes = yardstick._votes
        found = votes.measured(model, work.shape, work.dev, meter, most)
        (rows,) = work.dev.values()
        said = yardstick._answers.samples(
            model, work.shape, rows, Tally(), most, times=8, temperature=0.7
        )
        upper = votes.flops(work.shape, work.dev, most)
    measured = votes_of(Measured({}, {"sums": 1.0}, found), None)
    scores = [[each.score for each in samples] for samples in said]
    assert measured["accuracy"][0] == pytest.approx(np.mean(scores))
    assert measured["drawn"] == 24 * 8
    assert 0 < np.mean(scores) < 1
    assert meter.cost.flops <= upper
    # Batches pad: what is computed is a little more than what is charged an answer by itself.
    assert 0.9 < measured["flops_a_sample"] * 24 * 8 / meter.cost.flops <= 1.0


def test_evaluations_cost_no_more_than_predicted_and_the_answers_are_set_aside(many):
    with stages.at_work(RunFolder(many), silent) as work:
        costs = work.predicted(work.plan)
        plain = replace(work.plan, objective=replace(work.plan.objective, serving=None))
        without = work.predicted(plain)
    evaluated = [c["flops"] for c in ledger(many).charges() if c["activity"] == "evaluate"]
    assert without.evaluation.flops < max(evaluated) <= costs.evaluation.flops
    assert without.serving.flops == 0
    assert without.test.flops == costs.test.flops
    planned = work.plan.predicted["decode"]["flops"]
    assert costs.serving.flops == planned > 0
    spent = ledger(many).spent().flops
    assert work.plan.budget.flops - spent >= planned, "one answer to each question at least"


def test_the_report_says_what_is_left_for_answers(many, few):
    found = summarize(RunFolder(many))["serving"]
    left = 2e10 - ledger(many).spent().flops
    assert found["flops_left"] == pytest.approx(left)
    assert found["samples"] == pytest.approx(min(left / MANY / found["flops_a_sample"], 40))
    assert found["accuracy"] > found["accuracy_of_one"]
    assert found["decided"]["questions"] == MANY
    jointly = found["decided"]["jointly"]
    assert jointly["best"]["accuracy"] >= jointly["longest"]["accuracy"]
    told = text_summary(summarize(RunFolder(many)))
    assert "Training left " in told
    assert " for 3,000 questions: " in told
    assert summarize(RunFolder(few))["serving"]["samples"] == 40


def test_a_plan_keeps_an_answer_to_each_question_or_there_is_none(tiny_model, torn, tmp_path):
    free = {"training.max_steps": None}
    plan = serving(tmp_path / "run", tiny_model, torn, questions=18_000, fixed=free)
    answers = plan.predicted["decode"]["flops"]
    assert answers > 0.5 * BUDGET.flops
    assert 1 < plan.training.max_steps < 50
    assert sum(cost["flops"] for cost in plan.predicted.values()) <= BUDGET.flops
    with pytest.raises(ValueError, match=r"needs .* GFLOP but 20 GFLOP is allowed[\s\S]*fewer q"):
        serving(tmp_path / "other", tiny_model, torn, questions=50_000, fixed=free)


@pytest.mark.long
def test_a_run_interrupted_midway_decides_alike(many, tiny_model, torn, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    serving(folder, tiny_model, torn, questions=MANY)
    (stop,) = [d for d in endings(many) if d["chosen"] == COOL_DOWN]
    for step in (stop["step"] - 5, stop["step"] + 5):  # before the decision, and in the cool-down
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            with pytest.raises(Interrupted):
                finish(folder)
    finish(folder)
    (again,) = [d for d in endings(folder) if d["chosen"] == COOL_DOWN]
    assert again["step"] == stop["step"]
    assert again["detail"]["serving"]["accuracy"] == stop["detail"]["serving"]["accuracy"]
    first, second = ledger(many).evaluations(), ledger(folder).evaluations()
    assert [r["beside"]["votes"] for r in first] == [r["beside"]["votes"] for r in second]
    kept, other = weights(many / "model"), weights(folder / "model")
    assert all((kept[name] == other[name]).all() for name in kept)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"objective.metric": "dev_loss"}, "takes votes, and of objective.metric nats/token"),
        (
            {"objective.metric": {"callable": {"function": f"{__name__}:share"}}},
            "of objective.metric share nobody knows which answers are equal: use number",
        ),
        ({"objective.serving.questions": 0}, "questions must be at least 1, not 0"),
        ({"objective.serving.dev_samples": 1}, "dev_samples must be from 2 to 256, not 1"),
        ({"objective.serving.max_samples": 1000}, "max_samples must be from 1 to 256"),
        ({"objective.serving.temperature": 0.0}, "temperature must be from 0.001"),
        ({"objective.serving.tokens": 0.5}, "tokens must be at least 1, not 0.5"),
        (
            {"objective.serving.question": 3},
            "key objective.serving.question: did you mean questions",
        ),
        ({"stopping": "plateau"}, "which stopping plateau does not weigh: marginal_gain"),
        ({"training.devices": 2}, "objective.serving uses one device"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_spent(
    keys, says, tiny_model, torn, tmp_path
):
    with pytest.raises(ValueError, match=says):
        serving(tmp_path / "run", tiny_model, torn, questions=5, fixed=keys)
    assert not (tmp_path / "run").exists()


def test_a_budget_without_flops_cannot_be_shared(tiny_model, torn, tmp_path):
    with pytest.raises(ValueError, match=r"the budget does not limit them: set budget\.flops"):
        serving(tmp_path / "run", tiny_model, torn, questions=5, budget=Budget(seconds=60))


def share(prompt: str, answer: str, gold: str) -> float:
    return float(answer == gold)


@pytest.mark.parametrize(
    ("metric", "alike", "other", "nothing"),
    [
        (Number(), ("so 1,200.", "#### 1200.0", "1.2e3 is 1200"), "1201", "none"),
        (Number(), ("-0", "it is 0.0"), "1", ""),
        (ExactMatch(), (" Five  FIVE.", "five five."), "five five", "  "),
        (ExactMatch(ignore_punctuation=True), ("five, five.", "five five"), "five", "?!"),
    ],
)
def test_what_is_read_is_the_same_where_the_metric_says_so(metric, alike, other, nothing):
    assert len({metric.read(text) for text in alike}) == 1
    assert metric.read(other) not in {None, metric.read(alike[0])}
    assert metric.read(nothing) is None
    for text in (*alike, other):
        assert metric.score("", text, alike[0]) == (metric.read(text) == metric.read(alike[0]))


def test_the_option_of_the_command_line():
    parser = argparse.ArgumentParser()
    plan_options.add_to(parser)
    given = ["--model", "m", "--pool", "p", "--metric", "number", "--serve-questions", "1000"]
    fixed = plan_options.asked(parser.parse_args(given)).fixed
    assert fixed == {"objective.metric": "number", "objective.serving.questions": 1000}
