"""The ledger against a model in plain Python, under random sequences of what can happen to it."""

import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from thrifty.core import spending
from thrifty.core.budget import Budget, Cost, Rates
from thrifty.core.ledger import BudgetExceeded, Ledger

RATES = Rates(dollars_per_second=0.5, watts=2.0)
LIMITS = {
    "budget": Budget(flops=1000.0, seconds=300.0, dollars=120.0, memory_bytes=50.0),
    "control": Budget(flops=500.0),
}
STAGES = {"train": "budget", "select": "budget", "retrain": "control"}
names = st.sampled_from(list(STAGES))


@dataclass
class Held:
    """An open lease: what it reserved, and what it had used by its last tick."""

    flops: int
    seconds: int
    start: float
    step: int
    lease: spending.Lease
    used: int = 0
    ticked_at: float = 0.0
    steps: int = 0


@dataclass
class Booked:
    stage: str
    step_to: int
    flops: int
    seconds: float
    lost: bool


@dataclass
class Model:
    now: float = 1000.0
    held: dict[str, Held] = field(default_factory=dict)
    booked: list[Booked] = field(default_factory=list)

    def of(self, account: str) -> list[Booked]:
        return [b for b in self.booked if STAGES[b.stage] == account]

    def open(self, account: str) -> list[Held]:
        return [held for stage, held in self.held.items() if STAGES[stage] == account]


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger.sqlite"
        self.model = Model()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(spending, "time", SimpleNamespace(monotonic=lambda: self.model.now))
        self.patch.setattr("os.fsync", lambda _: None)
        Ledger.create(self.path, LIMITS["budget"], RATES).close()
        self.start_process()

    def teardown(self) -> None:
        self.ledger.close()
        self.patch.undo()
        self.folder.cleanup()

    def start_process(self) -> None:
        self.ledger = Ledger(self.path)
        self.ledger._journal._db.execute("PRAGMA synchronous = OFF")  # no power cut is simulated
        self.stages = {}
        for name, account in STAGES.items():
            limit = None if account == "budget" else LIMITS[account]
            # Left by an exception, a stage stays to be resumed, and its object stays usable.
            stage = self.ledger.stage(name, "x", account=account, limit=limit)
            with suppress(KeyError), stage as self.stages[name]:
                raise KeyError

    @rule(
        name=names,
        flops=st.integers(0, 400),
        seconds=st.integers(0, 120),
        peak=st.sampled_from([1.0, 50.0, 51.0]),
        step=st.integers(0, 9),
    )
    def reserve(self, name, flops, seconds, peak, step):
        if name in self.model.held:
            return
        account = STAGES[name]
        limit = LIMITS[account]
        upper = Cost(flops=flops, seconds=seconds, peak_memory_bytes=peak)
        booked, held = self.model.of(account), self.model.open(account)
        flops_then = sum(b.flops for b in booked) + sum(h.flops for h in held) + flops
        seconds_then = sum(b.seconds for b in booked) + sum(h.seconds for h in held) + seconds
        fits = (
            flops_then <= limit.flops
            and seconds_then <= (limit.seconds or seconds_then)
            and seconds_then / 2 <= (limit.dollars or seconds_then)
            and peak <= (limit.memory_bytes or peak)
        )
        try:
            lease = self.stages[name].lease("work", upper, step=step)
        except BudgetExceeded:
            assert not fits
        else:
            assert fits
            now = self.model.now
            self.model.held[name] = Held(flops, seconds, now, step, lease, ticked_at=now)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), steps=st.integers(0, 3))
    def tick(self, data, steps):
        """One lease reports work within its reservation; the clock of all of them runs on."""
        held = self.model.held[data.draw(st.sampled_from(sorted(self.model.held)))]
        flops = data.draw(st.integers(0, held.flops - held.used))
        left = min(h.start + h.seconds - self.model.now for h in self.model.held.values())
        self.model.now += data.draw(st.integers(0, int(left)))
        held.lease.tick(Cost(flops=flops, seconds=7, peak_memory_bytes=1.0), steps=steps)
        held.used += flops
        held.steps += steps
        held.ticked_at = self.model.now

    @rule(name=names, lost=st.booleans())
    def settle(self, name, lost):
        held = self.model.held.pop(name, None)
        if held is None:
            return
        for _ in range(2):  # the second time changes nothing
            held.lease.settle(lost=lost)
        seconds = self.model.now - held.start
        self.model.booked.append(Booked(name, held.step + held.steps, held.used, seconds, lost))

    @rule(name=names, step=st.integers(0, 12))
    def roll_back(self, name, step):
        lost = self.stages[name].roll_back(step, "")
        anew = [b for b in self.model.booked if b.stage == name and b.step_to > step and not b.lost]
        assert (lost.flops, lost.seconds) == (sum(b.flops for b in anew),
                                              sum(b.seconds for b in anew))  # fmt: skip
        for booked in anew:
            booked.lost = True

    @rule(times=st.integers(1, 2))
    def crash_and_recover(self, times):
        self.ledger.close()
        lost = 0
        for name, held in sorted(self.model.held.items(), key=lambda item: item[1].lease.id):
            seconds = held.ticked_at - held.start
            step_to = held.step + held.steps
            self.model.booked.append(Booked(name, step_to, held.used, seconds, True))
            lost += held.used
        self.model.held.clear()
        self.start_process()
        assert self.ledger.recover().flops == lost
        for _ in range(times - 1):
            assert self.ledger.recover() == Cost()

    @invariant()
    def what_is_booked_is_what_happened(self):
        for account, limit in LIMITS.items():
            booked, held = self.model.of(account), self.model.open(account)
            spent = self.ledger.spent(account=account)
            assert spent.flops == sum(b.flops for b in booked)
            assert spent.seconds == sum(b.seconds for b in booked)
            assert spent.dollars == sum(b.seconds for b in booked) / 2
            assert spent.joules == sum(b.seconds for b in booked) * 2
            lost = self.ledger.spent(account=account, lost=True)
            assert lost.flops == sum(b.flops for b in booked if b.lost)
            reserved = self.ledger.reserved(account)
            assert (reserved.flops, reserved.seconds) == (
                sum(h.flops for h in held),
                sum(h.seconds for h in held),
            )
            assert limit.exceeded_by(spent + reserved) is None
        rows = self.ledger.charges()
        assert [(r["stage"], r["flops"], r["step_to"], r["lost"]) for r in rows] == [
            (b.stage, b.flops, b.step_to, b.lost) for b in self.model.booked
        ]
        counters = list(self.path.parent.glob("*.counter"))
        assert len(counters) == len(self.model.held)


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=40, stateful_step_count=30)
