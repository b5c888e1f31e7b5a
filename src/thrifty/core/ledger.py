"""One journal of everything that is spent: predicted before, measured after.

A SQLite file (WAL, every transaction synced). Spending goes reserve -> run -> settle, each one
transaction, so that concurrent spenders can never pass a limit together:

    with ledger.stage("train", "full", predicted=cost) as stage:
        lease = stage.lease("train", upper_bound, step=0)   # raises BudgetExceeded
        lease.tick(step_cost)                               # no fsync: a memory-mapped counter
        lease.settle(step=8)                                # one charge, as measured

A lease that nobody settled (a crash) is settled by ``recover`` from its counter and marked lost: the
work is gone, the spending is not. Charges are only ever added. ``roll_back`` says that a stage went
on from an earlier step; charges past that step count as lost from then on.

Money is kept in integer micro-dollars; an unknown price is NULL, never zero. Durations come from a
monotonic clock; wall time is for display alone.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from thrifty.core import quantities
from thrifty.core.budget import Budget, Cost
from thrifty.core.counter import Counter, read_counter
from thrifty.core.marginal import Choice

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE stages(
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, method TEXT NOT NULL, account TEXT NOT NULL,
    predicted TEXT NOT NULL, state TEXT NOT NULL, detail TEXT NOT NULL DEFAULT '{}',
    started_at TEXT NOT NULL, ended_at TEXT) STRICT;
CREATE TABLE leases(
    id INTEGER PRIMARY KEY, stage_id INTEGER NOT NULL REFERENCES stages(id),
    activity TEXT NOT NULL, state TEXT NOT NULL, pid INTEGER NOT NULL, step INTEGER NOT NULL,
    reserved TEXT NOT NULL, opened_at TEXT NOT NULL) STRICT;
CREATE TABLE charges(
    id INTEGER PRIMARY KEY, stage_id INTEGER NOT NULL REFERENCES stages(id),
    lease_id INTEGER NOT NULL UNIQUE REFERENCES leases(id), activity TEXT NOT NULL,
    step_from INTEGER NOT NULL, step_to INTEGER NOT NULL, lost INTEGER NOT NULL,
    flops REAL NOT NULL, tokens REAL NOT NULL, seconds REAL NOT NULL, joules REAL,
    microdollars INTEGER, peak_memory_bytes REAL NOT NULL, charged_at TEXT NOT NULL) STRICT;
CREATE TABLE rollbacks(
    id INTEGER PRIMARY KEY, stage_id INTEGER NOT NULL REFERENCES stages(id),
    step INTEGER NOT NULL, last_charge INTEGER NOT NULL, last_evaluation INTEGER NOT NULL,
    reason TEXT NOT NULL, rolled_back_at TEXT NOT NULL) STRICT;
CREATE TABLE evaluations(
    id INTEGER PRIMARY KEY, stage_id INTEGER NOT NULL REFERENCES stages(id),
    step INTEGER NOT NULL, flops REAL NOT NULL, objective REAL NOT NULL, stderr REAL NOT NULL,
    by_target TEXT NOT NULL, evaluated_at TEXT NOT NULL) STRICT;
CREATE TABLE decisions(
    id INTEGER PRIMARY KEY, stage_id INTEGER REFERENCES stages(id), step INTEGER,
    name TEXT NOT NULL, chosen TEXT, reason TEXT NOT NULL, choice TEXT,
    detail TEXT,    decided_at TEXT NOT NULL) STRICT;
CREATE VIEW booked AS SELECT c.*, s.name AS stage, s.account, s.method,
    c.lost OR EXISTS (SELECT 1 FROM rollbacks r WHERE r.stage_id = c.stage_id
        AND c.id <= r.last_charge AND c.step_to > r.step) AS is_lost
    FROM charges c JOIN stages s ON s.id = c.stage_id;
"""


