import errno
import json
import math
import os
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from thrifty.core.budget import Budget, Cost, Rates
from thrifty.core.counter import Counter, read_counter, read_kept
from thrifty.core.ledger import BudgetExceeded, Ledger
from thrifty.core.marginal import Estimate, Option, choose, replay

BUDGET = Budget(flops=1000.0, memory_bytes=8 * 2.0**30)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    with Ledger.create(path, BUDGET) as ledger:
        yield ledger


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only a test moves: ``clock.now += 3``."""
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("thrifty.core.spending.time", clock)
    return clock


def counters(path):
    return sorted(file.name for file in path.parent.glob("*.counter"))


# -- reserving and settling -----------------------------------------------------------------------


def test_reserve_run_settle(ledger, clock):
    with ledger.stage("train", "full", predicted=Cost(flops=200)) as stage:
        lease = stage.lease("train", Cost(flops=300, seconds=50), step=10)
        assert ledger.reserved().flops == 300
        assert ledger.left() == {"flops": 700}
        for _ in range(3):
            clock.now += 2
            lease.tick(Cost(flops=40, tokens=5, seconds=99, peak_memory_bytes=7), steps=1)
        assert lease.used == Cost(flops=120, tokens=15, seconds=6, peak_memory_bytes=7)
        lease.settle()
        assert ledger.reserved() == Cost()
        stage.detail["note"] = "done well"
    spent = ledger.spent()
    assert (spent.flops, spent.tokens, spent.seconds, spent.peak_memory_bytes) == (120, 15, 6, 7)
    (charge,) = ledger.charges()
    assert (charge["step_from"], charge["step_to"], charge["lost"]) == (10, 13, False)
    assert (charge["stage"], charge["method"], charge["activity"]) == ("train", "full", "train")
    (row,) = ledger.stages()
    assert (row["state"], row["detail"]) == ("done", {"note": "done well"})
    assert (row["predicted"]["flops"], row["measured"]["flops"]) == (200, 120)


def test_what_does_not_fit_is_refused(ledger):
    with ledger.stage("train", "full") as stage:
        with stage.spending("train", Cost(flops=600)) as lease:
            lease.tick(Cost(flops=600), steps=1)
        with pytest.raises(BudgetExceeded) as refusal:
            stage.lease("train", Cost(flops=500))
        assert refusal.value.resource == "flops"
        assert "needs 500 FLOP but 400 FLOP of 1 kFLOP is left\nhint: " in str(refusal.value)
        assert ledger.reserved() == Cost()
        stage.require(Cost(flops=400))
        with pytest.raises(BudgetExceeded):
            stage.require(Cost(flops=401))
        with stage.spending("train", Cost(flops=400)):
            pass


def test_reservations_count_against_the_limit(ledger):
    with ledger.stage("a", "x") as a, ledger.stage("b", "y") as b:
        a.lease("train", Cost(flops=700))
        with pytest.raises(BudgetExceeded):
            b.lease("train", Cost(flops=301))
        b.lease("train", Cost(flops=300))


def test_memory_is_held_not_consumed(ledger):
    with ledger.stage("train", "full") as stage:
        with stage.spending("train", Cost(peak_memory_bytes=2**30)) as lease:
            lease.tick(Cost(peak_memory_bytes=9 * 2**30), steps=1)  # measured above the limit
        with stage.spending("pick", Cost(peak_memory_bytes=2**30)):
            pass  # what it once was takes nothing from what comes
        with pytest.raises(BudgetExceeded) as refusal:
            stage.lease("train", Cost(peak_memory_bytes=31.04 * 2**30))
    assert refusal.value.resource == "peak_memory_bytes"
    assert "needs 31 GiB but the budget allows 8 GiB\nhint: --memory 31.2GiB" in str(refusal.value)
    assert ledger.spent().peak_memory_bytes == 9 * 2**30


def test_settling_is_idempotent(ledger, clock):
    with ledger.stage("train", "full") as stage:
        lease = stage.lease("train", Cost(flops=10))
        lease.tick(Cost(flops=7), steps=1)
        clock.now += 1
        used = lease.settle()
        clock.now += 1
        assert lease.settle() == used == lease.used
        with pytest.raises(AssertionError):
            lease.tick(Cost(flops=1), steps=1)  # would be counted nowhere
    assert ledger.spent().flops == 7
    assert len(ledger.charges()) == 1


@pytest.mark.parametrize("cost", [Cost(flops=math.nan), Cost(flops=-1), Cost(tokens=math.nan)])
def test_a_tick_that_is_no_amount_is_refused(ledger, cost):
    with ledger.stage("train", "full") as stage, stage.spending("train", Cost(flops=9)) as lease:
        lease.tick(Cost(flops=5), steps=1)
        with pytest.raises(ValueError, match="\nhint: "):
            lease.tick(cost, steps=1)
        lease.tick(Cost(flops=2), steps=1)
    assert ledger.spent().flops == 7


def test_a_reservation_that_is_no_number_is_refused(ledger):
    with ledger.stage("train", "full") as stage, pytest.raises(BudgetExceeded):
        stage.lease("train", Cost(flops=math.nan))


def test_one_lease_of_a_stage_at_a_time(ledger):
    with ledger.stage("train", "full") as stage:
        stage.lease("train", Cost(flops=1))
        with pytest.raises(AssertionError, match="settle"):
            stage.lease("train", Cost(flops=1))


def test_thrown_away_work_is_charged_as_lost(ledger):
    with ledger.stage("train", "full") as stage:
        lease = stage.lease("train", Cost(flops=10))
        lease.tick(Cost(flops=4), steps=1)
        lease.settle(lost=True)
    assert ledger.spent().flops == ledger.spent(lost=True).flops == 4
    assert ledger.spent(lost=False).flops == 0


def test_spending_can_be_asked_by_stage_and_activity(ledger):
    for name, flops in (("select", 3), ("train", 50)):
        with ledger.stage(name, "x") as stage:
            for activity in ("work", "evaluate"):
                with stage.spending(activity, Cost(flops=100)) as lease:
                    lease.tick(Cost(flops=flops), steps=1)
    assert ledger.spent(stage="select").flops == 6
    assert ledger.spent(activity="evaluate").flops == 53
    assert ledger.spent(stage="train", activity="evaluate").flops == 50


# -- stages ---------------------------------------------------------------------------------------


def test_an_unfinished_stage_is_resumed_in_its_row(ledger):
    with suppress(KeyError), ledger.stage("train", "full", predicted=Cost(flops=5)) as stage:
        lease = stage.lease("train", Cost(flops=10))
        lease.tick(Cost(flops=4), steps=1)
        raise KeyError("x")
    (row,) = ledger.stages()
    assert (row["state"], row["detail"]) == ("stopped", {"reason": "KeyError: 'x'"})
    assert ledger.spent(lost=False).flops == 4  # settled on the way out, and not lost
    with ledger.stage("train", "full", predicted=Cost(flops=6)) as stage:
        assert ledger.stages()[0]["state"] == "open"
        with stage.spending("train", Cost(flops=10)) as lease:
            lease.tick(Cost(flops=3), steps=1)
    (row,) = ledger.stages()
    assert (row["state"], row["predicted"]["flops"], row["measured"]["flops"]) == ("done", 5, 7)
    with ledger.stage("train", "full"):
        pass
    assert len(ledger.stages()) == 2  # a finished one is not taken up again


def test_a_stage_is_open_until_it_ends_at_times_in_utc(ledger):
    before = datetime.now(UTC).replace(microsecond=0)
    with ledger.stage("train", "full"):
        (row,) = ledger.stages()
        assert (row["state"], row["account"], row["ended_at"]) == ("open", "budget", None)
    (row,) = ledger.stages()
    started, ended = (datetime.fromisoformat(row[name]) for name in ("started_at", "ended_at"))
    assert before <= started <= ended <= datetime.now(UTC)


def test_another_method_or_a_fresh_start_is_another_stage(ledger):
    for method, resume in (("full", True), ("lora", True), ("full", False)):
        with suppress(KeyError), ledger.stage("train", method, resume=resume):
            raise KeyError
    assert [row["method"] for row in ledger.stages()] == ["full", "lora", "full"]


def test_stages_nest_and_each_has_its_own_lease(ledger):
    with ledger.stage("train", "full") as outer:
        lease = outer.lease("train", Cost(flops=100))
        lease.tick(Cost(flops=1), steps=1)
        with ledger.stage("select", "bm25") as inner, inner.spending("score", Cost()) as scoring:
            scoring.tick(Cost(flops=20), steps=1)
        lease.tick(Cost(flops=2), steps=1)
    assert ledger.spent(stage="train").flops == 3
    assert ledger.spent(stage="select").flops == 20
    assert [row["state"] for row in ledger.stages()] == ["done", "done"]


def test_a_stage_is_not_opened_inside_itself(ledger):
    with (
        ledger.stage("train", "full"),
        pytest.raises(AssertionError, match="open already"),
        ledger.stage("train", "full"),
    ):
        pass


def test_a_control_run_is_journalled_outside_the_budget(ledger):
    with ledger.stage("train", "full", account="control", limit=Budget(flops=5000)) as stage:
        with stage.spending("train", Cost(flops=4000)) as lease:
            lease.tick(Cost(flops=4000), steps=1)
        with pytest.raises(BudgetExceeded):
            stage.lease("train", Cost(flops=1001))
        assert stage.spent().flops == 4000
    assert ledger.spent() == Cost()
    assert ledger.left() == {"flops": 1000}
    assert ledger.spent(account="control").flops == 4000
    with ledger.stage("train", "full") as stage, stage.spending("train", Cost(flops=1000)):
        pass


def test_a_changed_budget_holds_at_once_and_is_a_decision(ledger, path):
    with ledger.stage("train", "full") as stage:
        ledger.set_budget(Budget(flops=10.0))
        with pytest.raises(BudgetExceeded):
            stage.lease("train", Cost(flops=11))
    ledger.set_budget(Budget(flops=10.0))  # no change, no decision
    (row,) = ledger.decisions()
    assert (row["name"], row["chosen"]) == ("budget", "10 FLOP")
    with Ledger(path, read_only=True) as again:
        assert again.budget == Budget(flops=10.0)


# -- prices ---------------------------------------------------------------------------------------


def test_seconds_are_priced(path, clock):
    rates = Rates(dollars_per_second=0.25, watts=100)
    with Ledger.create(path, Budget(dollars=2), rates) as ledger:
        with ledger.stage("train", "full") as stage:
            with stage.spending("train", Cost(seconds=8)):
                clock.now += 4
            with pytest.raises(BudgetExceeded, match=r"needs \$1.25 but \$1.00 of \$2.00 is left"):
                stage.lease("train", Cost(seconds=5))
        assert (ledger.spent().dollars, ledger.spent().joules) == (1.0, 400.0)


def test_an_unknown_price_is_not_zero(ledger, path):
    with ledger.stage("train", "full") as stage, stage.spending("train", Cost()):
        pass
    assert (ledger.spent().dollars, ledger.spent().joules) == (None, None)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT joules, microdollars FROM charges").fetchall() == [(None, None)]


def test_a_budget_of_dollars_refuses_an_unknown_price(path):
    with Ledger.create(path, Budget(dollars=20)) as ledger:
        with ledger.stage("train", "full") as stage:
            with pytest.raises(BudgetExceeded, match=r"no known price.*\nhint: ") as refusal:
                stage.lease("train", Cost(seconds=1))
            assert refusal.value.resource == "dollars"
            with stage.spending("api", Cost(dollars=0.5)) as lease:  # has a price of its own
                lease.tick(Cost(dollars=0.25), steps=1)
        assert ledger.spent().dollars == 0.25


# -- crashes --------------------------------------------------------------------------------------


def killed(path, code):
    """Run ``code`` with an open ``ledger`` in a process that ends by force in the midst of it."""
    prelude = f"""
