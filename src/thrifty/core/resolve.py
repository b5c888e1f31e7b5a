"""Method name -> instance. The folder is the registry; third parties add by entry point.

``scorers/baselines/bm25.py`` holds the scorer ``bm25``: the one class in it that fulfils the
contract. A package outside offers more under the entry-point group ``thrifty.scorer`` (and
``thrifty.picker``, ...), each naming such a class. In plan.yaml a method is its name, or a mapping
from its name to its options: ``picker: {top_k: {by: density}}``.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

from thrifty.core.contracts import KINDS

Spec = str | Mapping[str, Mapping[str, Any] | None]


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


@lru_cache
def method_names(kind: str) -> dict[str, str]:
    """name -> module of every method of a kind that ships with thrifty. Imports none of them."""
    package = importlib.import_module(KINDS[kind][0])
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    return {m.name.rpartition(".")[2]: m.name for m in found if not m.ispkg}


def method_class(kind: str, name: str) -> type:
    """Raises ValueError, with the nearest name, where there is no such method."""
    contract = KINDS[kind][1]
    modules = method_names(kind)
    if name in modules:
        module = importlib.import_module(modules[name])
        classes = [
            c
            for _, c in inspect.getmembers(module, inspect.isclass)
            if issubclass(c, contract) and c.__module__ == module.__name__
        ]
        assert len(classes) == 1, f"{module.__name__} must hold one {kind}, has {classes}"
        return classes[0]
    outside = {point.name: point for point in entry_points(group=f"thrifty.{kind}")}
    if name in outside:
        return outside[name].load()
    known = [*modules, *outside]
    raise ValueError(f"there is no {kind} {name!r}\nhint: {nearest(name, known)}")


def all_names(kind: str) -> list[str]:
    return sorted({*method_names(kind), *(p.name for p in entry_points(group=f"thrifty.{kind}"))})


def resolve(kind: str, spec: Spec) -> Any:
    """The method that ``spec`` names, with its options checked and coerced to their types."""
    name, options = parse_spec(kind, spec)
    return build(method_class(kind, name), options, f"{kind}.{name}")


def parse_spec(kind: str, spec: Spec) -> tuple[str, Mapping[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and len(spec) == 1:
        ((name, options),) = spec.items()
        if isinstance(name, str) and (options is None or isinstance(options, Mapping)):
            return name, options or {}
    raise ValueError(
        f"{kind} must be a name or one name with its options, not {spec!r}\n"
        f"hint: {kind}: NAME, or {kind}: {{NAME: {{option: value}}}}"
    )


def build(cls: type, options: Mapping[str, Any], where: str) -> Any:
    """A dataclass from plain values. Raises ValueError naming every key that is wrong."""
    from pydantic import TypeAdapter, ValidationError

    known = {field.name for field in dataclasses.fields(cls)}
    problems = [
        f"unknown key {where}.{key}: {nearest(str(key), known) if known else 'it has no options'}"
        for key in options
        if key not in known
    ]
    if not problems:
        try:
            return TypeAdapter(cls).validate_python(dict(options))
        except ValidationError as error:
            problems = [
                f"{'.'.join([where, *map(str, e['loc'])])}: {e['msg']}, not {e['input']!r}"
                for e in error.errors()
            ]
    raise ValueError("\n".join(problems) + "\nhint: `thrifty methods` lists every method")


def name_of(method: Any) -> str:
    """The name under which a method instance is known: its file's."""
    return type(method).__module__.rpartition(".")[2]


def summary(cls: type) -> str:
    """The first line of the docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]
