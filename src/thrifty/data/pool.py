"""Reading a pool: any mix of files -> ``Row`` and ``BadRow``, one by one, in one fixed order.

``read_rows`` holds a few records at a time, whatever the size of the pool. Every record gets the
next id, the bad ones too, so that an id names the same (file, number) as long as the files stay the
same. Nothing is dropped silently: what cannot be trained on comes out as a ``BadRow`` whose reason
starts with a code of ``faults.REASONS``. A file that breaks off half-way gives one ``BadRow`` for
its rest, and reading goes on with the next file.

Formats and their order: ``sources.py`` (files), ``readers.py`` (records), ``formats.py`` (fields).
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from thrifty.data import readers
from thrifty.data.faults import Fault
from thrifty.data.formats import TASKS, Kind, convert, flat
from thrifty.data.sources import SourceFile, expand

MAX_LINE_BYTES = 16 << 20
MOST_BAD = 100_000
"""Records of a file, none of which can be used, after which its rest is not looked at."""


@dataclass(frozen=True, slots=True)
class Row:
    """One valid record.

    ``content`` has the fields of TRL and nothing else: ``text``; ``prompt`` and ``completion``;
    ``messages``; ``prompt``, ``chosen`` and ``rejected``. ``extra`` are the other scalar columns:
    they travel to the selected output and are never shown to a scorer.
    """

    id: int
    file: str
    number: int
    kind: Kind
    content: dict[str, Any]
    extra: dict[str, Any]

    @property
    def prompt(self) -> str:
        """What stands before the answer; of messages, all turns but the assistant's."""
        if self.kind == "messages":
            return flat([turn for turn in self.content["messages"] if turn["role"] != "assistant"])
        return flat(self.content.get("prompt", ""))

    @property
    def completion(self) -> str:
        """The answer; of messages, the assistant's turns; of a preference row, the chosen one."""
        if self.kind == "messages":
            return flat([turn for turn in self.content["messages"] if turn["role"] == "assistant"])
        field = {"text": "text", "preference": "chosen"}.get(self.kind, "completion")
        return flat(self.content[field])

    @property
    def text(self) -> str:
        """Everything, in its order: what text-based scorers and deduplication look at."""
        if self.kind == "messages":
            return flat(self.content["messages"])
        sides = list(self.content.values())
        if self.kind == "preference" or not isinstance(sides[-1], str):
            return "\n".join(map(flat, sides))
        return "".join(sides)

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that two rows share when their text differs in case and white space alone."""
        return fingerprint(self.text)


@dataclass(frozen=True, slots=True)
class BadRow:
    """One record that cannot be used, and why; ``excerpt`` is printable and short."""

    id: int
    file: str
    number: int
    reason: str
    excerpt: str

    @property
    def code(self) -> str:
        return self.reason.partition(":")[0]

    @classmethod
    def of(cls, row_id: int, file: str, number: int, fault: Fault) -> BadRow:
        return cls(row_id, file, number, fault.reason, fault.excerpt)


def fingerprint(text: str) -> bytes:
    """BLAKE2b-128 of the text in NFC, case-folded, white space collapsed."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()


def read_rows(
    sources: Sequence[str] | str,
    *,
    task: str = "sft",
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Row | BadRow]:
    """Every record of every source, converted for ``task``.

    Sources and arguments are checked at once, before the first row is asked for.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}\nhint: tasks are {', '.join(TASKS)}")
    return _rows(expand(sources), task, max_line_bytes)


def _rows(files: list[SourceFile], task: str, max_bytes: int) -> Iterator[Row | BadRow]:
    row_id = 0
    for file in files:
        number = num_read = 0
        only_bad = True
        try:
            for number, record in readers.read(file, max_bytes):
                row = _row(row_id, file.name, number, record, task, max_bytes)
                yield row
                row_id += 1
                num_read += 1
                only_bad = only_bad and isinstance(row, BadRow)
                if only_bad and num_read == MOST_BAD:
                    raise OSError(f"none of its first {MOST_BAD:,} records can be used")
        except readers.BROKEN as error:
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            fault = Fault("unreadable", detail[:200])
            yield BadRow.of(row_id, file.name, number + 1, fault)
            row_id += 1


def _row(
    row_id: int, file: str, number: int, record: Any, task: str, max_bytes: int
) -> Row | BadRow:
    try:
        if isinstance(record, Fault):
            raise record
        kind, content, extra = convert(record, task, max_bytes)
    except Fault as fault:
        return BadRow.of(row_id, file, number, fault)
    return Row(row_id, file, number, kind, content, extra)
