"""What counts as a checkpoint, which one is gone on with, and which are kept."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from tests.reliability.order import recorded
from tests.reliability.small_checkpoints import CONTENT, save
from thrifty import checkpoints
from thrifty.core.sealed import read_sealed

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")


@pytest.fixture
def home(tmp_path) -> Path:
    """A run's folder of checkpoints."""
    return tmp_path / "run" / "checkpoints"


@pytest.fixture(autouse=True)
def events(monkeypatch, tmp_path):
    return recorded(monkeypatch, tmp_path)


def commit(home: Path, step: int, **details: object) -> Path:
    folder = save(home, step)
    checkpoints.commit(folder, {"step": step, **details})
    return folder


def steps(home: Path) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints.committed(home)]


def names(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir())


# -- committing -----------------------------------------------------------------------------------


def test_the_manifest_is_named_last_when_all_else_is_on_the_disk(home, events):
    commit(home, 7, dev_loss=2.5)
    folder = "run/checkpoints/checkpoint-7"
    written, after = events[:5], events[5:]
    assert set(written) == {
        *(("sync", f"{folder}/{name}") for name in CONTENT),
        ("sync", f"{folder}/for-others"),
        ("sync", folder),
    }
    assert written[-1] == ("sync", folder)
    assert after == [
        ("sync", "run/checkpoints"),
        ("sync", "run"),
        ("sync", f"{folder}/.manifest.json.{os.getpid()}"),
        ("name", f"{folder}/manifest.json"),
        ("sync", folder),
    ]


def test_the_manifest_has_every_file_and_the_details(home):
    for _ in range(2):  # of itself it says nothing
        folder = commit(home, 7, dev_loss=2.5)
        checkpoints.commit(folder, {"step": 7, "dev_loss": 2.5})
        assert read_sealed(folder / "manifest.json") == {
            "step": 7,
            "dev_loss": 2.5,
            "files": {
                name: [size, hashlib.sha256(bytes([7]) * size).hexdigest()]
                for name, size in CONTENT.items()
            },
        }
    (found,) = checkpoints.committed(home)
    assert (found.path, found.step, found.dev_loss, found.may_be_kept) == (folder, 7, 2.5, True)


def test_what_is_committed_is_sorted_by_step_and_whole_in_name(home):
    for step in (10, 9, 100):
        commit(home, step)
    save(home, 8)  # never committed
    commit(home, 7).joinpath("manifest.json").write_text("{")
    commit(home, 6).rename(home / "checkpoint-x")
    commit(home, 5).rename(home / "torn-checkpoint-5")
    assert steps(home) == [9, 10, 100]


def test_may_be_kept_is_evaluated_and_within_the_floors(home):
    commit(home, 1)
    commit(home, 2, dev_loss=0.0)
    commit(home, 3, dev_loss=1.0, broken=["code"])
    commit(home, 4, dev_loss=1.0, broken=[])
    assert [c.may_be_kept for c in checkpoints.committed(home)] == [False, True, False, True]


# -- what is not as it was written ----------------------------------------------------------------


def _gone(path: Path) -> None:
    path.unlink()


def _short(path: Path) -> None:
    path.write_bytes(b"short")


def _flipped(path: Path) -> None:
    path.write_bytes(b"?" + path.read_bytes()[1:])


DAMAGES = [
    (_gone, "optimizer.pt is missing"),
    (_short, "optimizer.pt has 5 bytes, not 500"),
    (_flipped, "optimizer.pt has changed"),
]


@pytest.mark.parametrize(("harm", "what"), DAMAGES)
def test_damage_is_named(home, harm, what):
    harm(commit(home, 3) / "optimizer.pt")
    (checkpoint,) = checkpoints.committed(home)
    assert checkpoints.damage(checkpoint) == what


def test_a_manifest_of_another_step_is_damage(home):
    commit(home, 3).rename(home / "checkpoint-4")
    (checkpoint,) = checkpoints.committed(home)
    assert checkpoints.damage(checkpoint) == "manifest.json is of step 3"


def test_a_manifest_of_an_older_thrifty_has_no_step_and_no_seal(home):
    manifest = commit(home, 3) / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({"files": values["files"]}))
    (checkpoint,) = checkpoints.committed(home)
    assert checkpoints.damage(checkpoint) is None


# -- which one is gone on with --------------------------------------------------------------------


