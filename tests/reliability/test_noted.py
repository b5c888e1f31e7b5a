"""Files that are noted with their hash, and the model that is left as such a folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.reliability.order import recorded
from thrifty import checkpoints, publication
from thrifty.core import sums
from thrifty.core.sums import NAME


def line(text: str, name: str) -> str:
    return f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n"


def test_a_file_is_noted_beside_it_once(tmp_path):
    sums.check(tmp_path / "a", "never")
    sums.write(tmp_path / "a", "one")
    sums.write(tmp_path / "b", "two")
    sums.write(tmp_path / "a", "three")
    assert (tmp_path / "SHA256SUMS").read_text() == line("two", "b") + line("three", "a")
    assert [(tmp_path / name).read_text() for name in "ab"] == ["three", "two"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, "a", "b"]
    for name in "ab":
        sums.check(tmp_path / name, "never")


def test_a_folder_is_noted_with_those_in_it(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    for _ in range(2):  # of itself it says nothing
        sums.note_all(tmp_path)
        assert (tmp_path / NAME).read_text() == line("two", "b") + line("one", "deep/a")
    assert list(sums.faults(tmp_path)) == []


def test_each_fault_is_named(tmp_path):
    for name in "abcd":
        sums.write(tmp_path / name, name)
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_text("x")
    (tmp_path / "c").write_text("x")
    (tmp_path / "e").write_text("what is not noted is not looked at")
    with (tmp_path / NAME).open("ab") as notes:
        notes.write(b"? " * 100 + b"\n\xff\nhalf a line")
    said = [
        f"{tmp_path / NAME} is damaged: {'? ' * 40!r} is no hash and name",
        f"{tmp_path / NAME} is damaged: {chr(0xFFFD)!r} is no hash and name",
        f"{tmp_path / 'a'}, which {NAME} there names, is missing",
        f"{tmp_path / 'c'} is damaged: it is not as it was written, says {NAME} there",
    ]
    assert list(sums.faults(tmp_path, but=("b",))) == said
    with pytest.raises(ValueError) as refusal:
        sums.check_all(tmp_path, "look")
    assert str(refusal.value) == f"{said[0]}\nhint: look"
    for name in "ade":
        sums.check(tmp_path / name, "never")
    with pytest.raises(ValueError) as refusal:
        sums.check(tmp_path / "b", "look")
    assert str(refusal.value) == (
        f"{tmp_path / 'b'} is damaged: it is not as it was written, which {NAME} beside it tells\n"
        "hint: look"
    )


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    sums.write(tmp_path / "a", "one")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        sums.write(tmp_path / "a", "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, "a"]
    assert (tmp_path / "a").read_text() == "one"
    sums.check(tmp_path / "a", "never")


def test_what_went_wrong_after_a_file_was_named_is_told(tmp_path, monkeypatch):
    def full(aside, path):
        aside.replace(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sums, "rename_durably", full)
    with pytest.raises(OSError, match="No space left"):
        sums.write(tmp_path / "a", "one")
    sums.check(tmp_path / "a", "never")


def test_a_file_is_read_again_once_anything_says_that_it_changed(tmp_path, monkeypatch):
    file = tmp_path / "a"
    one, two = (hashlib.sha256(text).hexdigest() for text in (b"one", b"two"))
    said = {"st_size": 3, "st_mtime_ns": 0, "st_ctime_ns": 0}
    monkeypatch.setattr(Path, "stat", lambda *_: SimpleNamespace(**said))
    for name in said:
        file.write_bytes(b"one")
        assert sums.is_as(file, {one})
        file.write_bytes(b"two")
        assert sums.is_as(file, {one})
        said[name] += 1
        assert sums.is_as(file, {two})
        said[name] -= 1


def test_notes_are_read_again_once_their_size_or_time_is_another(tmp_path):
    (tmp_path / "a").write_text("one")
    one, two = line("one", "a"), line("two", "a")
    for noted, time, well in ((one, 1, True), (two, 2, False), (two + one, 2, True)):
        (tmp_path / NAME).write_text(noted)
        os.utime(tmp_path / NAME, (time, time))
        assert (list(sums.faults(tmp_path)) == []) == well


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")
def test_a_file_is_noted_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    sums.write(tmp_path / "a", "one")
    (tmp_path / "b.new").write_text("two")
    events, on_disk = recorded(monkeypatch, tmp_path), []
    sync = os.fsync

    def seen(descriptor):
        on_disk.append((tmp_path / NAME).read_text())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    sums.keep(tmp_path / "b.new", tmp_path / "b")
    assert events == [("sync", NAME), ("sync", "b.new"), ("name", "b"), ("sync", ".")]
    assert on_disk[0] == line("one", "a") + line("two", "b")


# -- a model --------------------------------------------------------------------------------------


FILES = (
    "model.safetensors",
    "config.json",
    "chat.jinja",
    "spiece.model",
    "merges.txt",
    "README.md",
)
NOT_OF_THE_MODEL = ("trainer_state.json", "manifest.json", "optimizer.pt", "rng_state.pth")


def trained(folder: Path, text: str = "x") -> Path:
    folder.mkdir(parents=True)
    for name in (*FILES, *NOT_OF_THE_MODEL):
        (folder / name).write_text(f"{text} {name}")
    return folder


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("inner", ["", checkpoints.FOR_OTHERS])
def test_the_model_s_own_files_are_left(inner, tmp_path):
    checkpoint, model = tmp_path / "checkpoint-3", tmp_path / "deep" / "model"
    trained(checkpoint / inner, "new")
    trained(tmp_path / "deep" / ".model.new", "of a process that was killed")
    assert not publication.is_done(model, "ours")
    publication.publish(checkpoint, model, mark="ours", step=3)
    found = content(model)
    assert {name: found[name] for name in FILES} == {name: f"new {name}" for name in FILES}
    assert json.loads(found["thrifty.json"]) == {"settings": "ours", "step": 3}
    assert set(found) == {*FILES, "thrifty.json", NAME}
    assert len(found[NAME].splitlines()) == len(FILES) + 1
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]
    publication.check(model)
    assert publication.is_done(model, "ours")


def test_a_model_that_was_trained_otherwise_is_refused(tmp_path):
    model = tmp_path / "model"
    publication.publish(trained(tmp_path / "checkpoint-3"), model, mark="ours", step=3)
    with pytest.raises(ValueError) as refusal:
        publication.is_done(model, "theirs")
    assert str(refusal.value) == (
        f"{model} was trained under other settings, or on other rows, than plan.yaml now has\n"
        f"hint: delete {model} and the checkpoints beside it to train anew, or undo the edit"
    )


@pytest.mark.parametrize("name", ["thrifty.json", "config.json"])
def test_a_model_that_was_changed_is_refused(name, tmp_path):
    model = tmp_path / "deep" / "model"
    publication.publish(trained(tmp_path / "checkpoint-3"), model, mark="ours", step=3)
    (model / name).write_text("{}")
    hint = f"hint: delete {model}; `thrifty run` leaves it again"
    with pytest.raises(ValueError, match=hint):
        publication.check(model)
    if name == "thrifty.json":
        with pytest.raises(ValueError, match=f"{name} is damaged(.|\n)*\n{hint}"):
            publication.is_done(model, "ours")
    else:
        assert publication.is_done(model, "ours")