import os, signal, time
from thrifty.core.budget import Cost
from thrifty.core.ledger import Ledger
ledger = Ledger({str(path)!r})
def die():
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
"""
    done = subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True)
    assert done.returncode != 0
    assert not done.stderr


def test_a_killed_process_is_booked_from_its_counters_as_lost(path):
    Ledger.create(path, BUDGET, Rates(dollars_per_second=0.5)).close()
    killed(
        path,
        """
with ledger.stage("train", "full") as train, ledger.stage("select", "less") as select:
    one = train.lease("train", Cost(flops=100), step=50)
    two = select.lease("score", Cost(flops=100, dollars=9))
    for _ in range(3):  # in turn: neither may overwrite the other's count
        time.sleep(0.01)
        one.tick(Cost(flops=1, tokens=2, peak_memory_bytes=3), steps=1)
        two.tick(Cost(flops=10, dollars=1), steps=0)
    die()
""",
    )
    with Ledger(path) as ledger:
        assert ledger.reserved().flops == 200
        lost = ledger.recover()
        first, second = ledger.charges()
        assert (first["flops"], first["tokens"], first["peak_memory_bytes"]) == (3, 6, 3)
        assert (first["step_from"], first["step_to"], first["lost"]) == (50, 53, True)
        assert 0.03 <= first["seconds"] < 30
        assert first["dollars"] == pytest.approx(first["seconds"] / 2, abs=1e-6)
        assert (second["flops"], second["dollars"], second["step_to"]) == (30, 3, 0)
        assert (lost.flops, lost.tokens) == (33, 6)
        assert ledger.reserved() == Cost()
        assert ledger.spent() == ledger.spent(lost=True)
        assert ledger.recover() == Cost()  # once is enough
        assert len(ledger.charges()) == 2
        assert [row["state"] for row in ledger.stages()] == ["open", "open"]
        assert counters(path) == []
        with ledger.stage("train", "full") as stage:  # in the row of the one that died
            assert stage.id == 1


@pytest.mark.parametrize("damage", [None, b"", b"\0" * 256, b"x" * 1000])
def test_without_a_whole_counter_the_reservation_is_charged(path, damage):
    Ledger.create(path, BUDGET).close()
    killed(
        path,
        """