def test_no_folder_and_an_empty_one_have_none(home):
    assert checkpoints.newest_whole(home) == (None, [])
    home.mkdir(parents=True)
    assert checkpoints.newest_whole(home) == (None, [])
    assert checkpoints.best(home) is None


def test_the_newest_whole_one_is_gone_on_with_and_others_are_set_aside(home):
    for step in (8, 9, 10, 11):
        commit(home, step)
    _short(home / "checkpoint-11" / "optimizer.pt")
    _gone(home / "checkpoint-10" / "model.safetensors")
    _short(home / "checkpoint-8" / "optimizer.pt")  # older: not looked at
    newest, notes = checkpoints.newest_whole(home)
    assert newest is not None
    assert newest.step == 9
    assert notes == [
        "checkpoint-11: optimizer.pt has 5 bytes, not 500",
        "checkpoint-10: model.safetensors is missing",
    ]
    assert names(home) == [
        "checkpoint-8",
        "checkpoint-9",
        "torn-checkpoint-10",
        "torn-checkpoint-11",
    ]


def test_what_was_never_committed_is_set_aside_with_why(home):
    save(home, 3)
    (commit(home, 4) / "manifest.json").write_text("{")
    newest, notes = checkpoints.newest_whole(home)
    assert newest is None
    assert sorted(notes) == [
        "checkpoint-3 was never committed",
        "checkpoint-4: manifest.json is damaged",
    ]
    assert names(home) == ["torn-checkpoint-3", "torn-checkpoint-4"]


def test_two_are_kept_for_a_look(home):
    left = []
    for number, step in enumerate((5, 5, 6, 4, 7)):
        torn = save(home, step)
        os.utime(torn, (1000 + number, 1000 + number))
        assert checkpoints.newest_whole(home)[0] is None
        left.append(names(home))
    assert left == [
        ["torn-checkpoint-5"],
        ["torn-checkpoint-5", "torn-checkpoint-5-1"],
        ["torn-checkpoint-5-1", "torn-checkpoint-6"],
        ["torn-checkpoint-4", "torn-checkpoint-6"],
        ["torn-checkpoint-4", "torn-checkpoint-7"],  # not by their names: by their age
    ]


def test_what_cannot_be_removed_stops_nothing(home, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "rmdir", denied)
    for step in (1, 2, 3):
        save(home, step)
        assert checkpoints.newest_whole(home)[0] is None
    assert names(home) == ["torn-checkpoint-1", "torn-checkpoint-2", "torn-checkpoint-3"]


# -- which are kept -------------------------------------------------------------------------------


def test_the_newest_few_and_the_best_are_kept(home):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.5), (10, 2.25)):
        commit(home, step, dev_loss=loss)
    checkpoints.retain(home, newest=2)
    assert names(home) == ["checkpoint-10", "checkpoint-3", "checkpoint-5"]  # of equals the later
    checkpoints.retain(home, newest=1)
    assert steps(home) == [3, 10]


def test_without_evaluations_the_newest_few_are_kept(home):
    for step in (1, 2, 3, 4):
        commit(home, step)
    commit(home, 0, dev_loss=0.5, broken=["code"])
    checkpoints.retain(home, newest=2)
    assert steps(home) == [3, 4]


@pytest.mark.parametrize("harm", [_gone, _short])
def test_what_lost_bytes_takes_nobody_s_place(home, harm):
    for step in (1, 2, 3, 4):
        commit(home, step, dev_loss=float(step != 4))
    harm(home / "checkpoint-4" / "optimizer.pt")
    checkpoints.retain(home, newest=1)
    assert names(home) == ["checkpoint-3"]


def test_a_kill_half_way_leaves_a_torn_folder_not_a_damaged_one(home, monkeypatch):
    for step in (1, 2):
        commit(home, step)

    def killed(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.retain(home, newest=1)
    assert names(home / "checkpoint-1") == ["for-others", "model.safetensors", "optimizer.pt"]
    assert steps(home) == [2]


def test_the_best_is_the_lowest_that_is_whole(home):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, None)):
        commit(home, step, dev_loss=loss)
    commit(home, 6, dev_loss=0.5, broken=["code"])
    best = checkpoints.best(home)
    assert best is not None
    assert best.step == 3
    _flipped(home / "checkpoint-3" / "model.safetensors")
    _gone(home / "checkpoint-2" / "model.safetensors")
    best = checkpoints.best(home)
    assert best is not None
    assert best.step == 4
    assert steps(home) == [1, 4, 5, 6]
    assert "torn-checkpoint-3" in names(home)
