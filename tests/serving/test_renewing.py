"""A purse that is renewed: what it charges, holds and leaves after a kill at any moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thrifty.core.budget import Budget, Cost, Rates
from thrifty.core.ledger import BudgetExceeded, Ledger
from thrifty.core.purse import Purse

LIMIT = Budget(tokens=1000.0)
ACCOUNT = "key alice"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "ledger.sqlite"
    Ledger.create(made, Budget(), Rates(dollars_per_second=0.0)).close()
    return made


def tokens(number: float) -> Cost:
    return Cost(tokens=number)


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(("hold", "settle", "renew")), st.integers(0, 300)), max_size=40
    )
)
def test_any_order_charges_what_was_settled_and_keeps_the_limit(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    Ledger.create(path, Budget(), Rates(dollars_per_second=0.0)).close()
    settled, held = 0.0, []
    with Ledger(path) as ledger:
        with ledger.stage("serve", "first", account=ACCOUNT, limit=LIMIT) as stage:
            purse = Purse(stage, "serve", timed=False)
            for what, number in steps:
                free = 1000 - settled - sum(upper for _, upper in held)
                if what == "hold" and number <= free:
                    held.append((purse.hold(tokens(number)), number))
                elif what == "hold":
                    with pytest.raises(BudgetExceeded):
                        purse.hold(tokens(number))
                elif what == "settle" and held:
                    hold, upper = held.pop(number % len(held))
                    hold.settle(tokens(min(number, upper)))
                    settled += min(number, upper)
                elif what == "renew":
                    purse.renew()
                    assert ledger.spent(account=ACCOUNT).tokens == settled
                assert purse.remaining("tokens") == 1000 - settled - sum(u for _, u in held)
            purse.close()
        assert ledger.spent(account=ACCOUNT).tokens == settled + sum(upper for _, upper in held)
    assert not list(path.parent.glob("*.counter"))


_KILLED = """
import os, sys
from pathlib import Path
from thrifty.core.budget import Budget, Cost
from thrifty.core.ledger import Ledger
from thrifty.core.purse import Purse

path, dies_at = Path(sys.argv[1]), int(sys.argv[2])
calls = 0

def counted(real):
    def wrapper(*arguments, **named):
        global calls
        calls += 1
        if calls == dies_at:
            os._exit(9)
        return real(*arguments, **named)
    return wrapper

with Ledger(path) as ledger:
    with ledger.stage("serve", "first", account="key alice", limit=Budget(tokens=1000.0)) as stage:
        purse = Purse(stage, "serve", timed=False)
        purse.hold(Cost(tokens=100.0)).settle(Cost(tokens=40.0))
        purse.hold(Cost(tokens=200.0))
        import thrifty.core.counter as counter
        from thrifty.core.journal import Journal
        Journal.execute = counted(Journal.execute)
        Journal.insert = counted(Journal.insert)
        counter.Counter.write = counted(counter.Counter.write)
        counter.Counter.remove = counted(counter.Counter.remove)
        counter.Counter.__init__ = counted(counter.Counter.__init__)
        purse.renew()
        os._exit(0 if calls < dies_at else 8)
"""


@pytest.mark.parametrize("dies_at", range(1, 12))
def test_a_kill_within_a_renewal_forgets_nothing(path, dies_at):
    done = subprocess.run([sys.executable, "-c", _KILLED, str(path), str(dies_at)], check=False)
    assert done.returncode in (0, 9)
    with Ledger(path) as ledger:
        ledger.recover()
        assert ledger.spent(account=ACCOUNT).tokens == 240.0
    assert not list(path.parent.glob("*.counter"))


def test_the_kills_reach_all_of_it(path):
    """The last one of the test above comes after the renewal is done."""
    done = subprocess.run([sys.executable, "-c", _KILLED, str(path), "11"], check=False)
    assert done.returncode == 0


def test_a_renewal_that_fails_leaves_the_purse_as_it_was(path, monkeypatch):
    with (
        Ledger(path) as ledger,
        ledger.stage("serve", "first", account=ACCOUNT, limit=LIMIT) as stage,
    ):
        purse = Purse(stage, "serve", timed=False)
        purse.hold(tokens(40)).settle(tokens(40))
        hold = purse.hold(tokens(200))

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as broken:
            broken.setattr("thrifty.core.ledger.Counter", full)
            with pytest.raises(OSError, match="No space"):
                purse.renew()
        assert purse.remaining("tokens") == 760
        assert ledger.spent(account=ACCOUNT).tokens == 0
        purse.renew()
        hold.settle(tokens(150))
        purse.close()
        assert ledger.spent(account=ACCOUNT).tokens == 190
        assert [charge["lost"] for charge in ledger.charges()] == [False] * 2
