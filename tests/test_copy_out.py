"""What was chosen leaves memory a block at a time, and is copied to wherever it is wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk
from fsspec.implementations.local import LocalFileSystem

from tests.runs import planned, silent
from thrifty import selected, stages
from thrifty.data import remote
from thrifty.run_folder import RunFolder
from thrifty.selected import MANIFEST, copy_selected


@pytest.fixture
def data(tiny_data, tmp_path):
    """Rows of which some have a column that others lack, and halves where others are whole."""
    rows = [json.loads(line) for line in tiny_data["small_pool"].read_text().splitlines()]
    for number, row in enumerate(rows):
        row["weighed"] = number if number % 3 else number / 2
        if number > 100:
            row["note"] = f"{number}\tand a tab"
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {**tiny_data, "pool": pool}


def select(folder: Path, model: Path, data: dict[str, Path]) -> Path:
    planned(folder, model, data, fixed={"selection.max_tokens": 4000})
    with stages.at_work(RunFolder(folder), silent) as work:
        stages.select(work, work.main)
    return folder / "selected"


def files_of(folder: Path) -> dict[str, bytes]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_the_same_is_left_whatever_the_block(tiny_model, data, tmp_path, monkeypatch):
    whole = select(tmp_path / "whole", tiny_model, data)
    monkeypatch.setattr(selected, "_BLOCK_ROWS", 7)
    parts = select(tmp_path / "parts", tiny_model, data)
    assert len(list((parts / "data").glob("*.arrow"))) > 5
    for name in ("selected.jsonl", "examples.json", "histogram.json", "outcomes.parquet"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    rows, same = (load_from_disk(str(folder / "data")) for folder in (whole, parts))
    assert rows.features == same.features
    assert rows.to_list() == same.to_list()
    lines = (parts / "selected.jsonl").read_text().splitlines()
    assert [row["id"] for row in same] == [json.loads(line)["id"] for line in lines]
    assert len(lines) > 40
    assert sorted(path.name for path in parts.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_a_copy_is_whole_or_has_no_manifest(tiny_model, data, tmp_path, monkeypatch):
    chosen = select(tmp_path / "run", tiny_model, data)
    there = tmp_path / "copied" / "here"
    there.mkdir(parents=True)
    (there / MANIFEST).write_text("{}")  # of another selection
    plain, asked = LocalFileSystem.put_file, []

    def killed(self: Any, path: str, *arguments: Any, **options: Any) -> None:
        asked.append(Path(path).name)
        if len(asked) == 4:
            raise KeyboardInterrupt
        plain(self, path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "put_file", killed)
        with pytest.raises(KeyboardInterrupt):
            copy_selected(chosen, str(there))
    assert there.is_dir()
    assert not (there / MANIFEST).exists()
    assert copy_selected(chosen, f"file://{there}/")
    assert files_of(there) == files_of(chosen)
    assert not copy_selected(chosen, str(there))


def test_writing_is_tried_again_and_told_in_the_end(tiny_model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    chosen = select(tmp_path / "run", tiny_model, data)
    plain, faults = LocalFileSystem.put_file, [TimeoutError("away")] * 3

    def away(*arguments: Any, **options: Any) -> None:
        if faults:
            raise faults.pop()
        plain(*arguments, **options)

    monkeypatch.setattr(LocalFileSystem, "put_file", away)
    assert copy_selected(chosen, str(tmp_path / "one"))
    assert files_of(tmp_path / "one") == files_of(chosen)
    faults += [TimeoutError("away")] * 100
    with pytest.raises(ValueError, match=r"cannot write .*5 attempts failed.*away\nhint: "):
        copy_selected(chosen, str(tmp_path / "two"))
    assert len(faults) == 95
    with pytest.raises(ValueError, match=r"holds no finished selection\nhint"):
        copy_selected(tmp_path, str(tmp_path / "three"))
    with pytest.raises(ValueError, match=r"cannot write to 'nosuch://.*\nhint: install"):
        copy_selected(chosen, "nosuch://place")
