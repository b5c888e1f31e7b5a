"""Every extension point, on one page.

A method is one file with one final class: a frozen, keyword-only dataclass whose fields all have
defaults and whose docstring's first line is its help text. It is found by its file's name
(``core/resolve.py``) and tested by the contract tests of its kind. Method files load no torch at
import time, so that the planner can price all of them in milliseconds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from thrifty.core import sampling
from thrifty.core.budget import Cost
from thrifty.core.given import (
    Candidates,
    Chosen,
    DrawnWithGradients,
    DrawnWithoutBackward,
    Held,
    Look,
    Meter,
    Models,
    Pool,
    Progress,
    Rows,
    Tokens,
    Work,
)
from thrifty.core.memory_contracts import (
    MEMORY_KINDS,
    ActivationMemory,
    LossMemory,
    MemoryTechnique,
    OptimizerStates,
    Trainable,
    WeightStorage,
)
from thrifty.core.worth import Worth

if TYPE_CHECKING:
    from numpy.random import Generator as Random
    from numpy.typing import NDArray

    from thrifty.costs.setting import MemorySetting
    from thrifty.costs.shape import ModelShape
    from thrifty.scaling.learning_rate import WarmupStable

__all__ = [
    "KINDS",
    "MEMORY_KINDS",
    "ActivationMemory",
    "AnswerForm",
    "AnswerMetric",
    "Candidates",
    "Choice",
    "Chosen",
    "DecodingPolicy",
    "DrawnWithGradients",
    "DrawnWithoutBackward",
    "Evaluation",
    "Filter",
    "Held",
    "Look",
    "LossMemory",
    "MemoryTechnique",
    "Meter",
    "Metric",
    "Models",
    "OnlineMethod",
    "OptimizerStates",
    "Outlook",
    "Picked",
    "Picker",
    "Pool",
    "Progress",
    "Question",
    "Round",
    "Rows",
    "Scorer",
    "StoppingRule",
    "Tokens",
    "Trainable",
    "Verdict",
    "WeightStorage",
    "Work",
    "Worth",
]
"""With what methods are given, which has a page of its own."""


# -- scorers ------------------------------------------------------------------------------------


class Scorer(ABC):
    """Rows -> scores, higher = keep.

    Must be deterministic under its seed and independent of batch size and shard order; prices its
    FLOPs and its peak bytes; charges what it computes to the meter.
    """

    needs_target: ClassVar[bool]
    needs_model: ClassVar[bool]
    tasks: ClassVar[tuple[str, ...]]
    """The training tasks for which the score makes sense."""
    cost_class: ClassVar[Literal["free", "text", "forward", "gradient", "training"]]
    source: ClassVar[str]
    worth: ClassVar[Worth]
    model: str = ""
    """Folder or hub name of the model that it looks at; empty: the one to be trained. An option of
    those that can use a smaller one."""
    stand_in: ClassVar[str] = ""
    """The scorer that looks at a model in training in its place, where a look of its own begins
    with a training; empty: none."""

    @property
    def looks_at(self) -> tuple[str, ...]:
        """Every model that the scores depend on."""
        return (self.model,)

    @property
    def reads(self) -> tuple[str, ...]:
        """Files of rows that the scores depend on, beside the pool and the targets."""
        return ()

    @abstractmethod
    def cost(self, work: Work) -> Cost:
        """FLOPs, seconds and peak bytes of scoring ``work.pool``, preparation included."""

    @abstractmethod
    def prepare(self, pool: Pool, targets: Mapping[str, Rows], models: Models, meter: Meter) -> Any:
        """What scoring a shard needs to know of the whole: pool statistics, target gradients."""

    @abstractmethod
    def score(self, shard: Rows, state: Any, meter: Meter) -> NDArray[np.float32]:
        """``[num_examples, num_targets]`` (one column where there is no target); NaN = not
        reached."""

    def direction(self, state: Any) -> NDArray[np.float32] | None:
        """[num_targets, n]: the targets' gradients as ``prepare`` found them, or a fixed sample of
        their elements, by which a later look tells how far they turned; None where it has none."""
        return None


# -- filters and pickers ------------------------------------------------------------------------


class Filter(ABC):
    """Candidates -> which remain, and for each dropped row the reason."""

    source: ClassVar[str]
    needs_vectors: ClassVar[bool] = False
    """Whether it asks ``candidates.look`` for them, which costs a pass over the pool."""

    @abstractmethod
    def drop(self, candidates: Candidates, held: Held) -> dict[int, str]:
        """id -> reason, of every candidate to drop."""


@dataclass(frozen=True, kw_only=True)
class Picked:
    """Rows to train on, in order of preference, with their weight."""

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]

    @classmethod
    def of(cls, ids: NDArray[np.int64]) -> Picked:
        """All of equal weight."""
        return cls(ids=ids, weights=np.ones(len(ids), dtype=np.float32))


class Picker(ABC):
    """Candidates -> rows within a token budget, never over it; ties broken by (seed, id)."""

    source: ClassVar[str]

    @property
    def needs_vectors(self) -> bool:
        """Whether it asks ``candidates.look`` for them, which costs a pass over the pool."""
        return False

    @property
    def needs_pairs(self) -> bool:
        """Whether it asks ``candidates.look`` what rows bring one another."""
        return False

    def cost(self, work: Work) -> Cost:
        """Of what else it asks ``candidates.look`` for, of rows like ``work.pool``."""
        return Cost()

    @abstractmethod
    def pick(self, candidates: Candidates, max_tokens: float, seed: int) -> Picked: ...


# -- inside training ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Round:
    """What is trained on next."""

    rows: NDArray[np.int64]
    """Places in ``Chosen``, in the order wanted; at least one."""
    weights: NDArray[np.float32] | None = None
    """Of their losses, [len(rows)]; None: one each."""
    left_out: int = 0
    """Tokens of rows that a plain pass would have trained on at this point and this one saves."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is trained on of a batch."""

    places: NDArray[np.int64]
    """In the batch, in order of preference; at least one."""
    learnt: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """To be known from now on."""


