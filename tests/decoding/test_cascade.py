"""The cascade: against a naive one; its bounds where the truth is known; what it refuses."""

import json
import math
import os
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from thrifty.core.resolve import resolve
from thrifty.core.sampling import Asked, Draw, Finish, Means, Offer, Outcome, Sample
from thrifty.decoding.cascade import Cascade
from thrifty.recordings import read_outcomes
from thrifty.replay import Recording, means_of, replay
from thrifty.scaling.escalation import GRID, NEVER, Recorded, certified, sequences
from thrifty.scaling.risk_bounds import in_expectation, p_value, upper_bound
from thrifty.signals.stage_votes import judge, weighted_vote

OFFERS = (Offer(model="small", cost=1.0), Offer(model="large", cost=10.0))
MEANS = Means(offers=OFFERS)


def outcome(id, model, answers, gold="yes", confidences=()):
    return Outcome(
        id=str(id),
        model=model,
        answers=tuple(answers),
        correct=tuple(float(answer == gold) for answer in answers),
        confidences=tuple(confidences),
    )


def world(count, seed=0, strong=0.9, samples=5):
    """Questions on which the small model is right as often as it agrees, more or less."""
    rng = np.random.default_rng(seed)
    found = []
    for id in range(count):
        easy = rng.beta(1.2, 0.6)
        small = [
            ("yes" if rng.random() < easy else f"no {rng.integers(3)}") for _ in range(samples)
        ]
        found.append(outcome(id, "small", small))
        found.append(outcome(id, "large", ["yes" if rng.random() < strong else "no 0"]))
    return found


def fitted(policy, outcomes, means=MEANS):
    return replace(means, learnt=json.loads(json.dumps(policy.fit(outcomes, means))))


def naive(policy, outcomes, threshold):
    """Question -> right, large asked: one loop."""
    of = {}
    for each in outcomes:
        of.setdefault(each.id, {})[each.model] = each
    found = {}
    for id, models in of.items():
        small, large = models["small"], models["large"]
        drawn = [answer for answer in small.answers[: policy.samples] if answer is not None]
        share, answer = 0.0, None
        if drawn:
            answer, number = Counter(drawn).most_common(1)[0]
            share = number / policy.samples
        stays = threshold is not None and answer is not None and share >= threshold
        chosen = answer if stays else (large.answers[0] or answer)
        right = 0.0
        for each in (small, large):
            for said, correct in zip(each.answers, each.correct, strict=True):
                if said is not None and said == chosen:
                    right = correct
        found[id] = (right, not stays)
    return found


# -- against naive ones --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_a_replay_does_what_one_loop_does(seed):
    outcomes = world(120, seed)
    policy = Cascade(vote="last")
    means = fitted(policy, outcomes)
    recording = Recording.of(outcomes)
    played = replay(policy, recording, replace(means, max_samples=6))
    threshold = policy._point(means, [["small"], ["large"]])["thresholds"][0]
    expected = naive(policy, outcomes, threshold)
    assert played.correct[0].tolist() == [right for right, _ in expected.values()]
    assert (played.samples[0] == 6).tolist() == [asked for _, asked in expected.values()]


def test_the_points_are_what_each_threshold_brings():
    outcomes = world(200)
    policy = Cascade(vote="last")
    learnt = policy.fit(outcomes, MEANS)
    by_hand = {}
    for threshold in [None, *(t for t in GRID if t != NEVER)]:
        found = list(naive(policy, outcomes, threshold).values())
        right, asked = np.array([r for r, _ in found]), np.array([a for _, a in found])
        by_hand[threshold] = (right.mean(), asked.mean())
    assert len(learnt["points"]) > 1
    for point in learnt["points"]:
        (threshold,) = point["thresholds"]
        assert (point["accuracy"], point["reached"][1]) == pytest.approx(by_hand[threshold])
    best = max(accuracy for accuracy, _ in by_hand.values())
    assert learnt["points"][-1]["accuracy"] == pytest.approx(best)


def test_the_price_moves_it_along_the_curve():
    outcomes = world(300)
    policy = Cascade()
    shares = []
    for price in (0.0, 0.005, 0.02, 0.1, 1.0):
        means = fitted(policy, outcomes, replace(MEANS, price=price))
        shares.append(policy._point(means, [["small"], ["large"]])["reached"][1])
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]
    one_fit = fitted(policy, outcomes)  # the price of the run decides, not that of the fit
    point = policy._point(replace(one_fit, price=1.0), [["small"], ["large"]])
    assert point["reached"][1] == shares[-1]


