from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from thrifty.core import resolve as registry
from thrifty.core.budget import Cost
from thrifty.core.contracts import KINDS, Picked, Picker, Verdict
from thrifty.core.resolve import all_names, build, method_class, name_of, parse_spec, resolve
from thrifty.core.typed import read, read_fields


@dataclass(frozen=True, kw_only=True)
class Newest(Picker):
    """The rows with the highest ids.

    Only a test.
    """

    by: Literal["id", "tokens"] = "id"
    share: float = 0.5
    names: tuple[str, ...] = ()
    depth: int | None = None
    source: ClassVar[str] = "a test"

    def pick(self, candidates: Any, max_tokens: float, seed: int) -> Picked:
        return Picked(ids=candidates.ids[::-1], weights=np.ones(len(candidates.ids)))


class Undressed(Picker):  # no dataclass: its options are unknown
    source: ClassVar[str] = "a test"

    def pick(self, candidates: Any, max_tokens: float, seed: int) -> Picked:
        raise NotImplementedError


@pytest.fixture
def installed(monkeypatch):
    """Other packages' entry points: name -> what it loads."""
    groups: dict[str, list[EntryPoint]] = {}

    def install(kind, name, value):
        group = f"thrifty.{kind}"
        groups.setdefault(group, []).append(EntryPoint(name, value, group))

    monkeypatch.setattr(registry, "installed", lambda kind: groups.get(f"thrifty.{kind}", ()))
    return install


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_is_found_by_its_file_and_built_with_its_defaults(kind):
    names = registry.method_names(kind)
    assert names
    for name in names:
        method = resolve(kind, name)
        assert isinstance(method, KINDS[kind][1])
        assert name_of(method) == name
        assert registry.summary(type(method))


def test_options_are_read_with_their_types():
    bm25 = resolve("scorer", {"bm25": {"k1": "1e-1", "max_queries": 7}})
    assert (bm25.k1, bm25.max_queries) == (0.1, 7)
    assert resolve("scorer", {"bm25": None}) == resolve("scorer", {"bm25": {}})
    newest = build(Newest, {"by": "tokens", "names": ["a"], "depth": None}, "picker.newest")
    assert newest == Newest(by="tokens", names=("a",))


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("scorer", "bm52", "there is no scorer 'bm52'\nhint: did you mean bm25?"),
        ("scorer", "BM25", "did you mean bm25?"),
        ("scorer", "grad-cosine", "did you mean grad_cosine?"),
        ("picker", "zzz", "there is no picker 'zzz'\nhint: known: balanced, "),
        ("filter", "../../etc/passwd", "there is no filter"),
        ("stopping", "os.system", "there is no stopping"),
    ],
)
def test_an_unknown_method_names_the_nearest(kind, name, message):
    with pytest.raises(ValueError) as refusal:
        resolve(kind, name)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "spec", [5, None, [], ["bm25"], {}, {"bm25": {}, "length": {}}, {"bm25": 3}, {3: {}}]
)
def test_a_method_is_a_name_or_a_name_with_options(spec):
    with pytest.raises(ValueError, match=r"must be a name or one name with its options.*\nhint: "):
        parse_spec("scorer", spec)


def test_everything_wrong_with_the_options_is_named_at_once():
    options = {"bye": 1, "share": "x", "depth": True, "names": "a", 3: 4}
    with pytest.raises(ValueError) as refusal:
        build(Newest, options, "picker.newest")
    assert str(refusal.value).splitlines() == [
        "unknown key picker.newest.bye: did you mean by?",
        "unknown key picker.newest.3: known: by, depth, names, share",
        "picker.newest.share must be a number, not 'x'",
        "picker.newest.names must be a list, not 'a'; write [a]",
        "picker.newest.depth must be a whole number, not True",
        "hint: `thrifty methods` lists every method",
    ]
    with pytest.raises(
        ValueError, match=r"picker\.newest\.by must be one of id, tokens, not 'name'"
    ):
        build(Newest, {"by": "name"}, "picker.newest")


def test_a_method_without_options_says_so():
    with pytest.raises(ValueError, match=r"unknown key filter.overlap.n: there is none"):
        resolve("filter", {"overlap": {"n": 3}})


# -- other packages' methods -----------------------------------------------------------------------


def test_an_installed_package_adds_a_method(installed):
    installed("picker", "newest", f"{__name__}:Newest")
    assert "newest" in all_names("picker")
    assert "newest" not in all_names("filter")
    method = resolve("picker", {"newest": {"share": 0.25}})
    assert method == Newest(share=0.25)
    assert name_of(method) == "newest"  # not its file's name
    assert registry.summary(Newest) == "The rows with the highest ids."
    with pytest.raises(ValueError, match="did you mean newest"):
        resolve("picker", "newst")


def test_a_shipped_method_cannot_be_replaced(installed):
    installed("picker", "top_k", f"{__name__}:Newest")
    assert method_class("picker", "top_k") is not Newest
    assert all_names("picker").count("top_k") == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_package:Newest", "cannot be loaded from no_such_package:Newest"),
        (f"{__name__}:Nowhere", "cannot be loaded"),
        (f"{__name__}:Undressed", "is no picker: it must be a dataclass of Picker"),
        (f"{__name__}:Cost", "is no picker"),
        (f"{__name__}:pytest", "is no picker"),
    ],
)
def test_a_broken_package_is_named(installed, value, message):
    installed("picker", "broken", value)
    with pytest.raises(ValueError, match=rf"{message}(.|\n)*\nhint: "):
        resolve("picker", "broken")


# -- reading typed values --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "value", "result"),
    [
        (int, "12", 12),
        (int, 3.0, 3),
        (int, 10**30, 10**30),
        (float, 3, 3.0),
        (float, "3e17", 3e17),
        (str, "", ""),
        (bool, False, False),
        (Any, {"x": [1]}, {"x": [1]}),
        (list[int], (1, 2), [1, 2]),
        (tuple[int, ...], [1, "2"], (1, 2)),
        (dict[str, float], {"a": 1}, {"a": 1.0}),
        (int | None, None, None),
        (int | str, "x", "x"),
        (int | str, "5", 5),
        (Literal["a", 1], 1, 1),
        (Cost, {"flops": 1}, Cost(flops=1.0)),
    ],
)
def test_values_are_read(hint, value, result):
    problems: list[str] = []
    assert read(hint, value, "x", problems) == result
    assert not problems


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, "1.5"),
        (int, "nan"),
        (int, float("inf")),
        (int, None),
        (float, "nan"),
        (float, []),
        (str, 3),
        (str, None),
        (bool, "true"),
        (bool, 0),
        (Literal["a", 1], True),
        (Literal["a", 1], "b"),
        (list[int], "12"),
        (list[int], [1, "x"]),
        (dict[str, int], [1]),
        (int | None, "x"),
        (Cost, None),
        (SimpleNamespace, {}),
    ],
)
def test_values_that_do_not_fit_are_named(hint, value):
    problems: list[str] = []
    read(hint, value, "x", problems)
    assert len(problems) == 1
    assert problems[0].startswith("x")


def test_required_fields_are_named():
    problems: list[str] = []
    assert read_fields(Verdict, {"stop": True}, "", problems) is None
    assert problems == ["reason is missing"]
