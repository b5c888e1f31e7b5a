"""Dirty data through the command line: set aside with file, line and reason, or refused with
``--strict``; memory bounded whatever a file holds; no bytes that end a reader."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import sentences
from thrifty.cli import main
from thrifty.data import inflated, pool, readers
from thrifty.data.faults import REASONS
from thrifty.data.parquet_pages import pages_of_groups
from thrifty.data.pool import BadRow, Row, read_rows
from thrifty.report.summary import summarize
from thrifty.run_folder import RunFolder

MIB = 1 << 20
GOOD = sentences("fruit", 40, 7)
LINE = json.dumps(GOOD[0]).encode()
OPTIONS = ["--flops", "4e9", "--scorer", "bm25", "--set", "training.max_length=64"]


@pytest.fixture
def arguments(tiny_model: Path, tiny_data: dict[str, Path]) -> Callable[..., list[str]]:
    def of(pool: Path, output: Path, *more: str) -> list[str]:
        target = ["--target", f"sums={tiny_data['signal']}", "--dev", f"sums={tiny_data['dev']}"]
        command = ["plan", "--model", str(tiny_model), "--pool", str(pool), *target, *OPTIONS]
        return [*command, "-o", str(output), *more]

    return of


# -- every fault in every format ----------------------------------------------------------------

DEEP = b'{"prompt": "a", "completion": "b", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
RECORDS = [
    (b'{"prompt": "a", "completion": "b"', "bad_json"),
    (b'{"prompt": 7, "completion": "b"}', "wrong_type"),
    (b"null", "not_an_object"),
    (b'{"prompt": "\\ud800", "completion": "b"}', "lone_surrogate"),
    (b'{"prompt": "\xff", "completion": "b"}', "invalid_utf8"),
    (b'{"prompt": "a\x00", "completion": "b"}', "nul"),
    (DEEP, "too_deep"),
    (b'{"prompt": NaN, "completion": "b"}', "non_finite"),
    (b'{"prompt": 1e400, "completion": "b"}', "non_finite"),
    (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "duplicate_keys"),
    (b'{"prompt": "a", "completion": ""}', "empty"),
]
"""A record that is dirty in each way that JSON has, and its reason."""
BOM = b"\xef\xbb\xbf"
Expected = list[tuple[str, int, str]]  # file, number, code


def jsonl(ending: bytes) -> tuple[bytes, list[tuple[int, str]]]:
    lines = [LINE, *(raw for raw, _ in RECORDS), LINE]
    return BOM + ending.join(lines) + ending, [(n, code) for n, (_, code) in enumerate(RECORDS, 2)]


def json_array() -> tuple[bytes, list[tuple[int, str]]]:
    records = [(raw, code) for raw, code in RECORDS if code != "bad_json"]
    records += [(b'{"prompt": "a", "completion": b}', "bad_json")]
    content = b"[" + b",\r\n".join([LINE, *(raw for raw, _ in records), LINE]) + b"]"
    return BOM + content, [(n, code) for n, (_, code) in enumerate(records, 2)]


def csv_table() -> tuple[bytes, list[tuple[int, str]]]:
    lines = [b"prompt,completion", b"a,b", b"a\xff,b", b"a\0,b", b"a,b,c", b'a,"b"c', b"a,", b"a,b"]
    bad = [(3, "invalid_utf8"), (4, "nul"), (5, "bad_csv"), (6, "bad_csv"), (7, "empty")]
    return BOM + b"\r\n".join(lines) + b"\r\n", bad


def text() -> tuple[bytes, list[tuple[int, str]]]:
    end = b"\r\n<|endoftext|>\r\n"
    return BOM + end.join([b"a", b"b\xff", b"c\0", b"d"]), [(3, "invalid_utf8"), (5, "nul")]


def parquet() -> tuple[bytes, list[tuple[int, str]]]:
    raw = pa.array([b"a", b"\xff\xfe", b"c\0", b"d", b"", b"f"])
    prompts = pa.Array.from_buffers(pa.string(), 6, raw.buffers())
    table = pa.table({"prompt": prompts, "completion": ["b", "b", "b", "", "b", None]})
    stream = io.BytesIO()
    pq.write_table(table, stream)
    bad = [(2, "invalid_utf8"), (3, "nul"), (4, "empty"), (6, "missing_fields")]
    return stream.getvalue(), bad


def dirty_folder(folder: Path) -> Expected:
    """Every format with every fault that it can have, and what is to be set aside of it."""
    folder.mkdir()
    contents = {
        "a.jsonl": jsonl(b"\n"),
        "b.jsonl": jsonl(b"\r\n"),
        "c.json": json_array(),
        "d.csv": csv_table(),
        "e.txt": text(),
        "f.parquet": parquet(),
        "g.jsonl": (b"", []),
        "h.jsonl.gz": (gzip.compress(jsonl(b"\n")[0]), jsonl(b"\n")[1]),
        "i.csv.gz": (gzip.compress(csv_table()[0]), csv_table()[1]),
        "j.json.gz": (gzip.compress(json_array()[0]), json_array()[1]),
        "k.txt.gz": (gzip.compress(text()[0]), text()[1]),
        "l.jsonl.gz": (gzip.compress(LINE + b"\n" + LINE)[:-9], [(2, "unreadable")]),
        "m.parquet": (parquet()[0][:-5], [(1, "unreadable")]),
        "n.arrow": (b"", [(1, "unreadable")]),
        "z.jsonl": (b"\n".join(json.dumps(row).encode() for row in GOOD), []),
    }
    expected = []
    for name, (content, bad) in contents.items():
        (folder / name).write_bytes(content)
        expected += [(str(folder / name), number, code) for number, code in bad]
    return expected


def test_every_fault_of_every_format_is_set_aside_with_its_place(
    arguments: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = dirty_folder(tmp_path / "pool")
    run = RunFolder(tmp_path / "run")
    assert main(arguments(tmp_path / "pool", run.path)) == 0
    told = capsys.readouterr().err
    aside = [json.loads(line) for line in (run.pool / "quarantine.jsonl").read_text().splitlines()]
    found = [(row["file"], row["number"], row["reason"].partition(":")[0]) for row in aside]
    assert found == expected
    assert all(row["excerpt"].isprintable() and row["reason"].isprintable() for row in aside)
    counts = Counter(code for _, _, code in expected)
    assert f"set aside {len(expected)} bad rows" in told
    assert all(f"{code} {count}" in told for code, count in counts.items())
    assert summarize(run)["quarantine"]["by_reason"] == counts
    with_all = json.loads((run.pool / "manifest.json").read_text())
    assert with_all["num_examples"] == 5 * 2 + 2 * 2 + 2 * 2 + 2 + 1 + len(GOOD)


def test_strict_refuses_before_anything_is_spent(
    arguments: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = dirty_folder(tmp_path / "pool")
    assert main(arguments(tmp_path / "pool", tmp_path / "run", "--strict")) == 4
    error = capsys.readouterr().err.partition("error: ")[2].splitlines()
    counts = Counter(code for _, _, code in expected)
    assert error[0].startswith(f"{len(expected)} rows cannot be used: ")
    assert all(f"{code} {count}" in error[0] for code, count in counts.items())
    places = [f"{file}:{number}: {code}: " for file, number, code in expected[:20]]
    assert len(expected) > 20
    assert all(line.startswith(place) for line, place in zip(error[1:21], places, strict=True))
    assert error[21] == f"and {len(expected) - 20} more"
    assert error[22].startswith("hint: ")
    assert not list(tmp_path.glob("*run*"))


def test_strict_looks_at_the_targets_too_and_takes_what_is_clean(
    arguments: Any, tiny_data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signal = tmp_path / "signal.jsonl"
    signal.write_bytes(tiny_data["signal"].read_bytes() + b"null\n")
    command = arguments(tiny_data["small_pool"], tmp_path / "run", "--strict")
    dirty = [part.replace(str(tiny_data["signal"]), str(signal)) for part in command]
    assert main(dirty) == 4
    assert f"{signal}:13: not_an_object" in capsys.readouterr().err
    assert main(command) == 0


def test_a_file_of_nothing_but_bad_rows_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "MOST_BAD", 5)
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" * 9)
    (tmp_path / "b.jsonl").write_bytes(LINE + b"\n" + b"{}\n" * 9)
    found = Counter((row.file[-7:], row.number) for row in read_rows(str(tmp_path)))
    assert [number for name, number in found if name == "a.jsonl"] == [1, 2, 3, 4, 5, 6]
    assert sum(name == "b.jsonl" for name, _ in found) == 10


# -- memory -------------------------------------------------------------------------------------

CHILD = """
import resource, sys
import pyarrow, pyarrow.compute, pyarrow.parquet
from thrifty.data.pool import Row, read_rows

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
for row in read_rows(sys.argv[1:], task="continued"):
    print("ok" if isinstance(row, Row) else row.reason.partition(":")[0], row.number)
