"""Amounts as people write them: ``24GiB``, ``3e17``, ``2h``, ``$20``, ``20M``.

Every parser returns a positive finite float in the base unit (bytes, FLOPs, seconds, dollars,
tokens) and every formatter prints what its parser reads back to three digits. Units are those of
the field: GiB = 2^30 bytes and GB = 10^9; FLOPs are a count, never a rate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18, "Z": 1e21}
BYTES = {
    "": 1.0,
    "B": 1.0,
    **{f"{p}B": DECIMAL[p] for p in "kMGTP"},
    "KB": 1e3,
    **{f"{p}iB": 2.0 ** (10 * (i + 1)) for i, p in enumerate("KMGTP")},
    "kiB": 2.0**10,
}
FLOPS = {f"{p}{suffix}": DECIMAL[p] for p in DECIMAL for suffix in ("", "FLOP", "FLOPs", "FLOPS")}
SECONDS = {
    "": 1.0,
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86400.0),
}
HOURS = {**{unit: size for unit, size in SECONDS.items() if unit}, "": 3600.0}
TOKENS = {
    "": 1.0,
    "k": 1e3,
    "K": 1e3,
    "M": 1e6,
    "B": 1e9,
    "T": 1e12,
    "token": 1.0,
    "tokens": 1.0,
}
DOLLARS = {"": 1.0, "USD": 1.0, "usd": 1.0, "dollars": 1.0}

_NUMBER = r"([+-]?(?:\d[\d_,]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
_TERM = re.compile(_NUMBER + r"\s*([A-Za-z]*)\s*")


def _parse(
    value: str | int | float, units: Mapping[str, float], what: str, examples: str, *, sums: bool
) -> float:
    hint = f"hint: write {what} like {examples}"
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{what} must be a number with a unit, not {value!r}\n{hint}")
    if isinstance(value, (int, float)):
        total = float(value) * units[""]
    else:
        text = value.strip()
        total, position = 0.0, 0
        while position < len(text):
            term = _TERM.match(text, position)
            if term is None or (position > 0 and not sums):
                raise ValueError(f"cannot read {value!r} as {what}\n{hint}")
            number, unit = term.groups()
            if unit not in units:
                known = ", ".join(sorted(filter(None, units), key=lambda u: (units[u], u))[:14])
                raise ValueError(
                    f"unknown unit {unit!r} in {value!r} for {what}\n"
                    f"hint: units are {known}; for example {examples}"
                )
            total += float(number.replace("_", "").replace(",", "")) * units[unit]
            position = term.end()
        if not text:
            raise ValueError(f"{what} is empty\n{hint}")
    if not math.isfinite(total) or total <= 0:
        raise ValueError(f"{what} must be more than zero and finite, not {value!r}\n{hint}")
    return total


def parse_bytes(value: str | int | float) -> float:
    """``"24GiB"`` -> bytes. A bare number is bytes."""
    return _parse(value, BYTES, "memory", "24GiB or 800MB", sums=False)


def parse_flops(value: str | int | float) -> float:
    """``"3e17"``, ``"300PFLOP"`` -> a count of floating-point operations."""
    if isinstance(value, str) and "/" in value:
        raise ValueError(
            f"{value!r} is a rate; the budget is a count of FLOPs\n"
            "hint: write FLOPs like 3e17 or 300PFLOP; for time use hours"
        )
    return _parse(value, FLOPS, "FLOPs", "3e17 or 300PFLOP", sums=False)


def parse_seconds(value: str | int | float) -> float:
    """``"90s"``, ``"1h30m"``, ``120`` -> seconds."""
    return _parse(value, SECONDS, "time", "90s, 45m or 1h30m", sums=True)


def parse_hours(value: str | int | float) -> float:
    """``2``, ``"2h"``, ``"45m"`` -> seconds; a bare number is hours, as in ``--hours 2``."""
    return _parse(value, HOURS, "hours", "2, 2h or 45m", sums=True)


def parse_dollars(value: str | int | float) -> float:
    """``"$20"``, ``"20"`` -> US dollars."""
    if isinstance(value, str):
        for sign in "€£¥":
            if sign in value:
                raise ValueError(
                    f"{value!r} is not in US dollars\nhint: prices are kept in $; write $20"
                )
        value = value.strip().removeprefix("$")
    return _parse(value, DOLLARS, "dollars", "$20 or 7.50", sums=False)


def parse_tokens(value: str | int | float) -> float:
    """``"20M"``, ``"1.5B"`` -> tokens."""
    return _parse(value, TOKENS, "tokens", "20M or 500k", sums=False)


def _format(value: float, steps: list[tuple[float, str]]) -> str:
    if value == 0:
        return f"0 {steps[-1][1]}".strip()
    for size, unit in steps:
        if abs(value) >= size * 0.9995 or size == steps[-1][0]:
            return f"{value / size:.3g} {unit}".strip() if value < 1e4 * size else f"{value:.3g}"
    raise AssertionError("the last step takes everything")


def format_bytes(value: float) -> str:
    return _format(value, [(2.0 ** (10 * i), u) for i, u in ((3, "GiB"), (2, "MiB"), (1, "KiB"))])


def format_flops(value: float) -> str:
    """``3.2e17`` -> ``320 PFLOP``."""
    return _format(value, [(DECIMAL[p], f"{p}FLOP") for p in ("Z", "E", "P", "T", "G", "M", "")])


def format_seconds(value: float) -> str:
    if value >= 5940:
        hours, minutes = divmod(round(value / 60), 60)
        return f"{hours}h{minutes:02d}m"
    if value >= 99.5:
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes}m{seconds:02d}s"
    return f"{value:.3g} s"


def format_dollars(value: float) -> str:
    return f"${value:,.2f}" if value >= 0.995 else f"${value:.3g}"


def format_tokens(value: float) -> str:
    return _format(value, [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, "")])


FORMATS = {
    "flops": format_flops,
    "tokens": lambda value: f"{format_tokens(value)} tokens",
    "seconds": format_seconds,
    "joules": lambda value: f"{value:.3g} J",
    "dollars": format_dollars,
    "peak_memory_bytes": format_bytes,
}
"""How each resource of a ``Cost`` is printed."""
