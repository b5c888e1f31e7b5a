"""What a check of everything finds in a journal, and its smaller files."""

import json
import sqlite3
import struct
from contextlib import closing
from pathlib import Path

import pytest

from thrifty.core.budget import Budget, Cost
from thrifty.core.head import read_head, write_head
from thrifty.core.ledger import Ledger
from thrifty.core.sealed import read_sealed, sealed
from thrifty.core.seals import write_seals


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger.create(path, Budget()) as ledger:
        for name in ("a", "b"):
            with ledger.stage(name, "x") as stage, stage.spending("work", Cost()) as lease:
                lease.tick(Cost(flops=2), steps=1)
    return path


def sealed_by_hand(path, *statements):
    """Written by one who computes the seals as well."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        write_seals(db, ("leases", "charges"), ("charges",))
        for statement in statements:
            db.execute(statement)


def faults(path):
    with Ledger(path, read_only=True) as ledger:
        return ledger.faults()


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ("UPDATE leases SET state = 'open' WHERE id = 1", "lease 1 was settled and not charged, "
         "or charged and not settled"),
        ("UPDATE leases SET stage_id = 9 WHERE id = 2", "row 2 of leases is of no row of stages"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_found(path, statement, fault):
    assert faults(path) == []
    sealed_by_hand(path, statement)
    assert faults(path) == [fault]


def test_a_row_of_no_stage_is_not_written(path):
    with Ledger(path) as ledger, pytest.raises(sqlite3.IntegrityError, match="FOREIGN KEY"):
        ledger._journal.insert("decisions", stage_id=9, name="a", reason="b", decided_at="c")


def test_a_lease_that_went_missing_meanwhile_is_a_fault(path):
    with Ledger(path, read_only=True) as ledger:
        sealed_by_hand(path, "DELETE FROM leases WHERE id = 1")
        assert ledger.faults() == [
            "leases has no row 1, though one 2",
            "row 1 of charges is of no row of leases",
        ]


def test_a_reader_sees_what_is_written_meanwhile(path):
    with Ledger(path, read_only=True) as reader, Ledger(path) as writer:
        writer.decide("x", None, "y")
        assert len(reader.decisions()) == 1


def test_what_cannot_be_asked_is_a_fault(path):
    with Ledger(path, read_only=True) as ledger:
        ledger._journal._db.set_authorizer(lambda *_: sqlite3.SQLITE_DENY)
        assert ledger.faults() == ["not authorized"]


def test_a_file_without_a_wal_in_its_header_is_refused(path):
    data = bytearray(path.read_bytes())
    for at in (18, 19):
        assert data[at] == 2
        path.write_bytes(data[:at] + b"\1" + data[at + 1 :])
        for read_only in (False, True):
            said = "as a ledger: its header does not say that it has a -wal\nhint: "
            with pytest.raises(ValueError, match=said):
                Ledger(path, read_only=read_only)
    path.write_bytes(data)
    assert faults(path) == []


def test_a_structure_that_is_damaged_is_refused(path):
    """A row that its own table could not hold, as after a write to a wrong place."""
    said, made_so = "activity TEXT NOT NULL", "activity TEXT"
    for before, after in ((said, made_so), (made_so, said)):
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("PRAGMA writable_schema = ON")
            edit = "UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE name = 'leases'"
            db.execute(edit, (before, after))
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            if after == made_so:
                db.execute("UPDATE leases SET activity = NULL WHERE id = 1")
    with pytest.raises(ValueError, match=r"cannot be read as a ledger: NULL value in leases"):
        Ledger(path)


def test_a_version_that_was_edited_is_refused(path):
    """As if the rows had no seals yet."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE meta SET value = '1' WHERE key = 'schema'")
    with pytest.raises(ValueError) as refusal:
        Ledger(path)
    assert str(refusal.value) == (
        f"{path} cannot be read as a ledger: its version was edited\n"
        "hint: put it back as it was, with its -wal file; was it truncated, overwritten or edited?"
    )


def test_a_row_that_is_missing_is_named(path):
    sealed_by_hand(path, "DELETE FROM charges WHERE id = 1")
    with pytest.raises(ValueError, match="charges has no row 1, though one 2"):
        Ledger(path)


# -- the number beside it -------------------------------------------------------------------------


def test_a_number_that_cannot_be_written_stops_no_transaction(path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("thrifty.core.journal.write_head", full)
    with Ledger(path) as ledger:
        ledger.decide("x", None, "y")
        assert len(ledger.decisions()) == 1


def test_how_far_it_had_come(tmp_path):
    path, open_files = tmp_path / "head", Path("/proc/self/fd")
    before = len(list(open_files.glob("*")))
    assert read_head(path) is None
    for number in (0, 1, 1 << 40, 3):
        write_head(path, number)
        assert read_head(path) == number
        assert path.stat().st_size == 12
    assert len(list(open_files.glob("*"))) == before
    assert not path.stat().st_mode & 0o111
    whole = path.read_bytes()
    assert whole[:8] == struct.pack("<q", 3)
    for damaged in (b"", whole[:8], whole[:11], whole + b"x", b"\1" + whole[1:], whole[::-1]):
        path.write_bytes(damaged)
        assert read_head(path) is None


# -- sealed values --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["{", "[1]", '"a"', "3", "null", "\udcff"])
def test_what_is_no_sealed_values_is_damaged(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"a\.json' is damaged: "):
        read_sealed(path)
    with pytest.raises(FileNotFoundError):
        read_sealed(tmp_path / "b.json")


def test_a_seal_is_of_all_the_values(tmp_path):
    path = tmp_path / "a.json"
    values = {"b": 1, "a": [2.5, None]}
    path.write_text(json.dumps(sealed(sealed(values))))
    assert read_sealed(path) == values
    assert sealed({"a": [2.5, None], "b": 1})["seal"] == sealed(values)["seal"]
    for changed in ({"b": 2}, {"c": 1}):
        path.write_text(json.dumps({**sealed(values), **changed}))
        with pytest.raises(ValueError, match="it is not as it was written"):
            read_sealed(path)
    path.write_text(json.dumps(values))  # of an older thrifty
    assert read_sealed(path) == values
