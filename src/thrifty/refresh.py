"""Choosing the rows anew while the model is trained on them: "dynamic LESS".

    probe      at evaluations, where anything that it might find could pay: a few hundred rows
               scored by the model as it is by then; how far have the scores drifted?
    weigh      is a fresh choice worth what looking again costs? (``refresh_gain.py``, the one rule)
    proxy      what the probe taught of cheap signals keeps a short-list of the pool
    verify     the method scores the short-list
    mix        new beliefs are weighed with the old ones (``drift.py``), or stand alone where
               another scorer takes over; rows that were trained on so often that they are worn out
               are left, before filters and picker choose

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thrifty import selection
from thrifty.core import contracts
from thrifty.core.arrays import load_arrays, save_arrays
from thrifty.core.budget import Cost
from thrifty.core.contracts import Candidates, Scorer, Worth
from thrifty.core.ledger import Stage
from thrifty.core.marginal import Choice
from thrifty.core.plan import Refresh
from thrifty.core.resolve import name_of
from thrifty.drift import Beliefs, Drift, Scale, drift, turn
from thrifty.effective_tokens import MAX_EPOCHS
from thrifty.prospect import Prospect
from thrifty.refresh_gain import (
    WIDTHS,
    Standing,
    Takeover,
    could_pay,
    weigh_refresh,
    weigh_width,
)
from thrifty.refresh_looks import Look, Looks, Running, upper

DECISION = "train on or choose rows anew"
WIDTH = "how many rows to train on"
CHOSEN_ANEW = "which rows from here on"


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Where the run stands."""

    tokens_left: float
    """To be trained on, as far as the budget goes."""
    tokens_given: float
    """Trained on so far."""
    drawn: NDArray[np.int64]
    """[rows of all choices, and what is replayed after each], how often each was trained on."""
    firsts: Sequence[int]
    """Where among them each choice begins."""
    prospect: Prospect | None
    """None: there are too few evaluations for a forecast."""


