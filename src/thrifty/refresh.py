"""Choosing the rows anew while the model is trained on them: "dynamic LESS".

    probe      at evaluations, a few hundred rows scored by the model as it is by then: how far have
               the scores drifted?
    weigh      is a fresh choice worth what looking again costs? (``refresh_gain.py``, the one rule)
    proxy      what the probe taught of cheap signals keeps a short-list of the pool
    verify     the method scores the short-list
    mix        new beliefs are weighed with the old ones (``drift.py``), and rows that were trained
               on so often that they are worn out are left, before filters and picker choose

arXiv:2606.10706 asks for it: selection that is re-evaluated during training, by "hybrid
proxy-verify pipelines" on "drift-aware refresh schedules", stable in the loop with the governor.
What keeps it from oscillating: the old beliefs' weight, which grows where the order of the rows
turns round again and again; evaluations that must pass between two choices; a gain that must beat
its price by its error, and knows that a fresh choice goes stale as fast as the present one did; a
bounded number of times.

    refreshes/000.npz  what was believed, and the probe's scores, after the first choice
    refreshes/001.npz  ... and after the first refresh; a run that resumes goes on from its own
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from thrifty import selection
from thrifty.core import contracts
from thrifty.core.budget import Cost
from thrifty.core.contracts import Candidates, Models, Rows, Scorer, Worth
from thrifty.core.durable import save_arrays
from thrifty.core.ledger import Lease, Stage
from thrifty.core.marginal import Choice
from thrifty.core.ordering import best_first, merged_scores, random_key
from thrifty.core.plan import Refresh
from thrifty.core.resolve import name_of
from thrifty.drift import Beliefs, Drift, Scale, drift, mixed
from thrifty.effective_tokens import MAX_EPOCHS
from thrifty.prospect import Prospect
from thrifty.refresh_gain import WIDTHS, Standing, weigh_refresh, weigh_width
from thrifty.signals.ngrams import ngrams_cost
from thrifty.signals.second_look import SecondLook

DECISION = "train on or choose rows anew"
WIDTH = "how many rows to train on"
CHOSEN_ANEW = "which rows from here on"
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


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Where the run stands."""

    tokens_left: float
    """To be trained on, as far as the budget goes."""
    tokens_given: float
    """Trained on so far."""
    drawn: NDArray[np.int64]
    """[rows of all choices], how often each was trained on."""
    prospect: Prospect | None
    """None: there are too few evaluations for a forecast."""