with ledger.stage("train", "full") as stage:
    stage.lease("train", Cost(flops=100)).tick(Cost(flops=1), steps=1)
    die()
""",
    )
    (counter,) = path.parent.glob("*.counter")
    counter.unlink()
    if damage is not None:
        counter.write_bytes(damage)
    with Ledger(path) as ledger:
        assert ledger.recover().flops == 100
        assert counters(path) == []
        (charge,) = ledger.charges()
        assert charge["step_from"] == charge["step_to"]  # no step is known to have been done


def test_recovering_leaves_ones_own_leases_alone(ledger, path):
    with ledger.stage("train", "full") as stage:
        lease = stage.lease("train", Cost(flops=10))
        lease.tick(Cost(flops=1), steps=1)
        assert ledger.recover() == Cost()
        lease.tick(Cost(flops=1), steps=1)
        assert len(counters(path)) == 1
    assert ledger.spent(lost=False).flops == 2
    assert counters(path) == []


def test_recovering_goes_on_past_ones_own_leases(ledger, path):
    with ledger.stage("train", "full") as stage:
        lease = stage.lease("train", Cost(flops=10))
        killed(
            path,
            """
with ledger.stage("select", "less") as stage:
    stage.lease("score", Cost(flops=100)).tick(Cost(flops=7), steps=1)
    die()
