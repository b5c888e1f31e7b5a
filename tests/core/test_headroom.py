"""Room for a ledger's last words, on a disk that is said to have so much left."""

import errno
import os
import re
import shutil
from types import SimpleNamespace

import pytest

from thrifty.core import headroom
from thrifty.core.budget import Budget, Cost
from thrifty.core.headroom import BYTES, Headroom
from thrifty.core.ledger import Ledger


@pytest.fixture
def free(monkeypatch):
    """Bytes that the disk says it has: ``free.bytes = 0``."""
    free = SimpleNamespace(bytes=10**9)

    def usage(folder):
        assert folder.is_dir()
        return SimpleNamespace(free=free.bytes)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return free


@pytest.fixture
def room(tmp_path):
    return Headroom(tmp_path / "ledger.sqlite")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "ledger.headroom"


def test_it_is_there_while_a_ledger_is_open_for_spending(file):
    with Ledger.create(file.with_name("ledger.sqlite"), Budget()):
        assert file.stat().st_size == BYTES
    assert not file.exists()
    with Ledger(file.with_name("ledger.sqlite"), read_only=True):
        assert not file.exists()


def test_one_that_a_kill_left_is_taken_over_and_half_a_one_is_not(room, file):
    file.write_bytes(b"x" * BYTES)
    room.hold()
    assert file.read_bytes() == b"x" * BYTES
    room.release()
    file.write_bytes(b"x" * 1000)
    room.hold()
    assert file.stat().st_size == BYTES
    assert set(file.read_bytes()) > {0, 1, 2}  # and not of zeros alone, which may take no room


def test_it_is_given_back_once(room, file):
    file.write_bytes(b"")
    room.release()  # never held: another's
    assert file.exists()
    room.hold()
    room.release()
    assert not file.exists()
    room.hold()
    file.unlink()
    room.release()  # somebody else took it
    file.write_bytes(b"")
    room.release()
    assert file.exists()


def test_a_disk_without_room_for_it_is_named_before_anything_is_spent(room, file, monkeypatch):
    def full(path, data):
        path.open("wb").close()
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{file}'")) as refusal:
        room.hold()
    assert refusal.value.errno == errno.ENOSPC
    assert not file.exists()


@pytest.mark.parametrize(
    ("left", "is_there", "may_write", "fits"),
    [
        (64 * 1024, False, True, True),
        (64 * 1024 - 1, False, True, False),
        (0, True, True, True),
        (0, False, False, True),
    ],
)
def test_who_reads_needs_room_for_what_is_shared(
    left, is_there, may_write, fits, room, free, tmp_path, monkeypatch
):
    free.bytes = left
    if is_there:
        (tmp_path / "ledger.sqlite-shm").touch()
    asked = []
    monkeypatch.setattr(os, "access", lambda *given: asked.append(given) or may_write)
    if fits:
        room.check()
    else:
        said = f"No space left on device: '{tmp_path / 'ledger.sqlite'}'"
        with pytest.raises(OSError, match=re.escape(said)) as refusal:
            room.check()
        assert refusal.value.errno == errno.ENOSPC
    assert asked == ([] if is_there else [(tmp_path, os.W_OK)])


@pytest.mark.parametrize(("left", "kept"), [(128 * 1024, True), (128 * 1024 - 1, False)])
def test_it_is_let_go_before_last_words_on_a_disk_that_is_nearly_full(left, kept, room, file, free):
    room.hold()
    free.bytes = left
    with room.for_last_words():
        assert file.exists() == kept


@pytest.mark.parametrize(
    ("number", "kept"), [(errno.ENOSPC, False), (errno.EDQUOT, False), (errno.EIO, True)]
)
def test_it_is_let_go_after_the_disk_was_full_all_the_same(number, kept, room, file, free):
    room.hold()
    with pytest.raises(OSError, match="so"), room.for_last_words():
        raise OSError(number, "so")
    assert file.exists() == kept


def test_a_ledger_settles_and_ends_its_stage_in_it(file, free):
    with Ledger.create(file.with_name("ledger.sqlite"), Budget()) as ledger:
        with ledger.stage("a", "x") as stage:
            lease = stage.lease("work", Cost(flops=2))
            assert file.exists()
            free.bytes = 0
            lease.settle()
            assert not file.exists()
        ledger._headroom.hold()
        with ledger.stage("b", "x"):
            assert file.exists()
        assert not file.exists()


def test_a_transaction_is_a_fraction_of_it():
    assert headroom._LEAST_FREE < BYTES
