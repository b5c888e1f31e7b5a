"""What a decoding leaves, question by question, so that it can go on after a kill.

FOLDER/decode.json     what was asked: another asking is refused
FOLDER/samples.jsonl   each sample as it came, appended; a torn last line is cut off
FOLDER/answers.jsonl   at the end: the answers, what each took and why it ended
FOLDER/recording.jsonl at the end, where gold answers are known: for `thrifty replay` and --fit
FOLDER/ledger.sqlite   what was spent
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from thrifty.core import sums
from thrifty.core.budget import Cost
from thrifty.core.durable import make_folder, sync_file
from thrifty.core.sampling import Asked, Sample


class Record:
    """The folder, open for appending. Raises ValueError where something else was asked in it."""

    def __init__(self, folder: Path, asked: Mapping[str, Any]) -> None:
        self.folder = folder
        make_folder(folder)
        self._check(asked)
        self._stream: BinaryIO | None = None
        self._took: dict[str, Cost] = {}

    @property
    def samples_file(self) -> Path:
        return self.folder / "samples.jsonl"

    @property
    def answers_file(self) -> Path:
        return self.folder / "answers.jsonl"

    def restore(self, questions: Mapping[str, Asked]) -> int:
        """Give each question the samples that came before; returns how many."""
        if not self.samples_file.is_file():
            return 0
        data = self.samples_file.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # killed while it was written; it was not settled either
            with self.samples_file.open("rb+") as stream:
                stream.truncate(whole)
        number = 0
        for line in data[:whole].splitlines():
            row = json.loads(line)
            id = row.pop("id")
            self._took[id] = self.took(id) + Cost(**row.pop("took"))
            questions[id].add(Sample(**row))
            number += 1
        return number

    def took(self, id: str) -> Cost:
        """What the samples of a question took, all that came of it."""
        return self._took.get(id, Cost())

    def add(self, asked: Asked, samples: Sequence[Sample], took: Cost) -> None:
        """Append what came, and ``took`` with it. Handed to the system at once: it outlives the
        process. What failed is not kept: another run has another chance."""
        if not samples:
            return
        self._took[asked.id] = self.took(asked.id) + took
        costs = [took, *[Cost()] * (len(samples) - 1)]  # shares would not quite add up again
        lines = [
            {
                "id": asked.id,
                **asdict(sample),
                "took": {"flops": cost.flops, "tokens": cost.tokens, "dollars": cost.dollars},
            }
            for sample, cost in zip(samples, costs, strict=True)
        ]
        if self._stream is None:
            self._stream = self.samples_file.open("ab")
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self._stream.write(text.encode("utf-8", "replace"))
        self._stream.flush()

    def finish(self, answers: Iterable[Mapping[str, Any]]) -> None:
        """Leave the answers, once the samples that they rest on are on the disk."""
        if self.samples_file.is_file():
            sync_file(self.samples_file)
        _write_lines(self.answers_file, answers)

    def finish_recording(self, rows: Iterable[Mapping[str, Any]]) -> None:
        _write_lines(self.folder / "recording.jsonl", rows)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _check(self, asked: Mapping[str, Any]) -> None:
        path = self.folder / "decode.json"
        text = json.dumps(asked, indent=1, ensure_ascii=False)
        if not path.is_file() or not self.samples_file.is_file():  # nothing is kept that it is of
            sums.write(path, text)
            return
        sums.check(path, "put it back as it was, or answer into another folder (-o)")
        before = json.loads(path.read_text(encoding="utf-8"))
        after = json.loads(text)
        changed = [key for key in after if before.get(key) != after[key]]
        if "settings" in changed:
            was, new = before["settings"], after["settings"]
            changed.remove("settings")
            changed += [key for key in new if was.get(key) != new[key]]
        if changed:
            raise ValueError(
                f"{self.folder} answers something else: {', '.join(changed)} differ\n"
                "hint: another folder (-o), or delete this one"
            )


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    sums.write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