class Refresher:
    """Looks at the pool with the model in training and chooses rows anew where that is worth it."""

    def __init__(
        self,
        job: selection.SelectionJob,
        asked: contracts.Work,
        scorer: Scorer,
        worth: Worth,
        candidates: Candidates,
        first: NDArray[np.int64],
        *,
        run_flops: float,
        num_evaluations: int,
        eval_steps: int,
        folder: Path,
    ) -> None:
        """``asked``: the pool in numbers, for pricing; ``scorer`` looks at the model in training,
        the selection's own is worth ``worth`` and left ``candidates`` with their scores, of which
        ``first`` were chosen; ``run_flops``, ``num_evaluations``: of the training, as far as can be
        told."""
        self.settings: Refresh = job.plan.selection.refresh
        self._job, self._asked, self._scorer, self._worth = job, asked, scorer, worth
        self._candidates, self._eval_steps = candidates, eval_steps
        self._run_flops = run_flops
        self._num_evaluations, self._folder = num_evaluations, folder
        self._choices = [first]
        self._raw = Scale.of(candidates.scores)
        self._beliefs = Beliefs(self._raw.standard(candidates.scores))
        self._chosen_at = 0
        """The step of the last choice."""
        self._looked_at = 0.0
        """Tokens that had been trained on at the last look."""
        self._probe_then: NDArray[np.float64] | None = None
        """[probe rows, num_targets], their scores at that choice; None: not known yet."""
        if name_of(scorer) == selection.scorer_name(job.plan):
            self._probe_then = candidates.scores[self._probed].astype(np.float64)

    # -- what it costs -----------------------------------------------------------------------------

    @cached_property
    def probe_cost(self) -> Cost:
        return self._look_cost(len(self._probed))

    @cached_property
    def refresh_cost(self) -> Cost:
        """Of choosing anew after a probe."""
        return self._look_cost(self._num_short) + ngrams_cost(self._asked, 1)

    def _look_cost(self, num_rows: int) -> Cost:
        share = min(1.0, num_rows / max(self._asked.pool.num_examples, 1))
        return self._scorer.cost(replace(self._asked, pool=self._asked.pool.part(share)))

    @property
    def _num_short(self) -> int:
        return min(len(self._candidates), max(1, round(self._short_share * len(self._candidates))))

    @property
    def _short_share(self) -> float:
        """No less than is to be chosen of it."""
        return min(1.0, max(self.settings.shortlist, 1.5 * self._kept_share))

    @property
    def _kept_share(self) -> float:
        total = max(int(self._candidates.num_tokens.sum()), 1)
        return min(1.0, self._unique / total)

    @property
    def _unique(self) -> float:
        """Tokens of the present choice."""
        return float(self._candidates.num_tokens[self._chosen_places].sum())

    @property
    def _chosen_places(self) -> NDArray[np.int64]:
        """Of the present choice, among the candidates."""
        return np.searchsorted(self._candidates.ids, self._choices[-1])

    # -- asked at every evaluation -----------------------------------------------------------------

    def restore(self, choices: Sequence[NDArray[np.int64]]) -> None:
        """Go on where these were chosen after the first."""
        self._choices = [self._choices[0], *choices]
        file = self._file(len(choices))
        if not file.is_file():
            return
        with np.load(file, allow_pickle=False) as saved:
            self._beliefs = Beliefs(saved["scores"], int(saved["reversals"]))
            self._chosen_at, self._looked_at = int(saved["step"]), float(saved["looked_at"])
            if "probe" in saved.files:
                self._probe_then = saved["probe"]

    def consider(self, step: int, running: Running, outlook: Outlook) -> NDArray[np.int64] | None:
        """The rows to train on from now on, by id and in order; None: as before."""
        if step == 0:
            self._see_at_first(running)
            return None
        if not self._is_due(step) or len(self._choices) > self.settings.times:
            return None
        if self.settings.when != "governed":
            if not running.allows(_upper(self.probe_cost + self.refresh_cost)):
                return None
            with self._looking(running) as (state, seen):
                moved = drift(self._seen_then, seen)
            return self._choose_anew(step, running, outlook, state, seen, moved, 1.0)
        return self._govern(step, running, outlook)

    def _govern(self, step: int, running: Running, outlook: Outlook) -> NDArray[np.int64] | None:
        """What is worth its price: to look again and choose anew, or else to choose more or fewer
        rows by the scores that there are."""
        prospect = outlook.prospect
        if prospect is None:
            return None
        moved = None
        both = _upper(self.probe_cost + self.refresh_cost)
        if self._may_probe(running) and running.allows(both):
            with self._looking(running) as (state, seen):
                moved = drift(self._seen_then, seen)
            standing, momentum = self._standing(outlook, moved), self._momentum
            width = standing.best_width(momentum, (1.0, *WIDTHS.values()))
            choice = weigh_refresh(
                standing,
                prospect,
                momentum=momentum,
                width=width,
                cost=running.stage.ledger.rates.of(self.refresh_cost),
                z=self.settings.z,
            )
            told = f"scores drifted by {moved.mean:.2f} ± {moved.stderr:.2f}; {choice.reason}"
            self._decide(step, running.stage, DECISION, choice, told, standing)
            if choice.chosen is not None:
                return self._choose_anew(step, running, outlook, state, seen, moved, width)
        standing = self._standing(outlook, moved or Drift(0.0, 0.0))
        choice = weigh_width(standing, prospect, z=self.settings.z)
        if choice.chosen is None:
            return None
        self._decide(step, running.stage, WIDTH, choice, choice.reason, standing)
        how = "by the scores that there are"
        return self._chosen(step, running.stage, outlook, WIDTHS[choice.chosen], how)

    def _see_at_first(self, running: Running) -> None:
        """Where another than the selection's scorer looks: how it scores the probe before training,
        for drift is between two looks of one scorer."""
        if self._probe_then is not None or not self._can_probe:
            return
        if not self._file(0).is_file():
            with self._looking(running) as (_, seen):
                self._probe_then = seen
            self._save()
        self.restore([])

    def _is_due(self, step: int) -> bool:
        settings, number = self.settings, step // self._eval_steps
        last = self._num_evaluations - 1
        if settings.when == "fixed":
            times = settings.times
            return number in {round(k * (last + 1) / (times + 1)) for k in range(1, times + 1)}
        if settings.when == "random":
            random = np.random.default_rng([settings.seed, 1])
            return number in 1 + random.choice(
                max(last, 1), min(settings.times, max(last, 1)), replace=False
            )
        return number - self._chosen_at // self._eval_steps >= settings.dwell

    @property
    def _can_probe(self) -> bool:
        """Whether the run can ever pay for two looks, of which drift is the difference; ``fixed``
        and ``random`` look whatever it costs."""
        twice = 2 * self.probe_cost.flops
        governed = self.settings.when == "governed"
        return not governed or twice <= self.settings.probe_share * self._run_flops

    def _may_probe(self, running: Running) -> bool:
        """Probes stay a small share of what the run has spent, and so does the next one."""
        if not self._can_probe:
            return False
        ledger, account = running.stage.ledger, running.stage.account
        probes = ledger.spent(account=account, activity="probe").flops
        most = self.settings.probe_share * ledger.spent(account=account).flops
        return probes + self.probe_cost.flops <= most

    def _standing(self, outlook: Outlook, moved: Drift) -> Standing:
        seen = self._times_drawn(outlook)[self._chosen_places]
        tokens = self._candidates.num_tokens[self._chosen_places]
        return Standing(
            tokens_left=outlook.tokens_left,
            tokens_seen=float(seen @ tokens),
            tokens_since_look=outlook.tokens_given - self._looked_at,
            unique=float(tokens.sum()),
            share=self._kept_share,
            drift=moved,
            worth=self._worth,
        )

    def _decide(
        self, step: int, stage: Stage, name: str, choice: Choice, reason: str, standing: Standing
    ) -> None:
        detail = {"standing": asdict(standing), "momentum": self._momentum}
        chosen = choice.chosen or "train on"
        stage.decide(name, chosen, reason, choice=choice, detail=detail, step=step)

    # -- looking again -----------------------------------------------------------------------------

    @cached_property
    def _probed(self) -> NDArray[np.int64]:
        """Places among the candidates, drawn at random: no more than a probe's share of the run
        pays for twice, but for the fewest that tell anything."""
        most, allowed = self.settings.probe_rows, self.settings.probe_share * self._run_flops / 2
        asked = self._look_cost(most).flops
        size = min(most, max(_FEWEST, int(most * allowed / max(asked, 1.0))))
        keys = random_key(self._candidates.ids, self.settings.seed)
        return np.sort(np.argsort(keys, kind="stable")[:size])

    @cached_property
    def _probe_rows(self) -> Rows:
        return self._job.pool.take(self._candidates.ids[self._probed])

    @property
    def _signals(self) -> Any:
        return self._job.signals if self._scorer.needs_target else {}

    @contextmanager
    def _looking(self, running: Running) -> Iterator[tuple[Any, NDArray[np.float64]]]:
        """What the scorer prepares on the model as it is, and the probe's scores by it."""
        with running.spending("probe", _upper(self.probe_cost)) as lease:
            state = self._scorer.prepare(self._job.pool, self._signals, running.models, lease)
            seen = self._scorer.score(self._probe_rows, state, lease).astype(np.float64)
        yield state, seen

    @property
    def _seen_then(self) -> NDArray[np.float64]:
        assert self._probe_then is not None, "seen before training"
        return self._probe_then

    @property
    def _momentum(self) -> float:
        return self._beliefs.momentum(self.settings.momentum)

    def _choose_anew(
        self,
        step: int,
        running: Running,
        outlook: Outlook,
        state: Any,
        seen: NDArray[np.float64],
        moved: Drift,
        width: float,
    ) -> NDArray[np.int64]:
        """Rows for the tokens to come, by id, after a second look at a short-list."""
        then, scale = self._beliefs.scores, Scale.of(seen)
        with running.spending("refresh", _upper(self.refresh_cost)) as lease:
            now = self._predicted(scale.standard(seen))
            short = self._shortlist(mixed(then, now, self._momentum))
            for block in np.array_split(short, -(-len(short) // _BLOCK_ROWS)):
                rows = self._job.pool.take(self._candidates.ids[block])
                now[block] = scale.standard(self._scorer.score(rows, state, lease))
        now[self._probed] = scale.standard(seen)
        self._beliefs = self._beliefs.after(now, moved, self.settings.momentum)
        self._probe_then, self._looked_at = seen, outlook.tokens_given
        how = (
            f"{self.settings.when}; scores drifted by {moved.mean:.2f} ± {moved.stderr:.2f}; "
            f"{self._num_short:,} of {len(self._candidates):,} rows scored again"
        )
        return self._chosen(step, running.stage, outlook, width, how, drift=asdict(moved))

    def _chosen(
        self, step: int, stage: Stage, outlook: Outlook, width: float, how: str, **detail: Any
    ) -> NDArray[np.int64]:
        """The rows for the tokens to come by what is believed, ``width`` times as many tokens as
        there were: noted, and kept for a run that resumes."""
        fresh = np.flatnonzero(self._times_drawn(outlook) < MAX_EPOCHS)  # more brings little
        limit = max(min(width * self._unique, outlook.tokens_left), 1.0)
        scores = self._raw.back(self._beliefs.scores).astype(np.float32)
        candidates = replace(self._candidates, scores=scores)
        if candidates.num_tokens[fresh].sum() >= limit:
            candidates = candidates.where(fresh)
        ids = selection.pick(self._job, candidates, limit)[0].ids
        kept = float(np.isin(ids, self._choices[-1]).mean())
        reason = f"{how}; {kept:.0%} of those chosen were chosen before"
        numbers = {"rows": len(ids), "kept": kept, "width": width, **detail}
        stage.decide(CHOSEN_ANEW, f"{len(ids):,} rows", reason, detail=numbers, step=step)
        self._choices.append(ids)
        self._chosen_at = step
        self._save()
        return ids

    def _times_drawn(self, outlook: Outlook) -> NDArray[np.int64]:
        """[candidates], how often each was trained on."""
        times = np.zeros(len(self._candidates), dtype=np.int64)
        ids = np.concatenate(self._choices)
        np.add.at(times, np.searchsorted(self._candidates.ids, ids), outlook.drawn[: len(ids)])
        return times

    def _predicted(self, seen: NDArray[np.float64]) -> NDArray[np.float64]:
        """What a second look would find, of every row, by what it found on the probe."""
        then, tokens = self._beliefs.scores, self._candidates.num_tokens
        known = self._probed[np.isfinite(seen).all(axis=1)]
        finite = seen[np.isfinite(seen).all(axis=1)]
        texts = self._job.pool.take(self._candidates.ids[known]).texts
        model = SecondLook.fit(then[known], finite, texts, tokens[known])
        found = np.empty_like(then)
        for places, some in self._texts():
            found[places] = model.predict(then[places], some, tokens[places])
        return found

    def _texts(self) -> Iterator[tuple[NDArray[np.int64], Sequence[str]]]:
        """Of the candidates, with their places, a shard at a time."""
        for shard in self._job.pool.shards():
            yield np.searchsorted(self._candidates.ids, shard.ids), shard.texts

    def _shortlist(self, believed: NDArray[np.float64]) -> NDArray[np.int64]:
        """Places of the candidates that promise most, sorted."""
        merged = merged_scores(believed, self._candidates.weights)
        order = best_first(merged, self._candidates.ids, self.settings.seed)
        return np.sort(order[: self._num_short])

    # -- what is left ------------------------------------------------------------------------------

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:03d}.npz"

    def _save(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        probe = {} if self._probe_then is None else {"probe": self._probe_then}
        kept = {
            "step": self._chosen_at,
            "looked_at": self._looked_at,
            "scores": self._beliefs.scores,
            "reversals": self._beliefs.reversals,
        }
        save_arrays(self._file(len(self._choices) - 1), {**kept, **probe})


def _upper(cost: Cost) -> Cost:
    return cost * _MARGIN
