"""Router: which model to ask, told from the question alone.

    model(q) = argmax over m of  P(m answers q rightly) - price x cost of m

The predictor (``signals/accuracy_predictors.py``, on ``signals/question_vectors.py``) is the one
that explains most, out of fold, of how models differ from each other on a question, since nothing
else decides; its differences are then drawn towards the models' mean ones by the slope that was
right out of fold. Where it did not beat the best single model at the run's price out of fold by
``z`` standard errors, that model answers everything, and the reason says so.

Sources: RouteLLM, arXiv:2406.18665; hybrid LLM, arXiv:2404.14618; k-nearest neighbours as a
rival, arXiv:2505.12601.
"""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from io import BytesIO
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from thrifty.core.budget import Cost
from thrifty.core.contracts import DecodingPolicy, Meter
from thrifty.core.question_reading import ReadsQuestions
from thrifty.core.ranges import check_ranges
from thrifty.core.sampling import Action, Asked, Draw, Finish, Means, Outcome, vote

Floats = NDArray[np.float64]

LEAST = 50
"""Questions to learn from."""


class Worth(NamedTuple):
    """What routing brought at a price, out of fold."""

    pays: bool
    best: int
    """Place of the best single model."""
    gain: float
    """Over that, accuracy less price times cost, a question."""
    error: float


