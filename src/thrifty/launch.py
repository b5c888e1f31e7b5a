"""Starts the ranks of a run that trains on several devices, where nobody has: ``thrifty run RUN``.

As ``torchrun --nproc-per-node N -m thrifty run RUN`` does, which works too; but here the exit code
is that of rank 0, and after a signal the ranks have the time that finishing a step and saving it
takes. Whether they live, and whether this process does, they see to themselves (``rank_watch.py``).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from thrifty import rank_watch, stop_signals
from thrifty.core.plan import Plan

_GRACE_SECONDS = 10.0
"""That the others have to end by themselves when a rank failed."""
_LOOK_SECONDS = 0.1


def needed(plan: Plan) -> bool:
    """Whether this process is to start the ranks of ``plan``, rather than being one of them."""
    return plan.training.devices > 1 and "WORLD_SIZE" not in os.environ


def run_ranks(count: int, arguments: Sequence[str]) -> int:
    """``thrifty ARGUMENTS`` as so many ranks on this machine; the exit code of rank 0, or of the
    rank that failed."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared[rank_watch.PARENT_VARIABLE] = str(os.getpid())
    # As torchrun does: the ranks share the cores.
    shared["OMP_NUM_THREADS"] = os.environ.get(
        "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count))
    )
    ranks: list[subprocess.Popen[bytes]] = []
    with _passing_on(ranks):
        for number in range(count):
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "thrifty", *arguments],
                    env={**os.environ, **shared, **own},
                )
            )
        return _ended(ranks)


def _ended(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; where one fails the others have a little time, then they are ended."""
    while all(one.poll() in (None, 0) for one in ranks):
        if all(one.poll() == 0 for one in ranks):
            return 0
        time.sleep(_LOOK_SECONDS)
    failed = next(one for one in ranks if one.poll() not in (None, 0))
    if failed.returncode < 0:
        name = signal.Signals(-failed.returncode).name
        print(f"rank {ranks.index(failed)} was ended by {name}: so are the others", file=sys.stderr)
    until = time.monotonic() + _GRACE_SECONDS
    for one in ranks:
        try:
            one.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.kill()
            one.wait()
    first = ranks[0].returncode
    code = first if first > 0 else failed.returncode
    return code if code > 0 else stop_signals.RESUMABLE


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def _passing_on(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Signals go to all ranks. Of a terminal's they hear twice, within a moment: it counts once."""

    def pass_on(number: int, frame: object) -> None:
        for one in ranks:
            if one.poll() is None:
                one.send_signal(number)

    before = {
        number: signal.signal(number, pass_on)
        for number in stop_signals.SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