@pytest.mark.parametrize("mean", [0.0, 0.02, 0.1, 0.4])
@pytest.mark.parametrize("count", [20, 200])
def test_the_bounds_against_sums(mean, count):
    """The binomial tail summed up by hand; Hoeffding's by its formula."""
    wrong = round(mean * count)
    for level in (0.05, 0.2, 0.5):
        tail = sum(
            math.comb(count, k) * level**k * (1 - level) ** (count - k) for k in range(wrong + 1)
        )
        assert p_value(wrong / count, count, level, binary=True) == pytest.approx(tail, rel=1e-9)
        low = min(wrong / count, level)
        apart = (1 - low) * math.log((1 - low) / (1 - level))
        if low > 0:
            apart += low * math.log(low / level)
        expected = min(math.exp(-count * apart), math.e * tail, 1.0)
        found = p_value(wrong / count, count, level, binary=False)
        assert found == pytest.approx(expected, rel=1e-9)
    for binary in (True, False):
        most = upper_bound(wrong / count, count, 0.1, binary=binary)
        assert p_value(wrong / count, count, most + 1e-9, binary=binary) <= 0.1
        assert p_value(wrong / count, count, most - 1e-6, binary=binary) > 0.1


def test_the_edges_of_the_bounds():
    assert p_value(0.3, 10, 1.0, binary=True) == 0
    assert p_value(0.0, 10, 0.0, binary=True) == 1
    assert upper_bound(1.0, 10, 0.1, binary=True) == 1
    assert in_expectation(0.0, 9) == pytest.approx(0.1)


def test_three_stages_are_what_loops_over_them_say():
    rng = np.random.default_rng(0)
    scores, right = rng.random((3, 50)), (rng.random((3, 50)) < 0.7).astype(float)
    recorded = Recorded(scores, right, (1.0, 2.0, 7.0))
    for first, second in product((0.0, 0.5, NEVER), repeat=2):
        lost, cost, accuracy, calls = [], [], [], []
        for i in range(50):
            end = 0 if scores[0, i] >= first else 1 if scores[1, i] >= second else 2
            accuracy.append(right[end, i])
            lost.append(max(right[2, i] - right[end, i], 0))
            cost.append((0.0, 2.0, 9.0)[end] / 9)
            calls.append(float(end == 2))
        at = (first, second)
        assert recorded.accuracy(at) == pytest.approx(np.mean(accuracy))
        for name, expected in (("lost", lost), ("cost", cost), ("calls", calls)):
            assert recorded.losses(name, at).tolist() == pytest.approx(expected)


# -- bounds, where the truth is known ------------------------------------------------------------


def draw_scores(rng, count):
    """Score, whether the small one is right with that probability, whether the large one is."""
    scores = rng.integers(0, 6, count) / 5
    small = rng.random(count) < 0.2 + 0.75 * scores
    return scores, small, rng.random(count) < 0.9


def true_risk(risk, threshold):
    """Of the world of ``draw_scores``, exactly."""
    total = 0.0
    for score in np.arange(6) / 5:
        stays, right = score >= threshold, 0.2 + 0.75 * score
        total += {
            "lost": stays * (1 - right) * 0.9,
            "wrong": stays * (1 - right) + (not stays) * 0.1,
            "calls": float(not stays),
        }[risk] / 6
    return total


@pytest.mark.parametrize(
    ("risk", "level"), [("lost", 0.06), ("lost", 0.1), ("wrong", 0.15), ("calls", 0.55)]
)
@pytest.mark.long
def test_a_bound_fails_no_more_often_than_it_says(risk, level):
    """400 calibrations on 150 questions: in no more than delta of them is any threshold allowed
    whose true risk is above the level (binomial slack of three standard errors)."""
    delta, times, broken, allowed = 0.1, 400, 0, 0
    for seed in range(times):
        rng = np.random.default_rng([7, seed])
        scores, small, large = draw_scores(rng, 150)
        recorded = Recorded(
            np.array([scores, np.ones(150)]), np.array([small, large]).astype(float), (1.0, 9.0)
        )
        found, binary = certified(recorded, risk, level, delta, in_mean=False)
        assert binary
        allowed += len(found) > 1
        broken += any(true_risk(risk, each[0]) > level + 1e-9 for each in found)
    assert broken / times <= delta + 3 * math.sqrt(delta * (1 - delta) / times)
    assert allowed / times > 0.3  # it is not kept by allowing nothing