""",
        )
        assert ledger.recover().flops == 7
        assert ledger.reserved().flops == 10
        lease.tick(Cost(flops=1), steps=1)
    assert [charge["flops"] for charge in ledger.charges()] == [7, 1]


def test_a_lease_booked_by_another_process_is_reported(ledger, path):
    with suppress(RuntimeError), ledger.stage("train", "full") as stage:
        lease = stage.lease("train", Cost(flops=10))
        lease.tick(Cost(flops=3), steps=1)
        with Ledger(path) as other:
            other.recover()
        lease.tick(Cost(flops=3), steps=1)
        with pytest.raises(RuntimeError) as refusal:
            lease.settle()
    assert str(refusal.value) == (
        f"lease 1 of {path} was booked as lost while it was being used\n"
        "hint: two processes work on one run; stop one of them"
    )
    assert ledger.spent(lost=True).flops == 3  # charged once


def test_recovering_removes_stale_counters_only(ledger, path):
    for name in ("ledger-77.counter", "ledger-x.counter", "other-1.counter"):
        (path.parent / name).write_bytes(b"")
    ledger.recover()
    assert counters(path) == ["other-1.counter"]


def test_a_stale_counter_that_another_process_removes_first(ledger, path, monkeypatch):
    gone = path.with_name("ledger-9.counter")
    monkeypatch.setattr("pathlib.Path.glob", lambda *_: iter([gone]))
    assert ledger.recover() == Cost()


def test_a_torn_store_leaves_the_one_before(tmp_path):
    file = tmp_path / "a.counter"
    counter = Counter(file)
    assert read_counter(file) == (0, Cost())
    assert file.stat().st_size == 2 * 128
    for n in range(1, 6):
        counter.write(n, Cost(flops=n, joules=None, dollars=0.5), 2.0 * n)
    assert read_counter(file) == (5, Cost(flops=5, seconds=10, joules=None, dollars=0.5))
    newest = 6 % 2 * 128  # the sixth store: one was made at the start
    counter._map[newest + 20] ^= 1
    assert read_counter(file) == (4, Cost(flops=4, seconds=8, joules=None, dollars=0.5))
    counter.write(7, Cost(joules=2.5, dollars=None, peak_memory_bytes=3), 1.0)
    unknown = Cost(seconds=1, joules=2.5, dollars=None, peak_memory_bytes=3)
    assert read_counter(file) == (7, unknown)
    for _ in range(2):  # another process that recovered may have removed it
        counter.remove()
        assert read_counter(file) is None


def test_the_newest_of_many_stores_is_read(tmp_path):
    counter = Counter(tmp_path / "a.counter")
    for n in range(300):
        counter.write(n, Cost(flops=n), 1.0)
        assert read_counter(counter.path) == (n, Cost(flops=n, seconds=1))
    counter.remove()


def test_a_counter_is_synced_once_and_gives_its_file_back(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", synced.append)
    counter = Counter(tmp_path / "a.counter")
    counter.write(1, Cost(flops=1), 1.0)
    assert len(synced) == 1
    counter.close()
    assert counter._map.closed


def test_what_is_kept_stands_beside_what_was_used(tmp_path):
    file = tmp_path / "a.counter"
    counter = Counter(file)
    assert read_kept(file) is None
    kept = Cost(flops=2, tokens=1, seconds=0.5, joules=None, dollars=0.25)
    counter.write(0, Cost(flops=3), 1.0, kept)
    assert read_kept(file) == kept
    assert read_counter(file) == (0, Cost(flops=3, seconds=1))
    counter.write(0, Cost(flops=4), 2.0, Cost(flops=4))
    counter._map[128 + 80] ^= 1  # in the second slot, after what was used
    assert read_counter(file) == (0, Cost(flops=4, seconds=2))
    assert read_kept(file) is None
    counter.remove()
    assert read_kept(file) is None


# -- rolling back ---------------------------------------------------------------------------------


def test_rolling_back_loses_what_came_after_the_step(ledger):
    with ledger.stage("train", "full") as stage:
        for step in (0, 10, 20):
            with stage.spending("train", Cost(flops=100), step=step) as lease:
                lease.tick(Cost(flops=10 + step), steps=10)
            with stage.spending("evaluate", Cost(flops=100), step=step + 10) as lease:
                lease.tick(Cost(flops=1), steps=0)
            stage.evaluate(step + 10, 10.0, 3.0 - step / 100, 0.1, {"code": {"loss": 3.0}})
        lost = stage.roll_back(20, "a crash")
        assert lost.flops == 31
        assert stage.roll_back(20, "again").flops == 0
        assert [c["step_to"] for c in ledger.charges() if c["lost"]] == [30, 30]
        with stage.spending("train", Cost(flops=100), step=20) as lease:
            lease.tick(Cost(flops=30), steps=10)
        stage.evaluate(30, 11.0, 2.5, 0.1, {})
    assert ledger.spent().flops == 10 + 20 + 30 + 3 + 30
    assert ledger.spent(lost=True).flops == 31
    assert [e["step"] for e in ledger.evaluations()] == [10, 20, 30]
    assert ledger.evaluations()[-1]["objective"] == 2.5
    assert ledger.evaluations()[0]["by_target"] == {"code": {"loss": 3.0}}
    everything = ledger.evaluations(lost=True)
    assert [(e["step"], e["lost"]) for e in everything][2:] == [(30, True), (30, False)]


def test_rolling_back_one_stage_leaves_the_others(ledger):
    for name in ("select", "train"):
        with ledger.stage(name, "x") as stage, stage.spending("work", Cost(), step=5) as lease:
            lease.tick(Cost(flops=2), steps=1)
    with ledger.stage("train", "x", resume=False) as stage:
        assert stage.roll_back(0, "fresh").flops == 0
    assert ledger.spent(lost=True) == Cost()


# -- decisions ------------------------------------------------------------------------------------


def test_a_decision_is_kept_with_its_losers_and_decides_the_same_again(ledger):
    options = [
        Option("a", Estimate(1.0, 0.1, "nats/token", "pilot"), Cost(flops=2, dollars=None)),
        Option("b", Estimate(3.0, 9.0, "nats/token", "prior"), Cost(flops=0), note="free"),
    ]
    choice = choose(options, resource="flops", price=0.1, incumbent="b", z=0.5)
    with ledger.stage("train", "full") as stage:
        stage.decide("go on", choice.chosen, choice.reason, choice=choice, step=7)
    ledger.decide("scorer", None, "by hand", detail={"forecast": 2.5})
    kept, plain = ledger.decisions()
    assert replay(kept["choice"]) == choice
    assert (kept["stage"], kept["step"], kept["chosen"]) == ("train", 7, choice.chosen)
    assert (plain["stage"], plain["choice"], plain["detail"]) == (None, None, {"forecast": 2.5})


# -- the file -------------------------------------------------------------------------------------


def test_an_existing_ledger_is_not_overwritten(ledger, path):
    with pytest.raises(ValueError, match=r"already\nhint: "):
        Ledger.create(path, BUDGET)


def test_half_a_ledger_of_a_crash_is_replaced(path):
    path.with_name(path.name + ".new").write_bytes(b"half")
    with Ledger.create(path, BUDGET):
        pass
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_name_may_hold_anything(tmp_path):
    path = tmp_path / "a b#c?d%20[e].sqlite"
    with Ledger.create(path, BUDGET) as ledger, ledger.stage("train", "full") as stage:
        stage.lease("train", Cost(flops=1)).tick(Cost(flops=1), steps=1)
    with Ledger(path) as ledger:
        ledger.recover()
        assert ledger.spent().flops == 1


def _truncated(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _scribbled(path):
    with path.open("r+b") as file:
        file.seek(4096 + 8)
        file.write(b"\xff" * 4000)


def _foreign(path):
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE t(x)")


def _newer(path):
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "cannot be read as a ledger"),
        (lambda path: path.write_text("flops: 3e17\n" * 1000), "cannot be read as a ledger"),
        (_truncated, "cannot be read as a ledger"),
        (_scribbled, "cannot be read as a ledger"),
        (_foreign, "cannot be read as a ledger: no such table"),
        (_newer, "has ledger version 99, this thrifty reads 1"),
        (lambda path: path.unlink(), "there is no ledger"),
        (lambda path: (path.unlink(), path.mkdir()), "there is no ledger"),
    ],
)
def test_a_file_that_is_no_ledger_is_refused_and_left_alone(path, damage, message, read_only):
    Ledger.create(path, BUDGET).close()
    damage(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(ValueError, match=message + r"(.|\n)*\nhint: "):
        Ledger(path, read_only=read_only)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_reading_goes_on_while_another_writes(ledger, path):
    with Ledger(path, read_only=True) as reader:
        with ledger.stage("train", "full") as stage:
            with stage.spending("train", Cost(flops=10)) as lease:
                lease.tick(Cost(flops=5), steps=1)
            assert reader.spent().flops == 5
            lease = stage.lease("train", Cost(flops=10))
            with ledger._journal.transaction():  # in the middle of a write
                lease.tick(Cost(flops=5), steps=1)
                lease.settle()
                assert reader.spent().flops == 5
        assert reader.spent().flops == 10
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.decide("x", None, "y")


def test_reading_from_a_folder_that_cannot_be_written(path, monkeypatch):
    with Ledger.create(path, BUDGET) as ledger:
        ledger.decide("x", "y", "z")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with Ledger(path, read_only=True) as reader:
        assert len(reader.decisions()) == 1
        assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_transaction_is_all_or_nothing(ledger):
    with suppress(KeyboardInterrupt), ledger._journal.transaction():
        ledger.decide("one", None, "")
        with ledger._journal.transaction():
            ledger.decide("two", None, "")
        raise KeyboardInterrupt
    assert ledger.decisions() == []
    ledger.decide("three", None, "")
    assert len(ledger.decisions()) == 1


def test_a_full_disk_is_an_oserror_and_nothing_is_half_written(ledger):
    with ledger.stage("train", "full") as stage:
        lease = stage.lease("train", Cost(flops=10))
        lease.tick(Cost(flops=5), steps=1)
        (pages,) = ledger._journal._db.execute("PRAGMA page_count").fetchone()
        ledger._journal._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OSError, match="No space left") as full:
            stage.evaluate(1, 1.0, 1.0, 1.0, {"x": "y" * 100_000})
        assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(ledger.path))
        ledger._journal._db.execute("PRAGMA max_page_count = 100000")
    assert ledger.spent().flops == 5


def test_a_locked_ledger_charges_nothing_and_can_be_asked_again(ledger, path):
    ledger._journal._db.execute("PRAGMA busy_timeout = 20")
    with ledger.stage("train", "full") as stage:
        lease = stage.lease("train", Cost(flops=10))
        lease.tick(Cost(flops=5), steps=1)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                lease.settle()
            other.execute("ROLLBACK")
        lease.settle()
    assert len(ledger.charges()) == 1


def test_meta_is_plain_json(ledger, path):
    with closing(sqlite3.connect(path)) as db:
        meta = dict(db.execute("SELECT key, value FROM meta"))
    assert json.loads(meta["budget"])["flops"] == 1000.0
    assert json.loads(meta["rates"]) == {"dollars_per_second": None, "watts": None}
    assert set(meta) == {"schema", "transactions", "budget", "rates", "created_at"}
