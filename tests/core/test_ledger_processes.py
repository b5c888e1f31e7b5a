"""The ledger under real processes: killed at random instants, and sixteen spending at once."""

import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from thrifty.core import ledger as ledger_module
from thrifty.core.budget import Budget, Cost, Rates
from thrifty.core.ledger import BudgetExceeded, Ledger


def start(code, *arguments):
    arguments = [str(a) for a in arguments]
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE)


WORKER = """
import os, sys
from thrifty.core.budget import Cost
from thrifty.core.ledger import Ledger
path, diary = sys.argv[1:]
ledger = Ledger(path)
ledger.recover()
diary = os.open(diary, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
print("started", flush=True)
with ledger.stage("train", "full") as stage:
    step = 0
    while True:
        lease = stage.lease("train", Cost(flops=5), step=step)
        for _ in range(5):
            lease.tick(Cost(flops=1), steps=1)
            os.write(diary, b".")  # the worker's own count
        lease.settle()
        step += 5
"""


def test_killed_at_any_instant_nothing_is_forgotten_or_counted_twice(tmp_path):
    path, diary = tmp_path / "ledger.sqlite", tmp_path / "diary"
    Ledger.create(path, Budget(flops=1e9)).close()
    kills = 5
    for kill in range(kills):
        worker = start(WORKER, path, diary)
        with worker:
            assert worker.stdout.readline() == b"started\n"
            time.sleep(random.Random(kill).uniform(0.02, 0.2))
            worker.kill()
    with Ledger(path) as ledger:
        ledger.recover()
        ticks = diary.stat().st_size
        # A kill may fall between a tick and the diary's dot; it cannot fall anywhere else.
        assert ticks <= ledger.spent().flops <= ticks + kills
        assert ledger.reserved() == Cost()
        assert all(charge["flops"] == 5 for charge in ledger.charges() if not charge["lost"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["diary", "ledger.sqlite"]


NUM_SPENDERS, NUM_KILLS = 16, 20
LIMIT = Budget(flops=2000.0, dollars=200.0)
UNIT = Cost(flops=1.0, dollars=0.1)  # ten cents are no binary fraction


def spend(path, number, seed):
    """Reserve, tick, settle until not even one unit fits; the diary counts what was ticked."""
    draw = random.Random(seed)
    # The time of day jumps: forty years back, ten years on.
    ledger_module._now = lambda: draw.choice(("1986-11-27", "2026-11-27", "2036-11-27"))
    diary = os.open(f"{path}.diary-{number}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with Ledger(path) as ledger, ledger.stage(f"{number}", "x") as stage:
        while True:
            upper = draw.randint(1, 9)
            try:
                lease = stage.lease("work", UNIT * upper)
            except BudgetExceeded:
                if upper == 1:
                    return
                continue
            for _ in range(draw.randint(0, upper)):
                lease.tick(UNIT, steps=1)
                os.write(diary, b".")
            lease.settle()


def taken(reader):
    """Spent and reserved at one instant."""
    reader._journal._db.execute("BEGIN")
    total = reader.spent() + reader.reserved()
    reader._journal._db.execute("ROLLBACK")
    return total


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, to start at once")
@pytest.mark.long
def test_sixteen_processes_that_are_killed_never_pass_a_limit_together():
    """Each goes on in another process; what it had reserved stays so until it is recovered."""
    memory = Path("/dev/shm")  # to sync there takes no time
    draw, kills = random.Random(9), Counter()
    start = time.monotonic()
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        path = Path(folder, "ledger.sqlite")
        Ledger.create(path, LIMIT, Rates(dollars_per_second=0.0)).close()

        def started(number):
            process = multiprocessing.get_context("fork").Process(
                target=spend, args=(path, number, f"{number}-{kills[number]}")
            )
            process.start()
            return process

        spenders = {number: started(number) for number in range(NUM_SPENDERS)}
        with Ledger(path, read_only=True) as reader:
            while any(spender.is_alive() for spender in spenders.values()):
                time.sleep(draw.uniform(0, 0.01))
                assert LIMIT.exceeded_by(taken(reader)) is None
                number = draw.randrange(NUM_SPENDERS)
                if kills.total() < NUM_KILLS and spenders[number].is_alive():
                    spenders[number].kill()
                    spenders[number].join()
                    kills[number] += 1
                    spenders[number] = started(number)
        assert [spender.exitcode for spender in spenders.values()] == [0] * NUM_SPENDERS
        assert kills.total() > 0  # all of them, where the machine has time for it
        with Ledger(path) as ledger:
            orphaned = ledger.reserved().flops
            assert ledger.spent().flops + orphaned == LIMIT.flops  # not one more would have fitted
            ledger.recover()
            assert ledger.reserved() == Cost()
            for number in range(NUM_SPENDERS):
                # A kill may fall between a tick and the diary's dot; it cannot fall anywhere else.
                ticks = Path(f"{path}.diary-{number}").stat().st_size
                assert ticks <= ledger.spent(stage=f"{number}").flops <= ticks + kills[number]
            with ledger.stage("last", "x") as stage:
                rest = stage.everything().flops
                with stage.spending("work", UNIT * rest) as lease:
                    lease.tick(UNIT * rest, steps=1)
                with pytest.raises(BudgetExceeded):
                    stage.lease("work", Cost(flops=1))
            assert ledger.spent().flops == LIMIT.flops
            (micro,) = ledger._journal.rows("SELECT SUM(microdollars) AS all_of_it FROM charges")
            assert micro["all_of_it"] == 200_000_000  # to the last millionth of a dollar
            longest = time.monotonic() - start  # whatever the time of day was said to be
            assert all(0 <= charge["seconds"] <= longest for charge in ledger.charges())


@pytest.mark.slow
def test_ticks_per_second(tmp_path):
    """A tick must not be felt in a training step: printed, not asserted (aim: 100,000/s)."""
    with (
        Ledger.create(tmp_path / "ledger.sqlite", Budget(flops=1e18)) as ledger,
        ledger.stage("train", "full") as stage,
    ):
        step, num_ticks, num_leases = Cost(flops=1e9, tokens=512.0), 200_000, 100
        with stage.spending("train", step * num_ticks) as lease:
            start = time.perf_counter()
            for _ in range(num_ticks):
                lease.tick(step, steps=1)
            ticks = num_ticks / (time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(num_leases):
            with stage.spending("train", step):
                pass
        leases = num_leases / (time.perf_counter() - start)
    print(f"{ticks:,.0f} ticks/s, {leases:,.0f} leases/s")