def test_with_three_stages_too():
    delta, times, broken, allowed = 0.1, 60, 0, 0
    for seed in range(times):
        rng = np.random.default_rng([8, seed])
        scores, small, large = draw_scores(rng, 200)
        middle_scores, middle, _ = draw_scores(rng, 200)
        right = np.array([small, middle, large]).astype(float)
        recorded = Recorded(np.array([scores, middle_scores, np.ones(200)]), right, (1.0, 3.0, 9.0))
        found, _ = certified(recorded, "lost", 0.12, delta, in_mean=False)
        allowed += len(found) > 1
        for first, second in found:
            goes_on = np.mean([score < first for score in np.arange(6) / 5])
            truth = true_risk("lost", first) + goes_on * true_risk("lost", second)
            if truth > 0.12 + 1e-9:
                broken += 1
                break
    assert broken / times <= delta + 3 * math.sqrt(delta * (1 - delta) / times)
    assert allowed / times > 0.3


def test_in_the_mean_it_holds_in_the_mean():
    level, risks = 0.08, []
    for seed in range(400):
        scores, small, large = draw_scores(np.random.default_rng([9, seed]), 100)
        recorded = Recorded(
            np.array([scores, np.ones(100)]), np.array([small, large]).astype(float), (1.0, 9.0)
        )
        found, _ = certified(recorded, "lost", level, 0.1, in_mean=True)
        risks.append(true_risk("lost", found[-1][0]))
    error = np.std(risks) / math.sqrt(len(risks))
    assert np.mean(risks) <= level + 3 * error
    assert np.mean(risks) > level / 3


def test_what_is_lost_is_bounded_at_whatever_price():
    """The bound of the target ``price`` holds for all points at once."""
    policy = Cascade(vote="last", samples=3)
    truth = {}
    for point in policy.fit(world(8000, seed=99, samples=3), MEANS)["points"]:
        truth[tuple(point["thresholds"])] = point["lost"]
    times, broken = 40, 0
    for seed in range(times):
        points = policy.fit(world(80, seed=seed, samples=3), MEANS)["points"]
        broken += any(truth.get(tuple(p["thresholds"]), 0.0) > p["lost_at_most"] for p in points)
    assert broken / times <= 0.1 + 3 * math.sqrt(0.09 / times)


def test_sequences_begin_where_the_risk_is_least():
    assert sequences(2, "lost")[0][0] == (NEVER,)
    assert sequences(2, "calls")[0][0] == (0.0,)
    assert len(sequences(3, "lost")) == 6


# -- what it does --------------------------------------------------------------------------------


def test_it_asks_the_small_one_and_then_the_large_one():
    policy = Cascade(threshold=0.7)
    asked = Asked("q")
    first = policy.decide(asked, MEANS)
    assert isinstance(first, Draw)
    assert (first.model, first.count) == ("small", 5)
    for answer in ("a", "a", "b", "c", None):
        asked.add(Sample(model="small", answer=answer))
    second = policy.decide(asked, MEANS)
    assert isinstance(second, Draw)
    assert (second.model, second.count) == ("large", 1)
    assert "0.40" in second.reason
    asked.add(Sample(model="large", answer="b"))
    last = policy.decide(asked, MEANS)
    assert isinstance(last, Finish)
    assert last.answer == "b"
    assert "not calibrated" in last.reason


def test_the_bound_stands_in_the_reason():
    policy = Cascade(target="lost", at_most=0.05)
    means = fitted(policy, world(300))
    bound = means.learnt["bound"]
    assert (bound["risk"], bound["at_most"], bound["level"]) == ("lost", 0.05, 0.9)
    assert (bound["questions"], bound["test"]) == (300, "binomial bound")
    asked = Asked("q")
    for _ in range(5):
        asked.add(Sample(model="small", answer="a"))
    finish = policy.decide(asked, means)
    assert isinstance(finish, Finish)
    assert "lost at most 0.05 with probability 0.9" in finish.reason
    assert "300 calibration questions" in finish.reason