@dataclass(frozen=True, kw_only=True)
class Router(DecodingPolicy, ReadsQuestions):
    """The model that pays for this question, told from its text."""

    models: tuple[str, ...] = ()
    """To choose among; empty: all at hand."""
    samples: int = 1
    """Of the model that is chosen; the answer is their vote."""
    embedding: str = ""
    """Folder of a sentence-transformers model that makes the vectors; empty: words and form."""
    z: float = 1.0
    """Standard errors by which routing must beat the best single model, on questions that it was
    not fitted on."""

    source: ClassVar[str] = "arXiv:2406.18665, arXiv:2505.12601"

    def __post_init__(self) -> None:
        check_ranges(self, samples=(1, math.inf), z=(0, math.inf))

    # -- asking -----------------------------------------------------------------------------------

    def reading(self, prompts: Sequence[str]) -> Cost:
        if not self.embedding:
            return Cost()
        from thrifty.signals.question_vectors import most_to_read

        return most_to_read(prompts, self.embedding)

    def read(self, prompts: Sequence[str], meter: Meter) -> None:
        if self.embedding:
            from thrifty.signals.question_vectors import read_by_model

            read_by_model(prompts, self.embedding, meter)

    def check(self, means: Means) -> None:
        if not means.learnt:
            raise ValueError(
                "a router knows nothing before it is fitted\n"
                "hint: fit it on questions with gold answers that every model was asked"
            )
        fitted = means.learnt["terms"]
        models = self._models(means)
        if set(models) != set(fitted["models"]) or self.embedding != fitted["embedding"]:
            raise ValueError(
                f"the router was fitted for {', '.join(fitted['models'])} with the embedding "
                f"{fitted['embedding'] or 'of words'}, not for {', '.join(models)} with "
                f"{self.embedding or 'words'}\nhint: fit it again, or set models"
            )
        if means.max_samples < self.samples:
            raise ValueError(
                f"{self.samples} samples of a model are to be drawn, {means.max_samples} allowed\n"
                "hint: fewer samples"
            )

    def decide(self, asked: Asked, means: Means) -> Action:
        return self.decide_all([asked], means)[0]

    def decide_all(self, questions: Sequence[Asked], means: Means) -> list[Action]:
        if not questions:
            return []
        models: list[str] = means.learnt["terms"]["models"]
        costs = self._costs(models, means)
        predicted = predict_accuracies(means.learnt, [asked.prompt for asked in questions])
        worth = _worth(means.learnt["state"], tuple(costs), means.price, self.z)
        if worth.pays:
            values = predicted - means.price * np.array(costs)
        else:
            values = np.tile(_mean_values(means.learnt, costs, means.price), (len(questions), 1))
        orders = np.argsort(-values, axis=1, kind="stable")
        return [
            self._action(asked, [models[m] for m in order], row[order], worth)
            for asked, order, row in zip(questions, orders, predicted, strict=True)
        ]

    def close(self, asked: Asked, means: Means, reason: str) -> Finish:
        return vote(asked, reason)

    def _action(self, asked: Asked, models: Sequence[str], chances: Floats, worth: Worth) -> Action:
        """``models``: the best first."""
        answers = asked.answers()
        told = f"+{worth.gain:.3f} ± {worth.error:.3f} over the best single model out of fold"
        if not worth.pays:
            told = f"routing does not pay: {told[1:] if worth.gain < 0 else told}"
        if not answers:
            place = asked.failed // self.samples  # on to the next best where one is down
            if place >= len(models):
                return vote(asked, "no model answers")
            count = self.samples - asked.failed % self.samples
            reason = f"right with {chances[place]:.2f}; {told}"
            return Draw(model=models[place], count=count, reason=reason)
        model = answers[0].model
        missing = self.samples - len(answers) - asked.failed % self.samples
        if missing > 0:
            return Draw(model=model, count=missing, reason="the same model again")
        finish = vote(asked, f"{model}; {told}")
        if finish.answer is None or model not in models:
            return finish
        return replace(finish, confidence=float(np.clip(chances[models.index(model)], 0, 1)))

    def _models(self, means: Means) -> list[str]:
        models = list(self.models) or [offer.model for offer in means.offers]
        for model in models:
            means.offer(model)
        return models

    def _costs(self, models: Sequence[str], means: Means) -> list[float]:
        """Of asking each."""
        return [self.samples * means.offer(model).cost for model in models]

    # -- learning ---------------------------------------------------------------------------------

    def fit(self, outcomes: Sequence[Outcome], means: Means) -> dict[str, Any]:
        """Raises ValueError where there is too little to learn from, or no scikit-learn."""
        try:
            import sklearn  # noqa: F401
        except ImportError:
            raise ValueError(
                "a router is fitted with scikit-learn, which is not installed\n"
                "hint: pip install 'thrifty[router]'; what was fitted elsewhere goes without it"
            ) from None
        from thrifty.signals.accuracy_predictors import KINDS, fit_predictor, out_of_fold
        from thrifty.signals.question_vectors import learn_vectors, vectors

        models = self._models(means)
        prompts, right, left_out = _table(outcomes, models)
        learnt = learn_vectors(prompts, self.embedding)
        x = vectors(prompts, learnt, self.embedding)
        tried = []
        best_explained, chosen, best_out = (
            0.0,
            ("mean", 0.0),
            np.tile(right.mean(axis=0), (len(x), 1)),
        )
        for kind in KINDS:
            out = out_of_fold(kind, x, right)
            slope, explained = _slope(out, right)
            tried.append({"kind": kind[0], "setting": kind[1], "explained": explained})
            if explained > best_explained:
                best_explained, chosen, best_out = explained, kind, out
        slope, _ = _slope(best_out, right)
        fitted = {} if chosen[0] == "mean" else fit_predictor(chosen, x, right)
        arrays = {
            **{f"question.{name}": each for name, each in learnt.items()},
            **{f"predictor.{name}": each for name, each in fitted.items()},
            "out_of_fold": _drawn_in(best_out, right.mean(axis=0), slope).astype(np.float32),
            "right": right.astype(np.float32),
        }
        state = _packed(arrays)
        worth = _worth(state, tuple(self._costs(models, means)), means.price, self.z)
        return {
            "terms": {"models": models, "embedding": self.embedding},
            "questions": len(prompts),
            "left_out": left_out,
            "kind": chosen[0],
            "setting": chosen[1],
            "slope": slope,
            "tried": tried,
            "accuracies": right.mean(axis=0).tolist(),
            "best_of_each": float(right.max(axis=1).mean()),
            "gain": [worth.gain, worth.error],
            "state": state,
        }


def predict_accuracies(learnt: Mapping[str, Any], prompts: Sequence[str]) -> Floats:
    """[prompts, models of ``terms``]: how likely each is right, by what ``fit`` learnt."""
    from thrifty.signals.accuracy_predictors import predict
    from thrifty.signals.question_vectors import vectors

    means = np.array(learnt["accuracies"])
    if learnt["kind"] == "mean":
        return np.tile(means, (len(prompts), 1))
    arrays = _unpacked(learnt["state"])
    x = vectors(prompts, _part(arrays, "question."), learnt["terms"]["embedding"])
    predicted = predict(learnt["kind"], _part(arrays, "predictor."), x)
    return _drawn_in(predicted, means, learnt["slope"])


