"""Each rank of a run watches the others, so that one that is killed or hangs ends them all.

What ranks do together waits without a limit that would help: one may score for hours while the
others wait for it. So each process says twice a second that it lives, from a thread of its own,
where the ranks found each other (torch's store); one that was not heard of for so long is dead, or
stopped, and whoever notices leaves as safely as a kill does. ``THRIFTY_RANK_PATIENCE`` sets how
many seconds that is.

Until they have joined, nobody can tell a rank that hangs from one whose libraries come from a slow
disk: whoever has not joined within ``JOINS`` times the patience leaves, be it that another never
came.

A process may live and its work hang. In a training step, where all is known to take about as long
each time, a rank whose step takes ``STEPS`` times the longest so far, and ``FLOOR`` times the
patience at the least, leaves too; elsewhere nobody can tell work from none.

Time is counted in own looks, not by a clock: a group that was stopped as a whole, by Ctrl-Z or a
scheduler, goes on when it is continued.

A signal to any rank is passed on to rank 0, which alone decides; so is the end of the process that
started the ranks, lest they go on as orphans. Rank 0 stops as it does alone; where it waits for
others it cannot, and leaves ``GRACE_SECONDS`` later.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from thrifty import stop_signals

PATIENCE_VARIABLE = "THRIFTY_RANK_PATIENCE"
PATIENCE_SECONDS = 60.0
PARENT_VARIABLE = "THRIFTY_RANKS_PARENT"
"""The process that started the ranks."""
JOINS = 10
STEPS = 20
FLOOR = 30
GRACE_SECONDS = 10.0
_LOOK_SECONDS = 0.5

_present: _Watch | None = None


@contextmanager
def watched(rank: int, world: int) -> Iterator[None]:
    """In the block this rank watches the others, and is watched. Raises ValueError for a patience
    that is none."""
    global _present
    _present = _Watch(rank, world, patience())
    try:
        with _present.at_work():
            yield
    finally:
        _present = None


def joined() -> None:
    """Called once the ranks have found each other; from then on each has to be heard of."""
    if _present is not None:
        _present.joined = True


def step_begins() -> None:
    """Called by the main thread; until ``step_ends`` it is known how long it may take."""
    if _present is not None:
        _present.looks_in_step = 0


def step_ends() -> None:
    if _present is not None and _present.looks_in_step is not None:
        _present.longest_step = max(_present.longest_step, _present.looks_in_step)
        _present.looks_in_step = None


def patience() -> float:
    """Seconds that a rank may be silent."""
    text = os.environ.get(PATIENCE_VARIABLE, "")
    try:
        seconds = float(text or PATIENCE_SECONDS)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(
            f"{PATIENCE_VARIABLE} is {text!r}, no number of seconds\n"
            f"hint: {PATIENCE_SECONDS:g} where it is not set"
        )
    return seconds


class _Watch:
    def __init__(self, rank: int, world: int, patience: float) -> None:
        self.rank, self.patience = rank, patience
        self.others = [number for number in range(world) if number != rank]
        self.every = min(_LOOK_SECONDS, patience / 4)
        self.joined = False
        self._looks_to_join = 0
        self.looks_in_step: int | None = None
        self.longest_step = 0
        self._heard = dict.fromkeys(self.others, b"")
        """Rank -> what it said: how many beats, and by which signal it was asked to stop."""
        self._said = self._heard
        """At the last look."""
        self._silent = dict.fromkeys(self.others, 0)
        self._asked = ""
        self._looks_since_asked = 0
        self._parent = int(os.environ.get(PARENT_VARIABLE, os.getppid()))
        self._over = threading.Event()
        self._signals, self._written = socket.socketpair()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The threads are daemons: what they wait for may never come."""
        for end in (self._signals, self._written):
            end.setblocking(False)
        # Also while the main thread waits for another rank, where it hears no signal.
        before = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        threads = [
            threading.Thread(target=work, daemon=True, name="rank watch")
            for work in (self._exchange, self._look)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            signal.set_wakeup_fd(before)
            threads[1].join()
            self._signals.close()
            self._written.close()

    # -- one thread says and hears, and may have to wait for the store ----------------------------

    def _exchange(self) -> None:
        from torch.distributed import TCPStore

        wait, store, beats = timedelta(seconds=self.patience), None, 0
        place = f"thrifty-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-"
        keys = [f"{place}{other}" for other in self.others]
        while not self._over.wait(self.every):
            beats += 1
            try:
                if store is None:
                    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                    store = TCPStore(address, port, timeout=wait, wait_for_workers=False)
                store.set(f"{place}{self.rank}", f"{beats} {self._asked}")
                self._heard = dict(zip(self.others, store.multi_get(keys), strict=True))
            except RuntimeError:  # silence, to whom it may concern
                continue

    # -- the other looks at what was heard --------------------------------------------------------

    def _look(self) -> None:
        while not self._over.wait(self.every):
            if self.joined:
                self._look_at_others()
            else:
                self._look_at_joining()
            self._look_at_step()
            self._look_for_signals()
            if self.rank == 0:
                self._look_for_wishes()

    def _look_at_joining(self) -> None:
        self._looks_to_join += 1
        most = JOINS * self.patience
        if self._looks_to_join * self.every > most:
            self._leave(f"the ranks have not joined within {most:g} s: one hangs, or never began")

    def _look_at_others(self) -> None:
        before, self._said = self._said, self._heard
        for other in self.others:
            silent = self._said[other] == before[other]
            self._silent[other] = self._silent[other] + 1 if silent else 0
            if self._silent[other] * self.every > self.patience:
                self._leave(f"rank {other} was not heard of for {self.patience:g} s")

    def _look_at_step(self) -> None:
        if self.looks_in_step is not None:
            self.looks_in_step += 1
            most = max(FLOOR * self.patience / self.every, STEPS * self.longest_step)
            if self.looks_in_step > most:
                self._leave(f"a training step has taken {most * self.every:.0f} s: a rank hangs")

    def _look_for_signals(self) -> None:
        try:
            numbers = self._signals.recv(64)
        except BlockingIOError:
            numbers = b""
        for number in numbers:
            long_ago = self._looks_since_asked * self.every > stop_signals.SAME_SECONDS
            if number == signal.SIGINT and long_ago:
                self._leave("left at once")
            if number in stop_signals.SIGNALS and not self._asked:
                self._asked = stop_signals.in_words(number)
        self._looks_since_asked += bool(self._asked)

    def _look_for_wishes(self) -> None:
        """As rank 0: those of others, and an orphan's; and its own, where it cannot follow it."""
        if not self._asked:
            for other, said in self._said.items():
                if wish := said.decode().partition(" ")[2]:
                    self._asked = f"rank {other} was {wish}"
            if os.getppid() != self._parent:
                self._asked = "the process that started the ranks is gone"
            if self._asked:
                stop_signals.ask(self._asked)
        waits = self._looks_since_asked * self.every > GRACE_SECONDS
        if waits and not stop_signals.is_saving():
            self._leave(f"{self._asked}, while it waited for another rank")

    def _leave(self, why: str) -> None:
        if not self._over.is_set():
            stop_signals.leave(f"rank {self.rank} leaves: {why}")
