"""Recorded samples: read, refused, replayed; beside votes counted by hand."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from thrifty.cli import main
from thrifty.core.resolve import all_names, resolve
from thrifty.core.sampling import Outcome
from thrifty.decoding.fixed import Fixed
from thrifty.decoding.marginal import Marginal
from thrifty.recordings import read_outcomes
from thrifty.replay import Recording, facts_of, interval, means_of, replay, votes


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recorded(num_questions: int, num_samples: int, seed: int = 0) -> list[dict]:
    """Questions of three kinds: easy, torn between two answers, hopeless."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num_questions):
        chances = [[0.95, 0.05], [0.55, 0.4, 0.05], [0.1] * 10][number % 3]
        answers = [int(rng.choice(len(chances), p=chances)) for _ in range(num_samples)]
        rows.append(
            {
                "id": number,
                "gold": 0,
                "answers": answers,
                "correct": [int(answer == 0) for answer in answers],
                "chars": [40 + answer for answer in answers],
            }
        )
    return rows


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "recorded.jsonl", recorded(60, 20))


def test_fixed_is_the_vote_counted_by_hand(file: Path) -> None:
    recording = Recording.of(read_outcomes([file]))
    means = means_of(recording)
    for number in (1, 3, 20):
        right = []
        for line in file.read_text().splitlines():
            row = json.loads(line)
            most = Counter(row["answers"][:number]).most_common(1)[0][0]
            right.append(float(most == 0))
        replayed = replay(Fixed(samples=number), recording, means)
        assert replayed.correct[0].tolist() == right
        assert votes(recording, "recorded", number, [None])[0].tolist() == right
        assert replayed.samples.mean() == number
        assert replayed.tokens.sum() > 0


def test_orders_are_drawn_by_their_seed(file: Path) -> None:
    recording = Recording.of(read_outcomes([file]))
    means = means_of(recording)
    one, two = (replay(Fixed(samples=2), recording, means, orders=[s]) for s in (1, 2))
    again = replay(Fixed(samples=2), recording, means, orders=[1])
    assert (one.correct == again.correct).all()
    assert (one.correct != two.correct).any()
    part = Recording(dict(list(recording.questions.items())[:10]))
    few = replay(Fixed(samples=2), part, means_of(part), orders=[1])
    assert (few.correct[0] == one.correct[0][:10]).all()


def test_marginal_spends_a_budget_where_votes_can_turn(file: Path) -> None:
    recording = Recording.of(read_outcomes([file]))
    means = means_of(recording, left=5.0 * 60)
    orders = list(range(5))
    replayed = replay(Marginal(), recording, means, orders=orders)
    assert replayed.samples.mean() <= 5.0
    easy, torn, _ = (replayed.samples[:, kind::3].mean() for kind in range(3))
    assert torn > 1.5 * easy
    assert replayed.correct[:, 0::3].mean() > 0.95


def test_with_neither_price_nor_budget_it_ends_by_itself(file: Path) -> None:
    recording = Recording.of(read_outcomes([file]))
    replayed = replay(Marginal(), recording, means_of(recording))
    assert 2 < replayed.samples.mean() < 15
    hopeless = replayed.finishes[0][2::3]
    assert all(finish.given_up and "given up" in finish.reason for finish in hopeless)


def test_a_higher_price_buys_fewer_samples(file: Path) -> None:
    recording = Recording.of(read_outcomes([file]))
    means = means_of(recording)
    spent = [
        replay(Marginal(price=price), recording, means).samples.mean()
        for price in (1e-4, 1e-3, 1e-2, 0.1)
    ]
    assert spent == sorted(spent, reverse=True)
    assert spent[0] > spent[-1] >= 1.0


def test_what_gold_answers_teach_is_kept(file: Path) -> None:
    recording = Recording.of(read_outcomes([file]))
    learnt = Marginal().fit(recording.outcomes, means_of(recording))
    assert learnt["num_questions"] == 60
    assert learnt["sharpness"] > 0
    assert json.loads(json.dumps(learnt)) == learnt
    means = means_of(recording, learnt=learnt, price=0.002)
    assert replay(Marginal(), recording, means).correct.mean() > 0.55


@pytest.mark.parametrize("name", all_names("policy"))
def test_single_samples_have_a_defined_outcome(name: str) -> None:
    """Greedy files: one answer a question."""
    outcomes = [
        Outcome(id=str(i), model="m", answers=(str(i % 2),), correct=(i % 2,), rewards=(1.0,))
        for i in range(10)
    ]
    recording = Recording.of(outcomes)
    policy = resolve("policy", name)
    means = means_of(recording)
    try:
        policy.check(means)
    except ValueError:
        pytest.skip("needs more than one model")
    if policy.needs == "thoughts":
        pytest.skip("thinks, which was not recorded")
    replayed = replay(policy, recording, means)
    assert replayed.correct.mean() == 0.5
    assert replayed.samples.mean() == 1.0


