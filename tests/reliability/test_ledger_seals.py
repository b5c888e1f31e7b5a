"""A ledger whose bytes were changed: it is refused with what was wrong, or nothing that is read
from it has changed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from thrifty.core.budget import Budget, Cost
from thrifty.core.head import read_head
from thrifty.core.journal import SCHEMA_VERSION
from thrifty.core.ledger import Ledger

PAGE = 4096
WRITE = """
import os, signal, sys
from thrifty.core.budget import Budget, Cost, Rates
from thrifty.core.ledger import Ledger
rates = Rates(dollars_per_second=0.25, watts=3.0)
with Ledger.create(sys.argv[1], Budget(flops=1e9, dollars=500.0), rates) as ledger:
    with ledger.stage("select", "bm25", predicted=Cost(flops=7)) as stage:
        for step in range(3):
            with stage.spending("score", Cost(flops=10), step=step) as lease:
                lease.tick(Cost(flops=5 + step, tokens=1 / 3), steps=1)
        stage.detail["kept"] = 12
    ledger.decide("picker", "top_k", "by hand", detail={"width": 0.1})
    with ledger.stage("train", "full") as stage:
        for step in range(0, 30, 10):
            with stage.spending("train", Cost(flops=100), step=step) as lease:
                lease.tick(Cost(flops=10 + step), steps=10)
            stage.evaluate(step, 10.0, 3.0 - step / 100, 0.1, {"code": {"loss": 3.0}})
        stage.roll_back(10, "a crash")
        stage.lease("train", Cost(flops=50), step=10)
        if len(sys.argv) > 2:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def written(folder: Path, *, killed: bool) -> Path:
    """A small ledger with something in every table; ``killed`` leaves its -wal and a lease."""
    path = folder / "ledger.sqlite"
    arguments = [sys.executable, "-c", WRITE, str(path), *(["die"] if killed else [])]
    code = subprocess.run(arguments, check=False).returncode
    assert code == (-signal.SIGKILL if killed else 0)
    return path


@pytest.fixture(scope="module")
def closed(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("closed"), killed=False)


@pytest.fixture(scope="module")
def left(tmp_path_factory) -> Path:
    """By a process that was killed: all that it wrote lies in the -wal."""
    return written(tmp_path_factory.mktemp("left"), killed=True)


def copied(path: Path, folder: Path) -> Path:
    """The ledger with all that lies beside it, but for what only a process that is alive needs."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(path.parent, folder, ignore=shutil.ignore_patterns("*-shm"))
    return folder / path.name


def contents(path: Path) -> dict[str, bytes]:
    """Of the ledger's files, but for what readers share, and an empty -wal of theirs."""
    files = [file for file in path.parent.glob(f"{path.name}*") if file.stat().st_size]
    return {file.name: file.read_bytes() for file in files if not file.name.endswith("-shm")}


def everything(path: Path, *, read_only: bool = True) -> object:
    """All that a program is ever told of a ledger."""
    with Ledger(path, read_only=read_only) as ledger:
        facts = [ledger.stages(), ledger.charges(), ledger.evaluations(lost=True)]
        facts += [ledger.decisions(), ledger.spent(), ledger.spent(lost=True), ledger.reserved()]
        charges = ledger._journal.rows("SELECT id, lease_id FROM charges")
        by_lease = "SELECT id FROM charges WHERE lease_id = ?"
        facts += [ledger._journal.rows(by_lease, (each["lease_id"],)) for each in charges]
        facts += [ledger._journal.rows("SELECT * FROM leases WHERE state = 'open'")]
        return [*facts, ledger.budget, ledger.rates]


def flip(file: Path, at: int, by: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        (byte,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte ^ by]))


def silently_changed(path: Path, damaged: str, places: list[int], folder: Path) -> list[object]:
    """Of these bytes of a file of the ledger those whose change is neither refused nor harmless."""
    rng, before, unnoticed = random.Random(0), everything(copied(path, folder)), []
    for at in places:
        by = rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
        file = copied(path, folder)
        flip(folder / damaged, at, by)
        try:
            noticed = everything(file) == before
        except ValueError as error:
            noticed = str(file) in str(error) and "\nhint: " in str(error)
        if not noticed:
            unnoticed.append((at, by))
    return unnoticed


def some_of(file: Path, each: int) -> list[int]:
    """So many places of every page, the first hundred bytes of the file all of them."""
    rng, size = random.Random(1), file.stat().st_size
    pages = range(0, size, PAGE)
    places = [rng.randrange(start, min(start + PAGE, size)) for start in pages for _ in range(each)]
    return [*range(min(100, size)), *places]


def test_a_flipped_byte_is_found_or_changes_nothing(closed, tmp_path):
    places = some_of(closed, 10)
    assert silently_changed(closed, closed.name, places, tmp_path / "copy") == []


