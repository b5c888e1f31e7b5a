"""Looking again at rows of the pool, with the model as it is by now: at a probe of a few hundred,
and by what that taught of cheap signals at a short-list ("proxy, then verify").
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from thrifty.core import contracts
from thrifty.core.budget import Cost
from thrifty.core.contracts import Candidates, Models, Rows, Scorer
from thrifty.core.ledger import Lease, Stage
from thrifty.core.ordering import best_first, merged_scores, random_key
from thrifty.core.plan_refresh import Refresh
from thrifty.drift import Scale, mixed
from thrifty.selection import SelectionJob
from thrifty.signals.ngrams import ngrams_cost
from thrifty.signals.second_look import SecondLook

_MARGIN = 1.15
"""Reserved over what a look was predicted to take."""
_BLOCK_ROWS = 4096
_FEWEST = 32
"""Rows of a probe."""


class Running(Protocol):
    """The training that asks."""

    @property
    def stage(self) -> Stage: ...
    @property
    def models(self) -> Models:
        """As they are by now."""
        ...

    def spending(self, name: str, upper: Cost) -> AbstractContextManager[Lease]: ...
    def allows(self, upper: Cost) -> bool:
        """Whether that leaves enough for the run to end well."""
        ...


@dataclass(frozen=True)
class Look:
    """What was seen of the probe."""

    state: Any
    """What the scorer prepared for it."""
    scores: NDArray[np.float64]  # [probe rows, num_targets]
    direction: NDArray[np.float32] | None
    """``Scorer.direction``."""


class Looks:
    """Of one scorer at ``candidates``, all rows of a pool that is ``asked`` in numbers."""

    def __init__(
        self,
        job: SelectionJob,
        asked: contracts.Work,
        scorer: Scorer,
        candidates: Candidates,
        *,
        run_flops: float,
    ) -> None:
        self._settings: Refresh = job.plan.selection.refresh
        self._job, self._asked, self.scorer = job, asked, scorer
        self._candidates, self._run_flops = candidates, run_flops

    # -- what it costs -----------------------------------------------------------------------------

    @cached_property
    def probe_cost(self) -> Cost:
        return self._cost(len(self.probed))

    def again_cost(self, num_short: int) -> Cost:
        """Of a short-list of so many, after a probe."""
        return self._cost(num_short) + ngrams_cost(self._asked, 1)

    def _cost(self, num_rows: int) -> Cost:
        share = min(1.0, num_rows / max(self._asked.pool.num_examples, 1))
        return self.scorer.cost(replace(self._asked, pool=self._asked.pool.part(share)))

    @property
    def can_probe(self) -> bool:
        """Whether the run can ever pay for two looks, of which drift is the difference; ``fixed``
        and ``random`` look whatever it costs."""
        twice = 2 * self.probe_cost.flops
        governed = self._settings.when == "governed"
        return not governed or twice <= self._settings.probe_share * self._run_flops

    def may_probe(self, running: Running) -> bool:
        """Probes stay a small share of what the run has spent, and so does the next one."""
        if not self.can_probe:
            return False
        ledger, account = running.stage.ledger, running.stage.account
        probes = ledger.spent(account=account, activity="probe").flops
        most = self._settings.probe_share * ledger.spent(account=account).flops
        return probes + self.probe_cost.flops <= most

    # -- the probe ---------------------------------------------------------------------------------

    @cached_property
    def probed(self) -> NDArray[np.int64]:
        """Places among the candidates, drawn at random: no more than a probe's share of the run
        pays for twice, but for the fewest that tell anything."""
        most, allowed = self._settings.probe_rows, self._settings.probe_share * self._run_flops / 2
        asked = self._cost(most).flops
        size = min(most, max(_FEWEST, int(most * allowed / max(asked, 1.0))))
        keys = random_key(self._candidates.ids, self._settings.seed)
        return np.sort(np.argsort(keys, kind="stable")[:size])

    @cached_property
    def _probe_rows(self) -> Rows:
        return self._job.pool.take(self._candidates.ids[self.probed])

    def probe(self, running: Running) -> Look:
        signals = self._job.signals if self.scorer.needs_target else {}
        with running.spending("probe", upper(self.probe_cost)) as lease:
            state = self.scorer.prepare(self._job.pool, signals, running.models, lease)
            seen = self.scorer.score(self._probe_rows, state, lease).astype(np.float64)
        return Look(state, seen, self.scorer.direction(state))

    # -- the short-list ----------------------------------------------------------------------------

    def again(
        self,
        look: Look,
        then: NDArray[np.float64],
        momentum: float,
        num_short: int,
        running: Running,
    ) -> NDArray[np.float64]:
        """[candidates, num_targets]: standard scores as they are by now, looked at of the rows that
        promise most and predicted of the others. ``then``: what was believed before."""
        scale = Scale.of(look.scores)
        seen = scale.standard(look.scores)
        with running.spending("refresh", upper(self.again_cost(num_short))) as lease:
            now = self._predicted(then, seen)
            short = self._shortlist(mixed(then, now, momentum), num_short)
            for block in np.array_split(short, -(-len(short) // _BLOCK_ROWS)):
                rows = self._job.pool.take(self._candidates.ids[block])
                now[block] = scale.standard(self.scorer.score(rows, look.state, lease))
        now[self.probed] = seen
        return now

    def _predicted(
        self, then: NDArray[np.float64], seen: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """What a second look would find, of every row, by what it found on the probe."""
        reached = np.isfinite(seen).all(axis=1)
        known, tokens = self.probed[reached], self._candidates.num_tokens
        texts = self._job.pool.take(self._candidates.ids[known]).texts
        model = SecondLook.fit(then[known], seen[reached], texts, tokens[known])
        found = np.empty_like(then)
        for shard in self._job.pool.shards():
            places = np.searchsorted(self._candidates.ids, shard.ids)
            found[places] = model.predict(then[places], shard.texts, tokens[places])
        return found

    def _shortlist(self, believed: NDArray[np.float64], size: int) -> NDArray[np.int64]:
        """Places of the candidates that promise most, sorted."""
        merged = merged_scores(believed, self._candidates.weights)
        order = best_first(merged, self._candidates.ids, self._settings.seed)
        return np.sort(order[:size])


def upper(cost: Cost) -> Cost:
    return cost * _MARGIN
