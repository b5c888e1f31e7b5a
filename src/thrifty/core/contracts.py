"""Every extension point, on one page.

A method is one file with one final class: a frozen, keyword-only dataclass whose fields all have
defaults and whose docstring's first line is its help text. It is found by its file's name
(``core/resolve.py``) and tested by the contract tests of its kind. Method files load no torch at
import time, so that the planner can price all of them in milliseconds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from thrifty.core.budget import Cost, PoolStats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from thrifty.costs.hardware import Device
    from thrifty.costs.setting import MemorySetting
    from thrifty.costs.shape import ModelShape


# -- what methods are given ---------------------------------------------------------------------


class Tokens(Protocol):
    """One tokenised example."""

    @property
    def input_ids(self) -> NDArray[np.int32]: ...  # [num_tokens]
    @property
    def loss_mask(self) -> NDArray[np.bool_]: ...  # [num_tokens], true where loss falls


class Rows(Protocol):
    """Some examples, column by column: a shard of the pool, or a target's rows."""

    @property
    def ids(self) -> NDArray[np.int64]: ...
    @property
    def prompts(self) -> Sequence[str]: ...
    @property
    def completions(self) -> Sequence[str]: ...
    @property
    def texts(self) -> Sequence[str]: ...
    @property
    def tokens(self) -> Sequence[Tokens]: ...
    @property
    def num_tokens(self) -> NDArray[np.int64]: ...
    @property
    def fingerprints(self) -> Sequence[bytes]: ...
    def __len__(self) -> int: ...


class Pool(Protocol):
    """All valid rows, a shard at a time: nobody holds the whole pool."""

    @property
    def num_shards(self) -> int: ...
    def shards(self) -> Iterator[Rows]: ...


class Models(Protocol):
    """The weights a method may look at. Loading is lazy and happens once."""

    def base(self) -> Any:
        """The ``transformers`` model before training, in eval mode, on the run's device."""
        ...

    @property
    def shape(self) -> ModelShape: ...

    def other(self, path: str) -> Models:
        """The same of another model, a folder or a hub name; of the base model for ``""``."""
        ...

    def tokens(self, rows: Rows) -> Sequence[Tokens]:
        """``rows`` as this model's tokenizer splits them; what it cannot split is one token without
        loss."""
        ...


