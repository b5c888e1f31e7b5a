"""A plan that is asked for again: the run that it made is kept, where nothing but that plan is in
it; whatever else lies there is refused and left as it is."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reliability.injected import forked
from tests.runs import asked, silent
from thrifty import preparation
from thrifty.core.budget import Budget
from thrifty.data.store_cache import VARIABLE
from thrifty.preparation import plan_run
from thrifty.run_folder import RunFolder

KEPT = "holds this very plan already: it is kept as it is"


@pytest.fixture(scope="module")
def fresh(tiny_model, tiny_data, tmp_path_factory) -> Path:
    """A planned run, with its files of rows beside it."""
    home = tmp_path_factory.mktemp("planned")
    for name in ("small_pool", "signal", "dev", "test"):
        shutil.copy2(tiny_data[name], home)
    plan(tiny_model, home, home / "run")
    return home


@pytest.fixture
def home(fresh) -> Path:
    """Put back as it was afterwards."""
    kept = {path: (path.read_bytes(), path.stat()) for path in fresh.rglob("*") if path.is_file()}
    yield fresh
    for path in [path for path in fresh.rglob("*") if path.is_file() and path not in kept]:
        path.unlink()
    for path, (data, seen) in kept.items():
        if not path.is_file() or path.read_bytes() != data:
            path.write_bytes(data)
            os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def plan(model: Path, home: Path, run: Path, say=silent, **changes) -> None:
    data = {name: home / f"{name}.jsonl" for name in ("signal", "dev", "test")}
    plan_run(asked(model, {**data, "pool": home / "small_pool.jsonl"}, **changes), run, say)


def held(run: Path) -> dict[str, tuple[bytes, int]]:
    """Its files; those aside that SQLite makes beside a ledger that is read."""
    beside = ("ledger.sqlite-wal", "ledger.sqlite-shm")
    files = [path for path in run.rglob("*") if path.is_file() and path.name not in beside]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_plan_that_was_killed_after_its_last_rename_goes_on(
    tiny_model, fresh, tmp_path, monkeypatch
):
    run, plain = tmp_path / "run", preparation.rename_durably

    def renamed_and_killed(draft: Path, folder: Path) -> None:
        plain(draft, folder)
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "rename_durably", renamed_and_killed)
        assert forked(lambda: plan(tiny_model, fresh, run)) == -signal.SIGKILL
    before, said = held(run), []
    plan(tiny_model, fresh, run, said.append)
    assert held(run) == before
    assert f"{run} {KEPT}" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def begin(home: Path) -> None:
    with RunFolder(home / "run").working() as ledger, ledger.stage("select", "bm25"):
        pass


def edit(home: Path) -> None:
    with (home / "run" / "plan.yaml").open("a") as stream:
        stream.write("# mine\n")


def change_pool(home: Path) -> None:
    lines = (home / "small_pool.jsonl").read_text().splitlines(keepends=True)
    (home / "small_pool.jsonl").write_text("".join(lines[:-1]))


OTHERWISE: dict[str, tuple[Callable[[Path], object], dict]] = {
    "another budget": (lambda home: None, {"budget": Budget(flops=5e9)}),
    "stricter": (lambda home: None, {"strict": True}),
    "a pool that changed": (change_pool, {}),
    "a plan that was edited": (edit, {}),
    "a run that has begun": (begin, {}),
    "a file of somebody's": (lambda home: (home / "run" / "notes.txt").write_text("mine"), {}),
    "a file that is gone": (lambda home: (home / "run" / "base.sha256").unlink(), {}),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_is_not_that_very_plan_is_refused_and_left(case, tiny_model, home, monkeypatch):
    monkeypatch.setenv(VARIABLE, "0")
    change, changes = OTHERWISE[case]
    change(home)
    before = held(home / "run")
    with pytest.raises(ValueError, match=r"run exists already\nhint: `thrifty run "):
        plan(tiny_model, home, home / "run", **changes)
    assert held(home / "run") == before
    assert not (home / ".run.draft").exists()