print((peak() - before) >> 10)
"""


def read_apart(path: Path) -> tuple[list[str], int]:
    """What a process of its own reads of a file, and the MiB that reading took at most."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *found, peak = done.stdout.splitlines()
    return found, int(peak)


def with_hole(path: Path, before: bytes, size: int, after: bytes) -> Path:
    """A file whose middle is ``size`` bytes of nothing, which take no room on the disk."""
    with path.open("wb") as file:
        file.write(before)
        file.seek(size, os.SEEK_CUR)
        file.write(after)
    return path


HUGE = {
    "a.jsonl": (b'{"text": "a"}\n{"text": "', b'"}\n{"text": "b"}\n', 3),
    "a.json": (b'[{"text": "a"},\n{"text": "', b'"},\n{"text": "b"}]', 3),
    "a.csv": (b"text,n\na,1\n", b",2\nb,3\n", 4),
    "quoted.csv": (b'text,n\na,1\n"x\n', b'\n\n",2\nb,3\n', 7),
    "a.txt": (b"a\n<|endoftext|>\n", b"\n<|endoftext|>\nb\n", 5),
}
"""What stands before and after a huge field, and the last row's number."""


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_line_takes_no_memory(name: str, tmp_path: Path) -> None:
    before, after, last = HUGE[name]
    found, peak = read_apart(with_hole(tmp_path / name, before, 64 * MIB, after))
    assert [line.split()[0] for line in found] == ["ok", "over_long", "ok"]
    assert found[-1] == f"ok {last}"
    assert peak < 48  # a line of 16 MiB, which is the limit, twice and something


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGE)
def test_a_line_of_a_gigabyte(name: str, tmp_path: Path) -> None:
    before, after, last = HUGE[name]
    found, peak = read_apart(with_hole(tmp_path / name, before, 1024 * MIB, after))
    assert [line.split()[0] for line in found] == ["ok", "over_long", "ok"]
    assert found[-1] == f"ok {last}"
    assert peak < 64


