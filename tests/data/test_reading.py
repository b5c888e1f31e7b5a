"""Reading: any files to rows and bad rows, none lost, none fatal."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.data import json_text, sources
from thrifty.data.faults import MAX_EXCERPT, REASONS, Fault
from thrifty.data.pool import BadRow, Row, read_rows
from thrifty.data.sources import expand

GOOD = {"prompt": "What is two plus two?", "completion": " Four.", "source": "sums"}


def read(*sources: Path | str, **options: Any) -> list[Row | BadRow]:
    return list(read_rows([str(source) for source in sources], **options))


def codes(rows: list[Row | BadRow]) -> list[str]:
    return ["ok" if isinstance(row, Row) else row.code for row in rows]


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# -- dirty rows ---------------------------------------------------------------------------------

DIRTY_LINES = [
    (b'{"prompt": "a", "completion": "b"}', "ok"),
    (b'{"prompt": "a", "completion": "b"', "bad_json"),
    (b"{'prompt': 'a'}", "bad_json"),
    (b"not json at all", "bad_json"),
    (b'{"prompt": "a", "completion": "b"} {}', "bad_json"),
    (b'{"n": ' + b"9" * 5000 + b', "text": "x"}', "bad_json"),
    (b"null", "not_an_object"),
    (b"[1, 2]", "not_an_object"),
    (b'"text"', "not_an_object"),
    (b'{"prompt": 7, "completion": "b"}', "wrong_type"),
    (b'{"prompt": "a", "completion": {"b": 1}}', "wrong_type"),
    (b'{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}', "wrong_type"),
    (b'{"messages": "hello"}', "wrong_type"),
    (b'{"messages": [{"role": "user", "content": null}]}', "wrong_type"),
    (b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}', "wrong_type"),
    (b'{"messages": [{"content": "a"}]}', "missing_fields"),
    (b'{"messages": []}', "empty"),
    (b'{"messages": [{"role": "user", "content": "a"}]}', "no_assistant"),
    (b'{"messages": [{"role": "assistant", "content": " "}]}', "empty"),
    (b'{"conversations": [{"from": "martian", "value": "a"}]}', "wrong_type"),
    (b"{}", "missing_fields"),
    (b'{"prompt": "a", "completion": null}', "missing_fields"),
    (b'{"prompt": "a"}', "missing_fields"),
    (b'{"prompt": "a", "completion": ""}', "empty"),
    (b'{"prompt": "a", "completion": " \\n\\u00a0"}', "empty"),
    (b'{"text": ""}', "empty"),
    (b'{"prompt": "", "completion": "b"}', "ok"),
    (b'{"prompt": "\xff", "completion": "b"}', "invalid_utf8"),
    (b'{"prompt": "a\x00", "completion": "b"}', "nul"),
    (b'{"prompt": "a\\u0000", "completion": "b"}', "nul"),
    (b'{"prompt": "\\ud800", "completion": "b"}', "lone_surrogate"),
    (b'{"prompt": "a", "completion": "b", "x": "\\udfff"}', "lone_surrogate"),
    (b'{"prompt": "\\ud83d\\ude00", "completion": "b"}', "ok"),
    (b'{"prompt": "a", "completion": "b", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}", "too_deep"),
    (b"[" * 100_000, "too_deep"),
    (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "duplicate_keys"),
    (b'{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}', "duplicate_keys"),
    (b'{"prompt": "a", "\\u0070rompt": "b", "completion": "c"}', "duplicate_keys"),
    (b'{"prompt": "code: {\\"a\\": 1}", "completion": "b"}', "ok"),
    (b'{"prompt": NaN, "completion": "b"}', "non_finite"),
    (b'{"prompt": 1e400, "completion": "b"}', "non_finite"),
    (b'{"prompt": "a", "completion": "b", "score": NaN}', "ok"),
    (b'{"prompt": "a", "completion": "' + b"b" * 5000 + b'"}', "ok"),
    (b'{"prompt": "a", "completion": "' + b"b" * 9000 + b'"}', "over_long"),
    (b'{"prompt": "a", "chosen": "b", "rejected": "c"}', "wrong_kind"),
    (b'{"instruction": "a", "output": "b", "history": [["c", "d"]]}', "wrong_type"),
    (b'{"prompt": "last, and whole", "completion": "b"}', "ok"),
]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["dirty.jsonl", "dirty.jsonl.gz"])
def test_every_dirty_line_gives_its_reason(tmp_path: Path, ending: str, name: str) -> None:
    # the deep lines are longer than the limit: they are read on their own, below
    lines = [(raw, code) for raw, code in DIRTY_LINES if code != "too_deep"]
    content = ending.encode().join(raw for raw, _ in lines)
    content = b"\xef\xbb\xbf" + content + ending.encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rows = read(path, max_line_bytes=8000)
    assert [(row.number, code) for row, code in zip(rows, codes(rows), strict=True)] == [
        (i + 1, code) for i, (_, code) in enumerate(lines)
    ]
    assert [row.id for row in rows] == list(range(len(lines)))


@pytest.mark.parametrize(("raw", "code"), DIRTY_LINES)
def test_dirty_elements_of_a_json_array(tmp_path: Path, raw: bytes, code: str) -> None:
    if raw in (b'{"prompt": "a", "completion": "b"', b"[" * 100_000):
        pytest.skip("unbalanced brackets take the rest of an array along")
    path = tmp_path / "dirty.json"
    path.write_bytes(b"[" + raw + b",\n" + json.dumps(GOOD).encode() + b"]")
    rows = read(path, max_line_bytes=8000 if code == "over_long" else 200_000)
    assert codes(rows) == [code, "ok"]


def test_deep_lines_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_bytes(b"\n".join(raw for raw, code in DIRTY_LINES if code == "too_deep"))
    assert codes(read(path)) == ["too_deep", "too_deep"]


@pytest.mark.parametrize(
    ("cells", "code"),
    [
        (["a", "b"], "ok"),
        (["a", ""], "empty"),
        (["a", "b", "c"], "bad_csv"),
        (["a"], "bad_csv"),
        (["two\nlines", "b, c"], "ok"),
        (["a\0", "b"], "nul"),
        (["x" * 300_000, "b"], "ok"),
        (["x" * 600_000, "b"], "over_long"),
    ],
)
def test_csv_rows(tmp_path: Path, cells: list[str], code: str) -> None:
    path = tmp_path / "table.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["prompt", "completion"], cells, ["last", "and whole"]])
    before = csv.field_size_limit()
    rows = read(path, max_line_bytes=500_000)
    assert codes(rows) == [code, "ok"]
    assert rows[0].number == 2
    assert csv.field_size_limit() == before


def test_csv_bytes_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(
        b'prompt,completion\na,\xff\n"a"x,b\n\nc,"d\n'  # the last quote never closes
    )
    rows = read(path)
    assert codes(rows) == ["invalid_utf8", "bad_csv", "bad_csv"]
    (tmp_path / "twice.tsv").write_text("prompt\tprompt\na\tb\n")
    assert codes(read(tmp_path / "twice.tsv")) == ["duplicate_keys"]
    (tmp_path / "empty.csv").write_text("")
    assert read(tmp_path / "empty.csv") == []


def test_parquet_rows(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"prompt": ["a", None], "completion": ["b", "b"]}, ["ok", "missing_fields"]),
        ({"prompt": ["a", "a"], "completion": ["b", ""]}, ["ok", "empty"]),
        ({"prompt": [1.0, float("nan")], "completion": ["b", "b"]}, ["wrong_type", "non_finite"]),
        ({"messages": [turns, None, turns[:1]]}, ["ok", "missing_fields", "no_assistant"]),
        ({"messages": [json.dumps(turns), "["]}, ["ok", "wrong_type"]),
        ({"text": [b"a", None]}, ["wrong_type", "missing_fields"]),
        ({"text": ["a\0", "b"]}, ["nul", "ok"]),
        ({"text": ["x" * 9000, "b"]}, ["over_long", "ok"]),
        ({"text": []}, []),
    ]  # fmt: skip
    for i, (columns, expected) in enumerate(cases):
        path = tmp_path / f"{i}.parquet"
        pq.write_table(pa.table(columns), path)
        assert codes(read(path, max_line_bytes=8000)) == expected, columns


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"\xff\xfe", b"fine too"])
    lying = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": lying}), tmp_path / "lying.parquet")
    assert codes(read(tmp_path / "lying.parquet")) == ["ok", "invalid_utf8", "ok"]


def test_txt_documents(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    paragraph = "word " * 150  # 749 characters
    path.write_text("\n\n".join([paragraph] * 5) + "\r\n")
    rows = read(path, task="continued")
    assert codes(rows) == ["ok", "ok", "ok"]  # two paragraphs fit 2,000 characters
    assert [row.number for row in rows] == [1, 5, 9]
    assert rows[0].text == f"{paragraph.strip()}\n\n{paragraph.strip()}"
    path.write_text("\n".join(["line " * 100] * 50))  # no blank line anywhere
    assert all(len(row.text) < 3000 for row in read(path) if isinstance(row, Row))
    path.write_text("One story.\n\nIts end.\n<|endoftext|>\nAnother.\n\n\n")
    rows = read(path)
    assert [(row.number, row.text) for row in rows if isinstance(row, Row)] == [
        (1, "One story.\n\nIts end."),
        (5, "Another."),
    ]
    path.write_bytes(
        b"fine\n<|endoftext|>\nbad \xff\n<|endoftext|>\nnul \0\n" + b"x" * 9000 + b"\n\ny"
    )
    assert codes(read(path, max_line_bytes=8000)) == [
        "ok",
        "invalid_utf8",
        "nul",
        "over_long",
        "ok",
    ]


def test_files_that_break_off(tmp_path: Path) -> None:
    good = jsonl(tmp_path / "z.jsonl", GOOD)
    content = "".join(json.dumps({**GOOD, "n": i}) + "\n" for i in range(5000)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content)[:-2000])
    (tmp_path / "b.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and nothing")
    table = pa.table({"text": [f"document {i} " * 50 for i in range(5000)]})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=500, compression="none")
    raw = bytearray((tmp_path / "d.parquet").read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 20_000] = b"\xff" * 20_000
    (tmp_path / "d.parquet").write_bytes(bytes(raw))
    (tmp_path / "e.json").write_text('[{"text": "a"}, {"text": "b"')
    (tmp_path / "f.arrow").write_bytes(b"\0" * 100)
    rows = read(tmp_path)
    bad = [row for row in rows if isinstance(row, BadRow) and row.code == "unreadable"]
    assert [Path(row.file).name for row in bad] == [
        "a.jsonl.gz", "b.jsonl.gz", "c.parquet", "d.parquet", "e.json", "f.arrow",
    ]  # fmt: skip
    assert rows[-1].file == str(good)
    assert [row.id for row in rows] == list(range(len(rows)))
    whole = [row for row in rows if Path(row.file).name == "d.parquet" and isinstance(row, Row)]
    assert len(whole) >= 500


def test_an_endless_line_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(b'"' + b"x" * (1 << 20))
        file.write(b"\n" + json.dumps(GOOD).encode())
    tracemalloc.start()
    rows = read(path, max_line_bytes=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert codes(rows) == ["over_long", "ok"]
    assert rows[1].number == 2
    assert peak < 16 << 20


def test_a_large_array_takes_one_record_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    record = json.dumps({"prompt": "a", "completion": 'x "quoted" \\ [{' * 100})
    path.write_text("[" + ",\n".join([record] * 5000) + "]")
    tracemalloc.start()
    count = sum(isinstance(row, Row) for row in read_rows([str(path)]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 5000
    assert peak < 8 << 20 < path.stat().st_size


# -- properties ---------------------------------------------------------------------------------

HOSTILE = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["prompt", "completion", "text", "messages", "role", "content"]),
                inner,
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode()),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(HOSTILE, max_size=8))
def test_any_bytes_give_one_row_or_bad_row_a_line(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]
) -> None:
    content = b"\n".join(pieces)
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    physical = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = [i + 1 for i, line in enumerate(physical) if line.strip()]
    rows = read(path, max_line_bytes=150)
    assert [row.number for row in rows] == expected
    for row in rows:
        if isinstance(row, BadRow):
            assert row.code in REASONS
            assert len(row.excerpt) <= MAX_EXCERPT
            assert (row.excerpt + row.reason).isprintable()
        else:
            (row.prompt + row.completion + row.text).encode()
            json.dumps([row.content, row.extra], allow_nan=False)
            assert row.completion.strip()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3), max_size=6),
    st.integers(1, 9),
)
def test_an_array_is_cut_as_json_reads_it(values: list[dict[str, str]], chunk: int) -> None:
    import io

    text = json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")
    before, json_text.CHUNK = json_text.CHUNK, chunk  # borders everywhere
    try:
        found = list(json_text.elements(io.BytesIO(text[1:]), 10_000))
    finally:
        json_text.CHUNK = before
    pieces = [piece for _, piece in found if not isinstance(piece, Fault)]
    assert [json.loads(piece.decode("utf-8", "surrogatepass")) for piece in pieces] == values


# -- sources ------------------------------------------------------------------------------------


def test_json_that_is_jsonl_and_json_that_is_wrapped(tmp_path: Path) -> None:
    records = [GOOD, {**GOOD, "prompt": "b"}]
    path = tmp_path / "x.json"
    for content in (
        "\n".join(map(json.dumps, records)),
        json.dumps(records),
        json.dumps(records, indent=2),
        json.dumps({"version": 1, "data": records, "more": {"x": []}}),
        json.dumps({"data": records}, indent=1),
        "\ufeff  " + json.dumps(records),
    ):
        path.write_text(content)
        assert codes(read(path)) == ["ok", "ok"], content[:40]
    path.write_text(json.dumps(GOOD))
    assert codes(read(path)) == ["ok"]
    for nothing in ("", "[]", "  \n", '{"data": []}'):
        path.write_text(nothing)
        assert read(path) == []


def test_folders_globs_and_duplicates(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", ".hidden/d.jsonl", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        jsonl(tmp_path / name, GOOD)
    names = [Path(row.file).name for row in read(tmp_path, tmp_path / "a.jsonl")]
    assert names == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert len(read(f"{tmp_path}/*.jsonl")) == 2
    assert len(read(f"{tmp_path}/**/*.jsonl", tmp_path)) == 3
    assert len(read(f"{tmp_path}/s*")) == 1
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert len(read(tmp_path)) == 3
    (tmp_path / "odd[1].jsonl").write_text(json.dumps(GOOD))
    assert len(read(tmp_path / "odd[1].jsonl")) == 1
    # sources keep their order
    order = [Path(row.file).name for row in read(tmp_path / "b.jsonl", tmp_path / "a.jsonl")]
    assert order == ["b.jsonl", "a.jsonl"]
    assert len(list(read_rows(str(tmp_path / "a.jsonl")))) == 1  # one source, not a list


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.jsonl", "there is no file"),
        ("tatsu-lab/alpaca", "hf://datasets/tatsu-lab/alpaca"),
        ("*.nothing", "nothing matches"),
        ("*.md", "no data file matches"),
        ("model.bin", "cannot tell the format"),
        ("table.parquet.gz", "cannot tell the format"),
        ("empty", "holds no data file"),
        ("foo://bar/x.jsonl", "cannot open"),
    ],
)
def test_what_cannot_be_found_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model.bin", "table.parquet.gz", "a.md", "b.md"):
        Path(name).write_bytes(b"x")
    Path("empty").mkdir()
    with pytest.raises(ValueError, match=r"\nhint: ") as error:
        read_rows([source])  # before the first row is asked for
    assert words in str(error.value)


def test_no_source_and_no_such_task() -> None:
    with pytest.raises(ValueError, match="no source"):
        read_rows([])
    with pytest.raises(ValueError, match="no task 'dpo'"):
        read_rows(["x"], task="dpo")
    for nothing in ("", " "):
        with pytest.raises(ValueError, match=r"a source of rows is empty\nhint"):
            read_rows([nothing])


def test_urls(tmp_path: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    with fs.open("/pool/a.jsonl", "wb") as file:
        file.write(json.dumps(GOOD).encode())
    with fs.open("/pool/b.jsonl.gz", "wb") as file:
        file.write(gzip.compress(json.dumps(GOOD).encode()))
    table = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), table)
    with fs.open("/pool/c.parquet", "wb") as file:
        file.write(table.read_bytes())
    for listed in (["memory://pool"], ["memory://pool/*"], ["memory://pool/c.parquet"]):
        rows = read(*listed)
        assert set(codes(rows)) == {"ok"}
        assert len(rows) == (2 if "c.parquet" in listed[0] else 4)
    (file,) = expand(["memory://pool/a.jsonl"])
    assert file.name.endswith("pool/a.jsonl")
    with pytest.raises(ValueError, match="no file or folder"):
        read_rows(["memory://nowhere/a.jsonl"])


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    def refused(*_: Any, **__: Any) -> bool:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(MemoryFileSystem, "isfile", refused)
    with pytest.raises(ValueError, match=r"cannot reach .*no route to host\nhint"):
        read_rows(["memory://user:secret@pool/a.jsonl"])


def test_credentials_stay_out_of_names() -> None:
    shown = sources.shown("https://user:secret@host/data.jsonl?token=hidden#x")
    assert shown == "https://host/data.jsonl"


def test_folders_saved_by_datasets(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    plain = datasets.Dataset.from_list([{"messages": turns, "n": i} for i in range(10)])
    plain.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict(train=plain, test=plain).save_to_disk(tmp_path / "both")
    datasets.DatasetDict(train=plain).save_to_disk(tmp_path / "one")
    rows = read(tmp_path / "saved")
    assert [row.extra["n"] for row in rows if isinstance(row, Row)] == list(range(10))
    assert len(read(tmp_path / "one")) == 10
    assert len(read(tmp_path / "both" / "train")) == 10
    with pytest.raises(ValueError, match=r"several splits: train, test\nhint: .*both/train"):
        read(tmp_path / "both")


def test_the_json_type_that_datasets_makes_of_a_flipped_column(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    jsonl(tmp_path / "x.jsonl", GOOD, {**GOOD, "prompt": 7})
    flipped = datasets.load_dataset(
        "json", data_files=str(tmp_path / "x.jsonl"), split="train", cache_dir=str(tmp_path / "c")
    )
    flipped.save_to_disk(tmp_path / "saved")
    rows = read(tmp_path / "saved")
    assert codes(rows) == ["ok", "wrong_type"]
    assert rows[0].prompt == GOOD["prompt"]


def test_real_data(shared_data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import time

    table = pq.read_table(shared_data / "mix" / "pool.parquet")
    records = table.slice(0, 5000).to_pylist()
    path = jsonl(tmp_path / "pool.jsonl", *records)
    start = time.perf_counter()
    rows = read(path)
    rate = len(rows) / (time.perf_counter() - start)
    with capsys.disabled():
        print(f"\njsonl: {rate:,.0f} rows/s")
    assert codes(rows).count("ok") >= 4990
    assert [row.extra["id"] for row in rows[:100] if isinstance(row, Row)] == [
        record["id"] for record in records[:100]
    ]
