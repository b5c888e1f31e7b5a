"""The ledger's SQLite file: its schema, opening it, transactions.

WAL with every transaction synced: readers never wait, and what was committed survives a power cut.
WAL needs shared memory, so the file belongs on a local disk, not on a network share.

A file is checked before it is used: its structure, its schema, the seal of every row
(``seals.py``). SQLite passes over what follows the first damaged page of a -wal file without a
word, as what a power cut left; so transactions are numbered, and beside a file with a -wal lies the
number that was reached (``ledger.sqlite-head``). A file that is behind it has lost some.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

from thrifty.core.durable import rename_durably
from thrifty.core.head import read_head, write_head
from thrifty.core.seals import broken_rows, write_seals

SCHEMA_VERSION = 2
_UNSEALED = 1
"""The version before; it has the same tables, without seals."""
_TRANSACTIONS = "transactions"
"""In ``meta``: how many there were."""

_WAL_VERSIONS = bytes([2, 2])
"""Bytes 18 and 19 of the file: to be written, and read, with its -wal."""

_SCHEMA = """
CREATE TABLE meta(
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, value TEXT NOT NULL, seal TEXT);
CREATE TABLE stages(
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, method TEXT NOT NULL,
    account TEXT NOT NULL, predicted TEXT NOT NULL, state TEXT NOT NULL,
    detail TEXT NOT NULL DEFAULT '{}', started_at TEXT NOT NULL, ended_at TEXT, seal TEXT);
CREATE TABLE leases(
    id INTEGER PRIMARY KEY AUTOINCREMENT, stage_id INTEGER NOT NULL REFERENCES stages(id),
    activity TEXT NOT NULL, state TEXT NOT NULL, pid INTEGER NOT NULL, step INTEGER NOT NULL,
    reserved TEXT NOT NULL, opened_at TEXT NOT NULL, seal TEXT);
CREATE TABLE charges(
    id INTEGER PRIMARY KEY AUTOINCREMENT, stage_id INTEGER NOT NULL REFERENCES stages(id),
    lease_id INTEGER NOT NULL UNIQUE REFERENCES leases(id), activity TEXT NOT NULL,
    step_from INTEGER NOT NULL, step_to INTEGER NOT NULL, lost INTEGER NOT NULL,
    flops REAL NOT NULL, tokens REAL NOT NULL, seconds REAL NOT NULL, joules REAL,
    microdollars INTEGER, peak_memory_bytes REAL NOT NULL, charged_at TEXT NOT NULL, seal TEXT);
CREATE TABLE rollbacks(
    id INTEGER PRIMARY KEY AUTOINCREMENT, stage_id INTEGER NOT NULL REFERENCES stages(id),
    step INTEGER NOT NULL, last_charge INTEGER NOT NULL, last_evaluation INTEGER NOT NULL,
    reason TEXT NOT NULL, rolled_back_at TEXT NOT NULL, seal TEXT);
CREATE TABLE evaluations(
    id INTEGER PRIMARY KEY AUTOINCREMENT, stage_id INTEGER NOT NULL REFERENCES stages(id),
    step INTEGER NOT NULL, flops REAL NOT NULL, objective REAL NOT NULL, stderr REAL NOT NULL,
    by_target TEXT NOT NULL, evaluated_at TEXT NOT NULL, beside TEXT, seal TEXT);
CREATE TABLE decisions(
    id INTEGER PRIMARY KEY AUTOINCREMENT, stage_id INTEGER REFERENCES stages(id), step INTEGER,
    name TEXT NOT NULL, chosen TEXT, reason TEXT NOT NULL, choice TEXT, detail TEXT,
    decided_at TEXT NOT NULL, seal TEXT);
CREATE VIEW booked AS SELECT c.*, s.name AS stage, s.account, s.method,
    c.lost OR EXISTS (SELECT 1 FROM rollbacks r WHERE r.stage_id = c.stage_id
        AND c.id <= r.last_charge AND c.step_to > r.step) AS is_lost
    FROM charges c JOIN stages s ON s.id = c.stage_id;
