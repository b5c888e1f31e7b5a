"""Where rows come from: files, folders, globs and URLs -> a fixed list of files to read.

A source is one file, a folder saved by ``datasets`` (``save_to_disk``), a folder of files
(searched through, hidden files left out), or a glob; on the local disk or at any fsspec URL
(``s3://``, ``http://``, ``hf://``). Sources keep the order they are given in; the files of a folder
or glob are sorted by path; a file met twice is read once. Faults on the way: ``remote.py``.

Limits: formats are told by the name's ending alone. A folder saved from a ``DatasetDict`` must have
one split, or be named with its split. No archive is opened.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from thrifty.data.remote import RemoteFile, is_url, shown

__all__ = ["FORMATS", "SourceFile", "expand", "is_url", "shown"]

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "txt",
    ".text": "txt",
}
"""Ending -> format. All but parquet and arrow may carry a further ``.gz``."""

NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file to read. ``name`` is for people: the path or URL without credentials or query."""

    location: str
    name: str
    format: str
    gzipped: bool

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The (decompressed) bytes, as a buffered stream."""
        with ExitStack() as stack:
            if is_url(self.location):
                raw = stack.enter_context(RemoteFile(self.location))
                # fsspec's own readline knows no limit
                stream = cast(BinaryIO, stack.enter_context(io.BufferedReader(raw, 1 << 20)))
            else:
                stream = stack.enter_context(Path(self.location).open("rb"))
            if self.gzipped:
                stream = cast(BinaryIO, stack.enter_context(gzip.GzipFile(fileobj=stream)))
            yield stream


def expand(sources: Sequence[str] | str) -> list[SourceFile]:
    """Every file of every source, once. Whatever cannot be found is a ``ValueError``."""
    sources = [sources] if isinstance(sources, str) else [str(source) for source in sources]
    if not sources:
        raise ValueError("there is no data: no source was given\nhint: name a file or a folder")
    found: dict[str, SourceFile] = {}
    for source in sources:
        if not source.strip():  # as a path it would be the whole disk, or the folder one is in
            raise ValueError("a source of rows is empty\nhint: name a file, a folder or a URL")
        try:
            locations = list(_locations(source))
        except ValueError:
            raise
        except Exception as error:  # each protocol has its own: no network, no credentials...
            if not is_url(source):
                raise
            detail = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"cannot reach {shown(source)!r}: {detail}\n"
                "hint: check the network and the credentials, or copy the data to this machine"
            ) from error
        for location in locations:
            key = location if is_url(location) else str(Path(location).resolve())
            if key not in found:
                found[key] = _source_file(location)
    return list(found.values())


def _locations(source: str) -> Iterator[str]:
    tree: _Local | _Remote = _Remote(source) if is_url(source) else _Local()
    if tree.is_file(source):
        yield source
    elif tree.is_folder(source):
        yield from _folder(tree, source)
    elif _GLOB.search(source):
        yield from _matches(tree, source)
    else:
        raise ValueError(f"there is no file or folder {shown(source)!r}\n{_hint(source)}")


def _matches(tree: _Local | _Remote, pattern: str) -> list[str]:
    matches = sorted(tree.glob(pattern))
    found: list[str] = []
    for match in matches:
        if not tree.is_file(match):
            if "**" not in pattern:
                found += _folder(tree, match)
        elif len(matches) == 1 or (_format(match) and not _is_hidden(match, pattern)):
            found.append(match)
    if not found:
        what = "no data file" if matches else "nothing"
        raise ValueError(
            f"{what} matches {shown(pattern)!r}\n"
            f"hint: quote the pattern; known endings are {', '.join(FORMATS)}, with or without .gz"
        )
    return found


def _hint(source: str) -> str:
    if not is_url(source) and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return f"hint: for a dataset on the Hugging Face hub write hf://datasets/{source}"
    if not is_url(source):
        parent = Path(source).parent
        if not parent.exists():
            return f"hint: the folder {str(parent)!r} does not exist either"
    return "hint: check the spelling; a pattern such as 'data/*.jsonl' works too"


def _folder(tree: _Local | _Remote, folder: str) -> Iterator[str]:
    folder = folder.rstrip("/") or "/"
    if tree.is_file(f"{folder}/dataset_dict.json"):
        splits = json.loads(tree.read(f"{folder}/dataset_dict.json")).get("splits", [])
        if len(splits) != 1:
            raise ValueError(
                f"{shown(folder)!r} holds several splits: {', '.join(map(str, splits))}\n"
                f"hint: name the one to read: {shown(folder)}/{splits[0] if splits else 'train'}"
            )
        folder = f"{folder}/{splits[0]}"
    if tree.is_file(f"{folder}/state.json") and tree.is_file(f"{folder}/dataset_info.json"):
        state = json.loads(tree.read(f"{folder}/state.json"))
        # Only the last part of a name: state.json must not lead out of its folder.
        names = [Path(item["filename"]).name for item in state.get("_data_files", [])]
        yield from (f"{folder}/{name}" for name in names)
        return
    files = [
        path
        for path in sorted(tree.files_under(folder))
        if _format(path) and Path(path).name not in NOT_ROWS and not _is_hidden(path, folder)
    ]
    if not files:
        raise ValueError(
            f"the folder {shown(folder)!r} holds no data file\n"
            f"hint: known endings are {', '.join(FORMATS)}, with or without .gz"
        )
    yield from files


class _Local:
    def is_file(self, path: str) -> bool:
        return Path(path).is_file()

    def is_folder(self, path: str) -> bool:
        return Path(path).is_dir()

    def glob(self, pattern: str) -> list[str]:
        return glob.glob(pattern, recursive=True)  # noqa: PTH207 (an absolute pattern, too)

    def files_under(self, folder: str) -> list[str]:
        return [str(path) for path in Path(folder).rglob("*") if path.is_file()]

    def read(self, path: str) -> bytes:
        return Path(path).read_bytes()


class _Remote:
    """The same questions to an fsspec file system."""

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self._fs: Any = fsspec.core.url_to_fs(url)[0]
        except (ImportError, ValueError) as error:
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"cannot open {shown(url)!r}: {first_line}\n"
                "hint: install the fsspec package of that protocol (s3fs for s3://, aiohttp for http://)"
            ) from None

    def is_file(self, path: str) -> bool:
        # Over http a folder listing is a file too, so a known ending decides.
        return self._fs.isfile(path) and (_format(path) is not None or not self.is_folder(path))

    def is_folder(self, path: str) -> bool:
        return self._fs.isdir(path)

    def glob(self, pattern: str) -> list[str]:
        return [self._fs.unstrip_protocol(path) for path in self._fs.glob(pattern)]

    def files_under(self, folder: str) -> list[str]:
        return [self._fs.unstrip_protocol(path) for path in self._fs.find(folder)]

    def read(self, path: str) -> bytes:
        return self._fs.cat_file(path)


def _is_hidden(path: str, below: str) -> bool:
    shared = _GLOB.split(below)[0]
    return any(part.startswith(".") for part in Path(path.removeprefix(shared)).parts)


def _format(location: str) -> tuple[str, bool] | None:
    """Format and whether gzipped, or None where the ending is unknown."""
    name = shown(location).lower()
    gzipped = name.endswith(".gz")
    kind = FORMATS.get(Path(name.removesuffix(".gz")).suffix)
    if kind is None or (gzipped and kind in ("parquet", "arrow")):
        return None
    return kind, gzipped


def _source_file(location: str) -> SourceFile:
    known = _format(location)
    if known is None:
        raise ValueError(
            f"cannot tell the format of {shown(location)!r}\n"
            f"hint: known endings are {', '.join(FORMATS)}; all but .parquet and .arrow may end "
            "in .gz too"
        )
    kind, gzipped = known
    return SourceFile(location=location, name=shown(location), format=kind, gzipped=gzipped)
