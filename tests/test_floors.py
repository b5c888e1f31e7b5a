"""The house's floors (docs/architecture.md, section 3): imports point down only.

    core  <  costs, scaling  <  data, signals, holding, backends  <  methods  <  everything else

``core``, ``costs`` and ``scaling`` know no torch; method files, and what they import, load it only
inside the functions that compute, so that all of them are priced in milliseconds.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import thrifty
from thrifty.core.resolve import KINDS, method_names

ROOT = Path(thrifty.__file__).parent
METHODS = (
    *("scorers", "filters", "pickers", "metrics", "stopping", "online", "memory"),
    *("decoding", "answer_forms"),
)
FLOORS = [("core",), ("costs", "scaling"), ("data", "signals", "holding", "backends"), METHODS]
FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
TOP = len(FLOORS)
HEAVY = {"torch", "transformers", "datasets", "peft", "accelerate", "trl"}
FILES = sorted(ROOT.rglob("*.py"))


def module_of(file: Path) -> tuple[str, ...]:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def floor_of(module: tuple[str, ...]) -> int:
    return FLOOR.get(module[1], TOP) if len(module) > 1 else TOP


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(file: Path, *, inside_functions: bool) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and name of every import in ``file``; those for the type checker alone are free."""
    package = module_of(file) if file.name == "__init__.py" else module_of(file)[:-1]
    nodes: list[ast.AST] = [parsed(file)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not inside_functions:
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from ((node.lineno, tuple(alias.name.split("."))) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from ((node.lineno, (*base, alias.name)) for alias in node.names)


def is_method(module: tuple[str, ...]) -> bool:
    return len(module) > 1 and module[1] in METHODS


def listed(found: list[str]) -> str:
    return "\n".join(["imports that should not be:", *found])


def test_imports_point_down():
    found = [
        f"{file.relative_to(ROOT)}:{line} imports {'.'.join(name)}"
        for file in FILES
        for line, name in imports(file, inside_functions=True)
        if name[0] == "thrifty" and len(name) > 1 and floor_of(name) > floor_of(module_of(file))
    ]
    assert not found, listed(found)


def test_the_lower_floors_know_no_torch():
    found = [
        f"{file.relative_to(ROOT)}:{line} imports {'.'.join(name)}"
        for file in FILES
        for line, name in imports(file, inside_functions=True)
        if floor_of(module_of(file)) <= FLOOR["costs"] and name[0] in HEAVY
    ]
    assert not found, listed(found)


def test_methods_and_what_they_stand_on_load_no_torch():
    """But for ``holding``, whose optimizers are torch's own subclasses: methods load it inside
    functions."""
    found = [
        f"{file.relative_to(ROOT)}:{line} imports {'.'.join(name)}"
        for file in FILES
        for line, name in imports(file, inside_functions=False)
        if floor_of(module_of(file)) < TOP
        and module_of(file)[1:2] != ("holding",)
        and name[0] in ("torch", "transformers")
    ]
    assert not found, listed(found)


def test_no_method_knows_another():
    found = [
        f"{file.relative_to(ROOT)}:{line} imports {'.'.join(name)}"
        for file in FILES
        for line, name in imports(file, inside_functions=True)
        if name[0] == "thrifty" and is_method(name) and is_method(module_of(file))
    ]
    assert not found, listed(found)


def test_planning_by_a_config_alone_waits_for_no_reader_of_data():
    """A plan answers in about a second; pyarrow and scipy take a fifth of that to load."""
    code = (
        "import sys, thrifty.preparation, thrifty.plan_display; "
        "print(*({'pyarrow', 'scipy', 'torch', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not found.stdout.split()


def test_loading_all_that_prices_loads_no_torch(capsys):
    modules = [
        "thrifty",
        *(name for kind in KINDS for name in method_names(kind).values()),
        *(
            ".".join(module_of(file))
            for file in FILES
            if floor_of(module_of(file)) <= FLOOR["costs"]
        ),
    ]
    code = f"""
import importlib, sys, time
def load(names):
    start = time.perf_counter()
    for name in names:
        importlib.import_module(name)
    return time.perf_counter() - start
modules = {modules!r}
alone, rest = load(modules[:1]), load(modules[1:])
heavy = sorted({{name.partition(".")[0] for name in sys.modules}} & {HEAVY!r})
print(f"import thrifty {{alone:.3f}} s, then {{len(modules) - 1}} modules {{rest:.3f}} s")
sys.exit(f"loaded {{', '.join(heavy)}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    with capsys.disabled():
        print(f"\n{done.stdout.strip()}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import thrifty.core.plan", [("thrifty", "core", "plan")]),
        ("from . import a", [("thrifty", "core", "a")]),
        ("from ..costs.flops import f", [("thrifty", "costs", "flops", "f")]),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import x", [("x",)]),
        ("def f():\n    import torch", [("torch",)]),
        ("class A:\n    def f(self):\n        from torch import nn", [("torch", "nn")]),
    ],
)
def test_the_test_sees_imports(code, names, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path / "thrifty")
    file = tmp_path / "thrifty" / "core" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(code)
    assert [name for _, name in imports(file, inside_functions=True)] == names
    inside = "def" in code
    assert bool(list(imports(file, inside_functions=False))) == (not inside)