def test_a_quoted_cell_of_many_lines_takes_no_row_along(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for filling in (b"x\n" * 99, b'say ""x""\n' * 40, b"x" * 500 + b"\n" + b"y\n" * 60):
        path.write_bytes(b'text,n\na,1\n"' + filling + b'",2\nb,3\n')
        rows = list(read_rows(str(path), task="continued", max_line_bytes=100))
        assert [isinstance(row, Row) for row in rows] == [True, False, True]
        assert rows[-1].number == 4 + filling.count(b"\n")
        assert isinstance(rows[1], BadRow)
        assert rows[1].reason.startswith(f"over_long: a record down to line {rows[-1].number - 1}")


def write_pages(path: Path, texts: list[str], **options: Any) -> Path:
    pq.write_table(pa.table({"text": texts}), path, **options)
    return path


def test_a_parquet_page_is_not_unpacked_where_it_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a", "b", "x" * 300_000, "c", "d", "e"]
    path = write_pages(tmp_path / "a.parquet", texts, row_group_size=2)
    monkeypatch.setattr(readers, "PAGE_BYTES", 200_000)
    rows = list(read_rows(str(path), task="continued"))
    found = [(row.number, getattr(row, "code", "ok")) for row in rows]
    assert found == [(1, "ok"), (2, "ok"), (3, "over_long"), (5, "ok"), (6, "ok")]
    assert "rows 3 to 4, a page of 300,0" in getattr(rows[2], "reason", "")


def test_a_small_parquet_file_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    path, times, size = tmp_path / "bomb.parquet", 600, 4 * MIB
    one = pa.array(["x" * size])
    text = pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), one)
    pq.write_table(pa.table({"text": text}), path)
    assert path.stat().st_size < MIB
    found, peak = read_apart(path)
    assert found == [f"ok {row}" for row in range(1, times + 1)]
    assert peak < 400 < times * size >> 20


