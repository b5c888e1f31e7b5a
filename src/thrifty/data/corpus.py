"""The embedded default: functions of Python's own standard library, real text that is always there.

A row is a function or method of 80 to 3,000 characters: the prompt is its signature and its
docstring where it has one, the completion its body. One package is the target; its rows are split
by the hash of their name, for near copies of a function share it:

    signal     scores the pool        dev    steers the run        test    is only ever reported on
    pool       the rest of the target, hidden among the rows of all other packages: user interfaces,
               parsers, protocols, code generators; what a good scorer finds, and what it must not

``pretrain`` is a share of the other packages' rows, kept out of the pool, for a base model. A row
that says the same as a held-out one is in no other part.

Limits: the rows differ between versions of Python and between distributions that leave packages
out (idlelib, tkinter). The ``test`` package and folders of tests are never read, as some leave
them out and they would make up two thirds of the pool.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from thrifty.data.pool import fingerprint
from thrifty.data.splits import part_of

TARGET = "asyncio"
"""The default target: some 600 functions of one style, in every distribution of Python."""
HELD_OUT = ("signal", "dev", "test")
PARTS = ("pool", *HELD_OUT, "pretrain")
HEADER = "corpus.json"
"""Counts and hashes; written last, so that its presence means that all files are whole."""

_TARGET_SHARES = {"signal": 0.08, "dev": 0.17, "test": 0.25, "pool": 0.5}
_OTHER_SHARES = {"pretrain": 0.2, "pool": 0.8}
_COMPLETION_CHARACTERS = range(80, 3_001)
_PROMPT_CHARACTERS = range(1, 601)  # more leaves no room for the body in a sequence of 256 tokens
_TEST_FOLDERS = {"test", "tests", "idle_test"}
_FORMAT = 1
"""To be raised with every change of what the files hold, so that older ones are written anew."""


@dataclass(frozen=True, kw_only=True)
class Function:
    """One row. Everything but prompt and completion tells where it is from, not what it says."""

    prompt: str
    completion: str
    package: str
    file: str
    line: int
    name: str

    @property
    def fingerprint(self) -> bytes:
        return fingerprint(self.prompt + self.completion)

    @property
    def kin(self) -> bytes:
        """Shared by functions of one name, as near copies in sibling classes are; but not by
        special methods, whose names (``__init__``) say nothing."""
        return self.fingerprint if self.name.startswith("__") else fingerprint(self.name)

    def to_json(self) -> str:
        return json.dumps(vars(self), ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class CorpusFiles:
    """The parts of the corpus as jsonl files, and what is in them."""

    directory: Path
    target: str
    python: str
    num_rows: Mapping[str, int]
    """By part."""
    num_target_rows_in_pool: int
    sha256: Mapping[str, str]
    """Of each part's file."""

    @property
    def pool(self) -> Path:
        return self.directory / "pool.jsonl"

    @property
    def signal(self) -> Path:
        return self.directory / "signal.jsonl"

    @property
    def dev(self) -> Path:
        return self.directory / "dev.jsonl"

    @property
    def test(self) -> Path:
        return self.directory / "test.jsonl"

    @property
    def pretrain(self) -> Path:
        return self.directory / "pretrain.jsonl"

    def texts(self, part: str) -> Iterator[str]:
        """Prompt and completion of every row of a part, as one text."""
        with (self.directory / f"{part}.jsonl").open(encoding="utf-8") as stream:
            for line in stream:
                row = json.loads(line)
                yield row["prompt"] + row["completion"]


def write_corpus(directory: Path | str, *, target: str = TARGET, seed: int = 0) -> CorpusFiles:
    """Write every part into ``directory``, or read its header where this Python wrote it before.

    ``target`` is a package or module of the standard library; ``seed`` splits its rows.
    """
    directory = Path(directory)
    request = {"format": _FORMAT, "python": _python(), "target": target, "seed": seed}
    header = _read_header(directory, request)
    if header is None:
        parts = split(functions(_standard_library()), target, seed)
        header = {"request": request, **_write(directory, parts, target)}
        draft = directory / f".{HEADER}.new"
        draft.write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
        draft.replace(directory / HEADER)
    return CorpusFiles(
        directory=directory,
        target=target,
        python=_python(),
        num_rows=header["num_rows"],
        num_target_rows_in_pool=header["num_target_rows_in_pool"],
        sha256=header["sha256"],
    )