class OnlineMethod(ABC):
    """Decides while training which rows come next, and how much each token's loss counts.

    A function of what it is given, so that a run that resumes repeats what it would have done.
    """

    source: ClassVar[str]
    cost_class: ClassVar[Literal["free", "forward", "gradient"]] = "free"
    """Of what it does before training, or in the midst of it."""
    watches: ClassVar[bool] = False
    """Whether it asks for the rows' losses, which training then notes (at no extra pass)."""
    weighs_tokens: ClassVar[bool] = False
    """Whether not all of them count alike, be it by ``token_weights`` or by their rows' weights."""
    keeps_order: ClassVar[bool] = False
    """Whether rows are packed exactly in their order, at the price of more padding."""
    chooses: ClassVar[bool] = False
    """Whether it trains on some rows of each batch alone, which it chooses by their gradients."""
    larger: int = 1
    """How many times a step's rows it is given to choose a step's rows of, without a backward; an
    option of those that do."""
    model: str = ""
    """Folder or hub name of another model that it looks at; an option of those that can."""
    renewals: int = 0
    """How often in a run it looks at the model as it is by then; an option of those that do."""

    def cost(self, work: Work) -> Cost:
        """FLOPs, seconds and peak bytes of preparing for ``work.pool``, the rows chosen."""
        return Cost()

    def renewal_cost(self, work: Work) -> Cost:
        """The same of looking at the model once while it is trained."""
        return Cost()

    def step_cost(self, step: Cost, shape: ModelShape, setting: MemorySetting) -> Cost:
        """Of a micro-batch under ``setting``, choosing included, where a plain one takes
        ``step``."""
        return step

    def refuses(self, shape: ModelShape, setting: MemorySetting) -> str | None:
        """Why a run cannot be held as ``setting`` has it; None where it can."""
        return None

    def prepare(
        self, chosen: Chosen, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> Mapping[str, NDArray[Any]]:
        """What it needs to know before the first step; kept, so that it is paid for once."""
        return {}

    def renew(
        self, chosen: Chosen, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> Mapping[str, NDArray[Any]]:
        """What it needs to know anew, with ``models.base()`` as it is by now. From then on
        ``known`` has it beside what was prepared."""
        return {}

    @abstractmethod
    def next_round(
        self, chosen: Chosen, known: Mapping[str, NDArray[Any]], now: Progress
    ) -> Round: ...

    def token_weights(
        self,
        known: Mapping[str, NDArray[Any]],
        rows: NDArray[np.int64],
        places: NDArray[np.int64],
        losses: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Weights of the tokens of a batch that carry loss, [n]: of row ``rows`` the token at
        ``places``, with its loss now. Their mean should be 1."""
        return np.ones(len(losses))

    def choose(
        self, batch: Any, chosen: Chosen, known: Mapping[str, NDArray[Any]], random: Random
    ) -> Choice:
        """Which rows of a batch to train on. It is ``DrawnWithGradients``, or where ``larger`` is
        above 1 ``DrawnWithoutBackward``. ``random``: the step's own."""
        return Choice(places=np.arange(len(batch.rows)))


# -- the objective ------------------------------------------------------------------------------


class Metric(ABC):
    """What the objective measures of a model: a loss of the rows, less is better; or where it is an
    ``AnswerMetric`` a score of generated answers."""

    source: ClassVar[str]
    cost_class: ClassVar[Literal["forward", "answers"]] = "forward"
    """Of an evaluation."""

    @property
    @abstractmethod
    def unit(self) -> str:
        """Of the objective, its gains and what a gain is worth."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt as text, and the answer that is wanted."""

    prompt: str
    gold: str


class AnswerMetric(Metric):
    """A score in [0, 1] of an answer that the model generated, more is better.

    Pure: the same texts, the same score. What the run lowers, its loss, is 1 - score.
    """

    cost_class: ClassVar[Literal["forward", "answers"]] = "answers"
    asks_own: ClassVar[bool] = False
    """Whether it brings its own ``questions``, in place of a target's dev and test rows."""
    compares: ClassVar[bool] = False
    """Whether it can ``read`` answers, so that they can be voted on."""

    def read(self, answer: str) -> str | None:
        """What an answer says, the same text for equal answers; None: nothing. Of those that
        compare."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise ValueError where it cannot score here: a package or a function is missing."""

    def questions(self, part: Literal["dev", "test"]) -> Sequence[Question]:
        """Of those that ``asks_own``."""
        return ()

    @abstractmethod
    def score(self, prompt: str, answer: str, gold: str) -> float: ...


# -- stopping -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One dev evaluation of a run."""

    step: int
    flops: float
    loss: float
    stderr: float
    """Standard error of the change since the evaluation before (paired by example); of the loss
    itself for the first."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a stopping rule may weigh besides the history."""

    resource: str
    """The binding resource, a field of ``Cost``."""
    next_interval: Cost
    remaining: Cost
    """From here to the end of the budget."""
    price: float
    """Objective units per unit of ``resource`` that the best alternative would bring."""
    unit: str
    """Of the objective: of losses, gains and the price's numerator."""
    scored: bool = False
    """Whether losses are 1 - score; the user reads the score."""
    spent: Cost = field(default_factory=Cost)
    """Of the budget, until now."""
    schedule: WarmupStable | None = None
    """Of the learning rate, whose cool-down may begin at any step; None: it stays as it is."""
    interval_steps: int = 0
    """Of ``next_interval``; 0: as many as between the last two evaluations."""
    intervals_left: float = float("inf")
    """Until the plan has the cool-down begin."""


class StoppingRule(ABC):
    """History of a run -> go on or stop, and why. Pure: the same history, the same answer."""

    source: ClassVar[str]
    weighs_price: ClassVar[bool] = False
    """Whether it goes by what the budget would bring elsewhere."""

    @abstractmethod
    def decide(self, history: Sequence[Evaluation], outlook: Outlook) -> Verdict: ...


@dataclass(frozen=True, kw_only=True)
class Verdict:
    stop: bool
    reason: str
    choice: Any = None
    """The ``Choice`` that decided, where the rule weighed options."""
    forecast: Any = None
    """The ``Forecast`` of the loss that it rests on, where it made one; its ``wrong`` are the odds
    that a stop now would be wrong."""


# -- decoding -----------------------------------------------------------------------------------


class DecodingPolicy(ABC):
    """The samples of questions so far, and what remains -> what comes next of each.

    Pure: the same samples, the same action; so that a run that resumes repeats what it would have
    done, and recorded samples can be replayed with no model.
    """

    source: ClassVar[str]
    needs: ClassVar[Literal["answers", "rewards", "thoughts", "nothing"]] = "answers"
    """That samples must tell for it to work: which answers are equal, how good each one is, the
    text to be continued."""
    pooled: ClassVar[bool] = False
    """Whether questions compete for what remains, rather than each be settled by itself."""
    model: str = ""
    """The one that is asked; empty: the cheapest. An option of those that ask one."""

    def check(self, means: sampling.Means) -> None:
        """Raise ValueError where it cannot work with what is at hand."""
        if self.model:
            means.offer(self.model)

    def fit(self, outcomes: Sequence[sampling.Outcome], means: sampling.Means) -> dict[str, Any]:
        """What it learns from questions whose gold answers are known, as JSON: ``means.learnt`` of
        later decisions. Most learn nothing."""
        return {}

    @abstractmethod
    def decide(self, asked: sampling.Asked, means: sampling.Means) -> sampling.Action:
        """Of one open question, no draw of which is under way."""

    def decide_all(
        self, questions: Sequence[sampling.Asked], means: sampling.Means
    ) -> list[sampling.Action]:
        """Of several, in their order."""
        return [self.decide(asked, means) for asked in questions]

    def close(self, asked: sampling.Asked, means: sampling.Means, reason: str) -> sampling.Finish:
        """What is answered where nothing more can be drawn: the vote, unless it knows better."""
        return sampling.vote(asked, reason)


class AnswerForm(ABC):
    """A text -> the answer in it, and which answers are equal."""

    source: ClassVar[str]

    def check(self) -> None:
        """Raise ValueError where it cannot read here: a package or a function is missing."""
        return None

    @abstractmethod
    def read(self, text: str, prompt: str = "") -> str | None:
        """In a form in which equal answers mostly are the same text; None: there is none."""

    def same(self, one: str, other: str) -> bool:
        """Whether two that were read say the same."""
        return one == other


KINDS: Mapping[str, tuple[str, type]] = {
    "scorer": ("thrifty.scorers", Scorer),
    "filter": ("thrifty.filters", Filter),
    "picker": ("thrifty.pickers", Picker),
    "online": ("thrifty.online", OnlineMethod),
    "metric": ("thrifty.metrics", Metric),
    "stopping": ("thrifty.stopping", StoppingRule),
    "policy": ("thrifty.decoding", DecodingPolicy),
    "answer": ("thrifty.answer_forms", AnswerForm),
    "trained": ("thrifty.memory.trained", Trainable),
    "weights": ("thrifty.memory.weights", WeightStorage),
    "activations": ("thrifty.memory.activations", ActivationMemory),
    "loss": ("thrifty.memory.loss", LossMemory),
    "states": ("thrifty.memory.states", OptimizerStates),
}
"""kind -> (package whose files are its methods, the contract)."""