def test_confidence_is_how_often_it_was_right():
    outcomes = world(2000, seed=3)
    policy = Cascade()
    recording = Recording.of(outcomes)
    played = replay(policy, recording, replace(fitted(policy, outcomes), max_samples=6))
    told = np.array([finish.confidence for finish in played.finishes[0]])
    for low, high in ((0, 0.8), (0.8, 0.9), (0.9, 1)):
        inside = (told >= low) & (told <= high)
        if inside.sum() > 100:
            assert told[inside].mean() == pytest.approx(played.correct[0][inside].mean(), abs=0.05)


def test_a_model_that_is_down_is_passed_over():
    policy = Cascade(threshold=0.7)
    asked = Asked("q")
    asked.failed = 5
    action = policy.decide(asked, MEANS)
    assert isinstance(action, Draw)
    assert action.model == "large"
    asked.failed = 6
    assert policy.decide(asked, MEANS).answer is None
    half = Asked("q")
    for _ in range(3):
        half.add(Sample(model="small", answer="a"))
    half.failed = 2
    assert policy.decide(half, MEANS).answer == "a"  # the three agree


def test_an_unreadable_strong_answer_leaves_the_weak_one():
    asked = Asked("q")
    for answer in ("a", "a", "b", "c", "d"):
        asked.add(Sample(model="small", answer=answer))
    asked.add(Sample(model="large", answer=None))
    assert Cascade(threshold=0.7).decide(asked, MEANS).answer == "a"


def test_where_the_money_ends_the_furthest_stage_answers():
    policy = Cascade(threshold=0.7)
    asked = Asked("q")
    asked.add(Sample(model="small", answer="a"))
    finish = policy.close(asked, MEANS, "the dollars are spent")
    assert finish.answer == "a"
    assert finish.reason.startswith("the dollars are spent")
    assert policy.close(Asked("q"), MEANS, "spent").answer is None


def test_prompts_of_one_model_are_a_stage():
    offers = (Offer(model="p1"), Offer(model="p2"), Offer(model="large", cost=10.0))
    policy = Cascade(stages=(("p1", "p2"), ("large",)), samples=2, threshold=0.7)
    asked = Asked("q")
    seen = []
    while isinstance(action := policy.decide(asked, Means(offers=offers)), Draw):
        seen.append((action.model, action.count))
        for _ in range(action.count):
            asked.add(Sample(model=action.model, answer={"p1": "a", "p2": "b"}.get(action.model)))
    assert seen == [("p1", 2), ("p2", 2), ("large", 1)]


def test_three_models_are_calibrated_and_played():
    rng = np.random.default_rng(5)
    outcomes = []
    for id in range(300):
        easy = rng.beta(1.2, 0.6)
        for model, power, count in (("small", 1.0, 5), ("middle", 0.5, 5), ("large", 0.15, 1)):
            said = [
                "yes" if rng.random() < easy**power else f"no {rng.integers(3)}"
                for _ in range(count)
            ]
            outcomes.append(outcome(id, model, said))
    offers = tuple(
        Offer(model=m, cost=c) for m, c in (("small", 1.0), ("middle", 3.0), ("large", 30.0))
    )
    means = Means(offers=offers, max_samples=11)
    policy = Cascade(target="lost", at_most=0.15)
    means = fitted(policy, outcomes, means)
    played = replay(policy, Recording.of(outcomes), means)
    assert set(played.samples[0].tolist()) <= {5.0, 10.0, 11.0}
    assert played.samples[0].mean() < 11
    large = np.mean([o.correct[0] for o in outcomes if o.model == "large"])
    assert played.correct.mean() > large - 0.15


def test_token_confidence_decides_where_it_is_asked_for():
    """Answers that all agree, right where the model is sure."""
    rng = np.random.default_rng(1)
    outcomes = []
    for id in range(200):
        sure = rng.random()
        answer = "yes" if sure > 0.5 else "no"
        outcomes.append(outcome(id, "small", [answer] * 5, confidences=[sure] * 5))
        outcomes.append(outcome(id, "large", ["yes"], confidences=[0.9]))
    for signal in ("confidence", "both"):
        policy = Cascade(signal=signal)
        learnt = policy.fit(outcomes, MEANS)
        assert learnt["points"][-1]["accuracy"] == 1.0
        assert 0.3 < learnt["points"][-1]["reached"][1] < 0.7
    blind = Cascade().fit(outcomes, MEANS)
    assert blind["points"][-1]["thresholds"] == [None]
    with pytest.raises(ValueError, match="no token confidence"):
        Cascade(signal="confidence").fit(world(50), MEANS)