def test_values_that_many_rows_share_are_known_before(tmp_path: Path) -> None:
    texts = ["long " * 1000] * 50
    delta = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    plain = {"use_dictionary": False}
    for name, options, shared in (
        ("dictionary", {}, True),
        ("delta", delta, True),
        ("plain", plain, False),
    ):
        path = write_pages(tmp_path / f"{name}.parquet", texts, compression="zstd", **options)
        with path.open("rb") as stream:
            (pages,) = pages_of_groups(stream)
        assert (pages.repeated >= 5000) == shared, name
        assert (pages.largest >= 50 * 5000) == (name == "plain"), name


@pytest.mark.slow
def test_a_parquet_cell_of_a_gigabyte_is_never_held(tmp_path: Path) -> None:
    script = (
        "import sys, pyarrow as pa, pyarrow.parquet as pq\n"
        "for size, path in ((200, sys.argv[1]), (1024, sys.argv[2])):\n"
        "    pq.write_table(pa.table({'text': ['a', 'x' * (size << 20), 'b']}), path)\n"
    )
    paths = [tmp_path / "in.parquet", tmp_path / "over.parquet"]
    subprocess.run([sys.executable, "-c", script, *map(str, paths)], check=True)
    found, peak = read_apart(paths[0])
    assert found == ["ok 1", "over_long 2", "ok 3"]
    assert peak < 1024
    found, peak = read_apart(paths[1])
    assert found == ["over_long 1"]
    assert peak < 64


def bomb(path: Path, piece: bytes, times: int) -> Path:
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(b'{"text": "a"}\n')
        for _ in range(times):
            file.write(piece)
    return path


@pytest.mark.long
def test_what_unpacks_to_too_much_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inflated, "FREE_BYTES", MIB)
    monkeypatch.setattr(inflated, "_BETWEEN_BYTES", 0)
    for piece in (b"x" * MIB, b'{"text": "b"}\n' * 40_000):
        path = bomb(tmp_path / "a.jsonl.gz", piece, 4)
        *rows, last = read_rows(str(path), task="continued")
        assert isinstance(last, BadRow)
        assert last.reason == "unreadable: it unpacks to more than 250 times its size"
        assert len(rows) < 4 * 40_000
    honest = [json.dumps({"text": f"{n} {random.Random(n).random()}"}) for n in range(40_000)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(honest).encode()))
    assert all(isinstance(row, Row) for row in read_rows(str(path), task="continued"))


@pytest.mark.slow
def test_a_gzip_bomb_of_ten_gigabytes(tmp_path: Path) -> None:
    path = bomb(tmp_path / "bomb.jsonl.gz", b"x" * MIB, 10 * 1024)
    assert path.stat().st_size < 12 * MIB
    found, peak = read_apart(path)
    assert found == ["ok 1", "unreadable 2"]
    assert peak < 64


@pytest.mark.slow
def test_a_plan_on_a_line_of_a_gigabyte_takes_what_one_without_takes(
    arguments: Any, tmp_path: Path
) -> None:
    good = b"\n".join(json.dumps(row).encode() for row in GOOD)
    (tmp_path / "small.jsonl").write_bytes(good)
    with_hole(tmp_path / "huge.jsonl", good + b'\n{"text": "', 1024 * MIB, b'"}\n')
    peaks = {}
    for name in ("small", "huge"):
        command = arguments(tmp_path / f"{name}.jsonl", tmp_path / name)
        process = subprocess.Popen(
            [sys.executable, "-m", "thrifty", *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        told = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stderr.close()
        assert process.returncode == 0, told
        peaks[name] = usage.ru_maxrss >> 10
    assert "over_long 1" in told
    assert peaks["huge"] < peaks["small"] + 100


# -- any bytes ----------------------------------------------------------------------------------


def parquet_of_rows() -> bytes:
    stream = io.BytesIO()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pq.write_table(pa.table({"messages": [turns] * 30, "n": range(30)}), stream, row_group_size=10)
    return stream.getvalue()


def arrow_of_rows() -> bytes:
    table = pq.read_table(io.BytesIO(parquet_of_rows()))
    stream = io.BytesIO()
    with pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table, 10)
    return stream.getvalue()


WHOLE = {
    "a.jsonl": jsonl(b"\n")[0].replace(DEEP, b""),
    "a.json": json_array()[0].replace(DEEP, b"{}"),
    "a.csv": csv_table()[0] * 3,
    "a.txt": text()[0] * 3,
    "a.parquet": parquet_of_rows(),
    "a.arrow": arrow_of_rows(),
    "a.jsonl.gz": gzip.compress(b"\n".join(json.dumps(row).encode() for row in GOOD), mtime=0),
}


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """With bytes changed, cut out and put in."""
    content = bytearray(whole)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(content))
        match rng.randrange(4):
            case 0 | 1:
                content[at] = rng.randrange(256)
            case 2:
                del content[at : at + rng.randint(1, 40)]
            case 3:
                content[at:at] = rng.randbytes(rng.randint(1, 8))
    return bytes(content)


