"""Spending at the same time: nothing is overspent, nothing is forgotten."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thrifty.core.budget import Budget, Cost, Rates
from thrifty.core.ledger import BudgetExceeded, Ledger
from thrifty.core.purse import Purse

FREE = Rates(dollars_per_second=0.0)


def ledger_of(folder: Path, budget: Budget) -> Ledger:
    return Ledger.create(folder / "ledger.sqlite", budget, FREE)


def test_holds_what_it_can_take_and_gives_the_rest_back(tmp_path: Path) -> None:
    with ledger_of(tmp_path, Budget(tokens=100)) as ledger, ledger.stage("serve", "x") as stage:
        purse = Purse(stage, "serve")
        one = purse.hold(Cost(tokens=60))
        with pytest.raises(BudgetExceeded, match="40 tokens is left and not held by others") as no:
            purse.hold(Cost(tokens=50))
        assert no.value.resource == "tokens"
        one.settle(Cost(tokens=10))
        one.settle(Cost(tokens=50))  # settled is settled
        assert purse.remaining("tokens") == 90
        assert purse.remaining("flops") is None
        purse.hold(Cost(tokens=90)).settle(Cost(tokens=90))
        with pytest.raises(BudgetExceeded):
            purse.hold(Cost(tokens=1))
        assert purse.close().tokens == 100
        assert purse.close().tokens == 100
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.spent().tokens == 100
        assert ledger.left() == {"tokens": 0.0}


@given(
    amounts=st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), max_size=30),
    limit=st.integers(1, 200),
)
@pytest.mark.long
def test_never_passes_the_limit_whatever_the_order(
    amounts: list[tuple[int, float]], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("purse")
    with ledger_of(folder, Budget(tokens=limit)) as ledger, ledger.stage("serve", "x") as stage:
        purse = Purse(stage, "serve", timed=False)
        held, settled = [], 0.0
        for number, (upper, share) in enumerate(amounts):
            try:
                held.append((purse.hold(Cost(tokens=upper)), upper * share))
            except BudgetExceeded:
                assert settled + purse.held.tokens + upper > limit
            if held and number % 3 == 2:
                hold, cost = held.pop(0)
                hold.settle(Cost(tokens=cost))
                settled += cost
            assert settled + purse.held.tokens <= limit * (1 + 1e-9)
            assert purse.spent.tokens == pytest.approx(settled)
        left_open = purse.held.tokens
        assert purse.close().tokens == pytest.approx(settled + left_open)


def test_a_kill_leaves_what_was_settled_and_all_that_was_held(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, Budget(tokens=100, dollars=1))
    with ledger.stage("serve", "x") as stage:
        purse = Purse(stage, "serve")
        purse.hold(Cost(tokens=50, dollars=0.5)).settle(Cost(tokens=20, dollars=0.25))
        purse.hold(Cost(tokens=30, dollars=0.125))
        ledger._counters.clear()  # as a process that is no more: nobody settles
        stage._open = None
    ledger.close()
    with Ledger(tmp_path / "ledger.sqlite") as after:
        assert after.recover().tokens == 30
        assert after.spent().tokens == 50
        assert after.spent().dollars == 0.375
        assert after.spent(lost=False).tokens == 20
        assert after.spent(lost=False).dollars == 0.25
        assert after.faults() == []


def test_what_was_kept_before_a_renewal_is_charged_once(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, Budget(tokens=100))
    with ledger.stage("serve", "x") as stage:
        purse = Purse(stage, "serve", timed=False)
        purse.hold(Cost(tokens=30)).settle(Cost(tokens=20))
        purse.renew()
        purse.hold(Cost(tokens=6)).settle(Cost(tokens=5))
        purse.hold(Cost(tokens=7))
        ledger._counters.clear()  # as a process that is no more
        stage._open = None
    ledger.close()
    with Ledger(tmp_path / "ledger.sqlite") as after:
        assert after.recover().tokens == 7
        assert after.spent(lost=False).tokens == 25
        assert after.spent().tokens == 32


def test_what_nobody_has_kept_is_lost_where_it_ends_badly(tmp_path: Path) -> None:
    limit = Budget(tokens=100, joules=1e9)
    rates = Rates(dollars_per_second=1.0, watts=1e6)
    with (
        Ledger.create(tmp_path / "ledger.sqlite", limit, rates) as ledger,
        suppress(KeyError),
        ledger.stage("decode", "x") as stage,
        Purse(stage, "decode") as purse,
    ):
        purse.hold(Cost(tokens=30)).settle(Cost(tokens=20))
        time.sleep(0.01)
        purse.hold(Cost(tokens=9)).settle(Cost(tokens=5), kept=False)
        purse.hold(Cost(tokens=7))
        raise KeyError
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        kept, lost = (ledger.spent(lost=lost) for lost in (False, True))
        assert (kept.tokens, lost.tokens) == (20, 12)
        # The time until the last that was kept; then 10 ms and more.
        assert kept.seconds < lost.seconds + kept.seconds - 0.01
        assert kept.joules == pytest.approx(1e6 * kept.seconds)
        assert kept.dollars == pytest.approx(kept.seconds, abs=1e-6)
        found = [(charge["lost"], charge["step_to"]) for charge in ledger.charges()]
        assert found == [(False, 0), (True, 0)]
        (part,) = ledger._journal.rows("SELECT reserved FROM leases WHERE id = 2")
        assert json.loads(part["reserved"])["tokens"] == 20
        assert ledger.faults() == []
        assert ledger.reserved() == Cost()


def test_where_it_ends_well_nothing_is_lost(tmp_path: Path) -> None:
    with ledger_of(tmp_path, Budget(tokens=100)) as ledger:
        with ledger.stage("decode", "x") as stage, Purse(stage, "decode") as purse:
            purse.hold(Cost(tokens=30)).settle(Cost(tokens=20))
            purse.hold(Cost(tokens=9)).settle(Cost(tokens=5), kept=False)
        assert ledger.spent(lost=False).tokens == 25
        assert len(ledger.charges()) == 1


def test_many_threads_together_spend_no_more_than_there_is(tmp_path: Path) -> None:
    with ledger_of(tmp_path, Budget(tokens=1000)) as ledger, ledger.stage("serve", "x") as stage:
        purse = Purse(stage, "serve", timed=False)
        done: list[float] = []

        def client() -> None:
            while True:
                try:
                    hold = purse.hold(Cost(tokens=7))
                except BudgetExceeded:
                    return
                hold.settle(Cost(tokens=3))
                done.append(3.0)

        threads = [threading.Thread(target=client) for _ in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 990 <= sum(done) <= 1000
        assert purse.close().tokens == sum(done)


def test_an_unknown_price_is_refused_where_dollars_are_limited(tmp_path: Path) -> None:
    with ledger_of(tmp_path, Budget(dollars=1)) as ledger, ledger.stage("serve", "x") as stage:
        purse = Purse(stage, "serve")
        with pytest.raises(BudgetExceeded, match="not known"):
            purse.hold(Cost(dollars=None))
        purse.close()


@pytest.mark.parametrize("tokens", [-1.0, float("nan"), float("inf")])
def test_no_cost_is_no_number(tmp_path: Path, tokens: float) -> None:
    with ledger_of(tmp_path, Budget(tokens=10)) as ledger, ledger.stage("serve", "x") as stage:
        purse = Purse(stage, "serve")
        hold = purse.hold(Cost(tokens=1))
        with pytest.raises(ValueError, match="cannot be settled"):
            hold.settle(Cost(tokens=tokens))
        assert purse.close().tokens == 1


def test_seconds_are_the_clock_s_or_those_that_are_settled(tmp_path: Path) -> None:
    with ledger_of(tmp_path, Budget(seconds=100)) as ledger:
        with ledger.stage("serve", "x") as stage:
            purse = Purse(stage, "serve", timed=False)
            purse.hold(Cost(seconds=50)).settle(Cost(seconds=20))
            assert purse.close().seconds == 20
        with ledger.stage("decode", "x") as stage:
            purse = Purse(stage, "decode")
            purse.hold(Cost(seconds=50)).settle(Cost(seconds=20))
            assert purse.close().seconds < 10