def test_the_weighted_vote_is_taken_where_it_is_better_and_only_there():
    """Everything is passed on (nothing may be lost) to a model that is right less often than the
    vote of the small one; or more often."""
    policy = Cascade(target="lost", at_most=0.0)
    outcomes = world(300, strong=0.55)
    means = fitted(policy, outcomes, replace(MEANS, max_samples=6))
    assert means.learnt["vote"] == "weighted"
    assert means.learnt["vote_gain"][0] > 2 * means.learnt["vote_gain"][1] > 0
    (point,) = means.learnt["points"]
    large = np.mean([o.correct[0] for o in outcomes if o.model == "large"])
    assert point["accuracy"] > large + 0.1
    played = replay(policy, Recording.of(outcomes), means)
    assert played.correct.mean() == pytest.approx(point["accuracy"])
    assert policy.fit(world(300, strong=1.0), MEANS)["vote"] == "last"
    assert replace(policy, vote="last").fit(outcomes, MEANS)["vote"] == "last"
    wrong = Cascade(target="wrong", at_most=0.6)  # its bound is of the last stage's answer
    assert wrong.fit(outcomes, MEANS)["vote"] == "last"


def test_votes_by_hand():
    said = [[("a", None), ("a", None), ("b", None), (None, None)], [("b", None)]]
    assert judge(said[:1], "agreement") == ("a", 0.5)
    assert judge(said, "agreement") == ("b", (0.25 + 1) / 2)
    assert weighted_vote(said, [1.0, 0.2]) == "a"
    assert weighted_vote(said, [1.0, 0.3]) == "b"
    assert weighted_vote(said, [0.0, 0.0]) is None
    assert judge([[(None, None)]], "agreement") == (None, -1.0)
    assert judge([], "agreement") == (None, -1.0)


# -- fits ----------------------------------------------------------------------------------------


def test_a_fit_is_json_and_the_same_again():
    outcomes = world(100, samples=20)
    policy = Cascade(target="calls", at_most=0.4)
    learnt = policy.fit(outcomes, MEANS)
    assert json.loads(json.dumps(learnt)) == learnt
    assert policy.fit(list(reversed(outcomes)), MEANS)["points"] == learnt["points"]
    assert policy.fit(outcomes, MEANS) == learnt


@pytest.mark.parametrize(
    ("outcomes", "hint"),
    [
        ([], "no outcome of 'small'"),
        ([o for o in world(50) if o.model == "small"], "no outcome of 'large'"),
        (world(10), "10 questions with 5 samples of small, 1 samples of large are too few"),
        (world(50, samples=3), "0 questions"),
    ],
)
def test_what_it_does_not_calibrate_on(outcomes, hint):
    with pytest.raises(ValueError, match=hint):
        Cascade().fit(outcomes, MEANS)


def test_one_model_is_no_cascade():
    alone = Means(offers=OFFERS[:1])
    with pytest.raises(ValueError, match="two models or more"):
        Cascade().fit(world(50), alone)
    with pytest.raises(ValueError, match="two models or more"):
        Cascade(threshold=0.7).check(alone)


def test_without_calibration_it_refuses():
    with pytest.raises(ValueError, match=r"must be calibrated[\s\S]*threshold: 0.7"):
        Cascade().check(MEANS)
    Cascade(threshold=0.7).check(MEANS)


def test_a_calibration_of_other_models_or_settings_is_refused():
    means = fitted(Cascade(), world(60))
    other = replace(means, offers=(Offer(model="small"), Offer(model="larger", cost=10.0)))
    with pytest.raises(ValueError, match="says nothing of another's"):
        Cascade().check(other)
    with pytest.raises(ValueError, match="calibrated with samples 5, not 4"):
        Cascade(samples=4).check(means)
    with pytest.raises(ValueError, match="takes 6 samples, 3 are allowed"):
        Cascade().check(replace(means, max_samples=3))


def test_costs_may_change_their_order_after_the_fit():
    means = fitted(Cascade(), world(60))
    turned = replace(means, offers=(replace(OFFERS[1], cost=0.5), OFFERS[0]))
    assert Cascade().decide(Asked("q"), turned).model == "small"