def functions(root: Path) -> Iterator[Function]:
    """Every function and method under ``root`` that makes a row, by file and line."""
    for package, path in _modules(root):
        source = path.read_text(encoding="utf-8", errors="replace")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are not ours to mend
            try:
                tree = ast.parse(source)
            except (SyntaxError, ValueError):
                continue  # a template, not a module
        # Lines as the parser counts them: str.splitlines also breaks at form feeds.
        lines = source.split("\n")
        for node in _definitions(tree):
            prompt, completion = _sides(node, lines)
            if len(prompt) in _PROMPT_CHARACTERS and len(completion) in _COMPLETION_CHARACTERS:
                yield Function(
                    prompt=prompt,
                    completion=completion,
                    package=package,
                    file=path.relative_to(root).as_posix(),
                    line=node.lineno,
                    name=node.name,
                )


def split(found: Iterable[Function], target: str, seed: int) -> dict[str, list[Function]]:
    """The rows of every part of the corpus, each part in the order of ``found``."""
    rows = [(row, row.fingerprint) for row in found]
    parts: dict[str, list[Function]] = {name: [] for name in PARTS}
    held_out: set[bytes] = set()
    for row, key in rows:
        part = part_of(row.kin, _TARGET_SHARES, seed)
        if row.package == target and part in HELD_OUT and key not in held_out:
            parts[part].append(row)
            held_out.add(key)
    empty = [name for name in HELD_OUT if not parts[name]]
    if empty:
        raise ValueError(
            f"the standard library of this Python has too few functions in {target!r}\n"
            f"hint: a package with some hundreds of them, such as {TARGET}, email or xml"
        )
    for row, key in rows:
        if key in held_out:
            continue
        part = "pool" if row.package == target else part_of(key, _OTHER_SHARES, seed)
        parts[part].append(row)
    return parts


def _definitions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods in their order, but none inside another: one row must not be a part of
    another one, which may be on the other side of a split."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif not isinstance(child, ast.expr):
            yield from _definitions(child)


def _sides(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str]:
    """Signature with docstring, and body: whole lines, moved left to where the signature starts.

    By line numbers: ``ast.get_source_segment`` splits the whole file at every call. A function on
    one line has no signature apart.
    """
    last = node.body[0].lineno - 1  # of the signature, as a number that counts from 1
    if ast.get_docstring(node, clean=False) is not None:
        last = node.body[0].end_lineno or last
    end = node.end_lineno or last
    signature, body = lines[node.lineno - 1 : last], lines[last:end]
    return _moved_left(signature, node.col_offset), _moved_left(body, node.col_offset)


def _moved_left(lines: list[str], columns: int) -> str:
    # Not textwrap.dedent: a string over several lines may start further left than its code.
    return "".join(line[min(columns, len(line) - len(line.lstrip(" "))) :] + "\n" for line in lines)


def _standard_library() -> Path:
    root = Path(sysconfig.get_paths()["stdlib"])
    if not (root / "ast.py").is_file():
        raise ValueError(
            f"this Python keeps no source of its standard library in {root}\n"
            "hint: use a Python whose library is not packed in a zip file"
        )
    return root


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    """(package, path) of each source file of the standard library itself, sorted."""
    official = sys.stdlib_module_names - _TEST_FOLDERS  # what else lies there is not Python's own
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        if here == root:
            folders[:] = sorted(official.intersection(folders))
            files = [file for file in files if file.removesuffix(".py") in official]
        else:
            folders[:] = sorted(set(folders) - _TEST_FOLDERS)
        for path in sorted(here / file for file in files if file.endswith(".py")):
            yield path.relative_to(root).parts[0].removesuffix(".py"), path


def _write(directory: Path, parts: Mapping[str, list[Function]], target: str) -> dict[str, object]:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / HEADER).unlink(missing_ok=True)
    sha256: dict[str, str] = {}
    for name, rows in parts.items():
        content = "".join(row.to_json() + "\n" for row in rows).encode()
        (directory / f"{name}.jsonl").write_bytes(content)
        sha256[name] = hashlib.sha256(content).hexdigest()
    return {
        "num_rows": {name: len(rows) for name, rows in parts.items()},
        "num_target_rows_in_pool": sum(row.package == target for row in parts["pool"]),
        "sha256": sha256,
    }


def _read_header(directory: Path, request: Mapping[str, object]) -> dict | None:
    try:
        header = json.loads((directory / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = all((directory / f"{part}.jsonl").is_file() for part in PARTS)
    if not whole or not isinstance(header, dict) or header.get("request") != request:
        return None
    return header


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"
