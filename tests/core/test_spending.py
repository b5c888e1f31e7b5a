"""Stages and leases: what limits them, what they refuse and with which words, what is lost."""

import math
import sqlite3
from contextlib import closing, suppress
from types import SimpleNamespace

import pytest

from thrifty.core.budget import Budget, Cost, Rates
from thrifty.core.counter import read_counter, read_kept
from thrifty.core.ledger import BudgetExceeded, Ledger

BUDGET = Budget(flops=1000.0, tokens=50.0, seconds=100.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    with Ledger.create(path, BUDGET) as ledger:
        yield ledger


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Seconds that only a test moves: ``clock.now += 3``."""
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("thrifty.core.spending.time", clock)
    return clock


def spend(ledger, name, flops, **stage):
    with ledger.stage(name, "x", **stage) as stage, stage.spending("work", Cost(flops=flops)) as it:
        it.tick(Cost(flops=flops), steps=1)


# -- what limits a stage --------------------------------------------------------------------------


def test_a_share_of_the_budget_is_not_taken_off_by_what_other_stages_spent(ledger):
    spend(ledger, "select", 300)
    with ledger.stage("train", "x", limit=Budget(flops=200.0, memory_bytes=7.0)) as stage:
        assert stage.budget == Budget(flops=500.0, tokens=50.0, seconds=100.0, memory_bytes=7.0)
        with stage.spending("train", Cost(flops=150)) as lease:
            lease.tick(Cost(flops=150), steps=1)
        with pytest.raises(BudgetExceeded):
            stage.lease("train", Cost(flops=51))
        with stage.spending("train", Cost(flops=50)):
            pass
    with ledger.stage("train", "x", reopen=True, limit=Budget(flops=200.0)) as stage:
        assert stage.budget.flops == 500.0  # of what it spent itself nothing is added
        assert stage.everything() == Cost(flops=50.0, tokens=50.0, seconds=100.0)


@pytest.mark.parametrize(("share", "limit"), [(5000.0, 1000.0), (1000.0, 1000.0), (10.0, 310.0)])
def test_a_share_is_no_more_than_the_budget(ledger, share, limit):
    spend(ledger, "select", 300)
    with ledger.stage("train", "x", limit=Budget(flops=share)) as stage:
        assert stage.budget == Budget(flops=limit, tokens=50.0, seconds=100.0)


def test_a_share_of_what_nobody_spent_is_itself(ledger):
    spend(ledger, "select", 300)
    with ledger.stage("train", "x", limit=Budget(tokens=10.0, dollars=0.25)) as stage:
        assert stage.budget == Budget(flops=1000.0, tokens=10.0, seconds=100.0, dollars=0.25)


def test_memory_is_limited_by_the_lesser_of_both(tmp_path):
    with Ledger.create(tmp_path / "a.sqlite", Budget(memory_bytes=5.0)) as ledger:
        for share, limit in ((9.0, 5.0), (3.0, 3.0), (None, 5.0)):
            with ledger.stage("train", "x", limit=Budget(memory_bytes=share)) as stage:
                assert stage.budget == Budget(memory_bytes=limit)


def test_an_account_of_its_own_has_its_limit_or_none(ledger):
    with ledger.stage("train", "x", account="control") as stage:
        assert stage.budget == Budget()
        stage.require(Cost(flops=1e30))
        assert stage.everything() == Cost()
    with ledger.stage("train", "x", account="control", limit=Budget(tokens=3.0)) as stage:
        assert stage.budget == Budget(tokens=3.0)


def test_everything_is_what_is_left_of_ones_own_account(ledger):
    spend(ledger, "train", 5000, account="control")
    with ledger.stage("train", "x") as stage, ledger.stage("other", "x") as other:
        other.lease("work", Cost(flops=100, tokens=10))
        assert stage.everything() == Cost(flops=900.0, tokens=40.0, seconds=100.0)
        with ledger.stage("c", "x", account="control", limit=Budget(flops=6000.0)) as control:
            assert control.everything() == Cost(flops=1000.0)
            control.lease("work", Cost(flops=400))
            assert control._open.left == {"flops": 1000.0}
            assert control.everything() == Cost(flops=600.0)
        assert stage.lease("work", Cost(flops=1))._left == {
            "flops": 900.0,
            "tokens": 40.0,
            "seconds": 100.0,
        }


def test_once_too_much_was_spent_nothing_is_left(ledger):
    with ledger.stage("train", "x") as stage:
        with stage.spending("train", Cost(flops=1000)) as lease:
            lease.tick(Cost(flops=1300), steps=1)  # a step took more than was foreseen
        assert ledger.spent().flops == 1300  # booked in full
        assert ledger.left()["flops"] == -300
        assert stage.everything().flops == 0.0
        with pytest.raises(BudgetExceeded) as refusal:
            stage.lease("train", Cost(flops=1))
    assert str(refusal.value) == (
        "train needs 1 FLOP but 0 FLOP of 1 kFLOP is left\n"
        "hint: raise the budget's flops, or plan a smaller run"
    )


# -- prices ---------------------------------------------------------------------------------------


def test_a_price_holds_from_when_it_is_set(ledger, path, clock):
    def run(seconds):
        with ledger.stage("train", "x") as stage, stage.spending("train", Cost(seconds=seconds)):
            clock.now += seconds

    ledger.set_rates(Rates(dollars_per_second=0.5, watts=2.0))
    run(3)
    ledger.set_rates(ledger.rates)
    ledger.set_rates(Rates(dollars_per_second=0.25, watts=2.0))
    assert [charge["dollars"] for charge in ledger.charges()] == [1.5]
    run(4)
    assert [charge["dollars"] for charge in ledger.charges()] == [1.5, 1.0]
    assert ledger.spent().dollars == 2.5
    with Ledger(path, read_only=True) as again:
        assert again.rates == Rates(dollars_per_second=0.25, watts=2.0)
        assert again._journal.meta["transactions"] == "10"  # to set what is set was none


def test_money_adds_up_to_the_last_millionth(ledger, path):
    ledger.set_rates(Rates(dollars_per_second=0.0))
    with ledger.stage("ask", "x") as stage:
        for _ in range(30):
            with stage.spending("api", Cost(dollars=0.1)) as lease:
                lease.tick(Cost(dollars=0.1), steps=1)
    assert ledger.spent().dollars == 3.0 != sum([0.1] * 30)
    with closing(sqlite3.connect(path)) as db:
        kinds = db.execute("SELECT DISTINCT typeof(microdollars) FROM charges").fetchall()
    assert kinds == [("integer",)]


def test_one_unknown_price_makes_the_sum_unknown(ledger, clock):
    ledger.set_rates(Rates(dollars_per_second=0.5, watts=2.0))
    spend(ledger, "known", 1)
    assert (ledger.spent().dollars, ledger.spent().joules) == (0.0, 0.0)
    ledger.set_rates(Rates(watts=2.0))
    spend(ledger, "unknown", 1)
    assert (ledger.spent().dollars, ledger.spent().joules) == (None, 0.0)
    assert [charge["dollars"] for charge in ledger.charges()] == [0.0, None]
    assert ledger.spent(stage="known").dollars == 0.0


def test_what_is_unknown_has_its_own_words(tmp_path):
    hint = (
        " no known price and the budget limits dollars\n"
        "hint: give the device's price from the start (dollars_per_hour in plan.yaml, or of "
        "BudgetCallback), or drop that limit"
    )
    with Ledger.create(tmp_path / "a.sqlite", Budget(dollars=5.0)) as ledger:
        with ledger.stage("train", "x") as stage:
            with pytest.raises(BudgetExceeded) as refusal:
                stage.require(Cost(flops=1))
            assert str(refusal.value) == "this stage has" + hint
            assert refusal.value.resource == "dollars"
            with stage.spending("train", Cost(dollars=1.0)):
                pass
        assert ledger.spent().dollars is None  # one second of the clock had no price
        with ledger.stage("train", "x") as stage:
            with pytest.raises(BudgetExceeded) as refusal:
                stage.lease("train", Cost(dollars=1.0))
            assert str(refusal.value) == "what was spent so far has" + hint


def test_a_limit_of_memory_says_how_much_is_enough(tmp_path):
    limit = Budget(memory_bytes=2.0**30)
    with (
        Ledger.create(tmp_path / "a.sqlite", limit) as ledger,
        ledger.stage("train", "x") as stage,
        pytest.raises(BudgetExceeded) as refusal,
    ):
        stage.require(Cost(peak_memory_bytes=2.0**31), "train")
    assert str(refusal.value) == (
        "train needs 2 GiB but the budget allows 1 GiB\nhint: --memory 2.01GiB or more"
    )


def test_joules_are_those_that_the_devices_counted(ledger, clock):
    ledger.set_rates(Rates(watts=1000.0))
    counted = SimpleNamespace(joules=50.0)
    ledger.energy = lambda: counted.joules
    with ledger.stage("train", "x") as stage:
        with stage.spending("train", Cost()) as lease:
            counted.joules += 7.0
            clock.now += 2.0
            assert lease.used == Cost(seconds=2.0, joules=7.0)
        lease = stage.lease("train", Cost())
        lease.timed = False
        counted.joules += 7.0
        clock.now += 2.0
        assert lease.used == Cost()
    assert ledger.spent().joules == 7.0


# -- what is refused on the way -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "seconds", "what", "resource"),
    [
        (Cost(flops=601), 0, "600 FLOP", "flops"),
        (Cost(tokens=31), 0, "30 tokens", "tokens"),
        (Cost(flops=1), 91, "90 s", "seconds"),
    ],
)
def test_work_that_would_pass_a_limit_is_refused_before_it_is_done(
    ledger, clock, cost, seconds, what, resource
):
    with ledger.stage("select", "x") as stage:
        with stage.spending("score", Cost(flops=400, tokens=20, seconds=10)) as lease:
            lease.tick(Cost(flops=400, tokens=20), steps=1)
            clock.now += 10
        with stage.spending("score", Cost(flops=1)) as lease:
            clock.now += seconds
            with pytest.raises(BudgetExceeded) as refusal:
                lease.tick(cost)
            assert lease._ticked == Cost()
    assert str(refusal.value) == (
        f"score would take more than the {what} that was left for it\n"
        f"hint: raise the budget's {resource}; the same command then goes on"
    )
    assert refusal.value.resource == resource


def test_work_may_take_all_that_is_left_and_more_than_was_foreseen(ledger, clock):
    with ledger.stage("select", "x") as stage, stage.spending("score", Cost(flops=1)) as lease:
        clock.now += 100
        lease.tick(Cost(flops=999, tokens=49))
        lease.tick(Cost(flops=1, tokens=1))
        lease.tick(Cost())  # which is no work
        for more in (Cost(flops=1), Cost(tokens=1)):
            with pytest.raises(BudgetExceeded):
                lease.tick(more)
        lease.tick(Cost(flops=1e-7))  # off by rounding
    assert ledger.spent().flops == pytest.approx(1000)


def test_work_that_takes_none_of_what_has_run_out_goes_on(ledger):
    with ledger.stage("select", "x") as stage:
        with stage.spending("embed", Cost(tokens=50)) as lease:
            lease.tick(Cost(tokens=50))
        with stage.spending("score", Cost(flops=1)) as lease:
            assert lease.left["tokens"] == 0
            lease.tick(Cost(flops=1))


@pytest.mark.parametrize(
    "cost",
    [Cost(tokens=-1), Cost(flops=-1, tokens=1), Cost(flops=math.nan), Cost(tokens=math.inf)],
)
def test_what_is_no_amount_is_named(ledger, cost):
    with ledger.stage("train", "x") as stage, stage.spending("train", Cost(flops=9)) as lease:
        lease.tick(Cost(flops=5, tokens=5), steps=1)
        with pytest.raises(ValueError) as refusal:
            lease.tick(cost, steps=1)
    assert str(refusal.value) == (
        f"train reports a cost that is negative or no number: {cost!r}\n"
        "hint: a cost is what was used, at least zero"
    )


def test_what_is_kept_stays_so_whatever_is_ticked_after_it(ledger):
    with ledger.stage("serve", "x") as stage, stage.spending("serve", Cost(tokens=9)) as lease:
        lease.count(Cost(tokens=5), Cost(tokens=3))
        lease.tick(Cost(tokens=1), steps=1)
        assert read_kept(lease._counter.path) == Cost(tokens=3)


def test_a_settled_lease_counts_no_more(ledger):
    with ledger.stage("train", "x") as stage:
        with pytest.raises(AssertionError, match=r"^there is no open lease"):
            stage.renew(Cost(), Cost())
        lease = stage.lease("train", Cost())
        assert (lease.settled, lease.activity, lease.step) == (False, "train", 0)
        with pytest.raises(AssertionError, match=r"^settle the open lease first"):
            stage.lease("train", Cost())
        lease.settle()
        assert lease.settled
        for again in (lambda: lease.tick(Cost()), lambda: lease.count(Cost())):
            with pytest.raises(AssertionError, match=r"^a settled lease counts no more"):
                again()


# -- what is lost ---------------------------------------------------------------------------------


def test_what_a_block_that_raised_had_spent_is_lost(ledger):
    with ledger.stage("select", "x") as stage:
        with stage.spending("score", Cost(flops=9)) as lease:
            lease.tick(Cost(flops=2))
        with suppress(KeyError), stage.spending("score", Cost(flops=9), step=3) as lease:
            lease.tick(Cost(flops=5), steps=2)
            raise KeyError
    kept, lost = ledger.charges()
    assert (kept["flops"], kept["lost"], kept["step_from"], kept["step_to"]) == (2, False, 0, 0)
    assert (lost["flops"], lost["lost"], lost["step_from"], lost["step_to"]) == (5, True, 3, 5)


def test_rolling_back_tells_what_was_lost_of_the_stage_s_account(ledger):
    with ledger.stage("c", "x", account="control") as control, ledger.stage("t", "x") as train:
        for stage, flops in ((control, 7), (train, 100)):
            with stage.spending("work", Cost(), step=5) as lease:
                lease.tick(Cost(flops=flops), steps=1)
        assert control.roll_back(5, "").flops == 7
        assert control.roll_back(5, "").flops == 0
        assert train.roll_back(5, "") == Cost(flops=100, joules=None, dollars=None)


def test_what_is_open_when_a_ledger_closes_is_there_to_be_recovered(path):
    ledger = Ledger.create(path, BUDGET)
    with suppress(KeyError), ledger.stage("train", "x") as stage:
        raise KeyError
    stage.lease("train", Cost(flops=9)).tick(Cost(flops=2), steps=1)
    ledger.close()
    with Ledger(path) as after:
        assert after.recover().flops == after.spent(lost=True).flops == 2


# -- going on with what is held -------------------------------------------------------------------


def test_renewing_charges_and_goes_on_with_the_rest(ledger, path, clock):
    with ledger.stage("serve", "x") as stage:
        before = stage.lease("serve", Cost(flops=400), step=4)
        before.timed = False
        clock.now += 5
        before.count(Cost(flops=300, tokens=3))
        after = stage.renew(Cost(flops=200, tokens=2), Cost(flops=100, seconds=9))
        assert before.settled
        assert before.used == before.settle() == Cost(flops=200, tokens=2)
        assert (after.activity, after.step, after.timed) == ("serve", 4, False)
        assert after.left == {"flops": 800.0, "tokens": 48.0, "seconds": 100.0}
        assert ledger.reserved() == Cost(flops=800, tokens=48, seconds=100, joules=None,
                                         dollars=None)  # fmt: skip
        (counter,) = path.parent.glob("*.counter")
        assert read_counter(counter) == (0, Cost(flops=100, seconds=9))
        assert after.settle().flops == 100
    first, second = ledger.charges()
    assert (first["flops"], first["tokens"], first["seconds"], first["lost"]) == (200, 2, 0, False)
    assert (first["step_from"], first["step_to"]) == (4, 4)
    assert (second["flops"], second["seconds"]) == (100, 9)
    assert list(path.parent.glob("*.counter")) == []


def test_what_cannot_be_renewed_goes_on_as_it_was(ledger, path):
    with ledger.stage("serve", "x") as stage, ledger.stage("other", "x") as other:
        beside = other.lease("work", Cost(flops=1))
        lease = stage.lease("serve", Cost(flops=10))
        lease.count(Cost(flops=1200))
        with pytest.raises(BudgetExceeded):
            stage.renew(Cost(flops=1200), Cost())  # more than there is
        assert not lease.settled
        assert ledger.charges() == []
        assert ledger.reserved().flops == 11
        names = sorted(file.name for file in path.parent.glob("*.counter"))
        assert names == [f"ledger-{beside.id}.counter", f"ledger-{lease.id}.counter"]
        lease.count(Cost(flops=3))
        with pytest.raises(AssertionError):
            stage.lease("serve", Cost())  # it is open
        assert lease.settle().flops == 3
    assert ledger.spent().flops == 3
    assert list(path.parent.glob("*.counter")) == []


def test_a_disk_that_fills_while_it_is_renewed_leaves_all_as_it_was(ledger, path, monkeypatch):
    with ledger.stage("serve", "x") as stage:
        lease = stage.lease("serve", Cost(flops=10))

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("thrifty.core.spending.Lease.count", full)
            with pytest.raises(OSError, match="No space left"):
                stage.renew(Cost(flops=4), Cost())
        assert [file.name for file in path.parent.glob("*.counter")] == ["ledger-1.counter"]
        assert ledger.charges() == []
        lease.count(Cost(flops=3))
        stage.renew(Cost(flops=3), Cost())
    assert [charge["flops"] for charge in ledger.charges()] == [3, 0]


def test_counted_again_it_may_be_less(ledger, path, clock):
    with ledger.stage("serve", "x") as stage:
        lease = stage.lease("serve", Cost())
        lease.tick(Cost(flops=9), steps=2)
        clock.now += 3
        lease.count(Cost(flops=4))
        (counter,) = path.parent.glob("*.counter")
        assert read_counter(counter) == (2, Cost(flops=4, seconds=3))
        assert lease.used == Cost(flops=4, seconds=3)
        clock.now += 1
        lease.tick(Cost(flops=1), steps=1)
        assert read_counter(counter) == (3, Cost(flops=5, seconds=4))


# -- what is written down -------------------------------------------------------------------------


def test_what_was_measured_beside_is_kept(ledger):
    with ledger.stage("train", "x") as stage:
        stage.evaluate(1, 10.0, 3.0, 0.1, {"code": 3.0}, {"guard": 2.0})
        stage.evaluate(2, 20.0, 2.0, 0.2, {})
        stage.decide("stop", "go on", "why", detail={"odds": 0.5}, step=2)
        stage.evaluate(3, 30.0, 1.0, 0.2, {})
        stage.roll_back(2, "")
    first, second = ledger.evaluations()
    assert [row["lost"] for row in ledger.evaluations(lost=True)] == [False, False, True]
    assert all(isinstance(row["lost"], bool) for row in ledger.evaluations(lost=True))
    assert {name: first[name] for name in ("step", "flops", "objective", "stderr")} == {
        "step": 1,
        "flops": 10.0,
        "objective": 3.0,
        "stderr": 0.1,
    }
    assert (first["by_target"], first["beside"], first["lost"]) == (
        {"code": 3.0},
        {"guard": 2.0},
        False,
    )
    assert (second["by_target"], second["beside"]) == ({}, {})
    (row,) = ledger.decisions()
    assert (row["stage"], row["step"], row["detail"]) == ("train", 2, {"odds": 0.5})
    assert (row["chosen"], row["reason"], row["choice"]) == ("go on", "why", None)


def test_a_charge_that_was_seen_must_be_there(ledger, path):
    start = ledger.last_charge
    assert start == {"id": 0, "seal": None}
    spend(ledger, "train", 1)
    first = ledger.last_charge
    assert first["id"] == 1
    spend(ledger, "train", 1)
    for charge in (start, first, ledger.last_charge):
        ledger.require_charge(charge, "the checkpoint")
    for charge in ({"id": 3, "seal": first["seal"]}, {"id": 2, "seal": first["seal"]}):
        with pytest.raises(ValueError) as refusal:
            ledger.require_charge(charge, "the checkpoint")
        assert str(refusal.value) == (
            f"{path} is older than the checkpoint: it has not the charge {charge['id']} that was "
            "made before\nhint: put the newer ledger back, with its -wal file; without it what "
            "was spent is not known"
        )
    assert ledger.faults() == []
