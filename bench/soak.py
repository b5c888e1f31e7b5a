"""Kill the commands of a job at random instants with SIGKILL, give the same command again until the
job is done, and compare it with one that nobody touched.

    python bench/soak.py [--kills 10] [--minutes N] [--seed 0] [--folder DIR]

Two jobs side by side, each in processes of one thread: `thrifty plan`, `run` (select, train with
evaluations and a refresh of the selection, test), `report` and `decode`. A kill aims at a phase: it
waits until the ledger shows a lease of that phase open, then a random part of the time that the
untouched job took for it. Where it hit is read from the lease that it left.

All but kills and resumes must be 0: torn (a command that failed, or a committed checkpoint that was
not whole), unequal (jobs whose plan, chosen rows, weights, evaluations or answers differ), lost
(jobs whose ledger forgot something or booked useful work otherwise), overspent.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from killed_job import (
    AIMS,
    COMMANDS,
    EXACT,
    PHASE_OF,
    POLL_SECONDS,
    Job,
    Reference,
    different,
    material,
    misbooked,
)
from material import heading
from thrifty import display
from thrifty.run_folder import RunFolder

HAND = 18
"""Kills of a job at the most: what is left of it then is run to its end."""
MISSES = 4
"""Times in a row that an aim may not come before it is given up."""
AGAIN = ("train", "evaluate", "checkpoint")
"""Phases that come again and again."""
TORN = re.compile(r"checkpoint that is not whole: checkpoint-\d+: ")
"""Said of one whose manifest was there and whose files were not as it says."""
AMISS = ("torn", "unequal", "lost", "overspent")


class Deck:
    """What the kills aim at: each phase in turn, in an order of chance. Shared by the workers."""

    def __init__(self, kills: float, until: float, seed: int) -> None:
        self._left, self._until = kills, until
        self._size = min(HAND, kills / 2)
        self._missed: Counter[str] = Counter()
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._waiting: list[str] = []

    def hand(self) -> list[str]:
        """Aims for a job, in the order in which they come; none where it is done."""
        with self._lock:
            still = self._still_come()
            number = math.ceil(min(self._size, self._left)) if still and not self.is_over else 0
            while len(self._waiting) < number:
                some = list(still)
                self._random.shuffle(some)
                self._waiting += some
            dealt, self._waiting = self._waiting[:number], self._waiting[number:]
            self._left -= number
        order = list(AIMS)
        places = {aim: order.index("train" if aim in AGAIN else aim) for aim in order}
        return sorted(dealt, key=lambda aim: (places[aim], self._random.random()))

    def came(self, aim: str) -> None:
        """It was hit."""
        with self._lock:
            self._missed[aim] = 0

    def put_back(self, aims: list[str]) -> None:
        """Those that did not come: another job's, or for a phase given up another one."""
        with self._lock:
            self._missed.update(aims)
            still = self._still_come()
            self._waiting = [aim for aim in (*aims, *self._waiting) if aim in still]
            self._left += len(aims)

    def _still_come(self) -> list[str]:
        return [aim for aim in AIMS if self._missed[aim] <= MISSES]

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._until


