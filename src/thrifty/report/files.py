"""What the files of a run folder say about its rows (chosen, left out, set aside) and answers.

A file that is not there is nothing; one that cannot be read is named, and is no reason to have no
report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thrifty.report.answers import Answers
from thrifty.run_folder import RunFolder

MAX_BYTES = 64 * 2**20
"""Of a file that is read whole; what a run writes here is a thousandth of it."""


@dataclass(frozen=True)
class Files:
    """Reads the JSON files of ``run``; ``unreadable`` collects those that were no JSON object."""

    run: RunFolder
    unreadable: list[str] = field(default_factory=list)

    def selection(self) -> dict[str, Any] | None:
        """What was kept, by which method, how many rows the filters dropped for what reason, and
        how many of those kept are a target's too."""
        found = self._read(self.run.selected("budget") / "manifest.json")
        if found is None:
            return None
        return {
            "scorer": found.get("scorer"),
            "picker": found.get("picker"),
            "num_candidates": found.get("num_candidates"),
            "num_selected": found.get("num_selected"),
            "tokens_selected": found.get("num_tokens"),
            "dropped": _counts(found.get("dropped")),
            "in_targets": _counts(found.get("in_targets")),
        }

    def quarantine(self) -> dict[str, Any] | None:
        """Rows of the pool that were set aside when it was read, by reason."""
        found = self._read(self.run.pool / "manifest.json")
        if found is None:
            return None
        reasons = _counts(found.get("num_bad"))
        return {
            "num_examples": found.get("num_examples"),
            "num_bad": sum(reasons.values()),
            "by_reason": reasons,
        }

    def histograms(self) -> dict[str, Any]:
        """Target -> ``{edges, all, selected}``."""
        return self._read(self.run.selected("budget") / "histogram.json") or {}

    def examples(self) -> dict[str, list[dict[str, Any]]]:
        """Some selected and some rejected rows."""
        found = self._read(self.run.selected("budget") / "examples.json") or {}
        return {part: _rows(found.get(part)) for part in ("selected", "rejected")}

    def answers(self) -> Answers | None:
        """What `thrifty decode RUN` left; None where nothing was asked."""
        asked = self._read(self.run.decoded / "decode.json")
        return None if asked is None else Answers(self.run.decoded, asked)

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.is_file():
            return None
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError("too large")
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("no object")
        except (OSError, ValueError, RecursionError):
            self.unreadable.append(path.relative_to(self.run.path).as_posix())
            return None
        return found


def _counts(value: Any) -> dict[str, int]:
    counts = value.items() if isinstance(value, Mapping) else ()
    return {str(k): v for k, v in counts if isinstance(v, int) and not isinstance(v, bool)}


def _rows(value: Any) -> list[dict[str, Any]]:
    rows = value if isinstance(value, list) else []
    keys = ("id", "file", "number", "score", "tokens", "text_prompt", "text_completion", "reason")
    return [{k: row.get(k) for k in keys} for row in rows if isinstance(row, Mapping)]
