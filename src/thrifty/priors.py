"""What methods are worth before anything was measured: the numbers in their files, or the user's.

A scorer or memory technique states its worth with its source. ``priors.yaml`` in the cache folder
overrides any of them by name:

    worth:
      lora: 0.8                                          # as sure as the file's own number is
      bm25: {mean: 3.0, stderr: 0.5, source: our runs}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from thrifty.core.contracts import KINDS, MemoryTechnique, Scorer, Worth
from thrifty.core.resolve import all_names, name_of
from thrifty.core.typed import nearest
from thrifty.costs.hardware import cache_folder


@dataclass(frozen=True)
class Priors:
    """The worth of every method, as the user has it or as its file says."""

    given: Mapping[str, Mapping[str, Any]]
    source: str = ""

    def of(self, method: Scorer | MemoryTechnique, *, trained: bool = False) -> Worth:
        """``trained``: of a form of the weights that is trained itself."""
        own: Worth = method.worth
        if trained and isinstance(method, MemoryTechnique):
            own = method.worth_trained or own
        given = self.given.get(name_of(method)) if self.given else None
        if given is None:
            return own
        mean = float(given["mean"])
        stderr = float(given.get("stderr", own.stderr * mean / own.mean))
        return Worth(mean, stderr, str(given.get("source", self.source)))


def load_priors() -> Priors:
    """Raises ValueError for a priors.yaml that names no method, or no number."""
    path = cache_folder() / "priors.yaml"
    return Priors(_read(path), str(path)) if path.is_file() else Priors({})


def _read(path: Path) -> Mapping[str, Mapping[str, Any]]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))["worth"]
        found = {
            name: value if isinstance(value, dict) else {"mean": value}
            for name, value in values.items()
        }
        wrong = [
            name
            for name, value in found.items()
            if not (float(value["mean"]) > 0 and float(value.get("stderr", 0.0)) >= 0)
        ]
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} does not say what methods are worth: {type(error).__name__} {error}\n"
            "hint: worth: {lora: 0.8, bm25: {mean: 3.0, stderr: 0.5}}"
        ) from None
    known = {name for kind in KINDS for name in all_names(kind)}
    for name in found:
        if name not in known:
            raise ValueError(
                f"{path} names {name!r}, which is no method\nhint: {nearest(name, sorted(known))}"
            )
    if wrong:
        raise ValueError(
            f"{path}: the worth of {', '.join(wrong)} must be more than zero\n"
            "hint: 1 is worth a token picked, or trained on, in the plainest way"
        )
    return found
