import json
import sys
from pathlib import Path

import pytest

from thrifty.data.corpus import (
    HELD_OUT,
    PARTS,
    CorpusFiles,
    Function,
    functions,
    split,
    write_corpus,
)

NUM_FUNCTIONS = 400


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusFiles:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def rows(corpus: CorpusFiles) -> dict[str, list[dict]]:
    return {part: read(corpus.directory / f"{part}.jsonl") for part in PARTS}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of two packages."""
    monkeypatch.setattr(sys, "stdlib_module_names", frozenset({"abacus", "zither", "test"}))
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")


def made_up(package: str, number: int, name: str | None = None) -> Function:
    return Function(
        prompt=f"def {name or f'f{number}'}(x):\n",
        completion=f"    return {number}\n",
        package=package,
        file=f"{package}.py",
        line=number,
        name=name or f"f{number}",
    )


@pytest.mark.long
def test_the_header_counts_what_was_written(corpus: CorpusFiles, rows: dict) -> None:
    assert {part: len(found) for part, found in rows.items()} == corpus.num_rows
    in_pool = [row for row in rows["pool"] if row["package"] == "asyncio"]
    assert len(in_pool) == corpus.num_target_rows_in_pool


def test_parts_are_large_enough_to_tell_scorers_apart(corpus: CorpusFiles) -> None:
    assert corpus.num_rows["pool"] > 4_000
    assert corpus.num_rows["pretrain"] > 1_000
    assert corpus.num_rows["signal"] >= 20
    assert corpus.num_rows["dev"] >= 40
    assert corpus.num_rows["test"] >= 100
    assert 150 <= corpus.num_target_rows_in_pool <= corpus.num_rows["pool"] / 10


def test_held_out_rows_are_the_targets_and_in_no_other_part(rows: dict) -> None:
    said = {
        part: {" ".join((row["prompt"] + row["completion"]).casefold().split()) for row in found}
        for part, found in rows.items()
    }
    for part in HELD_OUT:
        assert {row["package"] for row in rows[part]} == {"asyncio"}
        assert len(said[part]) == len(rows[part])
        for other in set(PARTS) - {part}:
            assert not said[part] & said[other]
    places = [(row["file"], row["line"]) for found in rows.values() for row in found]
    assert len(places) == len(set(places))


def test_pretraining_rows_are_of_other_packages(rows: dict) -> None:
    assert "asyncio" not in {row["package"] for row in rows["pretrain"]}
    assert len({row["package"] for row in rows["pretrain"]}) > 50


def test_no_row_is_of_a_test_folder_or_a_third_party(rows: dict) -> None:
    for found in rows.values():
        for row in found:
            assert not {"test", "tests", "idle_test"} & set(Path(row["file"]).parts)
            assert row["package"] in sys.stdlib_module_names


def test_rows_are_functions_of_a_fair_size(rows: dict) -> None:
    for found in rows.values():
        for row in found:
            assert row["prompt"].startswith(("def ", "async def "))
            assert len(row["prompt"]) <= 600
            assert 80 <= len(row["completion"]) <= 3_000


@pytest.mark.long
def test_the_same_again(tmp_path: Path, monkeypatch) -> None:
    some = frozenset({"asyncio", "email", "json"})  # of all packages it would take a while
    monkeypatch.setattr(sys, "stdlib_module_names", some)
    first, second = write_corpus(tmp_path / "first"), write_corpus(tmp_path / "second")
    assert first.sha256 == second.sha256
    second.dev.unlink()
    assert write_corpus(tmp_path / "second") == second
    assert second.dev.read_bytes() == first.dev.read_bytes()
    monkeypatch.setattr("thrifty.data.corpus.functions", None)  # not read twice
    assert write_corpus(tmp_path / "first") == first


def test_texts_join_prompt_and_completion(corpus: CorpusFiles, rows: dict) -> None:
    texts = list(corpus.texts("signal"))
    assert texts == [row["prompt"] + row["completion"] for row in rows["signal"]]


def test_a_method_is_moved_left_and_split_after_its_docstring(library: Path) -> None:
    body = "".join(f"        total += {i}  # some comment\n" for i in range(4))
    write(
        library / "abacus.py",
        "class A:\n"
        "    @cached\n"
        "    async def add(self, total,\n"
        "                  *, more=0):\n"
        '        """Adds up.\n\n        All of it."""\n\n'
        f"{body}"
        "\x0c        return '''\nleft'''\n",
    )
    (row,) = functions(library)
    assert row.prompt == (
        "async def add(self, total,\n"
        "              *, more=0):\n"
        '    """Adds up.\n\n    All of it."""\n'
    )
    assert row.completion.startswith("\n    total += 0")
    assert row.completion.endswith("'''\nleft'''\n")
    assert (row.package, row.file, row.line, row.name) == ("abacus", "abacus.py", 3, "add")


def test_what_makes_no_row(library: Path) -> None:
    long = "x = '" + "a" * 100 + "'\n"
    write(library / "abacus.py", f"def short():\n    return 1\ndef one(): {long}")
    write(library / "zither" / "tests" / "test_it.py", f"def f():\n    {long}")
    write(library / "zither" / "template.py", f"def f(:\n    {long}")
    write(library / "test" / "it.py", f"def f():\n    {long}")
    write(library / "site-packages" / "other.py", f"def f():\n    {long}")
    write(library / "nested.py", f"def f():\n    {long}")
    write(
        library / "zither" / "kept.py", f"def f():\n    def g():\n        {long}\n    return g\r\n"
    )
    assert [(row.file, row.name) for row in functions(library)] == [("zither/kept.py", "f")]


def test_functions_of_one_name_are_on_one_side() -> None:
    found = [made_up("target", i, f"f{i % 100}") for i in range(NUM_FUNCTIONS)]
    parts = split(found, "target", seed=0)
    names = [{row.name for row in parts[part]} for part in ("pool", *HELD_OUT)]
    assert sum(map(len, names)) == 100


def test_another_seed_splits_otherwise() -> None:
    found = [made_up("target", i) for i in range(NUM_FUNCTIONS)]
    first, second = (split(found, "target", seed)["test"] for seed in (0, 1))
    assert first != second


def test_a_copy_of_a_held_out_row_is_left_out_of_the_pool() -> None:
    target = [made_up("target", i) for i in range(NUM_FUNCTIONS)]
    copies = [made_up("other", i) for i in range(NUM_FUNCTIONS)]
    parts = split(target + copies, "target", seed=0)
    held_out = sum(len(parts[part]) for part in HELD_OUT)
    others = [row for part in ("pool", "pretrain") for row in parts[part] if row.package == "other"]
    assert len(others) == NUM_FUNCTIONS - held_out


def test_an_unknown_target_is_an_error_and_writes_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("thrifty.data.corpus.functions", lambda root: [made_up("other", 1)])
    with pytest.raises(ValueError, match=r"too few functions in 'nothing'\nhint: "):
        write_corpus(tmp_path / "corpus", target="nothing")
    assert not (tmp_path / "corpus").exists()


def test_a_library_without_source_is_an_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"keeps no source[^\n]*\nhint: "):
        write_corpus(tmp_path / "corpus")
