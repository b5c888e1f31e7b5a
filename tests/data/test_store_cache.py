"""The cache of tokenised rows: what it keeps, what makes it read anew, and what it survives."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from thrifty.data import store_cache
from thrifty.data.pool import read_rows
from thrifty.data.store import build_store, open_store
from thrifty.data.tokens import tokenizer_fingerprint


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(store_cache.VARIABLE, raising=False)
    return tmp_path / "cache" / "rows"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", "a plum")


def write(path: Path, text: str) -> Path:
    path.write_text("".join(f'{{"text": "{text} {n}"}}\n' for n in range(20)) + "{broken\n")
    return path


@pytest.fixture
def made(tokenizer, rows: Path, tmp_path: Path) -> Path:
    """A store of ``rows``, kept."""
    folder = tmp_path / "made"
    mark = tokenizer_fingerprint(tokenizer)
    build_store(read_rows([str(rows)]), folder, tokenizer, 32, tokenizer_fingerprint=mark)
    store_cache.keep(key(rows), folder)
    return folder


def key(*paths: Path, parts: tuple[object, ...] = ("tokenizer", 32, "sft")) -> str | None:
    return store_cache.key_of([str(path) for path in paths], *parts)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_comes_out_is_what_went_in(made, rows, tmp_path):
    assert store_cache.fetch(key(rows), tmp_path / "again") == open_store(made).manifest
    assert contents(tmp_path / "again") == contents(made)


def test_a_key_knows_all_that_decides(rows, tmp_path, monkeypatch):
    known = key(rows)
    assert key(rows) == known
    others = [
        key(rows, parts=("another tokenizer", 32, "sft")),
        key(rows, parts=("tokenizer", 64, "sft")),
        key(rows, parts=("tokenizer", 32, "continued")),
        key(rows, write(tmp_path / "more.jsonl", "x")),
        key(write(tmp_path / "copy.jsonl", "a plum")),  # rows carry their file's name
    ]
    write(rows, "a pear")
    others.append(key(rows))
    assert len({known, *others}) == 1 + len(others)
    monkeypatch.setattr(store_cache, "_code", lambda: "a mended reader")
    assert key(rows) != others[-1]


def test_urls_are_read_anew(rows):
    assert store_cache.key_of([str(rows), "memory://bucket/rows.jsonl"]) is None
    assert store_cache.fetch(None, rows.parent / "nothing") is None


def test_a_run_cannot_reach_the_cache_or_another_run(made, rows, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    store_cache.fetch(key(rows), one)
    store_cache.fetch(key(rows), other)
    for path in one.iterdir():
        with path.open("r+b") as file:
            file.write(b"damaged")
    assert contents(other) == contents(made)
    assert store_cache.fetch(key(rows), tmp_path / "third") is not None


@pytest.mark.parametrize("damage", ["shard-00000.parquet", "manifest.json"])
def test_a_damaged_entry_is_none(damage, made, rows, own_cache, tmp_path):
    file = own_cache / str(key(rows)) / damage
    file.write_bytes(file.read_bytes()[:-20])
    assert store_cache.fetch(key(rows), tmp_path / "again") is None
    assert not (tmp_path / "again").exists()
    assert list(own_cache.iterdir()) == [], "it is gone"
    store_cache.keep(key(rows), made)
    assert store_cache.fetch(key(rows), tmp_path / "again") is not None


def test_what_a_kill_left_is_no_entry(made, rows, own_cache, tmp_path):
    (own_cache / str(key(rows))).rename(own_cache / f".{key(rows)}.123")
    assert store_cache.fetch(key(rows), tmp_path / "again") is None
    os.utime(own_cache / f".{key(rows)}.123", (0, 0))
    store_cache.keep(key(rows), made)
    assert [path.name for path in own_cache.iterdir()] == [key(rows)], "and is swept up in time"


def test_what_was_used_longest_ago_goes_first(made, rows, own_cache, tmp_path, monkeypatch):
    size = sum(len(data) for data in contents(made).values())
    monkeypatch.setenv(store_cache.VARIABLE, str(2.5 * size / 2**30))
    (own_cache / str(key(rows))).rename(own_cache / "old")
    store_cache.keep("unused", made)
    os.utime(own_cache / "old", (1, 1))
    os.utime(own_cache / "unused", (2, 2))
    assert store_cache.fetch("old", tmp_path / "again") is not None, "which makes it the latest"
    store_cache.keep("new", made)
    assert sorted(path.name for path in own_cache.iterdir()) == ["new", "old"]
    monkeypatch.setenv(store_cache.VARIABLE, str(0.5 * size / 2**30))
    store_cache.keep("too large", made)
    assert not (own_cache / "too large").exists()


def test_it_can_be_switched_off(rows, monkeypatch):
    monkeypatch.setenv(store_cache.VARIABLE, "0")
    assert key(rows) is None
    monkeypatch.setenv(store_cache.VARIABLE, "lots")
    with pytest.raises(ValueError, match="must be a number of GiB, not 'lots'\nhint: "):
        key(rows)


def test_a_cache_that_cannot_be_written_is_none(made, rows, own_cache, tmp_path):
    for path in sorted(own_cache.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    own_cache.rmdir()
    own_cache.write_text("a file where the folder should be")
    store_cache.keep(key(rows), made)
    assert store_cache.fetch(key(rows), tmp_path / "again") is None


def test_many_at_once(made, rows, own_cache, tmp_path, monkeypatch):
    """Keeping, taking and dropping the same entries: a whole store comes out, or none."""
    size = sum(len(data) for data in contents(made).values())
    monkeypatch.setenv(store_cache.VARIABLE, str(1.5 * size / 2**30))
    found: list[bool] = []

    def work(worker: int) -> None:
        for turn in range(15):
            name = f"entry-{(worker + turn) % 3}"
            to = tmp_path / f"{worker}-{turn}"
            if store_cache.fetch(name, to) is not None:
                found.append(contents(to) == contents(made))
            store_cache.keep(name, made)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found
    assert all(found)
