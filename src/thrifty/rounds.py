"""The rounds of a run: which rows were given when, with which weights, and the losses that training
saw of them. All of it goes into every checkpoint, so that a run that resumes goes on the same.

Where rows are chosen anew on the way, what was chosen before is a leg that ended: its rows keep
their numbers, the new ones follow them, and the online method sees the last leg alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty.core.contracts import Chosen, OnlineMethod, Progress, Round

ROUNDS = 20
"""Of a run, where a method does not want whole passes."""
FILE = "rounds.npz"
_RENEWED = "renewed "
_LEG = "leg "


def _nothing() -> None:
    """What is learnt where nobody looks."""


class Rounds:
    """Asks an online method for its rounds as training comes to them."""

    def __init__(
        self,
        method: OnlineMethod,
        chosen: Chosen,
        known: Mapping[str, NDArray[Any]],
        *,
        num_tokens: float,
        seed: int,
    ) -> None:
        """``known``: what the method prepared; ``num_tokens``: of the whole run, as predicted."""
        self.method, self.chosen, self.known = method, chosen, known
        self.firsts = [0]
        """Row of each leg's first."""
        self._at_first = chosen
        self.tokens = list(chosen.tokens)
        """Of the rows of all legs."""
        self.cuts: list[int] = []
        """The first item that is trained on of each leg but the first."""
        self.legs: list[NDArray[np.int64]] = []
        """The rows of those in the pool, their ids in order."""
        self.leg_of: Callable[[NDArray[np.int64], int], Chosen] | None = None
        """Rows of the pool and a number -> that leg, where there may be others than the first; set
        by who chooses rows anew."""
        self._run_tokens = max(num_tokens, 1.0)
        self._seed = seed
        self._rounds: list[Round] = []
        self._given = 0
        self._num_tokens = chosen.num_tokens
        self._losses = np.full(len(chosen), np.nan)
        self._drawn = np.zeros(len(chosen), dtype=np.int64)
        self.renewed: dict[str, NDArray[Any]] = {}
        """What the method learnt while the model was trained."""
        self.renew: Callable[[], Mapping[str, NDArray[Any]] | None] = _nothing
        """Looks again, or not where the budget has nothing for it; set by who trains the model."""

    @property
    def remembers(self) -> bool:
        """Whether a run that resumes must be told what was: it depends on the model's state."""
        method = self.method
        return bool(self.leg_of or method.watches or method.renewals or method.chooses)

    @property
    def tells_rows(self) -> bool:
        """Whether training has to know which row each token is of."""
        return self.alters_loss or self.method.chooses

    @property
    def alters_loss(self) -> bool:
        """Whether training has to tell each token's loss, or to weigh it."""
        return self.method.watches or self.method.weighs_tokens

    @property
    def left_out(self) -> int:
        """Tokens that the rounds so far passed over."""
        return sum(each.left_out for each in self._rounds)

    @property
    def num_rounds(self) -> int:
        return len(self._rounds)

    def order(self, number: int) -> NDArray[np.int64]:
        """The rows of a round; asked for one after the other, and known ones again."""
        assert number <= len(self._rounds), "rounds come one after the other"
        if number == len(self._rounds):
            renewals = self.method.renewals
            if renewals and number % max(1, ROUNDS // renewals) == 0:
                self.renewed = dict(self.renew() or self.renewed)
            found = self.method.next_round(self.chosen, self.all_known, self._progress())
            self._add(replace(found, rows=found.rows + self.firsts[-1]))
        return self._rounds[number].rows

    def begin_leg(self, ids: NDArray[np.int64], item: int) -> None:
        """From the item on, these rows of the pool are what is trained on."""
        assert self.leg_of is not None
        self.firsts.append(self.firsts[-1] + len(self.chosen))
        self.legs.append(ids)
        self.chosen = self.leg_of(ids, len(self.legs))
        self.tokens += self.chosen.tokens
        self._num_tokens = np.concatenate([self._num_tokens, self.chosen.num_tokens])
        more = len(self.chosen)
        self._losses = np.concatenate([self._losses, np.full(more, np.nan)])
        self._drawn = np.concatenate([self._drawn, np.zeros(more, dtype=np.int64)])
        self.cuts.append(item)

    def take_back(self, rows: Sequence[int]) -> None:
        """Those of the round under way that nobody will read."""
        self._given -= int(self._num_tokens[list(rows)].sum())
        np.subtract.at(self._drawn, list(rows), 1)

    @property
    def drawn(self) -> NDArray[np.int64]:
        """[rows of all legs], how often each was given."""
        return self._drawn

    @property
    def all_known(self) -> Mapping[str, NDArray[Any]]:
        return {**self.known, **self.renewed}

    def _progress(self) -> Progress:
        longest = int(self.chosen.num_tokens.max())
        here = slice(self.firsts[-1], None)
        return Progress(
            number=len(self._rounds),
            share=min(1.0, self._given / self._run_tokens),
            round_tokens=max(round(self._run_tokens / ROUNDS), longest),
            losses=self._losses[here],
            drawn=self._drawn[here],
            seed=self._seed,
        )

    def _add(self, found: Round) -> None:
        assert len(found.rows), "a round has a row at least"
        self._rounds.append(found)
        self._given += int(self._num_tokens[found.rows].sum())
        np.add.at(self._drawn, found.rows, 1)

    def choose(self, batch: Any, step: int) -> NDArray[np.int64]:
        """Places in ``batch``, drawn for the optimizer's ``step``."""
        random = np.random.default_rng([self._seed, step, 1])
        found = self.method.choose(batch, self.chosen, self.all_known, random)
        self.renewed |= found.learnt
        return found.places

    def weigh(
        self,
        rounds: NDArray[np.int64],
        rows: NDArray[np.int64],
        places: NDArray[np.int64],
        losses: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Weights of the tokens of a batch that carry loss, [n]: given in the rounds ``rounds``, of
        the rows ``rows``, at their places there, with their losses now. Notes the losses."""
        if self.method.watches:
            which, at = np.unique(rows, return_inverse=True)
            sums, count = np.bincount(at, losses), np.bincount(at)
            self._losses[which] = sums / count
        weights = self.method.token_weights(self.all_known, rows, places, losses)
        for number in np.unique(rounds).tolist():
            given = self._rounds[number]
            if given.weights is None:
                continue
            of_row = np.ones(len(self.chosen))
            of_row[given.rows] = given.weights
            here = rounds == number
            weights[here] *= of_row[rows[here]]
        return weights

    # -- with a checkpoint ------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Next to a checkpoint's weights."""
        rounds = self._rounds
        none = np.zeros(0, dtype=np.float32)
        named: dict[str, Any] = {_RENEWED + name: value for name, value in self.renewed.items()}
        named |= {f"{_LEG}{number}": ids for number, ids in enumerate(self.legs)}
        np.savez(
            folder / FILE,
            losses=self._losses,
            lengths=[len(each.rows) for each in rounds],
            rows=np.concatenate([each.rows for each in rounds]),
            weighed=[each.weights is not None for each in rounds],
            weights=np.concatenate([none if e.weights is None else e.weights for e in rounds]),
            left_out=[each.left_out for each in rounds],
            given=self._given,
            drawn=self._drawn,
            cuts=self.cuts,
            **named,
        )

    def load(self, folder: Path) -> None:
        """Go on from what ``save`` left, whatever happened since."""
        self.chosen, self.tokens = self._at_first, list(self._at_first.tokens)
        self.firsts, self._num_tokens = [0], self._at_first.num_tokens
        self.cuts, self.legs = [], []
        with np.load(folder / FILE, allow_pickle=False) as saved:
            for number, item in enumerate(saved["cuts"].tolist()):
                self.begin_leg(saved[f"{_LEG}{number}"], item)
            losses, drawn, given = saved["losses"], saved["drawn"], int(saved["given"])
            ends = np.cumsum(saved["lengths"])
            each_rows = np.split(saved["rows"], ends[:-1])
            weighed, left_out = saved["weighed"].tolist(), saved["left_out"].tolist()
            own = np.where(saved["weighed"], saved["lengths"], 0)
            each_weights = np.split(saved["weights"], np.cumsum(own)[:-1])
            renewed = [name for name in saved.files if name.startswith(_RENEWED)]
            self.renewed = {name.removeprefix(_RENEWED): saved[name] for name in renewed}
        self._rounds = []
        parts = zip(each_rows, weighed, each_weights, left_out, strict=True)
        for rows, is_weighed, weights, left in parts:
            self._rounds.append(
                Round(rows=rows, weights=weights if is_weighed else None, left_out=left)
            )
        self._losses, self._drawn, self._given = losses, drawn, given
