"""A run folder before it is worked on: what is refused, that it is left as it was, the lock, the
price."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import finish, ledger, planned, silent
from tests.test_cli import start
from thrifty import stages
from thrifty.cli import main
from thrifty.core import plan as plans
from thrifty.core.budget import Budget
from thrifty.run_folder import RunFolder


@pytest.fixture(scope="module")
def fresh(tiny_model, tiny_data, tmp_path_factory) -> Path:
    """A planned run of a model that may vanish."""
    home = tmp_path_factory.mktemp("fresh")
    model = shutil.copytree(tiny_model, home / "model")
    planned(home / "run", model, tiny_data)
    return home


@pytest.fixture
def run(fresh, tmp_path) -> Path:
    home = shutil.copytree(fresh, tmp_path / "home")
    edit(home / "run", "model", {"path": str(home / "model")})
    return home / "run"


def edit(folder: Path, key: str, value: object) -> None:
    """plan.yaml with another value under ``key``."""
    file = folder / "plan.yaml"
    values = plans.to_dict(plans.load(file))
    plans.put(values, key, value)
    file.write_text(plans.dump(plans.from_dict(values)), encoding="utf-8")


def setting(key: str, value: object) -> Callable[[Path], None]:
    return lambda run: edit(run, key, value)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no dev rows": (
        lambda run: shutil.rmtree(run / "targets" / "sums" / "dev"),
        "dev' holds no finished store",
    ),
    "no test rows": (
        lambda run: shutil.rmtree(run / "targets" / "sums" / "test"),
        "test' holds no finished store",
    ),
    "no signal rows": (
        lambda run: shutil.rmtree(run / "targets" / "sums" / "signal"),
        "signal' holds no finished store",
    ),
    "a list as prepared.json": (
        lambda run: (run / "prepared.json").write_text("[]"),
        "prepared.json is damaged",
    ),
    "no prepared.json": (lambda run: (run / "prepared.json").unlink(), "another version made it"),
    "a list as manifest": (
        lambda run: (run / "pool" / "manifest.json").write_text("[]"),
        "manifest.json' is damaged",
    ),
    "an unknown device": (setting("device", "h1000"), "h1000"),
    "no such model": (
        lambda run: shutil.rmtree(run.parent / "model"),
        "there is no model folder",
    ),
    "less to keep than a row has": (
        setting("selection.max_tokens", 1),
        "selection.max_tokens 1 keeps nothing: the shortest row of the pool has",
    ),
    "a truncated shard, looked into": (
        lambda run: (truncate(run / "pool" / "shard-00000.parquet"),
                     edit(run, "selection.max_tokens", 1)),
        "shard-00000.parquet' is damaged",
    ),
    "other epochs": (
        setting("training.epochs", 9),
        "training.max_steps decides",
    ),
    "dollars without a price": (
        setting("budget.dollars", 5),
        "the budget limits dollars but the device's price is unknown",
    ),
    "a negative option": (
        lambda run: (run / "plan.yaml").write_text(
            (run / "plan.yaml").read_text().replace(
                "stopping: marginal_gain", "stopping: {plateau: {patience: -3}}"
            )
        ),
        "patience must be at least 1, not -3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_worked_on_is_refused_and_left_as_it_was(case, run, capsys):
    damage, says = REFUSED[case]
    damage(run)
    before = contents(run)
    assert main(["run", str(run)]) == 4
    error = capsys.readouterr().err
    assert says in error
    assert "hint: " in error
    assert "Traceback" not in error
    assert contents(run) == before


def test_a_truncated_shard_is_named(run, capsys):
    truncate(run / "pool" / "shard-00000.parquet")
    assert main(["run", str(run)]) == 4
    error = capsys.readouterr().err
    assert "shard-00000.parquet' is damaged" in error
    assert "hint: put it back, or `thrifty plan` again" in error


@pytest.mark.parametrize(
    ("file", "edited", "says"),
    [
        ("plan.yaml", ("version: 1", "version: 9"), "has version 9"),
        ("pool/manifest.json", ('"format": 3', '"format": 99'), "format 99"),
    ],
)
def test_a_folder_of_another_version_is_refused(file, edited, says, run, capsys):
    text = (run / file).read_text()
    assert edited[0] in text
    (run / file).write_text(text.replace(*edited))
    before = contents(run)
    assert main(["run", str(run)]) == 4
    error = capsys.readouterr().err
    assert says in error
    assert "hint: " in error
    assert contents(run) == before


def test_a_ledger_of_another_version_is_refused(run, capsys):
    import sqlite3

    with sqlite3.connect(run / "ledger.sqlite") as database:
        database.execute("UPDATE meta SET value = '9' WHERE key = 'schema'")
    database.close()
    assert main(["run", str(run)]) == 4
    error = capsys.readouterr().err
    assert "has ledger version 9" in error
    assert "hint: " in error


@pytest.mark.slow
def test_a_second_process_is_refused_with_its_exit_code(run, capsys):
    with RunFolder(run).working():
        process = start("run", str(run))
        _, error = process.communicate(timeout=120)
        refused = [(process.returncode, error)]
        for command in ("select", "train"):
            code = main([command, str(run)])
            refused.append((code, capsys.readouterr().err))
    for code, error in refused:
        assert code == 4, error
        assert "is being worked on by process" in error
        assert "hint: wait for it" in error
    assert not (run / "selected").exists()


# -- the price ----------------------------------------------------------------------------------


def test_the_price_is_in_the_plan(tiny_model, tiny_data, tmp_path):
    plan = planned(tmp_path / "asked", tiny_model, tiny_data, dollars_per_hour=3.6)
    assert plan.dollars_per_hour == 3.6
    fixed = {"dollars_per_hour": "$7.2"}
    plan = planned(tmp_path / "set", tiny_model, tiny_data, fixed=fixed)
    assert plan.dollars_per_hour == 7.2
    assert ledger(tmp_path / "set").rates.dollars_per_second == pytest.approx(0.002)
    plan = planned(tmp_path / "listed", tiny_model, tiny_data, device="h100")
    assert plan.dollars_per_hour > 0


@pytest.mark.long
def test_a_limit_in_dollars_can_be_added_by_editing_the_plan(run):
    watts = ledger(run).rates.watts
    edit(run, "dollars_per_hour", 3.6)
    edit(run, "budget.dollars", 1.0)
    finish(run)
    book = ledger(run)
    assert book.budget.dollars == 1.0
    assert book.rates.watts == watts
    spent = book.spent()
    assert spent.dollars == pytest.approx(spent.seconds * 3.6 / 3600, abs=1e-4)
    assert 0 < spent.dollars <= 1.0


def test_what_was_spent_at_an_unknown_price_cannot_be_limited_afterwards(run, capsys):
    with stages.at_work(RunFolder(run), silent) as work:
        stages.select(work, work.main)
    edit(run, "dollars_per_hour", 3.6)
    edit(run, "budget.dollars", 1.0)
    assert main(["run", str(run)]) == 3
    error = capsys.readouterr().err
    assert "what was spent so far has no known price and the budget limits dollars" in error


# -- epochs and steps ---------------------------------------------------------------------------


def test_a_cap_on_epochs_caps_the_steps(tiny_model, tiny_data, tmp_path):
    """Where the budget allows more, the pool is gone through as often as asked, no more."""
    steps = {}
    for epochs in (1, 2):
        fixed = {"training.epochs": epochs, "selection.scorer": "uniform"}
        plan = planned(
            tmp_path / str(epochs), tiny_model, tiny_data, fixed=fixed, budget=Budget(flops=1e12)
        )
        steps[epochs] = plan.training.max_steps
        assert plan.training.epochs == epochs
        pool = json.loads((tmp_path / str(epochs) / "pool" / "manifest.json").read_text())
        positions = plan.training.max_steps * plan.training.micro_batch_tokens
        assert 0.9 * epochs * pool["num_tokens"] < positions <= epochs * pool["num_tokens"]
    assert steps[2] == pytest.approx(2 * steps[1], abs=1)


def test_a_cap_on_epochs_holds_for_what_is_kept(tiny_model, tiny_data, tmp_path):
    """A small budget of a good scorer would rather repeat a small choice."""
    plan = planned(
        tmp_path / "run",
        tiny_model,
        tiny_data,
        fixed={"training.epochs": 1},
        budget=Budget(flops=6e9),
    )
    tokens = plan.training.max_steps * plan.training.micro_batch_tokens
    assert plan.selection.max_tokens is None or tokens <= 1.1 * plan.selection.max_tokens


def test_max_steps_may_be_edited(run):
    most = 2 * plans.load(run / "plan.yaml").training.max_steps
    edit(run, "training.max_steps", most)
    with stages.at_work(RunFolder(run), silent) as work:
        assert work.plan.training.max_steps == most


def test_continued_pretraining_says_why_it_warms_up_again(tiny_model, tiny_data, tmp_path):
    fixed = {"selection.scorer": "uniform"}
    plan = planned(tmp_path / "run", tiny_model, tiny_data, task="continued", fixed=fixed)
    assert plan.training.warmup_steps > 0
    why = plan.why["training.warmup_steps"]
    assert "warmed up again" in why
    assert "2308.04014" in why
    assert "2403.08763" in why