class Refresher:
    """Looks at the pool with the model in training and chooses rows anew where that is worth it."""

    def __init__(
        self,
        job: selection.SelectionJob,
        asked: contracts.Work,
        scorers: Sequence[tuple[Scorer, Worth]],
        worth: Worth,
        candidates: Candidates,
        first: NDArray[np.int64],
        *,
        run_flops: float,
        num_evaluations: int,
        eval_steps: int,
        folder: Path,
    ) -> None:
        """``asked``: the pool in numbers, for pricing; the first of ``scorers`` looks at the model
        in training, the others may take over, each with its worth; the selection's own is worth
        ``worth`` and left ``candidates`` with their scores, of which
        ``first`` were chosen; ``run_flops``, ``num_evaluations``: of the training, as far as can be
        told."""
        self.settings: Refresh = job.plan.selection.refresh
        self._job, self._worth = job, worth
        self._candidates, self._eval_steps = candidates, eval_steps
        self._all_looks = {
            name_of(scorer): Looks(job, asked, scorer, candidates, run_flops=run_flops)
            for scorer, _ in scorers
        }
        self._worths = {name_of(scorer): worth for scorer, worth in scorers}
        self._looking = next(iter(self._all_looks))
        """Whose looks are gone by."""
        self._num_evaluations, self._folder = num_evaluations, folder
        self._run_flops = run_flops
        self._choices = [first]
        self._raw = Scale.of(candidates.scores)
        self._beliefs = Beliefs(self._raw.standard(candidates.scores))
        self._chosen_at = 0
        """The step of the last choice."""
        self._looked_at = 0.0
        """Tokens that had been trained on at the last look."""
        self._probe_then: NDArray[np.float64] | None = None
        """[probe rows, num_targets], their scores at that choice; None: not known yet."""
        self._direction_then: NDArray[np.float32] | None = None
        """Of the targets' gradients, at the last look that tells it."""
        if self._looking == selection.scorer_name(job.plan):
            self._probe_then = candidates.scores[self._looks.probed].astype(np.float64)

    # -- in numbers --------------------------------------------------------------------------------

    @property
    def _looks(self) -> Looks:
        return self._all_looks[self._looking]

    @property
    def _refresh_cost(self) -> Cost:
        """Of choosing anew after a probe."""
        return self._looks.again_cost(self._num_short)

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

    def restore(self, choices: Sequence[NDArray[np.int64]], tokens_given: float) -> None:
        """Go on where these were chosen after the first, and so much was trained on."""
        self._choices = [self._choices[0], *choices]
        file = self._file(len(choices))
        if not file.is_file():
            return
        saved = load_arrays(file)
        self._beliefs = Beliefs(saved["scores"], int(saved["reversals"]))
        self._chosen_at = int(saved["step"])
        if saved["looked_at"] <= tokens_given:  # or else a killed process looked later
            self._looked_at = float(saved["looked_at"])
            self._probe_then = saved.get("probe", self._probe_then)
            self._direction_then = saved.get("direction", self._direction_then)
        if (looking := str(saved.get("looking", self._looking))) != self._looking:
            self._take_over(looking)

    def consider(self, step: int, running: Running, outlook: Outlook) -> NDArray[np.int64] | None:
        """The rows to train on from now on, by id and in order; None: as before."""
        if step == 0:
            # The governed form waits for a forecast.
            if self.settings.when != "governed" and running.allows(self._until_the_first_choice):
                self._see_at_first(running, outlook)
            return None
        if not self._is_due(step) or len(self._choices) > self.settings.times:
            return None
        if self.settings.when != "governed":
            if self._probe_then is None or not running.allows(self._both):
                return None
            look = self._looks.probe(running)
            moved = drift(self._seen_then, look.scores)
            return self._choose_anew(step, running, outlook, look, moved, 1.0)
        return self._govern(step, running, outlook)

    def _govern(self, step: int, running: Running, outlook: Outlook) -> NDArray[np.int64] | None:
        """What is worth its price: to look again and choose anew, or else to choose more or fewer
        rows by the scores that there are."""
        prospect = outlook.prospect
        if prospect is None:
            return None
        moved = None
        others = {other.name: other for other in self._others(running)}
        pays = self._may_pay(running, outlook, prospect, list(others.values()))
        if pays and self._probe_then is None:
            self._see_at_first(running, outlook)
        elif pays:
            look = self._looks.probe(running)
            moved = drift(self._seen_then, look.scores)
            standing, momentum = self._standing(outlook, moved), self._momentum
            width = standing.best_width(momentum)
            choice = weigh_refresh(
                standing,
                prospect,
                momentum=momentum,
                width=width,
                cost=running.stage.ledger.rates.of(self._refresh_cost),
                z=self.settings.z,
                others=list(others.values()),
            )
            told = f"scores drifted by {moved.mean:.2f} ± {moved.stderr:.2f}; {choice.reason}"
            self._decide(step, running.stage, DECISION, choice, told, standing)
            if (other := others.get(choice.chosen or "")) is not None:
                self._take_over(other.scorer)
                look, width = self._looks.probe(running), other.best_width(standing)
                return self._choose_anew(step, running, outlook, look, moved, width, own=False)
            if choice.chosen is not None:
                return self._choose_anew(step, running, outlook, look, moved, width)
        standing = self._standing(outlook, moved or Drift(0.0, 0.0))
        choice = weigh_width(standing, prospect, z=self.settings.z)
        if choice.chosen is None:
            return None
        self._decide(step, running.stage, WIDTH, choice, choice.reason, standing)
        how = "by the scores that there are"
        return self._chosen(step, running.stage, outlook, WIDTHS[choice.chosen], how)

    def _may_pay(
        self, running: Running, outlook: Outlook, prospect: Prospect, others: Sequence[Takeover]
    ) -> bool:
        """Whether the run can pay for a look, and could be the better for it."""
        if not (self._looks.may_probe(running) and running.allows(self._both)):
            return False
        probes = 1 if self._probe_then is not None else 2
        return could_pay(
            self._standing(outlook, Drift(0.0, 0.0)),
            prospect,
            momentum=self._momentum,
            cost=running.stage.ledger.rates.of(
                self._looks.probe_cost * probes + self._refresh_cost
            ),
            z=self.settings.z,
            others=others,
        )

    def _others(self, running: Running) -> Iterator[Takeover]:
        """Those that may look in its place, and whose looks the run can pay for."""
        for name, looks in self._all_looks.items():
            cost = looks.probe_cost + looks.again_cost(self._num_short)
            if name != self._looking and running.allows(upper(cost)):
                priced = running.stage.ledger.rates.of(cost)
                yield Takeover(scorer=name, worth=self._worths[name], cost=priced)

    def _take_over(self, name: str) -> None:
        self._looking, self._worth = name, self._worths[name]

    def _see_at_first(self, running: Running, outlook: Outlook) -> None:
        """Where another than the selection's scorer looks: how it scores the probe to begin with,
        for drift is between two looks of one scorer."""
        if self._probe_then is not None:
            return
        # Also where a killed process did, whose look is booked as lost with the training before it.
        look = self._looks.probe(running)
        self._probe_then, self._direction_then = look.scores, look.direction
        self._looked_at = outlook.tokens_given
        self._save()

    def _is_due(self, step: int) -> bool:
        number = step // self._eval_steps
        if self.settings.when != "governed":
            return number in self._due
        return number - self._chosen_at // self._eval_steps >= self.settings.dwell

    @property
    def _due(self) -> set[int]:
        """Numbers of the evaluations at which ``fixed`` and ``random`` choose."""
        times, last = self.settings.times, self._num_evaluations - 1
        if self.settings.when == "fixed":
            return {round(k * (last + 1) / (times + 1)) for k in range(1, times + 1)}
        random = np.random.default_rng([self.settings.seed, 1])
        drawn = random.choice(max(last, 1), min(times, max(last, 1)), replace=False)
        return {1 + int(number) for number in drawn}

    @property
    def _until_the_first_choice(self) -> Cost:
        """Of ``fixed`` and ``random``, the first look and their first choice included: those that
        cannot pay for that need not look."""
        share = min(self._due) / self._num_evaluations
        return self._both + self._looks.probe_cost + Cost(flops=share * self._run_flops)

    @property
    def _both(self) -> Cost:
        """Upper bound of a probe and what may follow it."""
        return upper(self._looks.probe_cost + self._refresh_cost)

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

    # -- choosing ----------------------------------------------------------------------------------

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
        look: Look,
        moved: Drift,
        width: float,
        own: bool = True,
    ) -> NDArray[np.int64]:
        """Rows for the tokens to come, by id, after a second look at a short-list. ``own``: by the
        scorer that looked before, with whose looks this one is mixed."""
        momentum = self._momentum if own else 1.0
        now = self._looks.again(look, self._beliefs.scores, momentum, self._num_short, running)
        if own:
            self._beliefs = self._beliefs.after(now, moved, self.settings.momentum)
        else:
            self._beliefs = Beliefs(now, self._beliefs.reversals)
        turned = turn(self._direction_then, look.direction) if own else None
        self._probe_then, self._direction_then = look.scores, look.direction
        self._looked_at = outlook.tokens_given
        how = (
            f"{self.settings.when}, by {self._looking}; "
            f"scores drifted by {moved.mean:.2f} ± {moved.stderr:.2f}; "
            f"{self._num_short:,} of {len(self._candidates):,} rows scored again"
        )
        if turned is not None:
            how += f", the targets' gradient turned by {turned:.2f}"
        return self._chosen(
            step, running.stage, outlook, width, how, drift=asdict(moved), turn=turned
        )

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
        for first, ids in zip(outlook.firsts, self._choices, strict=True):
            drawn = outlook.drawn[first : first + len(ids)]
            np.add.at(times, np.searchsorted(self._candidates.ids, ids), drawn)
        return times

    # -- what is left ------------------------------------------------------------------------------

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:03d}.npz"

    def _save(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        looks = {"probe": self._probe_then, "direction": self._direction_then}
        known = {name: array for name, array in looks.items() if array is not None}
        kept = {
            "step": self._chosen_at,
            "looked_at": self._looked_at,
            "scores": self._beliefs.scores,
            "reversals": self._beliefs.reversals,
            "looking": self._looking,
        }
        save_arrays(self._file(len(self._choices) - 1), {**kept, **known})