class Worker(threading.Thread):
    """Brings one job after the other to its end through its kills."""

    def __init__(
        self, number: int, home: Path, reference: Reference, deck: Deck, seed: int
    ) -> None:
        super().__init__(name=f"worker-{number}")
        self.job = Job(home / f"broken-{number}", reference.job.arguments)
        self.reference, self.deck = reference, deck
        self.random = random.Random(f"{seed}-{number}")
        self.counts: Counter[str] = Counter()
        self.hit: Counter[str] = Counter()
        self.wasted_flops = self.total_flops = 0.0
        self.notes: list[str] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while hand := self.deck.hand():
                self._go_through(hand)
        except BaseException as error:
            self.error = error

    def _go_through(self, hand: list[str]) -> None:
        """One job, from its plan to its comparison."""
        self.job.begin()
        remembered = 0.0
        for command in COMMANDS:
            aims = [aim for aim in hand if AIMS[aim][0] == command]
            while True:
                aim = aims[0] if aims and not self.deck.is_over else None
                code, pid = self._attempt(command, aim)
                if TORN.search(said := self.job.said.read_text("utf-8", "replace")):
                    self._torn(said)
                if code is None:
                    self.deck.came(aims.pop(0))
                    self._note_kill(command, pid)
                    if self.job.folder.is_dir():
                        remembered = max(remembered, self.job.spent_flops())
                    self.counts["resumes"] += 1
                    continue
                if code:
                    self._torn(f"{command} ended with {code}: {said}")
                    self.deck.put_back(aims)
                    return
                break
            if aims:
                self.deck.put_back(aims)
        self._compare(remembered)

    def _attempt(self, command: str, aim: str | None) -> tuple[int | None, int]:
        """Run a command, to be killed in that phase. Its exit code, None where it was; its pid."""
        process = self.job.start(command)
        if aim is None or not self._wait_for(aim, process):
            return process.wait(), process.pid
        try:
            process.wait(self.random.random() * self.reference.seconds[aim])
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None, process.pid
        return process.returncode, process.pid

    def _wait_for(self, aim: str, process: subprocess.Popen[bytes]) -> bool:
        """Until it is in that phase; what comes again and again is passed by now and then."""
        passed = False
        while process.poll() is None:
            if not self.job.is_in(aim, process):
                passed = False
            elif not passed:
                if aim not in AGAIN or self.random.random() < 0.6:
                    return True
                passed = True
            time.sleep(POLL_SECONDS)
        return False

    def _note_kill(self, command: str, pid: int) -> None:
        self.counts["kills"] += 1
        where = command
        if command not in ("plan", "report"):
            found = [PHASE_OF.get(name, name) for _, name in self.job.open_leases(pid)]
            where = found[0] if found else "between"
        self.hit[where] += 1
        display.say(f"{self.name}: kill {self.counts['kills']}, {command} in {where}")

    def _compare(self, remembered: float) -> None:
        self.counts["jobs"] += 1
        one, other = self.reference.job.folder, self.job.folder
        if names := different(one, other):
            self.counts["unequal"] += 1
            self.notes.append(f"unequal: {', '.join(names)}")
        with RunFolder(other).reading() as ledger:
            self.counts["overspent"] += any(amount < 0 for amount in ledger.left().values())
            total = ledger.spent().flops
        with RunFolder(one).reading() as ledger:
            self.wasted_flops += total - ledger.spent().flops
        self.total_flops += total
        if total < remembered * (1 - EXACT) or (names := misbooked(one, other)):
            self.counts["lost"] += 1
            self.notes.append(f"lost: {', '.join(names) or 'less than was spent at a kill'}")

    def _torn(self, what: str) -> None:
        self.counts["torn"] += 1
        self.notes.append(f"torn: {what[-2000:]}")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, help="in all (default: 10, or as many as time allows)")
    parser.add_argument("--minutes", type=float, help="no kill after that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept; default: one that is removed")
    options = parser.parse_args()
    home = (options.folder or Path(tempfile.mkdtemp(prefix="thrifty-soak-"))).absolute()
    # One thread a process; nothing is taken over from another job.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"THRIFTY_CACHE": str(home / "cache"), "THRIFTY_ROWS_CACHE_GIB": "0"}
    began = time.monotonic()
    reference = Reference(Job(home / "untouched", material(home)))
    reference.job.begin()
    reference.run()
    prepared = time.monotonic() - began
    kills = options.kills or (math.inf if options.minutes else 10)
    until = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    deck = Deck(kills, until, options.seed)
    workers = [Worker(number, home, reference, deck, options.seed) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.monotonic() - began - prepared
    bad = report(workers, prepared, seconds)
    if not options.folder and not bad:
        shutil.rmtree(home, ignore_errors=True)
    return 1 if bad else 0


def report(workers: list[Worker], prepared: float, seconds: float) -> bool:
    """Print what happened; whether something is amiss."""
    counts = sum((worker.counts for worker in workers), Counter())
    hit = sum((worker.hit for worker in workers), Counter())
    print(heading("Soak: SIGKILL at random instants, two jobs side by side"))
    names = ("kills", "resumes", *AMISS, "jobs")
    values = [str(counts[name]) for name in names]
    print(display.table(list(names), [values], right="r" * len(names)))
    where = sorted(hit, key=lambda name: -hit[name])
    print("\nkilled in:")
    print(display.table(where, [[str(hit[name]) for name in where]], right="r" * len(where)))
    wasted, total = (sum(getattr(w, f"{n}_flops") for w in workers) for n in ("wasted", "total"))
    each = max(counts["kills"], 1)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cores = (used.ru_utime + used.ru_stime) / (prepared + seconds)
    print(
        f"\nwork lost to kills, and booked: {wasted:.3g} of {total:.3g} FLOPs\n"
        f"{seconds:.0f} s, {seconds / each:.1f} s a kill, after {prepared:.0f} s for the untouched "
        f"job, on {cores:.2f} cores"
    )
    for worker in workers:
        for note in worker.notes:
            print(note, file=sys.stderr)
        if worker.error is not None:
            raise worker.error
    return any(counts[name] for name in AMISS)


if __name__ == "__main__":
    sys.exit(main())
