"""Cascade: the cheapest model first; on to the next where its samples do not agree.

    stage s ends a question  <=>  score_s >= threshold_s

The score is the agreement of a stage's samples with each other and with the stages before, their
token confidence, or the product (``signals/stage_votes.py``). A stage is a model or several
(prompts, temperatures), whose samples vote together. How much agreement is enough differs between
models and tasks (three of three that agree were right from .34 to .86 of the time), so that
thresholds come from questions of the same task with gold answers (``fit``), to keep

    lost   right answers of the last stage that ending earlier loses, a question
    wrong  answers, a question
    calls  of the last stage, a question
    cost   a question, in the resource of the run

at ``at_most``, with probability 1 - delta or in the mean, whatever the distribution
(``scaling/escalation.py``): of the thresholds that keep it, for lost and wrong the cheapest are
taken, for calls and cost the most accurate. ``price``: accuracy less the run's price of its cost
decides, and what is lost at most is told. A bound is of questions drawn like those of ``fit``.

Sources: FrugalGPT, arXiv:2305.05176; mixture-of-thought cascades, arXiv:2310.03094; Learn then
Test, arXiv:2110.01052; conformal risk control, arXiv:2208.02814.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from thrifty.core.contracts import DecodingPolicy
from thrifty.core.ranges import check_ranges
from thrifty.core.sampling import Action, Asked, Draw, Finish, Means, Outcome
from thrifty.signals.stage_votes import (
    NOTHING,
    RecordedQuestion,
    Said,
    Stages,
    Verdict,
    gain_of_weights,
    judge,
    recorded_blocks,
    vote_weights,
    weighted_vote,
)

if TYPE_CHECKING:
    from thrifty.scaling.escalation import Recorded, Thresholds

LEAST = 20
"""Questions to calibrate on; fewer certify no bound below 0.11, and tell thresholds by chance."""


@dataclass(frozen=True, kw_only=True)
class Cascade(DecodingPolicy):
    """The cheapest model first; the next where its samples agree too little."""

    stages: tuple[tuple[str, ...], ...] = ()
    """Models, those of a stage together; empty: each model at hand is a stage, the cheapest first.
    Written [[small], [large]]."""
    samples: int = 5
    """Of each model of a stage, the last stage aside."""
    last_samples: int = 1
    """Of each model of the last stage."""
    signal: Literal["agreement", "confidence", "both"] = "agreement"
    target: Literal["price", "lost", "wrong", "calls", "cost"] = "price"
    at_most: float | None = None
    """What the target must not exceed; for ``price`` nothing."""
    delta: float = 0.1
    """Probability that it does all the same."""
    guarantee: Literal["probability", "mean"] = "probability"
    """Mean: ``at_most`` holds on average over calibrations, a less cautious bound (two stages)."""
    vote: Literal["auto", "last", "weighted"] = "auto"
    """Of a question that came to the end: the last stage's answer, or the vote of all stages, each
    weighted by the log-odds of its accuracy there; auto: weighted where cross-validation finds that
    better by more than its standard error."""
    threshold: float | None = None
    """Of every stage where nothing was fitted; no bound holds then."""

    source: ClassVar[str] = "arXiv:2305.05176, arXiv:2310.03094, arXiv:2110.01052"

    def __post_init__(self) -> None:
        check_ranges(
            self,
            samples=(1, math.inf),
            last_samples=(1, math.inf),
            at_most=(0, math.inf),
            delta=(1e-9, 0.5),
            threshold=(0, 1),
        )
        models = _flat(self.stages)
        if len(self.stages) == 1 or not all(self.stages) or len(set(models)) < len(models):
            raise ValueError(
                "stages must be two or more, each of one model or more, and no model twice\n"
                "hint: stages: [[small], [large]]"
            )
        if (self.target == "price") != (self.at_most is None):
            raise ValueError(
                f"the target {self.target} goes {'without' if self.target == 'price' else 'with'} "
                "at_most\nhint: target: lost, at_most: 0.02"
            )
        self._check_guarantee(self.stages)

    def _check_guarantee(self, stages: Stages) -> None:
        if self.guarantee == "mean" and (self.target == "wrong" or len(stages) > 2):
            raise ValueError(
                "a bound in the mean needs a risk that only falls as more is passed on: two stages "
                "and not `wrong`\nhint: guarantee: probability"
            )

    # -- asking -----------------------------------------------------------------------------------

    def check(self, means: Means) -> None:
        if not means.learnt and self.threshold is None:
            raise ValueError(
                "a cascade's thresholds must be calibrated: how much agreement is enough differs "
                "between models and tasks\nhint: fit it on questions with gold answers, or set "
                "threshold: 0.7, for which no bound holds"
            )
        stages = self._stages(means)
        wanted = sum(self._counts(stages).values())
        if means.max_samples < wanted:
            raise ValueError(
                f"a question that comes to the end takes {wanted} samples, {means.max_samples} are "
                "allowed\nhint: allow more, or fewer samples a stage"
            )

    def decide(self, asked: Asked, means: Means) -> Action:
        return self.decide_all([asked], means)[0]

    def decide_all(self, questions: Sequence[Asked], means: Means) -> list[Action]:
        stages = self._stages(means)
        counts, point = self._counts(stages), self._point(means, stages)
        return [self._decide(asked, stages, counts, point, means) for asked in questions]

    def _decide(
        self,
        asked: Asked,
        stages: Stages,
        counts: Mapping[str, int],
        point: Mapping[str, Any],
        means: Means,
    ) -> Action:
        drawn: dict[str, list[tuple[str | None, float | None]]] = {model: [] for model in counts}
        for sample in asked.samples:
            if sample.model in drawn and sample.purpose == "answer":
                drawn[sample.model].append((sample.answer, sample.confidence))
        tried = sum(map(len, drawn.values())) + asked.failed
        planned, said, verdict = 0, list[Said](), NOTHING
        for place, stage in enumerate(stages):
            for model in stage:
                planned += counts[model]
                # a draw that failed counts as made, or a model that is down would be asked for ever
                missing = min(counts[model] - len(drawn[model]), planned - tried)
                if missing > 0:
                    return self._draw(model, missing, place, verdict, point, means)
            said.append([each for model in stage for each in drawn[model]])
            verdict = judge(said, self.signal)
            if place + 1 < len(stages):
                enough = point["thresholds"][place]
                if enough is not None and verdict.score >= enough:
                    reason = (
                        f"{self.signal} {verdict.score:.2f} at stage {place + 1} of {len(stages)}, "
                        f"{enough:.3g} is enough; {self._bound(point, means)}"
                    )
                    return self._finish(asked, verdict, place, reason, means)
        if means.learnt and means.learnt["vote"] == "weighted":
            answer = weighted_vote(said, means.learnt["weights"])
            verdict = Verdict(answer or verdict.answer, verdict.score)
        reason = f"passed on to the last of {len(stages)} stages; {self._bound(point, means)}"
        return self._finish(asked, verdict, len(stages) - 1, reason, means)

    def close(self, asked: Asked, means: Means, reason: str) -> Finish:
        said: list[Said] = []
        for stage in self._stages(means):
            mine = [(s.answer, s.confidence) for model in stage for s in asked.answers(model)]
            if not mine:
                break
            said.append(mine)
        verdict, place = judge(said, self.signal), max(len(said) - 1, 0)
        return self._finish(asked, verdict, place, f"{reason}, at stage {place + 1}", means)

    def _draw(
        self,
        model: str,
        count: int,
        place: int,
        before: Verdict,
        point: Mapping[str, Any],
        means: Means,
    ) -> Draw:
        if place == 0:
            return Draw(model=model, count=count, reason="the first stage")
        # who is least sure comes first where not all can be passed on
        doubt = 1 - self._confidence(before, place - 1, means)
        rate = doubt / max(means.offer(model).cost * count, 1e-12)
        enough = point["thresholds"][place - 1]
        wanted = "no score is enough" if enough is None else f"{enough:.3g} would be enough"
        said = f"{self.signal} {before.score:.2f}" if before.score >= 0 else "no score"
        return Draw(
            model=model, count=count, rate=rate, reason=f"{said} at stage {place}, {wanted}"
        )

    def _finish(
        self, asked: Asked, verdict: Verdict, place: int, reason: str, means: Means
    ) -> Finish:
        if verdict.answer is None:
            texts = [sample.text for sample in asked.answers()]
            return Finish(
                answer=None,
                confidence=0.0,
                reason=f"{reason}; no readable answer",
                given_up=True,
                text=texts[-1] if texts else "",
            )
        confidence = self._confidence(verdict, place, means)
        return Finish(answer=verdict.answer, confidence=confidence, reason=reason)

    def _confidence(self, verdict: Verdict, place: int, means: Means) -> float:
        """How often such a score was right when it was calibrated; without that, the score."""
        if not means.learnt:
            return min(max(verdict.score, 0.0), 1.0)
        steps = means.learnt["right"][place]
        return max((share for least, share in steps if verdict.score >= least), default=0.0)

    # -- what it goes by --------------------------------------------------------------------------

    def _stages(self, means: Means) -> Stages:
        """Raises ValueError where they are not at hand, or not those that it was fitted on."""
        stages: Stages = self.stages or [[offer.model] for offer in means.offers]
        if means.learnt:
            fitted: Stages = means.learnt["terms"]["stages"]
            if not self.stages and {*_flat(fitted)} == {*_flat(stages)}:
                stages = fitted  # costs may have changed their order since
            self._check_terms(means.learnt["terms"], stages)
        if len(stages) < 2:
            raise ValueError(
                "a cascade needs two models or more\nhint: another policy, such as marginal"
            )
        for model in _flat(stages):
            means.offer(model)
        return stages

    def _terms(self, stages: Stages) -> dict[str, Any]:
        """What a calibration holds for."""
        names = ("samples", "last_samples", "signal", "target", "at_most", "delta", "guarantee")
        return {
            "stages": [list(stage) for stage in stages],
            **{name: getattr(self, name) for name in names},
        }

    def _check_terms(self, fitted: Mapping[str, Any], stages: Stages) -> None:
        for name, value in self._terms(stages).items():
            if fitted[name] != value:
                raise ValueError(
                    f"the cascade was calibrated with {name} {fitted[name]}, not {value}\n"
                    "hint: calibrate it again: agreement of one model says nothing of another's"
                )

    def _counts(self, stages: Stages) -> dict[str, int]:
        """Samples of each model."""
        return {
            model: self.last_samples if place + 1 == len(stages) else self.samples
            for place, stage in enumerate(stages)
            for model in stage
        }

    def _costs(self, stages: Stages, means: Means) -> tuple[float, ...]:
        """Of each stage."""
        counts = self._counts(stages)
        return tuple(sum(means.offer(m).cost * counts[m] for m in stage) for stage in stages)

    def _point(self, means: Means, stages: Stages) -> Mapping[str, Any]:
        """The thresholds that are gone by."""
        if not means.learnt:
            return {"thresholds": [self.threshold] * (len(stages) - 1)}
        points: Sequence[Mapping[str, Any]] = means.learnt["points"]
        if len(points) == 1 or self.target in ("lost", "wrong"):
            return points[0]  # the cheapest
        return self._best(points, self._costs(stages, means), means.price)

    def _best(
        self, points: Sequence[Mapping[str, Any]], costs: Sequence[float], price: float
    ) -> Mapping[str, Any]:
        """Of those that keep the target, the one for it, at a price."""

        def value(point: Mapping[str, Any]) -> tuple[float, float]:
            cost = sum(c * share for c, share in zip(costs, point["reached"], strict=True))
            if self.target in ("lost", "wrong"):
                return -cost, point["accuracy"]
            return point["accuracy"] - price * cost, -cost

        return max(points, key=value)

    def _bound(self, point: Mapping[str, Any], means: Means) -> str:
        if not means.learnt:
            return f"{self.threshold:g} as it was set, not calibrated: no bound holds"
        told = str(means.learnt["bound"]["text"])
        return f"lost at most {point['lost_at_most']:.3f} {told}" if self.at_most is None else told

    # -- calibration ------------------------------------------------------------------------------

    def fit(self, outcomes: Sequence[Outcome], means: Means) -> dict[str, Any]:
        """Raises ValueError where there is too little to calibrate on, or nothing keeps the
        target."""
        import numpy as np

        from thrifty.scaling.escalation import Recorded, points, rising_shares

        means = replace(means, learnt={})
        stages = self._stages(means)
        self._check_guarantee(stages)
        counts, costs = self._counts(stages), self._costs(stages, means)
        blocks, left_out = recorded_blocks(outcomes, stages, counts, self.signal, LEAST)
        scores = np.array([[[v.score for v in q.verdicts] for q in block] for block in blocks])
        right = np.array([[q.right for q in block] for block in blocks])
        first = Recorded(scores[0].T, right[0].T, costs)
        every = Recorded(scores.reshape(-1, len(stages)).T, right.reshape(-1, len(stages)).T, costs)
        allowed, bound = self._allowed(first)

        def found(final: Any = None) -> list[dict[str, Any]]:
            return [_plain(each) for each in points(allowed, every, first, self.delta, final)]

        chosen = self._best(found(), costs, means.price)
        last = every.last_asked(_thresholds(chosen))
        questions = [question for block in blocks for question in block]
        vote = self._choose_vote([questions[i] for i in np.flatnonzero(last == len(stages) - 1)])
        final = every.right[-1]
        if vote["vote"] == "weighted":
            final = np.array([question.right_by(vote["weights"]) for question in questions])
        # confidence is of those that come to a stage, of all where few do
        told = [last >= s if (last >= s).sum() >= LEAST else last >= 0 for s in range(len(stages))]
        ended = zip(every.scores, [*every.right[:-1], final], told, strict=True)
        return {
            "terms": self._terms(stages),
            "questions": first.num_questions,
            "left_out": left_out,
            "bound": bound,
            "points": found(final),
            **vote,
            "right": [rising_shares(scores[of], right[of]) for scores, right, of in ended],
        }

    def _allowed(self, recorded: Recorded) -> tuple[list[Thresholds], dict[str, Any]]:
        """The thresholds that keep the target, and what is said of it."""
        from thrifty.scaling.escalation import certified, sequences
        from thrifty.scaling.risk_bounds import bound_name

        costs, count = recorded.costs, recorded.num_questions
        sure, by = f"with probability {1 - self.delta:g}", f"{count} calibration questions"
        bound: dict[str, Any] = {"risk": "lost", "level": 1 - self.delta, "questions": count}
        if self.at_most is None:
            every = [each for order in sequences(len(costs), "lost") for each in order]
            return every, bound | {"text": f"{sure} ({by})"}
        level = self.at_most
        if self.target == "cost":
            if level < costs[0]:
                raise ValueError(
                    f"the first stage alone costs {costs[0]:g} a question, {level:g} are allowed\n"
                    "hint: fewer samples, or a higher at_most"
                )
            rest = sum(costs[1:])
            level = (level - costs[0]) / rest if rest > 0 else 1.0
        in_mean = self.guarantee == "mean"
        found, binary = certified(recorded, self.target, level, self.delta, in_mean=in_mean)
        if not found:
            raise ValueError(
                f"no thresholds keep {self.target} at {self.at_most:g} {sure}, by {by}\n"
                "hint: more questions to calibrate on, or a higher at_most"
            )
        test = "conformal risk control" if in_mean else f"{bound_name(binary)} bound"
        how = "on average over calibrations" if in_mean else sure
        return found, bound | {
            "risk": self.target,
            "at_most": self.at_most,
            "level": None if in_mean else 1 - self.delta,
            "test": test,
            "text": f"{self.target} at most {self.at_most:g} {how} ({test}, {by})",
        }

    def _choose_vote(self, ended: Sequence[RecordedQuestion]) -> dict[str, Any]:
        """``ended``: those that came to the end."""
        if self.vote == "last" or self.target == "wrong" or not ended:
            return {"vote": "last", "weights": [], "vote_gain": None}
        gain, error = gain_of_weights(ended)
        better = self.vote == "weighted" or gain > error
        return {
            "vote": "weighted" if better else "last",
            "weights": vote_weights(ended) if better else [],
            "vote_gain": [gain, error],
        }


def _plain(point: Any) -> dict[str, Any]:
    """As JSON has it: None for the threshold that no score reaches."""
    thresholds = [None if math.isinf(each) else each for each in point.thresholds]
    return asdict(point) | {"thresholds": thresholds, "reached": list(point.reached)}


def _thresholds(point: Mapping[str, Any]) -> Thresholds:
    return tuple(math.inf if each is None else each for each in point["thresholds"])


def _flat(stages: Stages) -> list[str]:
    return [model for stage in stages for model in stage]