def test_two_models_of_a_question_belong_together(tmp_path: Path) -> None:
    weak = write(tmp_path / "weak.jsonl", recorded(6, 4))
    strong = write(tmp_path / "strong.jsonl", recorded(6, 2, seed=1))
    recording = Recording.of(read_outcomes([weak, strong]))
    assert recording.models == ("weak", "strong")
    assert recording.most_samples == 6
    means = means_of(recording, prices={"weak": 1.0, "strong": 20.0})
    replayed = replay(Fixed(samples=2, model="strong"), recording, means)
    assert replayed.cost.mean() == 40.0


def test_a_recording_that_ends_is_no_endless_loop(file: Path) -> None:
    recording = Recording.of(read_outcomes([file]))
    means = means_of(recording)
    longer = [Outcome(id="long", model="recorded", answers=("0",) * 50, correct=(1.0,) * 50)]
    recording = Recording.of([*recording.outcomes, *longer])
    replayed = replay(Fixed(samples=30), recording, means_of(recording))
    assert replayed.samples.max() == 30
    assert replayed.samples[0, 0] == 20
    assert means.max_samples == 20


def test_a_question_of_which_nothing_was_recorded_is_wrong(file: Path) -> None:
    nothing = Outcome(id="none", model="recorded", answers=(), correct=())
    recording = Recording.of([*read_outcomes([file]), nothing])
    for policy in (Marginal(), Fixed(samples=3)):
        replayed = replay(policy, recording, means_of(recording))
        assert replayed.correct[0, -1] == replayed.samples[0, -1] == 0
        assert replayed.finishes[0][-1].given_up


def test_forms_of_answers(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "answers": [1, 1.0, "1", None, "", float("nan")], "correct": [1, 1, 0, 0, 0, 0]}
    ]
    (outcome,) = read_outcomes([write(tmp_path / "x.jsonl", rows)])
    assert outcome.answers == ("1.0", "1.0", "1", None, None, None)
    assert outcome.model == "x"
    packed = tmp_path / "y.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "x.jsonl").read_bytes()))
    assert read_outcomes([packed])[0].answers == outcome.answers


BAD = [
    ('{"id": 1}', "answers"),
    ('{"id": 1, "answers": {}}', "answers"),
    ('{"id": 1, "answers": [1]}', "correct"),
    ('{"id": 1, "answers": [1], "correct": [1, 0]}', "list of 1"),
    ('{"id": 1, "answers": [1], "correct": ["yes"]}', "numbers"),
    ('{"id": 1, "answers": [1], "correct": [2]}', "from 0 to 1"),
    ('{"id": 1, "answers": [1], "correct": [1], "tokens": [-1]}', "at least 0"),
    ("[1, 2]", "not an object"),
    ("{broken", "bad_json"),
    ("", "no question"),
]


@pytest.mark.parametrize(("line", "said"), BAD)
def test_bad_lines_are_named(
    tmp_path: Path, line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    assert main(["replay", str(path)]) == 4
    error = capsys.readouterr().err
    assert said in error
    assert "hint:" in error


def test_the_same_question_twice_is_refused(tmp_path: Path) -> None:
    rows = recorded(2, 2)
    with pytest.raises(ValueError, match="twice"):
        read_outcomes([write(tmp_path / "x.jsonl", [*rows, rows[0]])])


def test_the_command_prints_what_it_found(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(file), "--policy", "marginal", "--samples", "3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["num_questions"] == 60
    assert facts["mean_samples"] <= 3
    assert facts["interval"][0] <= facts["accuracy"] <= facts["interval"][1]
    assert {"1", "3", "5", "20"} <= facts["fixed"].keys()
    assert sum(facts["ended"].values()) == pytest.approx(1.0)
    assert main(["replay", str(file), "--policy", "{fixed: {samples: 5}}", "--fit", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "fixed: accuracy" in text
    assert "of 30 questions" in text


@pytest.mark.parametrize(
    "options",
    [
        ["--policy", "nobody"],
        ["--policy", "{fixed: {samples: 0}}"],
        ["--policy", "{fixed: {smples: 3}}"],
        ["--samples", "0"],
        ["--samples", "3", "--tokens", "100"],
        ["--fit", "1.5"],
        ["--orders", "0"],
        ["--price", "-1"],
        ["--policy", "best_of"],
        ["--policy", "budget_forcing"],
        ["--cost", "other=3"],
        ["--cost", "recorded=much"],
    ],
)
def test_wrong_options_are_told(
    file: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(file), *options]) == 4
    assert "hint:" in capsys.readouterr().err


def test_a_policy_is_beside_fixed_votes_on_the_same_orders(file: Path) -> None:
    recording = Recording.of(read_outcomes([file]))
    means = means_of(recording)
    replayed = replay(Fixed(samples=5), recording, means, orders=[3, 4])
    facts = facts_of(recording, means, replayed, [3, 4])
    assert facts["fixed"]["5"]["ahead_by"] == 0.0
    assert facts["fixed"]["5"]["ahead_by_interval"] == [0.0, 0.0]


def test_the_interval_of_a_mean_covers_it() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        low, high = interval((rng.random(100) < 0.7).astype(float), seed=trial)
        hits += low <= 0.7 <= high
    assert 180 <= hits <= 200