class Meter(Protocol):
    """Where a method that computes reports what it did."""

    def tick(self, cost: Cost, *, steps: int = 0) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a scorer is asked to do, in numbers, for pricing it."""

    pool: PoolStats
    targets: Mapping[str, PoolStats]
    shape: ModelShape
    device: Device
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_length: int = 1024


# -- scorers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worth:
    """A prior on a scorer: a token that it picks is worth ``mean`` tokens picked at random.

    An editable number with its source, used by the planner until a pilot or a history replaces it.
    """

    mean: float
    stderr: float
    source: str


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

    @property
    def looks_at(self) -> tuple[str, ...]:
        """Every model that the scores depend on."""
        return (self.model,)

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


# -- filters and pickers ------------------------------------------------------------------------


class Look(Protocol):
    """What filters and pickers may look at beside the scores, charged where it is computed."""

    def texts(self) -> Iterator[tuple[NDArray[np.int64], Sequence[str]]]:
        """Ids and texts of the whole pool, a shard at a time."""
        ...

    def vectors(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """[n, width], of unit length: a row's position-weighted mean of last hidden states."""
        ...

    def pairwise_utility(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """[n, n]: how much row j, as an example before it, helps the base model with row i."""
        ...


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Scored rows, column by column; what filters and pickers work on."""

    ids: NDArray[np.int64]  # [n]
    scores: NDArray[np.float32]  # [n, num_targets]
    num_tokens: NDArray[np.int64]  # [n]
    fingerprints: NDArray[np.void]  # [n], 16 bytes of the normalised text each
    targets: tuple[str, ...]
    weights: tuple[float, ...]
    """The targets' weights in the objective, same order."""
    look: Look | None = None
    """None where there is nothing but scores."""

    def __post_init__(self) -> None:
        ids = self.ids if (np.diff(self.ids) > 0).all() else np.sort(self.ids)
        if (twice := np.flatnonzero(np.diff(ids) == 0)).size:
            raise ValueError(
                f"row {ids[twice[0]]} is among the candidates twice\nhint: each row has its own id"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def vectors(self) -> NDArray[np.float32]:
        """[n, width], of unit length. Raises ValueError where there is nothing but scores."""
        if self.look is None:
            raise ValueError("these candidates have no vectors\nhint: give them a look at the pool")
        return self.look.vectors(self.ids)

    def pairwise_utility(self) -> NDArray[np.float32]:
        """[n, n]: how much row j, as an example before it, helps the base model with row i. Raises
        ValueError where there is nothing but scores."""
        if self.look is None:
            raise ValueError("these candidates have no model\nhint: give them a look at the pool")
        return self.look.pairwise_utility(self.ids)

    def texts(self) -> Iterator[list[str]]:
        """Those of rows sorted by id, in their order, some at a time. Raises ValueError where there
        is nothing but scores, or where they are not sorted."""
        if self.look is None or (np.diff(self.ids) < 0).any():
            raise ValueError(
                "these candidates have no texts\nhint: sort them by id, with a look at the pool"
            )
        for ids, texts in self.look.texts():
            if not len(ids):
                continue
            near = slice(*np.searchsorted(self.ids, (ids.min(), ids.max() + 1)).tolist())
            places = np.flatnonzero(np.isin(ids, self.ids[near], assume_unique=True))
            yield [texts[place] for place in places.tolist()]

    def where(self, keep: NDArray[Any]) -> Candidates:
        """Those at a mask or at indices."""
        return Candidates(
            ids=self.ids[keep],
            scores=self.scores[keep],
            num_tokens=self.num_tokens[keep],
            fingerprints=self.fingerprints[keep],
            targets=self.targets,
            weights=self.weights,
            look=self.look,
        )


@dataclass(frozen=True)
class Held:
    """Fingerprints of rows that must not be trained on, by set (dev, test), for overlap."""

    fingerprints: Mapping[str, frozenset[bytes]]


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

    def cost(self, work: Work) -> Cost:
        """Of what else it asks ``candidates.look`` for, of rows like ``work.pool``."""
        return Cost()

    @abstractmethod
    def pick(self, candidates: Candidates, max_tokens: float, seed: int) -> Picked: ...


# -- inside training ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The rows that a run trains on, in the order in which they were picked."""

    tokens: Sequence[Tokens]
    num_tokens: NDArray[np.int64]  # [n]
    scores: NDArray[np.float32]
    """[n], the mean over targets; NaN of rows that were not scored (replay)."""

    def __len__(self) -> int:
        return len(self.num_tokens)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands when it asks for its next rows."""

    number: int
    """Of rounds before."""
    share: float
    """Of the run's tokens that they had, in [0, 1]."""
    num_tokens: int
    """That a round has unless it is a whole pass: a twentieth of the run's."""
    losses: NDArray[np.float64]
    """[n], nats a token as training saw them last; NaN where it has not. Only if asked for."""
    drawn: NDArray[np.int64]
    """[n], in how many rounds each row was."""
    seed: int

    @property
    def random(self) -> np.random.Generator:
        """The round's own: the same on every machine and after a resume."""
        return np.random.default_rng([self.seed, self.number])


@dataclass(frozen=True, kw_only=True)
class Round:
    """What is trained on next."""

    rows: NDArray[np.int64]
    """Places in ``Chosen``, in the order wanted; at least one."""
    weights: NDArray[np.float32] | None = None
    """Of their losses, [len(rows)]; None: one each."""
    left_out: int = 0
    """Tokens of rows that a plain pass would have trained on at this point and this one saves."""


class OnlineMethod(ABC):
    """Decides while training which rows come next, and how much each token's loss counts.

    A function of what it is given, so that a run that resumes repeats what it would have done.
    """

    source: ClassVar[str]
    watches: ClassVar[bool] = False
    """Whether it asks for the rows' losses, which training then notes (at no extra pass)."""
    weighs_tokens: ClassVar[bool] = False
    keeps_order: ClassVar[bool] = False
    """Whether rows are packed exactly in their order, at the price of more padding."""
    model: str = ""
    """Folder or hub name of another model that it looks at; an option of those that can."""

    def cost(self, work: Work) -> Cost:
        """FLOPs, seconds and peak bytes of preparing for ``work.pool``, the rows chosen."""
        return Cost()

    def prepare(
        self, chosen: Chosen, targets: Mapping[str, Rows], models: Models, meter: Meter
    ) -> Mapping[str, NDArray[Any]]:
        """What it needs to know before the first step; kept, so that it is paid for once."""
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


class StoppingRule(ABC):
    """History of a run -> go on or stop, and why. Pure: the same history, the same answer."""

    source: ClassVar[str]

    @abstractmethod
    def decide(self, history: Sequence[Evaluation], outlook: Outlook) -> Verdict: ...


@dataclass(frozen=True, kw_only=True)
class Verdict:
    stop: bool
    reason: str
    choice: Any = None
    """The ``Choice`` that decided, where the rule weighed options."""
    forecast: Any = None
    """The ``Forecast`` of the loss that it rests on, where it made one."""


# -- memory -------------------------------------------------------------------------------------


class MemoryTechnique(ABC):
    """One way to hold a part of a training step: the weights, what is trained of them, the
    optimizer's states, the activations, or the loss.

    A combination takes one of each. Each rewrites the setting that ``costs/memory.py`` evaluates,
    in the order of ``MEMORY_KINDS``, since what they save does not add up.
    """

    makes: ClassVar[Literal["fit", "faster"]]
    """What it is for: to make a model fit, or to get more from a FLOP."""
    runs: ClassVar[bool]
    """Whether a run of thrifty can train with it; otherwise it is priced alone."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Packages that it takes."""
    source: ClassVar[str]
    worth: ClassVar[Worth]
    """Of a token trained on under it, in tokens under the reference."""
    worth_trained: ClassVar[Worth | None] = None
    """The same where the weights that it holds are trained themselves."""

    def refuses(self, setting: MemorySetting) -> str | None:
        """Why it cannot be combined with what ``setting`` has so far; None where it can."""
        return None

    @abstractmethod
    def rewrite(self, setting: MemorySetting) -> MemorySetting: ...

    @classmethod
    def variants(cls) -> tuple[MemoryTechnique, ...]:
        """The forms in which a search tries it."""
        return (cls(),)


MEMORY_KINDS = ("trained", "weights", "activations", "loss", "states")
"""In the order in which they rewrite a setting."""


KINDS: Mapping[str, tuple[str, type]] = {
    "scorer": ("thrifty.scorers", Scorer),
    "filter": ("thrifty.filters", Filter),
    "picker": ("thrifty.pickers", Picker),
    "online": ("thrifty.online", OnlineMethod),
    "stopping": ("thrifty.stopping", StoppingRule),
    **{kind: (f"thrifty.memory.{kind}", MemoryTechnique) for kind in MEMORY_KINDS},
}
"""kind -> (package whose files are its methods, the contract)."""
