"""Sixteen who spend from one ledger at once, each with a connection of its own, against a model in
whole numbers: some die, some use more than they reserved, and the time of day is anything."""

import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from thrifty.core import ledger as ledger_module
from thrifty.core import spending
from thrifty.core.budget import Budget, Cost, Rates
from thrifty.core.ledger import BudgetExceeded, Ledger

NUM_SPENDERS = 16
FLOPS, CENTS = 1000, 400
"""The limits. A cent is no binary fraction: a sum of floats would drift."""
DAY = 86400.0
spenders = st.integers(0, NUM_SPENDERS - 1)


def cost(flops: int, cents: int) -> Cost:
    return Cost(flops=float(flops), dollars=cents / 100)


@dataclass
class Held:
    """An open lease: what it reserved, what it has used, and whose it is; None: of one who died."""

    flops: int
    cents: int
    lease: spending.Lease | None
    start: float
    used_flops: int = 0
    used_cents: int = 0
    ticked_at: float = 0.0


@dataclass
class Model:
    now: float = 0.0
    day: str = "2026-01-01"
    held: dict[int, Held] = field(default_factory=dict)
    """By the number of their lease."""
    flops: int = 0
    cents: int = 0
    seconds: float = 0.0
    num_charges: int = 0
    over: int = 0
    """FLOPs that were used and had not been reserved."""

    def book(self, lease_id: int, until: float) -> Held:
        held = self.held.pop(lease_id)
        self.flops += held.used_flops
        self.cents += held.used_cents
        self.seconds += until - held.start
        self.num_charges += 1
        self.over += max(held.used_flops - held.flops, 0)
        return held


class TogetherMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger.sqlite"
        self.model = Model()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(spending, "time", SimpleNamespace(monotonic=lambda: self.model.now))
        self.patch.setattr(ledger_module, "_now", lambda: self.model.day)
        self.patch.setattr("os.fsync", lambda _: None)
        limits = Budget(flops=float(FLOPS), dollars=CENTS / 100)
        Ledger.create(self.path, limits, Rates(dollars_per_second=0.0)).close()
        self.ledgers: dict[int, Ledger] = {}
        self.stages: dict[int, spending.Stage] = {}
        self.leases: dict[int, int] = {}  # of those who have one open, its number

    def teardown(self) -> None:
        for ledger in self.ledgers.values():
            ledger.close()
        self.patch.undo()
        self.folder.cleanup()

    def ledger(self, who: int) -> Ledger:
        """Opened when it is first asked for, as by a process that starts."""
        if who not in self.ledgers:
            ledger = self.ledgers[who] = Ledger(self.path)
            ledger._journal._db.execute("PRAGMA synchronous = OFF")  # no power cut is simulated
            # Left by an exception, a stage stays to be resumed, and its object stays usable.
            with suppress(KeyError), ledger.stage(f"stage {who}", "x") as self.stages[who]:
                raise KeyError
        return self.ledgers[who]

    @rule(who=spenders, flops=st.integers(0, 300), cents=st.integers(0, 120))
    def reserve(self, who, flops, cents):
        if who in self.leases:
            return
        self.ledger(who)
        all_held = self.model.held.values()
        then_flops = self.model.flops + sum(h.flops for h in all_held) + flops
        then_cents = self.model.cents + sum(h.cents for h in all_held) + cents
        fits = then_flops <= FLOPS and then_cents <= CENTS
        if not fits:
            with pytest.raises(BudgetExceeded) as refusal:
                self.stages[who].lease("work", cost(flops, cents))
            assert refusal.value.resource == ("flops" if then_flops > FLOPS else "dollars")
            return
        lease, now = self.stages[who].lease("work", cost(flops, cents)), self.model.now
        self.leases[who] = lease.id
        self.model.held[lease.id] = Held(flops, cents, lease, now, ticked_at=now)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), more=st.sampled_from([0, 0, 0, 0, 50]))
    def tick(self, data, more):
        """A step within what was reserved, or one that took ``more``: it is booked in full."""
        held = self.model.held[self.leases[data.draw(st.sampled_from(sorted(self.leases)))]]
        flops = data.draw(st.integers(0, max(held.flops - held.used_flops, 0))) + more
        cents = data.draw(st.integers(0, max(held.cents - held.used_cents, 0)))
        held.lease.tick(cost(flops, cents), steps=1)
        held.used_flops += flops
        held.used_cents += cents
        held.ticked_at = self.model.now

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def settle(self, data):
        who = data.draw(st.sampled_from(sorted(self.leases)))
        held = self.model.book(self.leases.pop(who), self.model.now)
        for _ in range(2):  # the second time changes nothing
            held.lease.settle()

    @precondition(lambda self: self.ledgers)
    @rule(data=st.data())
    def die(self, data):
        """Nobody settles; another process goes on in its place."""
        who = data.draw(st.sampled_from(sorted(self.ledgers)))
        self.ledgers.pop(who).close()
        if who in self.leases:
            self.model.held[self.leases.pop(who)].lease = None

    @precondition(lambda self: not self.leases)
    @rule(who=spenders)
    def recover(self, who):
        """Only while nobody spends: whoever recovers has the run's lock."""
        self.ledger(who).recover()
        for lease_id, held in sorted(self.model.held.items()):
            self.model.book(lease_id, held.ticked_at)

    @rule(seconds=st.integers(0, 50))
    def work(self, seconds):
        self.model.now += seconds

    @rule(day=st.sampled_from(["1970-01-01", "2026-01-02", "2036-11-27"]))
    def set_the_clock(self, day):
        """Ten years on, or back before everything: nothing goes by the time of day."""
        self.model.day = day

    @invariant()
    def what_is_spent_and_held_is_what_happened(self):
        ledger, held = self.ledger(0), self.model.held.values()
        spent, reserved = ledger.spent(), ledger.reserved()
        assert spent.flops == self.model.flops
        assert spent.seconds == self.model.seconds
        assert reserved.flops == sum(h.flops for h in held)
        assert reserved.dollars == pytest.approx(sum(h.cents for h in held) / 100)
        (micro,) = ledger._journal.rows("SELECT TOTAL(microdollars) AS all_of_it FROM charges")
        assert micro["all_of_it"] == self.model.cents * 10_000  # to the last millionth
        assert len(ledger.charges()) == self.model.num_charges

    @invariant()
    def no_limit_is_passed_but_by_what_a_step_took_more_than_it_said(self):
        held = self.model.held.values()
        assert self.model.cents + sum(h.cents for h in held) <= CENTS
        left = FLOPS - self.model.flops - sum(h.flops for h in held)
        assert self.ledger(0).left()["flops"] == left
        assert left >= -self.model.over
        if left <= 0:
            with pytest.raises(BudgetExceeded):
                self.stages[0].require(cost(1, 0))


TestTogetherMachine = TogetherMachine.TestCase
TestTogetherMachine.settings = settings(max_examples=12, stateful_step_count=30)
