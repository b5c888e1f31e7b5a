"""One journal of everything that is spent: predicted before, measured after.

A SQLite file (WAL, every transaction synced). Spending goes reserve -> run -> settle, each one
transaction, so that concurrent spenders can never pass a limit together:

    with ledger.stage("train", "full", predicted=cost) as stage:
        lease = stage.lease("train", upper_bound, step=0)   # raises BudgetExceeded
        lease.tick(step_cost, steps=1)                      # no fsync: a memory-mapped counter
        lease.settle()                                      # one charge, as measured

A lease that nobody settled (a crash) is settled by ``recover`` from its counter and marked lost:
the work is gone, the spending is not. Charges are only ever added. ``roll_back`` says that a stage
went on from an earlier step; charges past that step count as lost from then on.

Money is kept in integer micro-dollars; an unknown price is NULL, never zero. Durations come from a
monotonic clock; wall time is for display alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from glob import escape
from pathlib import Path
from typing import Any

from thrifty.core.budget import HELD, RESOURCES, Budget, Cost, Rates
from thrifty.core.counter import Counter, read_counter, read_kept
from thrifty.core.headroom import Headroom
from thrifty.core.journal import Journal
from thrifty.core.marginal import Choice
from thrifty.core.redaction import redact
from thrifty.core.spending import BudgetExceeded, Lease, Stage

__all__ = ["BudgetExceeded", "Lease", "Ledger", "Rates", "Stage"]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Ledger:
    """A run's journal. One process spends at a time (the run folder's lock sees to that for whole
    runs); any number may read, and reservations are safe between processes all the same."""

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self.path = Path(path)
        self._headroom = Headroom(self.path)
        if self.path.is_file():
            self._headroom.check() if read_only else self._headroom.hold()
        try:
            self._journal = Journal(self.path, read_only=read_only)
        except BaseException:
            self._headroom.release()
            raise
        self._counters: dict[int, Counter] = {}  # of the leases that are open here
        self._open_stages: set[int] = set()
        self.budget = Budget(**json.loads(self._journal.meta["budget"]))
        self.rates = Rates(**json.loads(self._journal.meta["rates"]))
        self.energy: Callable[[], float] | None = None
        """Joules that the devices have counted so far; None: their design power times seconds."""

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], budget: Budget, rates: Rates | None = None
    ) -> Ledger:
        """A new, empty journal. Raises ValueError where there is one already."""
        meta = {
            "budget": json.dumps(asdict(budget)),
            "rates": json.dumps(asdict(rates or Rates())),
            "created_at": _now(),
        }
        Journal.create(Path(path), meta)
        return cls(path)

    def close(self) -> None:
        """Leases that are still open stay so: their counters are there to be recovered from."""
        for counter in self._counters.values():
            counter.close()
        self._counters.clear()
        self._headroom.release()
        self._journal.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set_rates(self, rates: Rates) -> None:
        """Price what is spent from now on at ``rates``."""
        if rates != self.rates:
            with self._journal.transaction():
                values = (json.dumps(asdict(rates)),)
                self._journal.execute("UPDATE meta SET value = ? WHERE key = 'rates'", values)
            self.rates = rates

    def set_budget(self, budget: Budget) -> None:
        """Hold the run to ``budget`` from now on; a change is written down as a decision. Other
        processes that have the ledger open hear of it when they open it again."""
        if budget == self.budget:
            return
        with self._journal.transaction():
            values = (json.dumps(asdict(budget)),)
            self._journal.execute("UPDATE meta SET value = ? WHERE key = 'budget'", values)
            self.decide("budget", str(budget), f"the user changed it from {self.budget}")
        self.budget = budget

    # -- spending ---------------------------------------------------------------------------------

    @contextmanager
    def stage(
        self,
        name: str,
        method: str,
        *,
        predicted: Cost | None = None,
        account: str = "budget",
        limit: Budget | None = None,
        resume: bool = True,
        reopen: bool = False,
    ) -> Iterator[Stage]:
        """Open a stage, or go on with the unfinished one of that name and method; with ``reopen``
        with a finished one too.

        Spending on any ``account`` other than "budget" (a control run, say) is journalled beside
        it and limited by ``limit`` alone. On the run's own, ``limit`` is what all stages of that
        name may take of the budget together. An exception leaves the stage open with its reason: it
        can be resumed.
        """
        if limit is not None and account == "budget":
            limit = self._share(name, limit)
        identity = {"name": name, "method": method, "account": account}
        with self._journal.transaction():
            unfinished = self._journal.rows(
                "SELECT id FROM stages WHERE name = ? AND method = ? AND account = ? "
                "AND (state != 'done' OR ?) ORDER BY id DESC LIMIT 1",
                (*identity.values(), reopen),
            )
            if resume and unfinished:
                stage_id = unfinished[0]["id"]
                assert stage_id not in self._open_stages, f"stage {name} is open already"
                self._journal.execute("UPDATE stages SET state = 'open' WHERE id = ?", (stage_id,))
            else:
                prediction = json.dumps((predicted or Cost()).to_dict())
                stage_id = self._journal.insert(
                    "stages", **identity, predicted=prediction, state="open", started_at=_now()
                )
        stage = Stage(self, stage_id, account, limit)
        self._open_stages.add(stage_id)
        state = "done"
        try:
            yield stage
        except BaseException as error:
            state = "stopped"
            stage.detail["reason"] = redact(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._open_stages.discard(stage_id)
            stage.settle_open()
            with self._headroom.for_last_words():
                self._journal.execute(
                    "UPDATE stages SET state = ?, detail = ?, ended_at = ? WHERE id = ?",
                    (state, json.dumps(stage.detail), _now(), stage_id),
                )

    def _share(self, name: str, limit: Budget) -> Budget:
        """The budget, where stages of that name may take no more of it than ``limit``."""
        total, own = self.spent(), self.spent(stage=name)
        found: dict[str, float | None] = {}
        for resource in RESOURCES:
            whole, part, key = self.budget.limit(resource), limit.limit(resource), resource
            if resource in HELD:
                key = "memory_bytes"
            elif part is not None:  # what other stages have spent is not taken off it
                others = (total.of(resource) or 0.0) - (own.of(resource) or 0.0)
                part = max(part + others, 1e-30)
            found[key] = min((x for x in (whole, part) if x is not None), default=None)
        return Budget(**found)

    def _reserve(self, stage: Stage, activity: str, upper: Cost, step: int) -> tuple[int, Counter]:
        """Check and reserve in one transaction. The lease's counter is made inside it, so that a
        lease without one is known to be damaged."""
        upper = self.rates.of(upper)
        with self._journal.transaction():
            stage.require(upper, activity)
            lease_id = self._journal.insert(
                "leases",
                stage_id=stage.id,
                activity=activity,
                state="open",
                pid=os.getpid(),
                step=step,
                reserved=json.dumps(upper.to_dict()),
                opened_at=_now(),
            )
            counter = Counter(self._counter_path(lease_id))
        self._counters[lease_id] = counter
        return lease_id, counter

    def _settle(
        self, lease_id: int, used: Cost, *, steps: int, lost: bool, kept: Cost | None = None
    ) -> None:
        """``kept``: of what is ``lost`` the part whose result is not, charged by itself."""
        with self._headroom.for_last_words(), self._journal.transaction():
            before = self._journal.rows("SELECT lost FROM charges WHERE lease_id = ?", (lease_id,))
            if not before:  # a lease is charged once, whoever asks again
                if lost and kept:
                    self._charge(self._part(lease_id, kept), kept, steps=0, lost=False)
                    used = self.rates.of(used).without(self.rates.of(kept))
                self._charge(lease_id, used, steps=steps, lost=lost)
        counter = self._counters.pop(lease_id, None)
        if counter is not None:
            counter.remove()
        if before and before[0]["lost"] and not lost:
            raise RuntimeError(
                f"lease {lease_id} of {self.path} was booked as lost while it was being used\n"
                "hint: two processes work on one run; stop one of them"
            )

    def _charge(self, lease_id: int, used: Cost, *, steps: int, lost: bool) -> None:
        used = self.rates.of(used)
        micro = None if used.dollars is None else round(used.dollars * 1e6)
        amounts = (used.flops, used.tokens, used.seconds, used.joules, micro)
        self._journal.execute(
            "INSERT INTO charges(stage_id, lease_id, activity, step_from, step_to, lost,"
            " flops, tokens, seconds, joules, microdollars, peak_memory_bytes, charged_at)"
            " SELECT stage_id, id, activity, step, step + ?, ?, ?, ?, ?, ?, ?, ?, ?"
            " FROM leases WHERE id = ?",
            (steps, lost, *amounts, used.peak_memory_bytes, _now(), lease_id),
        )
        self._journal.execute("UPDATE leases SET state = 'settled' WHERE id = ?", (lease_id,))

    def _part(self, lease_id: int, kept: Cost) -> int:
        """A lease of the same work, for the part of it that is kept."""
        (lease,) = self._journal.rows("SELECT * FROM leases WHERE id = ?", (lease_id,))
        del lease["id"]
        return self._journal.insert("leases", **{**lease, "reserved": json.dumps(kept.to_dict())})

    def recover(self) -> Cost:
        """Settle the leases of processes that died, from their counters, as lost, but for what is
        kept whatever happens. Call it only while holding the run's lock. Returns what was lost."""
        total = Cost()
        for row in self._journal.rows("SELECT id, reserved FROM leases WHERE state = 'open'"):
            lease_id = row["id"]
            if lease_id in self._counters:
                continue  # this very process has it, and is alive
            path = self._counter_path(lease_id)
            # Unknown is not zero: without a whole counter, all that was reserved counts as used.
            steps, used = read_counter(path) or (0, Cost.from_dict(json.loads(row["reserved"])))
            kept = read_kept(path)
            self._settle(lease_id, used, steps=steps, lost=True, kept=kept)
            used = self.rates.of(used)
            total += used.without(self.rates.of(kept)) if kept else used
        alive = {counter.path for counter in self._counters.values()}
        for path in self.path.parent.glob(f"{escape(self.path.stem)}-*.counter"):
            if path not in alive:
                path.unlink(missing_ok=True)
        return total

    def _counter_path(self, lease_id: int) -> Path:
        return self.path.with_name(f"{self.path.stem}-{lease_id}.counter")

    def _roll_back(self, stage: Stage, step: int, reason: str) -> Cost:
        with self._journal.transaction():
            before = self.spent(account=stage.account, lost=True)
            self._journal.execute(
                "INSERT INTO rollbacks(stage_id, step, last_charge, last_evaluation, reason,"
                " rolled_back_at) SELECT ?, ?, (SELECT COALESCE(MAX(id), 0) FROM charges),"
                " (SELECT COALESCE(MAX(id), 0) FROM evaluations), ?, ?",
                (stage.id, step, reason, _now()),
            )
            after = self.spent(account=stage.account, lost=True)
        return after.without(before)

    # -- what was spent ---------------------------------------------------------------------------

    def spent(
        self,
        *,
        account: str = "budget",
        stage: str | None = None,
        activity: str | None = None,
        lost: bool | None = None,
    ) -> Cost:
        """The sum of the charges on ``account``, lost ones included unless ``lost`` says which."""
        named = {"account": account, "stage": stage, "activity": activity, "is_lost": lost}
        return self._total({name: value for name, value in named.items() if value is not None})

    def _total(self, where: Mapping[str, Any]) -> Cost:
        (row,) = self._journal.rows(
            "SELECT COUNT(*) AS num, TOTAL(flops) AS flops, TOTAL(tokens) AS tokens,"
            " TOTAL(seconds) AS seconds, TOTAL(joules) AS joules, COUNT(joules) AS num_joules,"
            " TOTAL(microdollars) AS micro, COUNT(microdollars) AS num_dollars,"
            " COALESCE(MAX(peak_memory_bytes), 0.0) AS peak_memory_bytes"
            f" FROM booked WHERE {' AND '.join(f'{name} = ?' for name in where)}",
            tuple(where.values()),
        )
        if row["num_joules"] < row["num"]:
            row["joules"] = None
        row["dollars"] = row["micro"] / 1e6 if row["num_dollars"] == row["num"] else None
        return Cost.from_dict(row)

    def reserved(self, account: str = "budget") -> Cost:
        """What open leases on ``account`` hold."""
        rows = self._journal.rows(
            "SELECT reserved FROM leases l JOIN stages s ON s.id = l.stage_id "
            "WHERE l.state = 'open' AND s.account = ?",
            (account,),
        )
        return sum((Cost.from_dict(json.loads(row["reserved"])) for row in rows), Cost())

    def left(self) -> dict[str, float]:
        """What every limited resource has left, open leases taken off."""
        return self.budget.left(self.spent() + self.reserved())

    # -- what happened ----------------------------------------------------------------------------

    def decide(
        self,
        name: str,
        chosen: str | None,
        reason: str,
        *,
        choice: Choice | None = None,
        detail: Mapping[str, Any] | None = None,
        stage_id: int | None = None,
        step: int | None = None,
    ) -> None:
        """Write a decision with the options that lost and the numbers that decided; ``detail`` is
        what else it rests on (a forecast), as JSON."""
        self._journal.insert(
            "decisions",
            stage_id=stage_id,
            step=step,
            name=name,
            chosen=chosen,
            reason=redact(reason),
            choice=None if choice is None else json.dumps(choice.to_dict()),
            detail=None if detail is None else json.dumps(detail),
            decided_at=_now(),
        )

    def _evaluated(
        self,
        stage_id: int,
        by_target: Mapping[str, Any],
        beside: Mapping[str, Any] | None,
        **values: float,
    ) -> None:
        self._journal.insert(
            "evaluations",
            stage_id=stage_id,
            by_target=json.dumps(by_target),
            beside=json.dumps(beside) if beside else None,
            evaluated_at=_now(),
            **values,
        )

    def stages(self) -> list[dict[str, Any]]:
        """Every stage with its predicted and measured cost, in order."""
        rows = self._journal.rows("SELECT * FROM stages ORDER BY id")
        for row in rows:
            row["predicted"] = json.loads(row["predicted"])
            row["measured"] = self._total({"stage_id": row["id"]}).to_dict()
            row["detail"] = json.loads(row["detail"])
        return rows

    def charges(self) -> list[dict[str, Any]]:
        """Every charge, in order; ``lost`` also where a rollback undid it."""
        rows = self._journal.rows("SELECT * FROM booked ORDER BY id")
        for row in rows:
            micro = row.pop("microdollars")
            row["dollars"] = None if micro is None else micro / 1e6
            row["lost"] = bool(row.pop("is_lost"))
        return rows

    @property
    def last_charge(self) -> dict[str, Any]:
        """Its id and its seal, which hangs on those of all before it: for what is saved beside the
        journal, to be shown to ``require_charge``."""
        return self._journal.last_charge

    def require_charge(self, charge: Mapping[str, Any], whose: str) -> None:
        """Raise ValueError where the journal does not go on from ``charge``, which was the last one
        when ``whose`` was written: it was put back to an older state."""
        if not self._journal.has_charge(charge):
            raise ValueError(
                f"{self.path} is older than {whose}: it has not the charge {charge['id']} that was "
                "made before\nhint: put the newer ledger back, with its -wal file; without it what "
                "was spent is not known"
            )

    def faults(self) -> list[str]:
        """What is wrong in rows that are never read again, and between tables: for a check of
        everything. What is read was looked at when the journal was opened."""
        return list(self._journal.faults())

    def decisions(self) -> list[dict[str, Any]]:
        """Every decision, in order; ``marginal.replay(row["choice"])`` decides it again."""
        rows = self._journal.rows(
            "SELECT d.*, s.name AS stage FROM decisions d LEFT JOIN stages s ON s.id = d.stage_id "
            "ORDER BY d.id"
        )
        for row in rows:
            for name in ("choice", "detail"):
                row[name] = None if row[name] is None else json.loads(row[name])
        return rows

    def evaluations(self, *, lost: bool = False, account: str = "budget") -> list[dict[str, Any]]:
        """Dev evaluations in order; those that a rollback undid only with ``lost``."""
        rows = self._journal.rows(
            "SELECT e.*, s.name AS stage, EXISTS (SELECT 1 FROM rollbacks r WHERE "
            "r.stage_id = e.stage_id AND e.id <= r.last_evaluation AND e.step > r.step) AS lost "
            "FROM evaluations e JOIN stages s ON s.id = e.stage_id WHERE s.account = ? "
            "ORDER BY e.id",
            (account,),
        )
        for row in rows:
            row["by_target"] = json.loads(row["by_target"])
            row["beside"] = json.loads(row.get("beside") or "{}")
            row["lost"] = bool(row["lost"])
        return [row for row in rows if lost or not row["lost"]]