@pytest.mark.parametrize(
    "options",
    [
        {"stages": (("a",),)},
        {"stages": (("a",), ("a",))},
        {"stages": (("a",), ())},
        {"target": "lost"},
        {"at_most": 0.1},
        {"target": "wrong", "at_most": 0.1, "guarantee": "mean"},
        {"stages": (("a",), ("b",), ("c",)), "target": "lost", "at_most": 0.1, "guarantee": "mean"},
        {"samples": 0},
        {"delta": 0.0},
        {"threshold": math.nan},
    ],
)
def test_options_that_make_no_sense(options):
    with pytest.raises(ValueError):
        Cascade(**options)


def test_it_is_named_with_its_options():
    policy = resolve("policy", {"cascade": {"stages": [["a", "b"], ["c"]], "threshold": 0.6}})
    assert policy == Cascade(stages=(("a", "b"), ("c",)), threshold=0.6)


def test_a_target_that_nothing_keeps():
    weak = [replace(o, correct=(0.0,) * len(o.answers)) for o in world(100)]
    with pytest.raises(ValueError, match=r"no thresholds keep wrong at 0\.1"):
        Cascade(target="wrong", at_most=0.1).fit(weak, MEANS)
    with pytest.raises(ValueError, match="the first stage alone costs 5"):
        Cascade(target="cost", at_most=4.0).fit(world(100), MEANS)


def test_too_few_questions_for_a_bound_pass_everything_on():
    """25 questions certify nothing below .088: nothing is lost by construction."""
    learnt = Cascade(target="lost", at_most=0.05).fit(world(25), MEANS)
    assert [point["thresholds"] for point in learnt["points"]] == [[None]]
    assert learnt["points"][0]["lost_at_most"] == 0


@pytest.mark.parametrize("right", [True, False])
def test_questions_that_are_all_alike(right):
    """All agree and all are right, or wrong: the cheap one does."""
    gold = "a" if right else "b"
    outcomes = []
    for id in range(60):
        outcomes += [outcome(id, "small", ["a"] * 5, gold), outcome(id, "large", ["a"], gold)]
    learnt = Cascade().fit(outcomes, MEANS)
    assert len(learnt["points"]) == 1
    assert learnt["points"][0]["reached"] == [1.0, 0.0]


def test_nothing_readable_goes_on():
    outcomes = []
    for id in range(60):
        outcomes += [outcome(id, "small", [None] * 5), outcome(id, "large", ["yes"])]
    learnt = Cascade(target="calls", at_most=1.0).fit(outcomes, MEANS)
    assert learnt["points"][0]["reached"] == [1.0, 1.0]
    assert learnt["points"][0]["accuracy"] == 1.0
    with pytest.raises(ValueError, match="no thresholds keep calls"):
        Cascade(target="calls", at_most=0.5).fit(outcomes, MEANS)


def test_a_strong_model_that_is_worse_is_not_asked():
    """Agreement of the small one is right, the large one wrong: no call is worth it."""
    learnt = Cascade().fit(world(300, strong=0.05), replace(MEANS, price=1e-4))
    means = replace(MEANS, learnt=learnt, price=1e-4)
    assert Cascade()._point(means, [["small"], ["large"]])["reached"][1] < 0.05


# -- the recordings ------------------------------------------------------------------------------


def test_gpt35_to_gpt4_calibrated_on_a_split():
    """docs/routing.md has the table: .905 with .29 of the calls on average, GPT-4 alone .889."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "traces"
    folder = Path(os.environ.get("THRIFTY_SHARED_TRACES", beside)) / "samples"
    weak = [f"mot_gpt35_date_{prompt}" for prompt in ("cot1", "cot2", "pot1", "pot2")]
    strong = "mot_gpt4_date_greedy_cot2"
    files = [folder / f"{name}.jsonl.gz" for name in (*weak, strong)]
    if not all(file.exists() for file in files):
        pytest.skip("no recorded samples on this machine")
    recording = Recording.of(read_outcomes(files))
    policy = Cascade(stages=(tuple(weak), (strong,)))
    ahead, calls = [], []
    for seed in range(6):
        one, other = recording.split(0.5, seed)
        means = means_of(one, prices={strong: 20.0})
        played = replay(policy, other, replace(means, learnt=policy.fit(one.outcomes, means)))
        alone = np.mean([of[strong].correct[0] for of in other.questions.values()])
        ahead.append(played.correct.mean() - alone)
        calls.append((played.samples[0] == 21).mean())
    assert np.mean(ahead) > 0
    assert np.mean(calls) < 0.5