"""
_CHAINED = ("charges", "rollbacks", "evaluations", "decisions")
"""Tables that are only added to."""
_TABLES = ("meta", "stages", "leases", *_CHAINED)
_READ_AGAIN = {"leases": "state != 'settled'"}
"""Of a table the rows that are, where not all of them."""


class Journal:
    """An open journal. Raises ValueError where the file is missing, damaged or of another
    version."""

    def __init__(self, path: Path, *, read_only: bool) -> None:
        if not path.is_file():
            raise ValueError(
                f"there is no ledger at {path}\nhint: `thrifty plan ... -o RUN` makes one"
            )
        self.path = path
        self._read_only = read_only
        # By a reader: a writer that closes the file brings it up to date, and drops what lies in
        # a damaged -wal.
        with closing(_connect(path, "ro")) as reader:
            self.meta = _checked(path, reader)
        self._db = _connect(path, "ro" if read_only else "rw")
        try:
            self._db.execute("PRAGMA synchronous = FULL")
            if not read_only:
                self._seal()
            self._db.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            self._db.close()
            raise

    def _seal(self) -> None:
        """Seal what is written from now on; a file of the version before becomes one of this
        version, and as it was it is kept beside it."""
        if self.meta["schema"] != str(_UNSEALED):
            write_seals(self._db, _TABLES, _CHAINED)
            return
        kept = self.path.with_name(f"{self.path.name}.version-{_UNSEALED}")
        draft = kept.with_name(kept.name + ".new")
        draft.unlink(missing_ok=True)
        with closing(_connect(draft, "rwc")) as copy:
            self._db.backup(copy)
        rename_durably(draft, kept)
        with self.transaction():
            rows = {name: self.rows(f"SELECT * FROM {name} ORDER BY rowid") for name in _TABLES}
            self._db.execute("DROP VIEW booked")
            for name in reversed(_TABLES):
                self._db.execute(f"DROP TABLE {name}")
            others = [row for row in rows["meta"] if row["key"] != "schema"]
            _fill(self._db, {**rows, "meta": [*_meta({}), *others]})
        self.meta["schema"] = str(SCHEMA_VERSION)

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
        with closing(_connect(draft, "rwc")) as db:
            db.execute("BEGIN")
            _fill(db, {"meta": _meta(meta)})
            db.execute("COMMIT")
            db.execute("PRAGMA journal_mode = WAL")  # stays with the file
        _head_of(path).unlink(missing_ok=True)  # of one that was deleted
        draft.replace(path)

    def faults(self) -> Iterator[str]:
        """What is wrong in rows that are never read again, and between tables, in words; what is
        read was looked at when the file was opened."""
        if self.meta["schema"] == str(_UNSEALED):
            return
        try:
            for table in _READ_AGAIN:
                yield from broken_rows(self._db, table, chained=table in _CHAINED)
            for table, row_id, other, _ in self._db.execute("PRAGMA foreign_key_check"):
                yield f"row {row_id} of {table} is of no row of {other}"
            unequal = (
                "SELECT l.id FROM leases l LEFT JOIN charges c ON c.lease_id = l.id "
                "WHERE (l.state = 'settled') != (c.id IS NOT NULL)"
            )
            for (lease,) in self._db.execute(unequal):
                yield f"lease {lease} was settled and not charged, or charged and not settled"
        except sqlite3.DatabaseError as error:
            yield str(error)

    @property
    def last_charge(self) -> dict[str, Any]:
        """Its id and its seal, which hangs on all charges before it."""
        found = self._db.execute("SELECT id, seal FROM charges ORDER BY id DESC LIMIT 1").fetchone()
        row_id, seal = found or (0, None)
        return {"id": row_id, "seal": seal}

    def has_charge(self, charge: Mapping[str, Any]) -> bool:
        """Whether it goes on from where that was ``last_charge``."""
        query = "SELECT COUNT(*) FROM charges WHERE id = ? AND seal = ?"
        (found,) = self._db.execute(query, (charge["id"], charge["seal"])).fetchone()
        return bool(found) or charge["id"] == 0

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, and no other writer meanwhile; inside another, a part of it."""
        if self._db.in_transaction:
            yield
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            query = "UPDATE meta SET value = value + 1 WHERE key = ?"
            self._db.execute(query, (_TRANSACTIONS,))
            number = _transactions(self._db)
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:  # a full disk has rolled it back already
                self._db.execute("ROLLBACK")
            if getattr(error, "sqlite_errorname", None) == "SQLITE_FULL":
                reason = os.strerror(errno.ENOSPC)
                raise OSError(errno.ENOSPC, reason, str(self.path)) from error
            raise
        with suppress(OSError):  # an older number tells less, and nothing wrong
            write_head(_head_of(self.path), number)

    def insert(self, table: str, **values: Any) -> int:
        """Add a row; returns its id."""
        with self.transaction():
            row_id = _insert(self._db, table, values)
        assert row_id is not None
        return row_id

    def execute(self, query: str, values: tuple[Any, ...] = ()) -> None:
        with self.transaction():
            self._db.execute(query, values)

    def rows(self, query: str, values: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        """What a query finds, without seals."""
        cursor = self._db.execute(query, values)
        names = [column[0] for column in cursor.description]
        found = [dict(zip(names, row, strict=True)) for row in cursor]
        for row in found:
            row.pop("seal", None)
        return found

    def close(self) -> None:
        self._db.close()
        if not self._read_only and not _wal_of(self.path).exists():
            with suppress(OSError):  # all is in the one file; while another has it open it stays
                _head_of(self.path).unlink()


def _head_of(path: Path) -> Path:
    return path.with_name(path.name + "-head")


def _wal_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _meta(given: Mapping[str, str]) -> list[dict[str, str]]:
    meta = {"schema": str(SCHEMA_VERSION), _TRANSACTIONS: "0", **given}
    return [{"key": key, "value": value} for key, value in meta.items()]


def _fill(db: sqlite3.Connection, rows: Mapping[str, list[dict[str, Any]]]) -> None:
    """Make the tables, and seal what is put into them."""
    for statement in _SCHEMA.strip().split(";\n"):
        db.execute(statement)
    write_seals(db, _TABLES, _CHAINED)
    for table in _TABLES:
        for row in rows.get(table, ()):
            _insert(db, table, row)


def _insert(db: sqlite3.Connection, table: str, values: Mapping[str, Any]) -> int | None:
    names, places = ", ".join(values), ", ".join("?" * len(values))
    query = f"INSERT INTO {table}({names}) VALUES ({places})"
    return db.execute(query, tuple(values.values())).lastrowid


def _transactions(db: sqlite3.Connection) -> int:
    query = "SELECT value FROM meta WHERE key = ?"
    return int(db.execute(query, (_TRANSACTIONS,)).fetchone()[0])


# -- checking -----------------------------------------------------------------------------------


def _checked(path: Path, db: sqlite3.Connection) -> dict[str, str]:
    """What ``meta`` says. Raises ValueError where the file is damaged or of another version."""
    reached = read_head(_head_of(path))  # before the file is looked at, which others write to
    try:
        db.execute("BEGIN")  # one state of it, whoever writes meanwhile
        meta = dict(db.execute("SELECT key, value FROM meta"))
        damage = next(_damage(path, db, meta, reached), None)
        db.execute("ROLLBACK")
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        meta, damage = {}, str(error)
    if damage is not None:
        raise ValueError(
            f"{path} cannot be read as a ledger: {damage}\n"
            "hint: put it back as it was, with its -wal file; was it truncated, overwritten or "
            "edited?"
        )
    if meta.get("schema") not in (str(_UNSEALED), str(SCHEMA_VERSION)):
        raise ValueError(
            f"{path} has ledger version {meta.get('schema')}, this thrifty reads {_UNSEALED} and "
            f"{SCHEMA_VERSION}\nhint: use the thrifty version that made the run, or plan anew"
        )
    return meta


def _damage(
    path: Path, db: sqlite3.Connection, meta: Mapping[str, str], reached: int | None
) -> Iterator[str]:
    """What makes the file useless, in words."""
    (structure,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if structure != "ok":
        yield structure
    with path.open("rb") as file:
        if file.read(20)[18:] != _WAL_VERSIONS:  # what lies in its -wal would not be seen
            yield "its header does not say that it has a -wal"
    if meta.get("schema") == str(_UNSEALED):
        if _known_parts() <= _parts(db):
            yield "its version was edited"
        return
    if meta.get("schema") != str(SCHEMA_VERSION):
        return
    if _parts(db) != _known_parts():
        yield "its tables are not those that were made"
    for table in _TABLES:
        where = _READ_AGAIN.get(table, "1")
        yield from broken_rows(db, table, chained=table in _CHAINED, where=where)
    number = _transactions(db)
    if reached is not None and number < reached:
        yield (
            f"{reached - number:,} of its {reached:,} transactions are gone, as where its -wal "
            "file is damaged or was taken away"
        )


def _parts(db: sqlite3.Connection) -> set[tuple[Any, ...]]:
    return set(db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master"))


@cache
def _known_parts() -> set[tuple[Any, ...]]:
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(_SCHEMA)
        return _parts(db)


def _connect(path: Path, mode: Literal["ro", "rw", "rwc"]) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    if mode == "ro" and not _wal_of(path).exists() and not os.access(path.parent, os.W_OK):
        uri += "&immutable=1"  # even a reader of a WAL file writes beside it, unless told so
    # Transactions are opened by hand, BEGIN IMMEDIATE, so that check and charge are one step.
    return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30.0)
