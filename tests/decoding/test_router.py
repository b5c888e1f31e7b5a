"""The router: against naive predictors and a world whose truth is known; what it refuses."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.decoding.routed import of_two_kinds, outcomes_of, question, save_sentence_model
from thrifty.backends.backend import Answered, Backend, Completion
from thrifty.core.budget import Budget, Cost
from thrifty.core.given import AddingUp
from thrifty.core.resolve import resolve
from thrifty.core.sampling import Asked, Draw, Finish, Means, Offer, Sample
from thrifty.core.spending import BudgetExceeded
from thrifty.decode_pool import decode
from thrifty.decoding.router import Router, _drawn_in, _slope, predict_accuracies
from thrifty.replay import Recording, replay
from thrifty.signals import accuracy_predictors, question_vectors
from thrifty.signals.accuracy_predictors import fit_predictor, out_of_fold, predict
from thrifty.signals.question_vectors import READ, learn_vectors, vectors
from thrifty.signals.sentence_vectors import encoder_of

OFFERS = (Offer(model="cheap", cost=1.0), Offer(model="dear", cost=10.0))
MEANS = Means(offers=OFFERS)


@pytest.fixture(autouse=True)
def few_trees(monkeypatch):
    monkeypatch.setattr(accuracy_predictors, "NUM_TREES", 10)


@pytest.fixture(scope="module")
def numbers():
    return np.random.default_rng(0).integers(1, 999, 300).tolist()


@pytest.fixture
def two_kinds(numbers):
    return of_two_kinds(numbers)


def fitted(policy, outcomes, means=MEANS):
    return replace(means, learnt=json.loads(json.dumps(policy.fit(outcomes, means))))


def chosen(policy, means, prompts):
    questions = [Asked(str(i), prompt) for i, prompt in enumerate(prompts)]
    actions = policy.decide_all(questions, means)
    assert all(isinstance(action, Draw) for action in actions)
    return [action.model for action in actions]


# -- predictors ----------------------------------------------------------------------------------


def test_ridge_is_the_solution_of_its_equations():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 5)), rng.random((80, 3))
    found = predict("ridge", fit_predictor(("ridge", 7.0), x, y), x)
    # the same as augmented least squares: rows of sqrt(7) that want weights of 0
    moved = np.vstack([x - x.mean(axis=0), np.sqrt(7.0) * np.eye(5)])
    wanted = np.vstack([y - y.mean(axis=0), np.zeros((5, 3))])
    weights = np.linalg.lstsq(moved, wanted, rcond=None)[0]
    assert found == pytest.approx((x - x.mean(axis=0)) @ weights + y.mean(axis=0))
    far = fit_predictor(("ridge", 1e12), x, y)
    assert predict("ridge", far, x) == pytest.approx(np.tile(y.mean(axis=0), (80, 1)), abs=1e-6)


def test_neighbours_are_the_nearest_of_all():
    rng = np.random.default_rng(1)
    x, y, new = rng.normal(size=(60, 4)), rng.random((60, 2)), rng.normal(size=(9, 4))
    found = predict("neighbours", fit_predictor(("neighbours", 7), x, y), new)
    for row, at in zip(found, new, strict=True):
        order = sorted(range(60), key=lambda i: float(((x[i] - at) ** 2).sum()))
        assert row == pytest.approx(y[order[:7]].mean(axis=0))
    few = fit_predictor(("neighbours", 100), x[:5], y[:5])
    assert predict("neighbours", few, new) == pytest.approx(np.tile(y[:5].mean(axis=0), (9, 1)))


def test_trees_are_walked_as_sklearn_walks_them():
    from sklearn.ensemble import ExtraTreesRegressor

    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(200, 6)), rng.random((200, 3))
    found = predict("forest", fit_predictor(("forest", 5), x, y, seed=3), x)
    own = ExtraTreesRegressor(10, min_samples_leaf=5, max_features=1 / 3, random_state=3)
    assert found == pytest.approx(own.fit(x, y).predict(x), abs=1e-3)  # leaves are in float16


def test_out_of_fold_nobody_saw_the_answer():
    """Answers that are noise: what is predicted must not go with them."""
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(400, 5)), (rng.random((400, 2)) < 0.5).astype(float)
    for kind in accuracy_predictors.KINDS:
        out = out_of_fold(kind, x, y)
        assert abs(np.corrcoef(out[:, 0] - out[:, 1], y[:, 0] - y[:, 1])[0, 1]) < 0.2
        assert np.array_equal(out, out_of_fold(kind, x, y))


def test_the_slope_believes_what_was_right():
    rng = np.random.default_rng(5)
    signal = rng.normal(size=(5000, 1)) * np.array([1.0, -1.0])
    real = signal + rng.normal(size=(5000, 2))
    slope, explained = _slope(2 * signal, real)
    assert slope == pytest.approx(0.5, abs=0.03)
    assert 0.4 < explained < 0.8
    assert _slope(rng.normal(size=(5000, 2)), real)[1] < 0.01
    assert _slope(np.ones((5, 2)), real[:5]) == (0.0, 0.0)
    assert _slope(signal, np.ones_like(real)) == (0.0, 0.0)
    means = np.array([0.7, 0.5])
    nothing = _drawn_in(np.array([[0.2, 0.8]]), means, 0.0)
    assert nothing == pytest.approx(np.array([[0.6, 0.4]]))  # as hard, differing as usual
    assert _drawn_in(np.array([[0.2, 0.8]]), means, 1.0) == pytest.approx(np.array([[0.2, 0.8]]))


def test_vectors_are_of_a_question_alone():
    texts = [question(i % 2, i) for i in range(80)] + ["", "é" * 10, "x " * 100_000]
    learnt = learn_vectors(texts)
    whole = vectors(texts, learnt)
    assert np.isfinite(whole).all()
    assert whole.mean(axis=0) == pytest.approx(0, abs=1e-9)
    for i in (0, 1, 80, 82):
        assert vectors([texts[i]], learnt)[0] == pytest.approx(whole[i], abs=1e-9)
    cut = vectors(["a b " * READ], learnt)
    assert cut == pytest.approx(vectors([("a b " * READ)[:READ]], learnt))


# -- what it does --------------------------------------------------------------------------------


def test_each_question_goes_to_who_knows(two_kinds):
    policy = Router()
    means = fitted(policy, two_kinds)
    policy.check(means)
    assert means.learnt["gain"][0] > 0.15
    prompts = [question(1, 1234), question(0, 1234)]
    assert chosen(policy, means, prompts) == ["cheap", "dear"]
    predicted = predict_accuracies(means.learnt, prompts)
    order = [means.learnt["terms"]["models"].index(model) for model in ("cheap", "dear")]
    assert predicted[:, order] == pytest.approx(np.array([[0.9, 0.4], [0.2, 0.9]]), abs=0.15)


def test_it_beats_the_best_single_model_on_new_questions(two_kinds):
    policy = Router()
    means = fitted(policy, two_kinds)
    kinds = np.array([i % 2 for i in range(200)])
    models = chosen(policy, means, [question(kind, 1000 + i) for i, kind in enumerate(kinds)])
    chance = {"cheap": (0.2, 0.9), "dear": (0.9, 0.4)}
    got = np.mean([chance[model][kind] for model, kind in zip(models, kinds, strict=True)])
    assert got > 0.85  # the best single one: .65


def test_the_price_moves_it_to_the_cheap_one(two_kinds):
    policy = Router()
    shares = []
    for price in (0.0, 0.02, 0.06, 0.1, 1.0):
        means = replace(fitted(policy, two_kinds), price=price)
        models = chosen(policy, means, [question(i % 2, i) for i in range(60)])
        shares.append(models.count("dear") / len(models))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.3
    assert shares[-1] == 0


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_not_routed_on(numbers, seed):
    """Nothing in the question tells: all goes to the better one."""
    prompts = [question(i % 2, number) for i, number in enumerate(numbers)]
    chances = {"cheap": [0.5] * 300, "dear": [0.6] * 300}
    outcomes = outcomes_of(prompts, chances, seed)
    right = {
        model: np.mean([o.correct[0] for o in outcomes if o.model == model]) for model in chances
    }
    policy = Router(z=2.0)
    means = fitted(policy, outcomes)
    assert set(chosen(policy, means, prompts)) == {max(right, key=right.get)}
    asked = Asked("0", prompts[0])
    assert "does not pay" in policy.decide(asked, means).reason


def test_models_that_are_all_alike(numbers):
    prompts = [question(i % 2, number) for i, number in enumerate(numbers)]
    for chance in (0.0, 1.0):
        outcomes = outcomes_of(prompts, {"cheap": [chance] * 300, "dear": [chance] * 300})
        policy = Router()
        means = fitted(policy, outcomes, replace(MEANS, price=1e-6))
        assert means.learnt["kind"] == "mean"
        assert set(chosen(policy, means, prompts[:9])) == {"cheap"}


def test_an_answer_ends_it_and_a_model_that_is_down_is_passed_over(two_kinds):
    policy = Router(samples=2)
    means = fitted(policy, two_kinds)
    asked = Asked("q", question(1, 50))
    first = policy.decide(asked, means)
    assert (first.model, first.count) == ("cheap", 2)
    asked.failed = 2
    second = policy.decide(asked, means)
    assert (second.model, second.count) == ("dear", 2)
    asked.add(Sample(model="dear", answer="a"))
    third = policy.decide(asked, means)
    assert (third.model, third.count) == ("dear", 1)
    asked.add(Sample(model="dear", answer="a"))
    finish = policy.decide(asked, means)
    assert isinstance(finish, Finish)
    assert finish.answer == "a"
    assert finish.confidence == pytest.approx(0.4, abs=0.2)
    down = Asked("q", question(1, 50))
    down.failed = 4
    assert policy.decide(down, means).answer is None


def test_a_replay_answers_all(two_kinds):
    policy = Router()
    means = replace(fitted(policy, two_kinds), max_samples=2)
    played = replay(policy, Recording.of(two_kinds), means)
    assert (played.samples == 1).all()
    assert played.correct.mean() > 0.8


def test_one_at_a_time_is_what_all_at_once_is(two_kinds):
    policy = Router()
    means = fitted(policy, two_kinds)
    questions = [Asked(str(i), question(i % 2, i * 3)) for i in range(40)]
    together = policy.decide_all(questions, means)
    alone = [policy.decide(asked, means) for asked in questions]
    assert [action.model for action in alone] == [action.model for action in together]
    assert policy.decide_all([], means) == []


def test_five_hundred_questions_in_a_fraction_of_a_second(two_kinds):
    """In processor time, generously: bench/routing.py and docs/routing.md have what it takes."""
    policy = Router()
    means = fitted(policy, two_kinds)
    questions = [Asked(str(i), question(i % 2, i)) for i in range(500)]
    policy.decide_all(questions[:1], means)
    started = time.process_time()
    policy.decide_all(questions, means)
    assert time.process_time() - started < 1


# -- fits ----------------------------------------------------------------------------------------


def test_a_fit_is_json_and_the_same_again(two_kinds):
    policy = Router()
    learnt = policy.fit(two_kinds, MEANS)
    assert json.loads(json.dumps(learnt)) == learnt
    assert policy.fit(two_kinds, MEANS) == learnt


def test_an_embedding_takes_the_place_of_words(two_kinds, tmp_path):
    with pytest.raises(ValueError, match="no folder of a sentence-transformers model"):
        Router(embedding=str(tmp_path)).fit(two_kinds, MEANS)
    means = fitted(Router(), two_kinds)
    with pytest.raises(ValueError, match="fitted for"):
        Router(embedding=str(tmp_path)).check(means)


@pytest.fixture(scope="module")
def sentence_model(tiny_model, tmp_path_factory):
    return save_sentence_model(tiny_model, tmp_path_factory.mktemp("sentences") / "model")


def test_a_sentence_model_can_make_the_vectors(two_kinds, sentence_model):
    policy = Router(embedding=sentence_model)
    means = fitted(policy, two_kinds)
    policy.check(means)
    assert chosen(policy, means, [question(1, 1234), question(0, 1234)]) == ["cheap", "dear"]
    with pytest.raises(ValueError, match="fitted for"):
        Router().check(means)


def test_what_a_sentence_model_takes_is_told_beforehand_and_paid_once(two_kinds, sentence_model):
    policy, shape = Router(embedding=sentence_model), encoder_of(Path(sentence_model))
    prompts = [f"{question(i % 2, 2000 + i)} Once more." for i in range(40)]
    most, took = policy.reading(prompts), AddingUp()
    policy.read(prompts, took)
    assert 0.7 * most.flops < took.cost.flops <= most.flops
    assert took.cost.flops >= 40 * shape.flops(1, 5)
    assert policy.reading(prompts) == Cost(), "they are kept"
    again = AddingUp()
    policy.read([*prompts, prompts[0] + " New."], again)
    assert 0 < again.cost.flops < took.cost.flops / 10
    assert Router().reading(prompts) == Cost(), "words are read for nothing"


def test_a_decoding_pays_for_what_its_router_reads(two_kinds, sentence_model, tmp_path):
    """Held beforehand: where it does not fit, nothing is read."""

    class Says(Backend):
        settings_known = frozenset()

        def __init__(self, model):
            self.model = model

        def upper(self, asking):
            return Cost(flops=1e3, tokens=10.0)

        async def ask(self, asking):
            return Answered(
                completions=(Completion(text="x", tokens=10.0),), cost=Cost(flops=1e3, tokens=10.0)
            )

    prompts = [f"{question(i % 2, 5000 + i)} Now." for i in range(6)]
    options = {
        "backends": [Says("cheap"), Says("dear")],
        "policy": {"router": {"embedding": sentence_model}},
        "answer": None,
        "fit_on": two_kinds,
    }
    question_vectors._kept.clear()
    with pytest.raises(BudgetExceeded, match="may take"):
        decode(prompts, **options, budget=Budget(flops=1e6))
    assert not question_vectors._kept
    spent = decode(prompts, **options, budget=Budget(flops=1e12), folder=tmp_path / "a").spent
    assert spent.flops > 6e3 + 300 * encoder_of(Path(sentence_model)).flops(1, 5)
    warm = decode(prompts, **options, budget=Budget(flops=1e12), folder=tmp_path / "b").spent
    assert warm.flops == 6e3


def test_without_scikit_learn_it_is_said(two_kinds, monkeypatch):
    means = fitted(Router(), two_kinds)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"pip install 'thrifty\[router\]'"):
        Router().fit(two_kinds, MEANS)
    assert chosen(Router(), means, [question(1, 7)]) == ["cheap"]  # deciding goes without it


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda outcomes: [], "no outcome of 'cheap'"),
        (lambda outcomes: [o for o in outcomes if o.model == "dear"], "no outcome of 'cheap'"),
        (lambda outcomes: outcomes[:20], "10 questions with a text .* are too few"),
        (lambda outcomes: [replace(o, prompt="") for o in outcomes], "0 questions with a text"),
        (
            lambda outcomes: [replace(o, id=f"{o.model}{o.id}") for o in outcomes],
            "0 questions with a text",
        ),
    ],
)
def test_what_it_does_not_learn_from(two_kinds, change, hint):
    with pytest.raises(ValueError, match=hint):
        Router().fit(change(two_kinds), MEANS)


def test_one_model_needs_no_router(two_kinds):
    with pytest.raises(ValueError, match="two models or more"):
        Router().fit(two_kinds, Means(offers=OFFERS[:1]))
    with pytest.raises(ValueError, match="two models or more"):
        Router(models=("cheap",)).fit(two_kinds, MEANS)
    with pytest.raises(ValueError, match="there is no model 'other'"):
        Router(models=("cheap", "other")).fit(two_kinds, MEANS)


def test_questions_that_one_model_was_not_asked_are_left_out(two_kinds):
    learnt = Router().fit(two_kinds[:-1], MEANS)
    assert (learnt["questions"], learnt["left_out"]) == (299, 1)


def test_without_a_fit_it_refuses(two_kinds):
    with pytest.raises(ValueError, match="knows nothing before it is fitted"):
        Router().check(MEANS)
    means = fitted(Router(), two_kinds)
    three = replace(means, offers=(*OFFERS, Offer(model="new", cost=3.0)))
    with pytest.raises(ValueError, match="fit it again"):
        Router().check(three)
    Router(models=("dear", "cheap")).check(three)
    with pytest.raises(ValueError, match="fewer samples"):
        Router(samples=3).check(replace(means, max_samples=2))


@pytest.mark.parametrize("damage", ["", "%%%", "aGVsbG8=", None])
def test_a_damaged_state_is_an_error_not_code(two_kinds, damage):
    import base64
    import io

    if damage is None:  # a pickle in an npz
        file = io.BytesIO()
        np.savez(file, out_of_fold=np.array([{"a": 1}], dtype=object))
        damage = base64.b64encode(file.getvalue()).decode()
    means = fitted(Router(), two_kinds)
    broken = replace(means, learnt={**means.learnt, "state": damage})
    with pytest.raises(ValueError, match="damaged"):
        Router().decide(Asked("q", "Compute."), broken)


def test_hostile_prompts(two_kinds):
    policy = Router()
    means = fitted(policy, two_kinds)
    for prompt in ("", "\0", "a" * 10_000_000, "\ud800", "💥" * 5000, "." * 100_000):
        assert isinstance(policy.decide(Asked("q", prompt), means), Draw)


def test_options_that_make_no_sense():
    for options in ({"samples": 0}, {"z": -1.0}, {"z": float("nan")}):
        with pytest.raises(ValueError):
            Router(**options)
    assert resolve("policy", {"router": {"models": ["a", "b"]}}) == Router(models=("a", "b"))


def test_the_nine_models_out_of_fold():
    """A part of the train file alone: the forest explains something of how the models differ."""
    import csv
    import gzip

    beside = Path(__file__).resolve().parents[3] / "shared" / "traces"
    folder = Path(os.environ.get("THRIFTY_SHARED_TRACES", beside))
    path = folder / "routing" / "llmrouter_dcrouter_train.csv.gz"
    if not path.exists():
        pytest.skip("no recorded routes on this machine")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[::8]
    models = list(rows[0])[2:]
    right = np.array([[float(row[model]) for model in models] for row in rows])
    texts = [row["question"] for row in rows]
    out = out_of_fold(("forest", 5), vectors(texts, learn_vectors(texts)), right)
    assert _slope(out, right)[1] > 0.05
