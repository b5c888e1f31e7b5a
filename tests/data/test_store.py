"""The store: what was written is what is read, killed builds start again, damage is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from thrifty.data import store as store_module
from thrifty.data.pool import BadRow, Row, read_rows
from thrifty.data.store import FORMAT, Store, StoreManifest, build_store, open_store
from thrifty.data.tokens import (
    Tokens,
    load_tokenizer,
    tokenize,
    tokenize_rows,
    tokenizer_fingerprint,
)

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Four."}]


def make_rows(count: int) -> Iterator[Row | BadRow]:
    for i in range(count):
        if i % 7 == 3:
            yield BadRow(i, "pool.jsonl", i + 1, "bad_json: expecting value", "{")
        elif i % 7 == 4:
            yield Row(i, "pool.jsonl", i + 1, "messages", {"messages": TURNS}, {"n": i})
        elif i % 7 == 5:
            pair = {"prompt": "What? " * 100, "completion": "x"}
            yield Row(i, "pool.jsonl", i + 1, "prompt_completion", pair, {})
        else:
            pair = {"prompt": f"What is {i}?\n", "completion": f"It is {i}. " * (1 + i % 30)}
            yield Row(i, "pool.jsonl", i + 1, "prompt_completion", pair, {"n": i, "x": None})


def build(
    folder: Path, tokenizer: Any, count: int = 100, *, rows: Any = None, **options: Any
) -> StoreManifest:
    return build_store(
        make_rows(count) if rows is None else rows,
        folder,
        tokenizer,
        100,
        tokenizer_fingerprint="t",
        shard_rows=16,
        **options,
    )


@pytest.fixture
def store(tmp_path: Path, tokenizer: Any) -> Store:
    build(tmp_path / "store", tokenizer)
    return open_store(tmp_path / "store")


def test_what_is_read_is_what_was_written(store: Store, tokenizer: Any) -> None:
    rows = [row for row in make_rows(100) if isinstance(row, Row)]
    tokens = tokenize_rows(rows, tokenizer, 100)
    valid = [(row, t) for row, t in zip(rows, tokens, strict=True) if isinstance(t, Tokens)]
    found = [row for shard in store.shards() for row in shard.rows]
    assert found == [row for row, _ in valid]
    at = 0
    for shard in store.shards():
        assert len(shard) == len(shard.ids) == len(shard.tokens) == len(shard.texts)
        for i, (row, expected) in enumerate(valid[at : at + len(shard)]):
            assert shard.ids[i] == row.id
            assert shard.prompts[i] == row.prompt
            assert shard.completions[i] == row.completion
            assert shard.texts[i] == row.text
            assert shard.fingerprints[i] == row.fingerprint
            assert shard.num_tokens[i] == expected.num_tokens
            assert shard.num_loss_tokens[i] == expected.num_loss_tokens
            assert np.array_equal(shard.tokens[i].input_ids, expected.input_ids)
            assert np.array_equal(shard.tokens[i].loss_mask, expected.loss_mask)
            assert shard.tokens[i].input_ids.dtype == np.int32
            assert shard.tokens[i].loss_mask.dtype == np.bool_
            assert shard.tokens[i].truncated is expected.truncated
        at += len(shard)
    assert at == len(valid) == len(store)


def test_the_manifest_counts(store: Store) -> None:
    manifest = store.manifest
    shards = list(store.shards())
    assert store.num_shards == len(shards) > 3
    assert all(len(shard) == 16 for shard in shards[:-1])
    assert manifest.num_examples == sum(map(len, shards))
    assert manifest.num_tokens == sum(int(shard.num_tokens.sum()) for shard in shards)
    assert manifest.num_loss_tokens == sum(int(shard.num_loss_tokens.sum()) for shard in shards)
    assert manifest.num_truncated == sum(t.truncated for shard in shards for t in shard.tokens) > 0
    assert manifest.max_tokens == max(int(shard.num_tokens.max()) for shard in shards) == 100
    assert manifest.num_bad == {"bad_json": 14, "prompt_too_long": 14}
    assert sum(manifest.lengths.values()) == manifest.num_examples
    assert manifest.stats.mean_tokens == manifest.num_tokens / manifest.num_examples
    below = sum(int((shard.num_tokens <= 32).sum()) for shard in shards)
    assert sum(count for size, count in manifest.lengths.items() if int(size) <= 32) == below
    quarantine = list(store.quarantine())
    assert [row.id for row in quarantine] == [i for i in range(100) if i % 7 in (3, 5)]
    assert quarantine[0].reason == "bad_json: expecting value"
    assert quarantine[1].code == "prompt_too_long"


def test_take(store: Store) -> None:
    ids = [i for i in range(100) if i % 7 not in (3, 5)]
    chosen = [ids[40], ids[0], ids[17], ids[17], ids[-1]]
    taken = store.take(chosen)
    assert taken.ids.tolist() == chosen
    assert [row.id for row in taken.rows] == chosen
    assert len(taken.tokens) == 5
    assert np.array_equal(taken.tokens[2].input_ids, taken.tokens[3].input_ids)
    assert len(store.take([])) == 0
    assert store.take([]).tokens == []
    for wrong in (3, 1000, -1):
        with pytest.raises(ValueError, match=rf"no row {wrong}\nhint"):
            store.take([ids[0], wrong])


def test_the_same_rows_give_the_same_store(tmp_path: Path, tokenizer: Any) -> None:
    one, two = build(tmp_path / "1", tokenizer), build(tmp_path / "2", tokenizer)
    assert one == two
    other = build(tmp_path / "3", tokenizer, count=99)
    assert other.fingerprint != one.fingerprint
    # the content fingerprint is about texts, not about tokens
    shorter = build_store(
        (row for row in make_rows(100) if isinstance(row, Row) and row.id % 7 != 5),
        tmp_path / "4", tokenizer, 50, tokenizer_fingerprint="t",
    )  # fmt: skip
    assert shorter.fingerprint == one.fingerprint
    assert shorter.num_tokens != one.num_tokens


def test_a_killed_build_starts_again(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "store"
    complete = build(folder, tokenizer)

    def dying() -> Iterator[Row | BadRow]:
        for i, row in enumerate(make_rows(600)):
            if i == 500:
                raise KeyboardInterrupt
            yield row

    with pytest.raises(KeyboardInterrupt):
        build_store(dying(), folder, tokenizer, 100, tokenizer_fingerprint="t", shard_rows=16)
    assert list(folder.glob("shard-*"))
    with pytest.raises(ValueError, match=r"no finished store.*\nhint"):
        open_store(folder)
    assert build(folder, tokenizer) == complete
    open_store(folder).verify()
    assert len(list(folder.glob("shard-*"))) == len(complete.shards)


def test_killed_between_any_two_writes(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th sync fails, n = 1, 2, ... until the build gets through: never half a store."""
    folder, complete = tmp_path / "store", build(tmp_path / "whole", tokenizer, count=40)
    real = store_module.os.fsync
    for n in range(1, 20):
        left = [n]

        def fsync(descriptor: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr("os.fsync", fsync)
        try:
            built = build(folder, tokenizer, count=40)
        except OSError:
            if (folder / "manifest.json").exists():  # only the folder's own sync failed
                assert open_store(folder).manifest == complete
                open_store(folder).verify()
            continue
        assert built == complete
        assert n > 3
        return
    pytest.fail("the build never got through")


def test_damage_is_named(store: Store) -> None:
    store.verify()
    path = store.directory / "shard-00001.parquet"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(ValueError, match=r"shard-00001.parquet' changed .*\nhint"):
        store.verify()
    path.write_bytes(bytes(raw[: len(raw) // 2]))
    with pytest.raises(ValueError, match=r"shard-00001.parquet' is damaged: .*\nhint"):
        _ = store.shard(1).ids
    with pytest.raises(ValueError, match=r"shard-00001.parquet' is damaged: .*\nhint"):
        store.take([len(store) - 1, store.manifest.shards[1].first_id])
    path.unlink()
    for read in (store.verify, lambda: store.shard(1).tokens):
        with pytest.raises(ValueError, match=r"shard-00001.parquet' is missing\nhint"):
            read()
    manifest = store.directory / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "format": 99}))
    with pytest.raises(ValueError, match=rf"format 99, not {FORMAT}\nhint"):
        open_store(store.directory)
    for nonsense in ("{", "[]"):
        manifest.write_text(nonsense)
        with pytest.raises(ValueError, match=r"manifest.json' is damaged.*\nhint"):
            open_store(store.directory)


def test_no_valid_row_names_the_reasons(tmp_path: Path, tokenizer: Any) -> None:
    bad = [row for row in make_rows(100) if isinstance(row, BadRow)]
    with pytest.raises(ValueError) as error:
        build_store(bad, tmp_path / "s", tokenizer, 100, tokenizer_fingerprint="t")
    assert "none of the 14 rows" in str(error.value)
    assert "pool.jsonl:4: bad_json: expecting value; pool.jsonl:11:" in str(error.value)
    assert "\nhint: " in str(error.value)
    with pytest.raises(ValueError, match=r"no rows at all\nhint"):
        build_store([], tmp_path / "s", tokenizer, 100, tokenizer_fingerprint="t")


def test_columns_are_read_on_demand(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = pq.read_table

    def spy(path: Any, columns: Any = None, **options: Any) -> Any:
        asked.append(columns)
        return real(path, columns=columns, **options)

    monkeypatch.setattr(pq, "read_table", spy)
    shard = store.shard(0)
    assert asked == []
    assert shard.tokens is shard.tokens
    assert asked == [["input_ids"], ["loss_mask"], ["truncated"], ["border"]]


def test_from_files_to_store_and_back(tmp_path: Path, tokenizer: Any) -> None:
    lines = [{"instruction": f"Say {i}.", "output": str(i), "source": "s"} for i in range(50)]
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\nbroken")
    manifest = build_store(
        read_rows([str(path)]), tmp_path / "store", tokenizer, 64,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )  # fmt: skip
    assert (manifest.num_examples, manifest.num_bad) == (50, {"bad_json": 1})
    row = open_store(tmp_path / "store").take([7]).rows[0]
    assert row.content == {"prompt": "Say 7.\n\n", "completion": "7"}
    assert row.extra == {"source": "s"}
    assert isinstance(tokenize(row, tokenizer, 64), Tokens)


def test_real_data(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import time

    tokenizer = load_tokenizer(str(shared_data / "stories260K-hf"))
    rows = read_rows([str(shared_data / "mix" / "targets.parquet")])
    start = time.perf_counter()
    manifest = build_store(
        islice(rows, 1000), tmp_path / "store", tokenizer,
        512, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer), shard_rows=300,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    with capsys.disabled():
        print(f"\nstored: {manifest.num_examples / seconds:,.0f} rows/s, {manifest.num_bad}")
    num_tokens = sum(
        t.num_tokens for s in open_store(tmp_path / "store").shards() for t in s.tokens
    )
    assert num_tokens == manifest.num_tokens
    open_store(tmp_path / "store").verify()


def test_one_that_is_older_is_known_by_its_shards(tmp_path: Path, tokenizer: Any) -> None:
    manifest = build(tmp_path / "store", tokenizer)
    values = asdict(manifest)
    assert StoreManifest.from_dict(values) == manifest
    del values["content_sha256"]
    older = StoreManifest.from_dict(values)
    assert older.content_sha256 == ""
    assert older.shards == manifest.shards
