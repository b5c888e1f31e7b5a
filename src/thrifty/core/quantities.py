"""Amounts as people write them: ``24GiB``, ``3e17``, ``2h``, ``$20``, ``20M``.

Every parser returns a positive finite float in the base unit (bytes, FLOPs, seconds, dollars,
tokens) and every formatter prints what its parser reads back to three digits. Units are those of
the field: GiB = 2^30 bytes and GB = 10^9; FLOPs are a count, never a rate. Letters count the same
in either case, since nobody's budget is in millibytes. What could be read in two ways is refused:
``1,5`` (a decimal or a thousands comma?), ``2h30`` (minutes or seconds?), ``3E`` (3e18 or half of
``3e17``?).
"""

from __future__ import annotations

import math
import re
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Annotated

_DECIMAL = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18, "Z": 1e21}
_BINARY = {f"{prefix}iB": 2.0 ** (10 * (i + 1)) for i, prefix in enumerate("KMGTP")}

_TERM = re.compile(
    r"([+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d+(?:_\d+)*)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)"
    r"\s*([A-Za-z]*)\s*"
)
_RATE = re.compile(r"/|\bper\b")


@dataclass(frozen=True)
class _Notation:
    """How amounts of one resource are written."""

    what: str
    units: Mapping[str, float]
    """Unit -> its size; "" is what a bare number counts."""
    examples: str
    sums: bool = False
    """Whether several terms add up, as in ``1h30m``."""
    listed: str = ""
    """The units as a hint names them, where they are too many to go through."""
    most: float = math.inf
    """More than this is a slip of the keyboard; it would only make numbers that nobody can read."""
    forgotten: tuple[float, str] = (0.0, "")
    """Below this a bare number lacks its unit, probably this one."""

    def parse(self, value: str | int | float) -> float:
        if isinstance(value, bool) or not isinstance(value, (str, Real)):
            raise self._error(f"{self.what} must be a number with a unit, not {show(value)}")
        if isinstance(value, str):
            total = math.fsum(self._terms(value))
        else:
            total = _float(value) * self.units[""]
        if not 0 < total < math.inf:
            raise self._error(f"{self.what} must be more than zero and finite, not {show(value)}")
        if total > self.most:
            raise self._error(f"{show(value)} is more {self.what} than any run can use")
        least, unit = self.forgotten
        if total < least and _is_bare(value):
            raise ValueError(
                f"{show(value)} is too little {self.what} to be meant without a unit\n"
                f"hint: did you mean {str(value).strip()}{unit}?"
            )
        return total

    def _terms(self, value: str) -> list[float]:
        if _RATE.search(value):
            raise self._error(f"{show(value)} is a rate; a budget is an amount of {self.what}")
        text = value.strip()
        if not text:
            raise self._error(f"an amount of {self.what} is missing")
        terms: list[tuple[str, str]] = []
        position = 0
        while position < len(text):
            term = _TERM.match(text, position)
            if term is None or (terms and (not self.sums or term[1][0] in "+-")):
                raise self._error(f"cannot read {show(value)} as {self.what}")
            terms.append((term[1].replace(",", ""), term[2].lower()))
            position = term.end()
        if len(terms) > 1 and not all(unit for _, unit in terms):
            raise self._error(f"{show(value)} has a number without a unit")
        sizes = {name.lower(): size for name, size in self.units.items()}
        for _, unit in terms:
            if unit not in sizes:
                known = self.listed or ", ".join(filter(None, self.units))
                raise ValueError(
                    f"unknown unit {unit[:20]!r} in {show(value)} for {self.what}\n"
                    f"hint: units are {known}; for example {self.examples}"
                )
        return [_float(number) * sizes[unit] for number, unit in terms]

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{message}\nhint: write {self.what} like {self.examples}")


def _is_bare(value: str | int | float) -> bool:
    return not isinstance(value, str) or not any(map(str.isalpha, value.lower().replace("e", "")))


def _float(number: str | int | float) -> float:
    try:
        return float(number)
    except OverflowError:  # an int past 1e308
        return math.inf