def check_outcome(path: Path) -> None:
    """Rows and faults, numbered in the file's order within what it holds; never an exception."""
    rows = list(read_rows(str(path)))
    assert [row.id for row in rows] == list(range(len(rows)))
    if not path.name.endswith((".parquet", ".arrow")):
        numbers = [row.number for row in rows]
        assert numbers == sorted(numbers)
        if path.suffix in (".jsonl", ".csv", ".txt"):
            assert max(numbers, default=1) <= path.read_bytes().count(b"\n") + 1
    for row in rows:
        if isinstance(row, BadRow):
            assert row.code in REASONS
            assert (row.reason + row.excerpt).isprintable()
        else:
            (row.prompt + row.completion + json.dumps(row.extra, allow_nan=False)).encode()


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=40, deadline=None)
@given(content=st.binary(max_size=300))
def test_any_bytes_are_rows_and_faults(
    name: str, content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    check_outcome(path)


def damaged_files(folder: Path, seed: int, count: int) -> Iterator[Path]:
    rng = random.Random(seed)
    for number in range(count):
        name, whole = rng.choice(list(WHOLE.items()))
        path = folder / f"{number % 2}{name}"
        path.write_bytes(damaged(whole, rng))
        yield path


def test_damaged_files_are_rows_and_faults(tmp_path: Path) -> None:
    for path in damaged_files(tmp_path, 0, 300):
        check_outcome(path)


@pytest.mark.slow
def test_many_damaged_files_are_rows_and_faults(tmp_path: Path) -> None:
    for path in damaged_files(tmp_path, 1, 20_000):
        check_outcome(path)


# -- rows that are there twice, and scores that say nothing --------------------------------------


def test_ids_that_stand_twice_and_rows_of_the_dev_set(
    arguments: Any, tiny_data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dev = [json.loads(line) for line in tiny_data["dev"].read_text().splitlines()]
    rows = [{**row, "id": 7} for row in (*GOOD, GOOD[0], dev[0])]
    data = tmp_path / "pool.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    assert main(arguments(data, run, "--set", "selection.max_tokens=1e9")) == 0
    assert main(["select", str(run)]) == 0
    manifest = json.loads((run / "selected" / "manifest.json").read_text())
    assert sum(manifest["dropped"].values()) == 2
    assert manifest["dropped"]["also in dev rows of sums"] == 1
    assert any(reason.startswith("duplicate") for reason in manifest["dropped"])
    capsys.readouterr()


@pytest.mark.parametrize("score", [1.0, float("nan")])
@pytest.mark.long
def test_scores_that_say_nothing(
    score: float,
    arguments: Any,
    tiny_data: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All the same: drawn by the seed, the same rows each time. None at all: refused."""
    import numpy as np

    from thrifty.scorers.baselines.bm25 import BM25

    def same(self: Any, shard: Any, state: Any, meter: Any) -> Any:
        return np.full((len(shard), 1), score, dtype=np.float32)

    monkeypatch.setattr(BM25, "score", same)
    chosen = []
    for name in ("one", "two"):
        run = tmp_path / name
        few = ("--set", "selection.max_tokens=800")
        assert main(arguments(tiny_data["small_pool"], run, *few)) == 0
        code = main(["select", str(run)])
        told = capsys.readouterr().err
        if score == score:
            assert code == 0, told
            chosen.append((run / "selected" / "ids.npy").read_bytes())
        else:
            assert code == 4
            assert "hint:" in told
    assert len(set(chosen)) <= 1