def _table(outcomes: Sequence[Outcome], models: Sequence[str]) -> tuple[list[str], Floats, int]:
    """Questions that every model was asked, [questions, models] how often each was right, and how
    many questions were left out."""
    if len(models) < 2:
        raise ValueError(
            "a router needs two models or more\nhint: another policy, such as marginal"
        )
    found: dict[str, dict[str, Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.id, {})[outcome.model] = outcome
    for model in models:
        if not any(model in of and of[model].answers for of in found.values()):
            raise ValueError(
                f"no outcome of {model!r} to learn from\n"
                "hint: record its answers to the same questions, or leave it out of models"
            )
    prompts, right = [], []
    for of in found.values():
        prompt = next((each.prompt for each in of.values() if each.prompt), "")
        if prompt and all(model in of and of[model].correct for model in models):
            prompts.append(prompt)
            right.append([float(np.mean(of[model].correct)) for model in models])
    if len(prompts) < LEAST:
        raise ValueError(
            f"{len(prompts)} questions with a text that all of {', '.join(models)} were asked are "
            f"too few to learn from\nhint: {LEAST} at least, some hundreds for a gain"
        )
    return prompts, np.array(right), len(found) - len(prompts)


# -- what is predicted, and what it is worth ----------------------------------------------------


def _slope(out: Floats, right: Floats) -> tuple[float, float]:
    """From 0 to 1: how much of the predicted differences between models to believe; and the share
    of the real ones' variance that is explained then."""
    real = _differences(right)
    real = real - real.mean(axis=0)
    told = _differences(out)
    told = told - told.mean(axis=0)
    size, all_of_it = float((told**2).sum()), float((real**2).sum())
    if size <= 1e-12 or all_of_it <= 1e-12:
        return 0.0, 0.0
    slope = min(max(float((told * real).sum()) / size, 0.0), 1.0)
    return slope, 1 - float(((real - slope * told) ** 2).sum()) / all_of_it


def _differences(values: Floats) -> Floats:
    """From the mean over models."""
    return values - values.mean(axis=1, keepdims=True)


def _drawn_in(predicted: Floats, means: Floats, slope: float) -> Floats:
    """The differences between models drawn towards their mean ones; how hard a question is for all
    is left as it is."""
    usual = means - means.mean()
    differences = usual + slope * (_differences(predicted) - usual)
    return predicted.mean(axis=1, keepdims=True) + differences


@lru_cache(maxsize=64)
def _worth(state: str, costs: tuple[float, ...], price: float, z: float) -> Worth:
    arrays = _unpacked(state)
    values = arrays["right"].astype(float) - price * np.array(costs)
    told = arrays["out_of_fold"].astype(float) - price * np.array(costs)
    best = int(values.mean(axis=0).argmax())
    gains = np.take_along_axis(values, told.argmax(axis=1)[:, None], axis=1)[:, 0]
    gains = gains - values[:, best]
    gain, error = float(gains.mean()), float(gains.std() / math.sqrt(len(gains)))
    return Worth(gain > z * error, best, gain, error)


def _mean_values(learnt: Mapping[str, Any], costs: Sequence[float], price: float) -> Floats:
    return np.array(learnt["accuracies"]) - price * np.array(costs)


# -- arrays as text -----------------------------------------------------------------------------


def _packed(arrays: Mapping[str, NDArray[Any]]) -> str:
    """An npz file as base64: JSON holds it, and nothing in it is code."""
    file = BytesIO()
    plain: Any = dict(arrays)
    np.savez_compressed(file, allow_pickle=False, **plain)
    return b64encode(file.getvalue()).decode("ascii")


@lru_cache(maxsize=4)
def _unpacked(state: str) -> dict[str, NDArray[Any]]:
    """With halves as doubles, to be computed with. Raises ValueError where it is no such text."""
    try:
        with np.load(BytesIO(b64decode(state, validate=True)), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zip, zlib, base64 and numpy each have their own
        raise ValueError(
            f"the router's fitted state is damaged: {error}\nhint: fit it again"
        ) from None
    return {
        name: each.astype(np.float64) if each.dtype == np.float16 else each
        for name, each in arrays.items()
    }


def _part(arrays: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {
        name.removeprefix(prefix): each for name, each in arrays.items() if name.startswith(prefix)
    }