def show(value: object) -> str:
    """``repr`` cut short: an error is not the place for a megabyte of text."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python prints no int of more than 4300 digits
        return "so large a number"


_MEMORY = _Notation(
    "memory",
    {
        "": 1.0,
        "B": 1.0,
        **{f"{p}B": _DECIMAL[p] for p in "kMGTP"},
        **_BINARY,
        # The smaller of its two readings, so that no limit is ever passed for want of two letters.
        **{p: _DECIMAL[p] for p in "kMGTP"},
    },
    "24GiB or 800MB",
    most=1e18,
    forgotten=(1e6, "GiB"),
)
_FLOPS = _Notation(
    "FLOPs",
    {
        "": 1.0,
        **{prefix: size for prefix, size in _DECIMAL.items() if prefix != "E"},
        **{f"{p}FLOP": size for p, size in {"": 1.0, **_DECIMAL}.items()},
        **{f"{p}FLOPs": size for p, size in {"": 1.0, **_DECIMAL}.items()},
    },
    "3e17 or 300PFLOP",
    listed="FLOP with k, M, G, T, P, E or Z before it (all but E also alone: 3E could be 3e18)",
    most=1e30,
)
_CENTURY = 100 * 365.25 * 86400
_TIME = _Notation(
    "time",
    {
        "": 1.0,
        **dict.fromkeys(("s", "sec", "second", "seconds"), 1.0),
        **dict.fromkeys(("m", "min", "minute", "minutes"), 60.0),
        **dict.fromkeys(("h", "hour", "hours"), 3600.0),
        **dict.fromkeys(("d", "day", "days"), 86400.0),
    },
    "90s, 45m or 1h30m",
    sums=True,
    most=_CENTURY,
)
_HOURS = _Notation("hours", {**_TIME.units, "": 3600.0}, "2, 2h or 1h30m", sums=True, most=_CENTURY)
_DOLLARS = _Notation(
    "dollars",
    {"": 1.0, "k": 1e3, "USD": 1.0, "dollar": 1.0, "dollars": 1.0},
    "$20 or 7.50",
    most=1e15,
)
_TOKENS = _Notation(
    "tokens",
    {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12},
    "20M or 500k",
    most=1e18,
)

_PARAMETERS = _Notation(
    "parameters",
    {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12},
    "7B or 350M",
    most=1e18,
)


def parse_bytes(value: str | int | float) -> float:
    """``"24GiB"`` -> bytes. A bare number is bytes, unless so few that its unit was forgotten."""
    return _MEMORY.parse(value)


def parse_flops(value: str | int | float) -> float:
    """``"3e17"``, ``"300PFLOP"`` -> a count of floating-point operations."""
    return _FLOPS.parse(value)


def parse_seconds(value: str | int | float) -> float:
    """``"90s"``, ``"1h30m"``, ``120`` -> seconds."""
    return _TIME.parse(value)


def parse_hours(value: str | int | float) -> float:
    """``2``, ``"2h"``, ``"45m"`` -> seconds; a bare number is hours, as in ``--hours 2``."""
    return _HOURS.parse(value)


def parse_dollars(value: str | int | float) -> float:
    """``"$20"``, ``"20"`` -> US dollars."""
    if isinstance(value, str):
        if any(unicodedata.category(c) == "Sc" and c != "$" for c in value):
            raise ValueError(
                f"{show(value)} is not in US dollars\nhint: prices are kept in $; write $20"
            )
        text = value.strip()
        value = text[1:] if text.startswith("$") else text.removesuffix("$")
    return _DOLLARS.parse(value)


def parse_tokens(value: str | int | float) -> float:
    """``"20M"``, ``"1.5B"``, ``"500k tokens"`` -> tokens."""
    if isinstance(value, str):
        value = re.sub(r"tokens?\s*$", "", value, flags=re.IGNORECASE)
    return _TOKENS.parse(value)


def parse_parameters(value: str | int | float) -> float:
    """``"7B"``, ``"350M"`` -> parameters of a model."""
    return _PARAMETERS.parse(value)


Bytes = Annotated[float, parse_bytes]
Flops = Annotated[float, parse_flops]
Seconds = Annotated[float, parse_seconds]
Dollars = Annotated[float, parse_dollars]
Tokens = Annotated[float, parse_tokens]
"""The types of fields in which amounts may stand as people write them (read by ``typed.py``)."""


def _format(value: float, steps: Sequence[tuple[float, str]]) -> str:
    """Three digits in the largest of ``steps`` that ``value`` fills; 1023 MiB has four."""
    size, unit = next((s for s in steps if abs(value) >= 0.9995 * s[0]), steps[-1])
    number = value / size
    digits = f"{number:.0f}" if 999.5 <= abs(number) < 1e6 else f"{number:.3g}"
    return f"{digits} {unit}".rstrip()


_PREFIXES = [*sorted(((size, p) for p, size in _DECIMAL.items()), reverse=True), (1.0, "")]
_BYTES_STEPS = [*((size, unit) for unit, size in reversed(_BINARY.items())), (1.0, "B")]


def format_bytes(value: float) -> str:
    return _format(value, _BYTES_STEPS)


def format_flops(value: float) -> str:
    """``3.2e17`` -> ``320 PFLOP``."""
    return _format(value, [(size, f"{p}FLOP") for size, p in _PREFIXES])


def format_seconds(value: float) -> str:
    """``3725`` -> ``62m05s``: two units, the smaller no more than a hundredth of the whole."""
    if not 100 <= value < 1e10:
        return f"{value:.3g} s"
    if value < 6000:
        smaller, larger, units = 1, 60, "ms"
    elif value < 360_000:
        smaller, larger, units = 60, 3600, "hm"
    else:
        smaller, larger, units = 3600, 86400, "dh"
    whole, rest = divmod(round(value / smaller), larger // smaller)
    return f"{whole}{units[0]}{rest:02d}{units[1]}"


def format_dollars(value: float) -> str:
    return f"${value:,.2f}" if 1 <= value < 1e12 else f"${value:.3g}"


def format_tokens(value: float) -> str:
    return _format(value, [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, "")])


def format_joules(value: float) -> str:
    return _format(value, [(size, f"{p}J") for size, p in _PREFIXES])


FORMATS = {
    "flops": format_flops,
    "tokens": lambda value: f"{format_tokens(value)} tokens",
    "seconds": format_seconds,
    "joules": format_joules,
    "dollars": format_dollars,
    "peak_memory_bytes": format_bytes,
}
"""How each resource of a ``Cost`` is printed."""

NAMES = {
    "flops": "FLOPs",
    "tokens": "tokens",
    "seconds": "time",
    "joules": "energy",
    "dollars": "money",
    "peak_memory_bytes": "peak memory",
}
"""How each resource of a ``Cost`` is called."""

PER = {
    "flops": (1e15, "PFLOP"),
    "tokens": (1e6, "M tokens"),
    "seconds": (1.0, "second"),
    "joules": (1e3, "kJ"),
    "dollars": (1.0, "dollar"),
    "peak_memory_bytes": (2.0**30, "GiB"),
}
"""resource -> the size and the name of the unit in which rates per resource are shown."""


def short(value: float) -> str:
    """Three significant digits: ``0.00123``, ``12,300``."""
    return f"{float(f'{value:.3g}'):,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.3g}"