@pytest.mark.parametrize("name", ["ledger.sqlite-wal", "ledger.sqlite-head"])
def test_a_flipped_byte_of_what_a_kill_left_is_found_or_changes_nothing(name, left, tmp_path):
    places = some_of(left.with_name(name), 2)
    assert silently_changed(left, name, places, tmp_path / "copy") == []


@pytest.mark.slow
@pytest.mark.parametrize("which", ["closed", "left"])
def test_many_bytes(which, request, tmp_path):
    path = request.getfixturevalue(which)
    file = path if which == "closed" else path.with_name(path.name + "-wal")
    places = list(range(0, file.stat().st_size, file.stat().st_size // 2000))
    assert silently_changed(path, file.name, places, tmp_path / "copy") == []


# -- edited by hand -----------------------------------------------------------------------------

EDITS = {
    "a number": ("UPDATE charges SET flops = 1 WHERE id = 2", "row 2 of charges is not as"),
    "a number of an evaluation": (
        "UPDATE evaluations SET objective = objective - 1 WHERE id = 1",
        "row 1 of evaluations is not as",
    ),
    "the budget": (
        "UPDATE meta SET value = replace(value, '500.0', '900.0') WHERE key = 'budget'",
        "row 3 of meta is not as",
    ),
    "a row taken out": ("DELETE FROM charges WHERE id = 3", "charges has no row 3, though one 4"),
    "the last row taken out": (
        "DELETE FROM decisions WHERE id = (SELECT MAX(id) FROM decisions)",
        "decisions has 0 rows up to 0, and 1 were written",
    ),
    "two rows swapped": (
        "UPDATE evaluations SET id = 9 WHERE id = 1; UPDATE evaluations SET id = 1 WHERE id = 2; "
        "UPDATE evaluations SET id = 2 WHERE id = 9",
        "row 1 of evaluations is not as",
    ),
    "a row put in": (
        "INSERT INTO rollbacks(stage_id, step, last_charge, last_evaluation, reason, "
        "rolled_back_at) VALUES (2, 0, 99, 99, '', '')",
        "row 2 of rollbacks is not as",
    ),
    "a row with another's seal": (
        "UPDATE charges SET flops = 1, seal = (SELECT seal FROM charges WHERE id = 1) WHERE id = 2",
        "row 2 of charges is not as",
    ),
    "what is counted as lost": (
        "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = replace(sql, 'c.step_to > ', "
        "'c.step_to < ') WHERE name = 'booked'",
        "its tables are not those that were made",
    ),
}


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("case", EDITS)
def test_what_another_program_wrote_is_named(case, read_only, closed, tmp_path):
    edit, says = EDITS[case]
    path = copied(closed, tmp_path / "copy")
    with closing(sqlite3.connect(path)) as db:
        db.executescript(edit)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"as a ledger: {says}(.|\n)*\nhint: "):
        Ledger(path, read_only=read_only)
    assert path.read_bytes() == before


def test_a_settled_lease_that_was_edited_is_found_by_a_check_of_everything(closed, tmp_path):
    path = copied(closed, tmp_path / "copy")
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE leases SET step = 77 WHERE id = 2")
    with Ledger(path) as ledger:
        assert ledger.faults() == ["row 2 of leases is not as it was written"]
    with Ledger(copied(closed, tmp_path / "copy")) as ledger:
        assert ledger.faults() == []


# -- put back to an older state -----------------------------------------------------------------


@pytest.mark.parametrize("taken", ["all of it", "its end", "one page of it"])
def test_a_wal_that_is_gone_is_missed(taken, left, tmp_path):
    path = copied(left, tmp_path / "copy")
    wal = path.with_name(path.name + "-wal")
    if taken == "all of it":
        wal.unlink()
    elif taken == "its end":
        os.truncate(wal, wal.stat().st_size - 100)
    else:
        flip(wal, wal.stat().st_size // 2, 1)
    kept = contents(path)
    reached = read_head(path.with_name(path.name + "-head"))
    gone = {"all of it": reached, "its end": 1}.get(taken, r"\d+")
    said = (
        f"as a ledger: {gone} of its {reached} transactions are gone, as where its -wal file is "
        "damaged or was taken away\nhint: "
    )
    for read_only in (False, True):
        with pytest.raises(ValueError, match=said):
            Ledger(path, read_only=read_only)
    assert contents(path) == kept, "left for whoever mends it"


def test_a_ledger_older_than_what_was_saved_beside_it_is_refused(closed, tmp_path):
    path = copied(closed, tmp_path / "then")
    newer = copied(closed, tmp_path / "now")
    with Ledger(newer) as ledger:
        before = ledger.last_charge
        with ledger.stage("test", "test") as stage, stage.spending("test", Cost(flops=1)):
            pass
        saved = ledger.last_charge
        for known in (before, saved, {"id": 0, "seal": None}):
            ledger.require_charge(known, "checkpoint-30")
    with Ledger(path) as ledger:
        ledger.require_charge(before, "checkpoint-30")
        with pytest.raises(ValueError, match=r"is older than checkpoint-30(.|\n)*\nhint: "):
            ledger.require_charge(saved, "checkpoint-30")
        with ledger.stage("test", "other") as stage, stage.spending("test", Cost(flops=2)):
            pass
        with pytest.raises(ValueError, match="is older than"):  # another charge of that number
            ledger.require_charge(saved, "checkpoint-30")


def test_the_number_beside_it_goes_with_the_wal(closed, left, tmp_path):
    assert [file.name for file in closed.parent.iterdir()] == [closed.name]
    path = copied(left, tmp_path / "copy")
    head = path.with_name(path.name + "-head")
    with Ledger(path) as one, Ledger(path) as other:
        one.decide("a", None, "b")
        other.decide("c", None, "d")
        one.close()
        assert head.exists()
    assert not head.exists()
    head.write_bytes(b"no number")  # tells nothing
    assert len(everything(path)[3]) == 3
    path.unlink()
    Ledger.create(path, Budget(flops=1.0)).close()  # it is not the one before
    assert not head.exists()


def test_a_number_beside_it_that_is_behind_tells_nothing(left, tmp_path):
    path = copied(left, tmp_path / "copy")
    path.with_name(path.name + "-head").write_bytes(b"no number")
    assert everything(path) == everything(copied(left, tmp_path / "other"))


# -- of the version before ----------------------------------------------------------------------

OLD_SCHEMA = """
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
    by_target TEXT NOT NULL, evaluated_at TEXT NOT NULL);
CREATE TABLE decisions(
    id INTEGER PRIMARY KEY, stage_id INTEGER REFERENCES stages(id), step INTEGER,
    name TEXT NOT NULL, chosen TEXT, reason TEXT NOT NULL, choice TEXT, detail TEXT,
    decided_at TEXT NOT NULL);
CREATE VIEW booked AS SELECT c.*, s.name AS stage, s.account, s.method,
    c.lost OR EXISTS (SELECT 1 FROM rollbacks r WHERE r.stage_id = c.stage_id
        AND c.id <= r.last_charge AND c.step_to > r.step) AS is_lost
    FROM charges c JOIN stages s ON s.id = c.stage_id;
PRAGMA journal_mode = WAL;
"""


def unsealed(path: Path, folder: Path) -> Path:
    """The same ledger as the version before would have written it."""
    folder.mkdir()
    older = folder / path.name
    with closing(sqlite3.connect(older)) as new, closing(sqlite3.connect(path)) as now:
        new.executescript(OLD_SCHEMA)
        tables = [name for (name,) in new.execute("SELECT name FROM sqlite_master WHERE type = "
                                                  "'table'")]  # fmt: skip
        for table in tables:
            names = [row[1] for row in new.execute(f"PRAGMA table_info({table})")]
            rows = now.execute(f"SELECT {', '.join(names)} FROM {table} ORDER BY rowid")
            places = ", ".join("?" * len(names))
            new.executemany(f"INSERT INTO {table} VALUES ({places})", rows)
        new.execute("UPDATE meta SET value = '1' WHERE key = 'schema'")
        new.execute("DELETE FROM meta WHERE key = 'transactions'")
        new.commit()
    return older


def test_a_ledger_of_the_version_before_is_sealed_and_kept_as_it_was(closed, tmp_path):
    older = unsealed(closed, tmp_path / "older")
    as_it_was = older.read_bytes()
    what_it_says = everything(older)
    assert older.read_bytes() == as_it_was, "a reader changes nothing"
    assert everything(older, read_only=False) == what_it_says == everything(closed)
    kept = older.with_name("ledger.sqlite.version-1")
    assert sorted(file.name for file in older.parent.iterdir()) == [older.name, kept.name]
    assert everything(kept) == what_it_says
    with closing(sqlite3.connect(kept)) as db:
        assert db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone() == ("1",)
    with Ledger(kept, read_only=True) as ledger:
        assert ledger.faults() == []  # of itself it says nothing
    with Ledger(older) as ledger:
        assert ledger._journal.meta["schema"] == str(SCHEMA_VERSION)
        assert ledger.faults() == []
        with ledger.stage("test", "test") as stage, stage.spending("test", Cost(flops=1)):
            pass
    flip(older, older.stat().st_size - 60, 1)
    assert len(everything(kept)[1]) == len(everything(closed)[1])


def test_killed_while_it_was_sealed_it_is_sealed_the_next_time(closed, tmp_path, monkeypatch):
    older = unsealed(closed, tmp_path / "older")
    what_it_says = everything(older)

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("thrifty.core.journal.write_seals", killed)
        with pytest.raises(Killed):
            Ledger(older)
    assert everything(older) == what_it_says
    assert everything(older, read_only=False) == what_it_says
