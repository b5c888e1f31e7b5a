"""Plain values, as YAML and JSON have them -> dataclasses, with every mistake found at once.

A field's type says what may stand there; ``Annotated[T, parse]`` reads what people write
(``quantities.Bytes``). ``None`` only where the type allows it, no number where a flag should be,
nothing infinite, and no key that no field has.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from thrifty.core.quantities import show


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known one, or all of them."""
    known = sorted(known)
    close = _close(name, known)
    if close:
        return f"did you mean {close}?"
    return f"known: {', '.join(known)}" if known else "there is none"


def _close(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1)), None)


def read(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    """``value`` as ``hint`` wants it; what is wrong is added to ``problems``, with its place."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        try:
            return args[1](value)
        except ValueError as error:
            problems.append(f"{where}: {_one_line(error)}")
            return None
    if origin in (Union, types.UnionType):
        return _read_union(args, value, where, problems)
    if origin is Literal:
        if any(value == known and type(value) is type(known) for known in args):
            return value
        close = _close(value, map(str, args)) if isinstance(value, str) else None
        meant = f"; did you mean {close}?" if close else ""
        return _wrong(f"one of {', '.join(map(str, args))}", value, where, problems, meant)
    if dataclasses.is_dataclass(hint):
        return read_fields(hint, value, where, problems)
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            return _wrong("a mapping from names", value, where, problems)
        inner = args[1] if args else Any
        return {k: read(inner, v, f"{where}.{k}", problems) for k, v in value.items()}
    if isinstance(kind, type) and issubclass(kind, Collection) and kind is not str:
        if not isinstance(value, (list, tuple)):
            written = f"; write [{value}]" if isinstance(value, str) and len(value) < 100 else ""
            return _wrong("a list", value, where, problems, written)
        inner = args[0] if args else Any
        items = [read(inner, v, f"{where}[{i}]", problems) for i, v in enumerate(value)]
        return items if kind is list else tuple(items)
    return _read_scalar(hint, value, where, problems)


def read_fields(cls: Any, values: Any, where: str, problems: list[str]) -> Any:
    """An instance of the dataclass ``cls``; None where something in it is wrong."""
    if not isinstance(values, Mapping):
        return _wrong("a mapping", values, where or "it", problems)
    before = len(problems)
    hints = get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            deeper = _deeper(cls, str(key), values[key])
            hint = f"did you mean {prefix}{deeper}?" if deeper else nearest(str(key), fields)
            problems.append(f"unknown key {prefix}{key!s:.80}: {hint}")
    read_values = {}
    for name, field in fields.items():
        if name in values:
            read_values[name] = read(hints[name], values[name], f"{prefix}{name}", problems)
        elif field.default is field.default_factory is dataclasses.MISSING:
            problems.append(f"{prefix}{name} is missing")
    if len(problems) > before:
        return None
    try:
        return cls(**read_values)
    except ValueError as error:
        problems.append(f"{where}: {_one_line(error)}" if where else _one_line(error))
        return None


def _deeper(cls: Any, key: str, value: Any) -> str | None:
    """The path below ``cls`` of the one field called ``key`` that stands deeper: for ``lora``, and
    what is set in it, ``selection.max_tokens``."""
    if isinstance(value, Mapping) and len(value) == 1:
        key = f"{key}.{next(iter(value))}"
    found = [path for path in _paths(cls) if path.endswith(f".{key}")]
    return found[0] if len(found) == 1 else None


def _paths(cls: Any) -> Iterator[str]:
    for name, hint in get_type_hints(cls).items():
        yield name
        if dataclasses.is_dataclass(hint):
            yield from (f"{name}.{path}" for path in _paths(hint))


def _read_union(hints: tuple[Any, ...], value: Any, where: str, problems: list[str]) -> Any:
    if value is None and types.NoneType in hints:
        return None
    found: list[str] = []
    for hint in hints:
        if hint is not types.NoneType:
            found = []
            result = read(hint, value, where, found)
            if not found:
                return result
    problems += found
    return None


_SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _read_scalar(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    is_flag = isinstance(value, bool)  # a number to Python, to nobody else
    if hint in (int, float) and not is_flag:
        try:
            number = float(value)  # also from text, for which YAML takes 3e17
            if math.isfinite(number) and hint is float:
                return number
            if number == int(number):
                return value if isinstance(value, int) else int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    elif isinstance(value, hint) and is_flag == (hint is bool):
        return value
    unquoted = hint is str and isinstance(value, (bool, int, float))
    quote = "; put it in quotes" if unquoted else ""
    return _wrong(_SCALARS.get(hint, str(hint)), value, where, problems, quote)


def _wrong(wanted: str, value: Any, where: str, problems: list[str], more: str = "") -> None:
    problems.append(f"{where} must be {wanted}, not {show(value)}{more}")


def _one_line(error: ValueError) -> str:
    return str(error).replace("\nhint: ", "; ").replace("\n", "; ")