class BudgetExceeded(ValueError):
    """A reservation does not fit what is left. ``resource`` names the limit that it would pass."""

    def __init__(self, message: str, resource: str) -> None:
        super().__init__(message)
        self.resource = resource


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a second of this run's devices costs; None is unknown."""

    dollars_per_second: float | None = None
    watts: float | None = None

    def of(self, cost: Cost) -> Cost:
        """``cost`` with joules and dollars for its seconds (where it has none of its own)."""
        joules, dollars = cost.joules, cost.dollars
        if joules == 0.0:
            joules = None if self.watts is None else cost.seconds * self.watts
        if dollars == 0.0:
            rate = self.dollars_per_second
            dollars = None if rate is None else cost.seconds * rate
        return replace(cost, joules=joules, dollars=dollars)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Ledger:
    """A run's journal. One process spends at a time (the run folder's lock sees to that for whole
    runs); any number may read, and reservations are safe between processes all the same."""

    def __init__(self, path: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(
                f"there is no ledger at {self.path}\nhint: `thrifty plan ... -o RUN` makes one"
            )
        self._db = _connect(self.path, read_only=read_only)
        try:
            meta = dict(self._db.execute("SELECT key, value FROM meta"))
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{self.path} is not a ledger: {error}\nhint: was it truncated or overwritten?"
            ) from None
        if int(meta.get("schema", "-1")) != SCHEMA_VERSION:
            raise ValueError(
                f"{self.path} has ledger version {meta.get('schema')}, this thrifty reads "
                f"{SCHEMA_VERSION}\nhint: use the thrifty version that made the run, or plan anew"
            )
        self.budget = Budget(**json.loads(meta["budget"]))
        self.rates = Rates(**json.loads(meta["rates"]))
        self._counter: Counter | None = None

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], budget: Budget, rates: Rates | None = None
    ) -> Ledger:
        """A new, empty journal. Raises ValueError where there is one already."""
        path = Path(path)
        if path.exists():
            raise ValueError(f"there is a ledger at {path} already\nhint: choose another run folder")
        # Built aside and renamed, so that a crash here leaves no half a ledger.
        draft = path.with_name(path.name + ".new")
        draft.unlink(missing_ok=True)
        db = _connect(draft)
        db.executescript("BEGIN IMMEDIATE;" + _SCHEMA + "COMMIT;")
        with _transaction(db):
            meta = {
                "schema": str(SCHEMA_VERSION),
                "budget": json.dumps(budget.to_dict()),
                "rates": json.dumps((rates or Rates()).__dict__),
                "created_at": _now(),
            }
            db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.close()
        os.replace(draft, path)
        return cls(path)

    def close(self) -> None:
        if self._counter is not None:
            self._counter.close()
            self._counter = None
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set_budget(self, budget: Budget) -> None:
        """Hold the run to ``budget`` from now on; a change is written down as a decision."""
        if budget == self.budget:
            return
        with _transaction(self._db):
            self._db.execute(
                "UPDATE meta SET value = ? WHERE key = 'budget'", (json.dumps(budget.to_dict()),)
            )
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
    ) -> Iterator[Stage]:
        """Open a stage, or go on with the unfinished one of that name and method.

        Spending on any ``account`` other than "budget" (a control run, say) is journalled beside
        it and limited by ``limit`` alone. An exception leaves the stage open with its reason: it can be resumed.
        """
        row = None
        if resume:
            row = self._db.execute(
                "SELECT id FROM stages WHERE name = ? AND method = ? AND account = ? "
                "AND state != 'done' ORDER BY id DESC LIMIT 1",
                (name, method, account),
            ).fetchone()
        with _transaction(self._db):
            if row is None:
                stage_id = self._db.execute(
                    "INSERT INTO stages(name, method, account, predicted, state, started_at) "
                    "VALUES (?, ?, ?, ?, 'open', ?)",
                    (name, method, account, json.dumps((predicted or Cost()).to_dict()), _now()),
                ).lastrowid
            else:
                stage_id = row[0]
                self._db.execute("UPDATE stages SET state = 'open' WHERE id = ?", (stage_id,))
        assert stage_id is not None
        stage = Stage(self, stage_id, account, limit)
        try:
            yield stage
        except BaseException as error:
            stage._settle_open()
            self._end_stage(stage_id, "stopped", {"reason": f"{type(error).__name__}: {error}"})
            raise
        stage._settle_open()
        self._end_stage(stage_id, "done", stage.detail)

    def _end_stage(self, stage_id: int, state: str, detail: Mapping[str, Any]) -> None:
        with _transaction(self._db):
            self._db.execute(
                "UPDATE stages SET state = ?, detail = ?, ended_at = ? WHERE id = ?",
                (state, json.dumps(detail), _now(), stage_id),
            )

    def _reserve(self, stage: Stage, activity: str, upper: Cost, step: int) -> int:
        upper = self.rates.of(upper)
        with _transaction(self._db):
            spent = self.spent(account=stage.account) + self.reserved(stage.account)
            over = stage.budget.exceeded_by(spent + upper)
            if over is not None:
                message = _refusal(activity, upper, spent, stage.budget, over)
                raise BudgetExceeded(message, over)
            lease_id = self._db.execute(
                "INSERT INTO leases(stage_id, activity, state, pid, step, reserved, opened_at) "
                "VALUES (?, ?, 'open', ?, ?, ?, ?)",
                (stage.id, activity, os.getpid(), step, json.dumps(upper.to_dict()), _now()),
            ).lastrowid
        assert lease_id is not None
        return lease_id

    def _settle(
        self, lease: Lease, cost: Cost, step_to: int, *, lost: bool = False
    ) -> None:
        cost = self.rates.of(cost)
        with _transaction(self._db):
            changed = self._db.execute(
                "UPDATE leases SET state = 'settled' WHERE id = ? AND state = 'open'", (lease.id,)
            ).rowcount
            if not changed:
                return  # settled before: a lease is charged once, whoever asks again
            self._db.execute(
                "INSERT INTO charges(stage_id, lease_id, activity, step_from, step_to, lost, flops,"
                " tokens, seconds, joules, microdollars, peak_memory_bytes, charged_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    lease.stage.id,
                    lease.id,
                    lease.activity,
                    lease.step,
                    step_to,
                    int(lost),
                    cost.flops,
                    cost.tokens,
                    cost.seconds,
                    cost.joules,
                    None if cost.dollars is None else round(cost.dollars * 1e6),
                    cost.peak_memory_bytes,
                    _now(),
                ),
            )

    def recover(self) -> Cost:
        """Settle the leases of processes that died, from their counter, as lost. Call it only while
        holding the run's lock. Returns what was lost."""
        rows = self._db.execute(
            "SELECT l.id, l.stage_id, l.activity, l.step, l.pid, s.account FROM leases l "
            "JOIN stages s ON s.id = l.stage_id WHERE l.state = 'open'"
        ).fetchall()
        total = Cost()
        for lease_id, stage_id, activity, step, pid, account in rows:
            lease = Lease(Stage(self, stage_id, account), lease_id, activity, step, counter=None)
            steps, cost = read_counter(self._counter_path(pid), lease_id)
            self._settle(lease, cost, step + steps, lost=True)
            total += cost
        for path in self.path.parent.glob(f"{self.path.stem}-*.counter"):
            path.unlink(missing_ok=True)
        return total

    def _counter_path(self, pid: int) -> Path:
        return self.path.with_name(f"{self.path.stem}-{pid}.counter")

    def _open_counter(self) -> Counter:
        if self._counter is None:
            self._counter = Counter(self._counter_path(os.getpid()))
        return self._counter

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
        where, values = ["account = ?"], [account]
        for column, value in (("stage", stage), ("activity", activity)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(value)
        if lost is not None:
            where.append("is_lost" if lost else "NOT is_lost")
        row = self._db.execute(
            "SELECT COUNT(*), TOTAL(flops), TOTAL(tokens), TOTAL(seconds), TOTAL(joules),"
            " TOTAL(microdollars), MAX(peak_memory_bytes), COUNT(joules), COUNT(microdollars)"
            f" FROM booked WHERE {' AND '.join(where)}",
            values,
        ).fetchone()
        count, flops, tokens, seconds, joules, micro, peak, with_joules, with_dollars = row
        return Cost(
            flops=flops,
            tokens=tokens,
            seconds=seconds,
            joules=joules if with_joules == count else None,
            dollars=micro / 1e6 if with_dollars == count else None,
            peak_memory_bytes=peak or 0.0,
        )

    def reserved(self, account: str = "budget") -> Cost:
        """What open leases on ``account`` hold."""
        rows = self._db.execute(
            "SELECT reserved FROM leases l JOIN stages s ON s.id = l.stage_id "
            "WHERE l.state = 'open' AND s.account = ?",
            (account,),
        )
        total = Cost()
        for (reserved,) in rows:
            total += Cost.from_dict(json.loads(reserved))
        return total

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
        with _transaction(self._db):
            self._db.execute(
                "INSERT INTO decisions(stage_id, step, name, chosen, reason, choice, detail,"
                " decided_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    stage_id,
                    step,
                    name,
                    chosen,
                    reason,
                    None if choice is None else json.dumps(choice.to_dict()),
                    None if detail is None else json.dumps(detail),
                    _now(),
                ),
            )

    def stages(self) -> list[dict[str, Any]]:
        """Every stage with its predicted and measured cost, in order."""
        rows = self._rows("SELECT * FROM stages ORDER BY id")
        for row in rows:
            row["predicted"] = json.loads(row["predicted"])
            row["detail"] = json.loads(row["detail"])
        return rows

    def charges(self) -> list[dict[str, Any]]:
        rows = self._rows("SELECT * FROM booked ORDER BY id")
        for row in rows:
            micro = row.pop("microdollars")
            row["dollars"] = None if micro is None else micro / 1e6
            row["lost"] = bool(row.pop("is_lost"))
        return rows

    def decisions(self) -> list[dict[str, Any]]:
        rows = self._rows(
            "SELECT d.*, s.name AS stage FROM decisions d LEFT JOIN stages s ON s.id = d.stage_id "
            "ORDER BY d.id"
        )
        for row in rows:
            for name in ("choice", "detail"):
                row[name] = None if row[name] is None else json.loads(row[name])
        return rows

    def evaluations(self, *, lost: bool = False, account: str = "budget") -> list[dict[str, Any]]:
        """Dev evaluations in order; those that a rollback undid only with ``lost``."""
        rows = self._rows(
            "SELECT e.*, s.name AS stage, EXISTS (SELECT 1 FROM rollbacks r WHERE "
            "r.stage_id = e.stage_id AND e.id <= r.last_evaluation AND e.step > r.step) AS lost "
            "FROM evaluations e JOIN stages s ON s.id = e.stage_id WHERE s.account = ? "
            "ORDER BY e.id",
            (account,),
        )
        for row in rows:
            row["by_target"] = json.loads(row["by_target"])
        return [row for row in rows if lost or not row.pop("lost")]

    def _rows(self, query: str, values: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        cursor = self._db.execute(query, values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]


class Stage:
    """An open stage; spends through leases. ``detail`` (JSON) is kept when it ends."""

    def __init__(
        self, ledger: Ledger, stage_id: int, account: str, limit: Budget | None = None
    ) -> None:
        self.ledger = ledger
        self.id = stage_id
        self.account = account
        self.budget = ledger.budget if account == "budget" else (limit or Budget())
        self.detail: dict[str, Any] = {}
        self._open: Lease | None = None

    def lease(self, activity: str, upper: Cost, *, step: int = 0) -> Lease:
        """Reserve ``upper`` and start its clock. One lease of a stage is open at a time.

        Raises BudgetExceeded, with the resource and what is left, where it does not fit.
        """
        assert self._open is None or self._open.settled, "settle the open lease first"
        lease_id = self.ledger._reserve(self, activity, upper, step)
        self._open = Lease(self, lease_id, activity, step, self.ledger._open_counter())
        return self._open

    def spent(self) -> Cost:
        """What the stage's account has spent, other stages included."""
        return self.ledger.spent(account=self.account)

    @contextmanager
    def spending(self, activity: str, upper: Cost, *, step: int = 0) -> Iterator[Lease]:
        """A lease for a block; settled at its end, also when the block raises."""
        lease = self.lease(activity, upper, step=step)
        try:
            yield lease
        finally:
            lease.settle()

    def evaluate(
        self, step: int, flops: float, objective: float, stderr: float, by_target: Mapping[str, Any]
    ) -> None:
        """Record a dev evaluation. ``flops``: what this stage had spent by then."""
        with _transaction(self.ledger._db):
            self.ledger._db.execute(
                "INSERT INTO evaluations(stage_id, step, flops, objective, stderr, by_target,"
                " evaluated_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (self.id, step, flops, objective, stderr, json.dumps(by_target), _now()),
            )

    def decide(
        self,
        name: str,
        chosen: str | None,
        reason: str,
        *,
        choice: Choice | None = None,
        detail: Mapping[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        self.ledger.decide(
            name, chosen, reason, choice=choice, detail=detail, stage_id=self.id, step=step
        )

    def roll_back(self, step: int, reason: str) -> Cost:
        """The stage goes on from ``step``: charges past it are lost. Returns what was lost anew."""
        before = self.ledger.spent(account=self.account, lost=True)
        with _transaction(self.ledger._db):
            self.ledger._db.execute(
                "INSERT INTO rollbacks(stage_id, step, last_charge, last_evaluation, reason,"
                " rolled_back_at) SELECT ?, ?, (SELECT COALESCE(MAX(id), 0) FROM charges),"
                " (SELECT COALESCE(MAX(id), 0) FROM evaluations), ?, ?",
                (self.id, step, reason, _now()),
            )
        after = self.ledger.spent(account=self.account, lost=True)
        return Cost(
            flops=after.flops - before.flops,
            tokens=after.tokens - before.tokens,
            seconds=after.seconds - before.seconds,
        )

    def _settle_open(self) -> None:
        if self._open is not None and not self._open.settled:
            self._open.settle()


class Lease:
    """A reservation being spent. ``used`` is what its ticks add up to, seconds from its own clock."""

    def __init__(
        self, stage: Stage, lease_id: int, activity: str, step: int, counter: Counter | None
    ) -> None:
        self.stage = stage
        self.id = lease_id
        self.activity = activity
        self.step = step
        self.settled = False
        self._counter = counter
        self._start = time.monotonic()
        self._ticks = 0
        self._used = Cost()
        if counter is not None:
            counter.write(lease_id, 0, self._used)

    @property
    def used(self) -> Cost:
        return replace(self._used, seconds=time.monotonic() - self._start)

    def tick(self, cost: Cost, *, steps: int = 1) -> None:
        """Count ``cost`` (its seconds are ignored: the clock knows). Survives the process."""
        self._ticks += steps
        self._used += replace(cost, seconds=0.0)
        if self._counter is not None:
            self._counter.write(self.id, self._ticks, self.used)

    def settle(self, *, lost: bool = False) -> Cost:
        """Charge what was used, ``lost`` where its result was thrown away. Idempotent."""
        used = self.used
        if not self.settled:
            self.stage.ledger._settle(self, used, self.step + self._ticks, lost=lost)
            self.settled = True
        return used


def _refusal(activity: str, upper: Cost, spent: Cost, budget: Budget, over: str) -> str:
    show = quantities.FORMATS[over]
    limit, needs = budget.limit(over), upper.of(over)
    assert limit is not None
    if needs is None:
        return (
            f"{activity} has no known price and the budget limits {over}\n"
            "hint: give the device's price (thrifty device --price), or drop that limit"
        )
    if over == "peak_memory_bytes":
        return (
            f"{activity} needs {show(needs)} but the budget allows {show(limit)}\n"
            f"hint: --memory {show(needs).replace(' ', '')} or more"
        )
    left = max(limit - (spent.of(over) or 0.0), 0.0)
    return (
        f"{activity} needs {show(needs)} but {show(left)} of {show(limit)} is left\n"
        f"hint: raise the budget's {over}, or plan a smaller run"
    )


def _connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}{'?mode=ro' if read_only else ''}"
    # Transactions are opened by hand, BEGIN IMMEDIATE, so that check and charge are one step.
    db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30.0)
    if not read_only:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
    return db


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")
