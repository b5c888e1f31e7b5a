"""The ledger's SQLite file: its schema, opening it, transactions.

WAL with every transaction synced: readers never wait, and what was committed survives a power cut.
WAL needs shared memory, so the file belongs on a local disk, not on a network share.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE stages(
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, method TEXT NOT NULL, account TEXT NOT NULL,
    predicted TEXT NOT NULL, state TEXT NOT NULL, detail TEXT NOT NULL DEFAULT '{}',
    started_at TEXT NOT NULL, ended_at TEXT);
CREATE TABLE leases(
    id INTEGER PRIMARY KEY, stage_id INTEGER NOT NULL REFERENCES stages(id),
    activity TEXT NOT NULL, state TEXT NOT NULL, pid INTEGER NOT NULL, step INTEGER NOT NULL,
    reserved TEXT NOT NULL, opened_at TEXT NOT NULL);
CREATE TABLE charges(
    id INTEGER PRIMARY KEY, stage_id INTEGER NOT NULL REFERENCES stages(id),
    lease_id INTEGER NOT NULL UNIQUE REFERENCES leases(id), activity TEXT NOT NULL,
    step_from INTEGER NOT NULL, step_to INTEGER NOT NULL, lost INTEGER NOT NULL,
    flops REAL NOT NULL, tokens REAL NOT NULL, seconds REAL NOT NULL, joules REAL,
    microdollars INTEGER, peak_memory_bytes REAL NOT NULL, charged_at TEXT NOT NULL);
CREATE TABLE rollbacks(
    id INTEGER PRIMARY KEY, stage_id INTEGER NOT NULL REFERENCES stages(id),
    step INTEGER NOT NULL, last_charge INTEGER NOT NULL, last_evaluation INTEGER NOT NULL,
    reason TEXT NOT NULL, rolled_back_at TEXT NOT NULL);
CREATE TABLE evaluations(
    id INTEGER PRIMARY KEY, stage_id INTEGER NOT NULL REFERENCES stages(id),
    step INTEGER NOT NULL, flops REAL NOT NULL, objective REAL NOT NULL, stderr REAL NOT NULL,
    by_target TEXT NOT NULL, evaluated_at TEXT NOT NULL, beside TEXT);
CREATE TABLE decisions(
    id INTEGER PRIMARY KEY, stage_id INTEGER REFERENCES stages(id), step INTEGER,
    name TEXT NOT NULL, chosen TEXT, reason TEXT NOT NULL, choice TEXT, detail TEXT,
    decided_at TEXT NOT NULL);
CREATE VIEW booked AS SELECT c.*, s.name AS stage, s.account, s.method,
    c.lost OR EXISTS (SELECT 1 FROM rollbacks r WHERE r.stage_id = c.stage_id
        AND c.id <= r.last_charge AND c.step_to > r.step) AS is_lost
    FROM charges c JOIN stages s ON s.id = c.stage_id;
"""


class Journal:
    """An open journal. Raises ValueError where the file is missing, damaged or of another
    version."""

    def __init__(self, path: Path, *, read_only: bool) -> None:
        if not path.is_file():
            raise ValueError(
                f"there is no ledger at {path}\nhint: `thrifty plan ... -o RUN` makes one"
            )
        self.path = path
        self._db = _connect(path, "ro" if read_only else "rw")
        try:
            self.meta = self._read_meta()
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            if not read_only:
                self._add_columns()
        except BaseException:
            self._db.close()
            raise

    def _add_columns(self) -> None:
        """Those that a ledger made before there were any lacks."""
        known = {row["name"] for row in self.rows("PRAGMA table_info(evaluations)")}
        if "beside" not in known:
            self.execute("ALTER TABLE evaluations ADD COLUMN beside TEXT")

    @staticmethod
    def create(path: Path, meta: Mapping[str, str]) -> None:
        """Write an empty journal. Raises ValueError where there is one already."""
        if path.exists():
            raise ValueError(
                f"there is a ledger at {path} already\nhint: choose another run folder"
            )
        # Built aside and renamed, so that a crash here leaves no half a ledger.
        draft = path.with_name(path.name + ".new")
        draft.unlink(missing_ok=True)
        rows = {"schema": str(SCHEMA_VERSION), **meta}
        with closing(_connect(draft, "rwc")) as db:
            db.executescript("BEGIN;" + _SCHEMA)
            db.executemany("INSERT INTO meta VALUES (?, ?)", rows.items())
            db.execute("COMMIT")
            db.execute("PRAGMA journal_mode = WAL")  # stays with the file
        draft.replace(path)

    def _read_meta(self) -> dict[str, str]:
        try:
            meta = dict(self._db.execute("SELECT key, value FROM meta"))
            (damage,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            meta, damage = {}, str(error)
        if damage != "ok":
            raise ValueError(
                f"{self.path} cannot be read as a ledger: {damage}\n"
                "hint: was it truncated or overwritten?"
            )
        if meta.get("schema") != str(SCHEMA_VERSION):
            raise ValueError(
                f"{self.path} has ledger version {meta.get('schema')}, this thrifty reads "
                f"{SCHEMA_VERSION}\nhint: use the thrifty version that made the run, or plan anew"
            )
        return meta

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, and no other writer meanwhile; inside another, a part of it."""
        if self._db.in_transaction:
            yield
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:  # a full disk has rolled it back already
                self._db.execute("ROLLBACK")
            if getattr(error, "sqlite_errorname", None) == "SQLITE_FULL":
                reason = os.strerror(errno.ENOSPC)
                raise OSError(errno.ENOSPC, reason, str(self.path)) from error
            raise

    def insert(self, table: str, **values: Any) -> int:
        """Add a row; returns its id."""
        names, places = ", ".join(values), ", ".join("?" * len(values))
        query = f"INSERT INTO {table}({names}) VALUES ({places})"
        with self.transaction():
            row_id = self._db.execute(query, tuple(values.values())).lastrowid
        assert row_id is not None
        return row_id

    def execute(self, query: str, values: tuple[Any, ...] = ()) -> None:
        with self.transaction():
            self._db.execute(query, values)

    def rows(self, query: str, values: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        cursor = self._db.execute(query, values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def close(self) -> None:
        self._db.close()


def _connect(path: Path, mode: Literal["ro", "rw", "rwc"]) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    wal = path.with_name(path.name + "-wal")
    if mode == "ro" and not wal.exists() and not os.access(path.parent, os.W_OK):
        uri += "&immutable=1"  # even a reader of a WAL file writes beside it, unless told so
    # Transactions are opened by hand, BEGIN IMMEDIATE, so that check and charge are one step.
    return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30.0)
