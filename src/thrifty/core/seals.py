"""A checksum in every row of a journal: what was changed in it is found, and named.

SQLite sees to the structure of its file, not to what its rows say. Here each row has a ``seal``, a
hash of its other values; in a table that is only ever added to, of the seal of the row before too,
so that a row which was edited, taken out or moved breaks the chain where it was. Ids count up from
1 without a gap, and SQLite keeps the last one apart: the end of a table cannot go unnoticed either.

Triggers write the seals, so that no statement can forget to. They are temporary, of a connection
that knows the hash: what any other program writes into the file is not sealed, and found.

This is no lock: who can compute a hash can forge one.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

_FUNCTION = "thrifty_seal"


def seal_of(*values: Any) -> str:
    """Of the seal of the row before (None where there is none to count), then the row's values:
    texts and numbers as SQLite gives them."""
    return hashlib.blake2b(ascii(values).encode(), digest_size=8).hexdigest()


def write_seals(db: sqlite3.Connection, tables: Iterable[str], chained: Sequence[str]) -> None:
    """Have this connection seal what it writes from now on."""
    db.create_function(_FUNCTION, -1, seal_of, deterministic=True)
    for table in tables:
        before = "NULL"
        if table in chained:
            before = f"(SELECT b.seal FROM {table} b WHERE b.id = {table}.id - 1)"
        columns = ", ".join(_columns(db, table))
        # Read from the row as it lies there, not as it was given: 1 in a REAL column is 1.0.
        sealing = f"UPDATE {table} SET seal = {_FUNCTION}({before}, {columns}) WHERE id = NEW.id"
        for name, change in (("new", "INSERT"), ("changed", f"UPDATE OF {columns}")):
            db.execute(
                f"CREATE TEMP TRIGGER seal_{name}_{table} AFTER {change} ON {table} "
                f"BEGIN {sealing}; END"
            )


def broken_rows(
    db: sqlite3.Connection, table: str, *, chained: bool, where: str = "1"
) -> Iterator[str]:
    """What is wrong with a table's rows, those of ``where`` alone, in words."""
    names = _columns(db, table)
    query = f"SELECT seal, {', '.join(names)} FROM {table} WHERE {where} ORDER BY id"
    before, row_id = None, 0
    for seal, *values in db.execute(query):
        if where == "1":
            row_id += 1
            if values[0] != row_id:
                yield f"{table} has no row {row_id}, though one {values[0]}"
                return
        if seal != seal_of(before, *values):
            yield f"row {values[0]} of {table} is not as it was written"
        before = seal if chained else None
    kept = db.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchone()
    last, count = db.execute(f"SELECT COALESCE(MAX(id), 0), COUNT(*) FROM {table}").fetchone()
    written = kept[0] if kept else 0
    if not last == count == written:
        yield f"{table} has {count:,} rows up to {last:,}, and {written:,} were written"


def _columns(db: sqlite3.Connection, table: str) -> list[str]:
    """All but the seal; the id is the first."""
    names = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
    return [name for name in names if name != "seal"]
