"""What methods are given to work on; ``contracts.py`` says what they must do with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from thrifty.core.budget import Cost, PoolStats
from thrifty.core.ordering import fill

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from thrifty.costs.hardware import Device
    from thrifty.costs.operations import Adapter
    from thrifty.costs.shape import ModelShape


# -- all of them ----------------------------------------------------------------------------------


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

    @property
    def splits_anew(self) -> bool:
        """Whether its tokenizer is another than the pool's."""
        ...

    def tokens(self, rows: Rows) -> Sequence[Tokens]:
        """``rows`` as this model's tokenizer splits them; what it cannot split is one token without
        loss."""
        ...


class Meter(Protocol):
    """Where a method that computes reports what it did."""

    def tick(self, cost: Cost, *, steps: int = 0) -> None: ...


class AddingUp:
    """A meter for what is charged as a whole."""

    def __init__(self) -> None:
        self.cost = Cost()

    def tick(self, cost: Cost, *, steps: int = 0) -> None:
        self.cost += cost


def same_tokens(model: str) -> float:
    """The ratio of a pool of which nothing else is known."""
    return 1.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a scorer is asked to do, in numbers, for pricing it."""

    pool: PoolStats
    targets: Mapping[str, PoolStats]
    shape: ModelShape
    device: Device
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_length: int = 1024
    adapter: Adapter | None = None
    """That training puts on the model; None: it trains all weights."""
    token_ratio: Callable[[str], float] = same_tokens
    """Path of a model -> tokens that it makes of the rows, over those that are counted here."""


# -- filters and pickers --------------------------------------------------------------------------


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


# -- inside training ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The rows that a run trains on, in the order in which they were picked."""

    tokens: Sequence[Tokens]
    num_tokens: NDArray[np.int64]  # [n]
    scores: NDArray[np.float32]
    """[n], the mean over targets; NaN of rows that were not scored (replay)."""
    groups: NDArray[np.int64] | None = None
    """[n], which value each has in the column ``selection.groups``; None where there is none."""

    def __len__(self) -> int:
        return len(self.num_tokens)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands when it asks for its next rows."""

    number: int
    """Of rounds before."""
    share: float
    """Of the run's tokens that they had, in [0, 1]."""
    round_tokens: int
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

    def least_drawn(
        self, rows: NDArray[np.int64], num_tokens: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Of ``rows`` a round's worth, those drawn least often first and ties at random;
        ``num_tokens`` of all rows."""
        rows = self.random.permutation(rows)
        rows = rows[np.argsort(self.drawn[rows], kind="stable")]
        return rows[fill(num_tokens[rows], self.round_tokens)]


class Drawn(Protocol):
    """The rows of a batch, of which an online method chooses those to train on."""

    @property
    def rows(self) -> NDArray[np.int64]:  # [n], places in ``Chosen``
        ...

    @property
    def num_tokens(self) -> NDArray[np.int64]:  # [n], that carry loss
        ...


class DrawnWithGradients(Drawn, Protocol):
    """After a backward of activations."""

    def products(
        self, layers: int, direction: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[n] and [n, n]: inner products of the rows' gradients with ``direction`` and with one
        another, over the trained matrices of the last ``layers`` decoder layers (0: of all)."""
        ...


class DrawnWithoutBackward(Drawn, Protocol):
    """Of a larger batch, which goes through no backward."""

    @property
    def num_elements(self) -> int:
        """Of the last value projection."""
        ...

    def slopes(self, directions: NDArray[np.float32], epsilon: float) -> NDArray[np.float64]:
        """[n, m]: how the rows' losses change along m directions ``[m, elements]`` of the last
        value projection, from two passes of the last layer each."""
        ...
