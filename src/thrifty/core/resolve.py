"""Method name -> instance. The folder is the registry; third parties add by entry point.

``scorers/baselines/bm25.py`` holds the scorer ``bm25``: the one class in it that fulfils the
contract. A package outside offers more under the entry-point group ``thrifty.scorer`` (and
``thrifty.picker``, ...), each naming such a class. In plan.yaml a method is its name, or a mapping
from its name to its options: ``picker: {top_k: {by: density}}``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from thrifty.core import typed
from thrifty.core.contracts import KINDS
from thrifty.core.quantities import show
from thrifty.core.typed import nearest

Spec = str | Mapping[str, Mapping[str, Any] | None]


@lru_cache
def method_names(kind: str) -> dict[str, str]:
    """name -> module of every method of a kind that ships with thrifty. Imports none of them."""
    package = importlib.import_module(KINDS[kind][0])
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    return {m.name.rpartition(".")[2]: m.name for m in found if not m.ispkg}


@lru_cache
def installed(kind: str) -> tuple[EntryPoint, ...]:
    """What other packages offer. Looking through all that are installed takes 20 ms."""
    return tuple(_every_entry_point().select(group=f"thrifty.{kind}"))


@lru_cache
def _every_entry_point() -> Any:
    return entry_points()


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
    outside = {point.name: point for point in installed(kind)}
    if name in outside:
        return _load(kind, contract, outside[name])
    raise ValueError(f"there is no {kind} {name!r}\nhint: {nearest(name, [*modules, *outside])}")


def _load(kind: str, contract: type, point: EntryPoint) -> type:
    """A third party's class. Raises ValueError where its package is broken."""
    try:
        cls = point.load()
    except Exception as error:  # other people's code: anything can go wrong
        raise ValueError(
            f"the {kind} {point.name!r} cannot be loaded from {point.value}: {error}\n"
            "hint: reinstall the package that brings it, or use another"
        ) from error
    if not (inspect.isclass(cls) and issubclass(cls, contract) and dataclasses.is_dataclass(cls)):
        raise ValueError(
            f"{point.value} is no {kind}: it must be a dataclass of {contract.__name__}\n"
            "hint: tell the package's authors; thrifty/core/contracts.py says what it must do"
        )
    return cls


def all_names(kind: str) -> list[str]:
    return sorted({*method_names(kind), *(p.name for p in installed(kind))})


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
        f"{kind} must be a name or one name with its options, not {show(spec)}\n"
        f"hint: {kind}: NAME, or {kind}: {{NAME: {{option: value}}}}"
    )


def build(cls: type, options: Mapping[str, Any], where: str) -> Any:
    """A method from plain values. Raises ValueError naming everything that is wrong."""
    problems: list[str] = []
    method = typed.read_fields(cls, options, where, problems)
    if problems:
        raise ValueError("\n".join(problems) + "\nhint: `thrifty methods` lists every method")
    return method


def spec_of(method: Any) -> Spec:
    """What ``resolve`` makes the method of: its name, and its options where they are not the
    defaults."""
    options = {
        field.name: value
        for field in dataclasses.fields(method)
        if (value := getattr(method, field.name)) != field.default
    }
    return {name_of(method): options} if options else name_of(method)


def name_of(method: Any) -> str:
    """The name under which a method instance is known: its file's, or its entry point's."""
    module, cls = type(method).__module__, type(method).__qualname__
    if not module.startswith("thrifty."):
        for kind in KINDS:
            for point in installed(kind):
                if point.value == f"{module}:{cls}":
                    return point.name
    return module.rpartition(".")[2]


def summary(cls: type) -> str:
    """The first line of the docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]
