"""What is synced before it gets its name, and what is left where that fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.reliability.order import recorded
from thrifty.core import durable

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")


@pytest.fixture
def events(monkeypatch, tmp_path):
    return recorded(monkeypatch, tmp_path)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_text_is_synced_then_named(events, tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    durable.write_atomically(path, "zwölf\nlines\n")
    assert path.read_bytes() == "zwölf\nlines\n".encode()
    assert events == [("sync", f".a.json.{os.getpid()}"), ("name", "a.json"), ("sync", ".")]
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("step", ["pathlib.Path.open", "os.fsync", "os.replace"])
def test_a_text_that_cannot_be_written_leaves_the_old_one(step, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(step, full)
        with pytest.raises(OSError, match="No space left"):
            durable.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]  # and nothing that fills the disk


def test_a_file_is_synced_then_named(events, tmp_path):
    (tmp_path / "draft").write_text("x")
    durable.rename_durably(tmp_path / "draft", tmp_path / "file")
    assert events == [("sync", "draft"), ("name", "file"), ("sync", ".")]
    assert (tmp_path / "file").read_text() == "x"


def made(folder: Path, text: str) -> Path:
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_text(text)
    (folder / "top").write_text(text)
    return folder


SYNCED = [
    ("sync", "draft/deep/file"),
    ("sync", "draft/deep"),
    ("sync", "draft/top"),
    ("sync", "draft"),
]


def test_a_folder_is_synced_with_all_in_it_then_named(events, tmp_path):
    durable.rename_durably(made(tmp_path / "draft", "x"), tmp_path / "folder")
    assert events == [*SYNCED, ("name", "folder"), ("sync", ".")]
    assert (tmp_path / "folder" / "deep" / "file").read_text() == "x"


def test_a_folder_is_replaced_in_two_renames(events, tmp_path):
    made(tmp_path / "folder", "old")
    made(tmp_path / ".folder.old", "older")  # of a process that was killed
    durable.replace_folder(made(tmp_path / "draft", "new"), tmp_path / "folder")
    assert events == [*SYNCED, ("name", ".folder.old"), ("name", "folder"), ("sync", ".")]
    assert (tmp_path / "folder" / "top").read_text() == "new"
    assert names(tmp_path) == ["folder"]


def test_a_folder_that_replaces_none(events, tmp_path):
    durable.replace_folder(made(tmp_path / "draft", "new"), tmp_path / "folder")
    assert events == [*SYNCED, ("name", "folder"), ("sync", ".")]
    assert names(tmp_path) == ["folder"]


def test_new_folders_are_in_those_above_them(events, tmp_path):
    durable.make_folder(tmp_path / "a" / "b" / "c")
    assert events == [("sync", "."), ("sync", "a"), ("sync", "a/b")]
    durable.make_folder(tmp_path / "a" / "b" / "c")
    durable.make_folder(tmp_path / "a" / "d")
    assert events[3:] == [("sync", "a")]


def test_no_descriptor_is_left_open(tmp_path, monkeypatch):
    """Also where syncing fails."""

    def broken(_):
        raise OSError(5, "Input/output error")

    before = len(names(Path("/proc/self/fd")))
    durable.sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        durable.sync_folder(tmp_path)
    assert len(names(Path("/proc/self/fd"))) == before
