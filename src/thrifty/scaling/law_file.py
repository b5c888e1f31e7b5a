"""A law on disk: what ``thrifty law fit -o`` leaves and the other commands read.

JSON with the law's numbers, their intervals, the outliers by line, and what later questions need:
the bootstrap's draws, which give the answers their intervals, and the points, for plots.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from thrifty.core.durable import write_atomically
from thrifty.scaling.asking import loss_of
from thrifty.scaling.fits import FORMS, Fit, numbers_of
from thrifty.scaling.laws import numbers
from thrifty.scaling.points import Points
from thrifty.scaling.published import DEFAULT, PUBLISHED, published


@dataclass(frozen=True, kw_only=True)
class Known:
    """A law to ask, from a file or from a paper."""

    form: str
    law: Any
    draws: Any
    source: str
    points: Points | None = None
    kept: Any = None

    @classmethod
    def of(cls, fit: Fit) -> Known:
        return cls(
            form=fit.form,
            law=fit.law,
            draws=fit.draws,
            source=fit.source,
            points=fit.points,
            kept=fit.kept,
        )

    @property
    def facts(self) -> dict[str, Any]:
        return {"form": self.form, **shown_numbers(self.form, self.law), "source": self.source}

    @property
    def largest(self) -> float | None:
        """N D of the largest run that it was fitted to."""
        if self.points is None or not np.all(np.isfinite(self.points.N)):
            return None
        return float((self.points.N * self.points.D)[self.kept].max())


def shown_numbers(form: str, law: Any) -> dict[str, float]:
    """The numbers of a law, without those that its form does not have."""
    hidden = ("A", "alpha") if form == "tokens" else ()
    return {name: value for name, value in numbers(law).items() if name not in hidden}


def facts_of(fit: Fit) -> dict[str, Any]:
    """What ``thrifty law fit --json`` prints of a fit."""
    out = np.flatnonzero(~fit.kept)
    predicted = loss_of(fit.law, fit.points.N, fit.points.D, fit.points.unique)
    intervals = fit.intervals
    shown = shown_numbers(fit.form, fit.law)
    return {
        "form": fit.form,
        **shown,
        "objective": fit.objective,
        "num_points": len(fit.points),
        "outliers": [
            {
                "line": int(fit.points.lines[i]),
                **{k: _finite(getattr(fit.points, k)[i]) for k in ("N", "D", "loss")},
                "predicted": float(predicted[i]),
            }
            for i in out
        ],
        "intervals": {name: intervals[name] for name in shown if name in intervals},
        "source": fit.source,
    }


def write_law(path: Path, fit: Fit, facts: dict[str, Any]) -> None:
    """``facts`` with what later questions need."""
    columns = {f.name: getattr(fit.points, f.name) for f in fields(Points)}
    draws = {} if fit.draws is None else numbers_of(fit.draws, fit.law)
    whole = {
        **facts,
        "law": numbers(fit.law),
        "draws": {name: [_finite(v) for v in values] for name, values in draws.items()},
        "points": {name: [_finite(v) for v in values] for name, values in columns.items()},
        "kept": fit.kept.tolist(),
    }
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}\nhint: make it, or another -o")
    write_atomically(path, json.dumps(whole, indent=1, allow_nan=False) + "\n")


def read_law(name: str | None) -> Known:
    """A file, or a published law by its name; the default one for None.

    Raises ValueError for what is neither.
    """
    if name is None or name in PUBLISHED:
        known = published(name or DEFAULT)
        repeats = bool(np.all(np.isfinite(known.law.R_D)))
        form = "data_constrained" if repeats else "chinchilla"
        return Known(form=form, law=known.law, draws=None, source=known.source)
    path = Path(name)
    if not path.is_file():
        published(name)  # raises
    try:
        return _read(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no law: {type(error).__name__} {error}\n"
            "hint: `thrifty law fit RUNS.csv -o LAW.json` leaves one"
        ) from None


def _read(values: Any) -> Known:
    form = values["form"]
    cls: Any = FORMS[form].cls
    draws = {name: _numbers(each) for name, each in values["draws"].items()}
    columns = {f.name: _numbers(values["points"][f.name]) for f in fields(Points)}
    law = cls(**{name: _number(value) for name, value in values["law"].items()})
    return Known(
        form=form,
        law=law,
        # A number that has no draws is one that the form does not have: the same in all of them.
        draws=cls(**{**_everywhere(law, len(next(iter(draws.values())))), **draws})
        if draws
        else None,
        source=str(values["source"]),
        points=Points(**{**columns, "lines": columns["lines"].astype(np.int64)}),
        kept=np.array(values["kept"], dtype=bool),
    )


def _everywhere(law: Any, count: int) -> dict[str, Any]:
    return {f.name: np.full(count, getattr(law, f.name)) for f in fields(law)}


def _number(value: Any) -> float:
    number = float(value)
    if isinstance(value, (bool, str)) or not math.isfinite(number):
        raise ValueError(f"{value!r} is no number of a law")
    return number


def _numbers(values: Any) -> Any:
    """Infinite where the file says nothing."""
    return np.array([math.inf if v is None else float(v) for v in values])


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
