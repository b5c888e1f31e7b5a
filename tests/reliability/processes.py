"""The command as a process of its own, looked at from outside while it works."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sqlite3
import sys
import termios
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from tests.runs import ledger
from thrifty import checkpoints, deadline
from thrifty.cli import main
from thrifty.core.counter import read_counter


class Running:
    """A process that was started, in a session of its own."""

    def __init__(self, pid: int, said: int) -> None:
        self.pid = pid
        self.said = ""
        """On standard output and standard error, as far as it was read."""
        self._file = said
        self._code: int | None = None

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def is_there(self) -> bool:
        """Whether it has not ended; what it says is read."""
        return not self._read(time.monotonic() + 0.001)

    def hear(self, words: str, seconds: float = 180.0) -> None:
        """Until it says ``words``."""
        self._read(time.monotonic() + seconds, words)
        assert words in self.said, self.said

    def ended(self, seconds: float = 180.0) -> int:
        """Its exit code. Whoever has what it says open has ended too by then."""
        if self._code is None:
            if not self._read(time.monotonic() + seconds):
                self.kill()
                raise AssertionError(f"it goes on after {seconds} s:\n{self.said}")
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._file)
        return self._code

    def hang_up(self, seconds: float = 180.0) -> int:
        """Close its terminal; its exit code."""
        os.close(self._file)
        wait_for(lambda: self._has_ended(), seconds)
        assert self._code is not None
        return self._code

    def _has_ended(self) -> bool:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        self._code = os.waitstatus_to_exitcode(status)
        return pid != 0

    def kill(self) -> None:
        """It and what it started, whatever state it is in."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _read(self, until: float, words: str | None = None) -> bool:
        """Whether that came, or the end."""
        while words is None or words not in self.said:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._file], [], [], left)[0]:
                return False
            if not (data := os.read(self._file, 65536)):
                return words is None
            self.said += data.decode(errors="replace")
        return True


def start(*command: str, terminal: bool = False, **environment: str) -> Running:
    """``thrifty COMMAND``, forked from this process, which has loaded everything already;
    ``terminal``: it has one of its own."""
    ours, theirs = os.openpty() if terminal else os.pipe()
    return _started(ours, theirs, command, environment)


def start_anew(*arguments: str, **environment: str) -> Running:
    """``python ARGUMENTS``."""
    return _started(*os.pipe(), arguments, environment, program=True)


def _started(
    ours: int,
    theirs: int,
    command: tuple[str, ...],
    environment: dict[str, str],
    *,
    program: bool = False,
) -> Running:
    if pid := os.fork():
        os.close(theirs)
        return Running(pid, ours)
    code = 70
    try:
        os.close(ours)
        os.setsid()
        if os.isatty(theirs):
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        for file in (1, 2):
            os.dup2(theirs, file)
        os.close(theirs)
        # Whoever runs these tests in the background may have handed down an ignored SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(environment)
        if program:
            os.execv(sys.executable, [sys.executable, *command])
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        torch.set_num_threads(1)  # the threads of the process that was forked are not here
        deadline.of_slurm.cache_clear()
        code = main(command)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait_for(check: Callable[[], object], seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


def doing(folder: Path) -> tuple[str, int] | None:
    """The activity for which a run holds a lease, and the step that it came to."""
    file = folder / "ledger.sqlite"
    try:
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as books:
            row = books.execute(
                "SELECT id, activity, step FROM leases WHERE state = 'open'"
            ).fetchone()
    except sqlite3.OperationalError:
        return None
    if row is None:
        return None
    counted = read_counter(file.with_name(f"ledger-{row[0]}.counter"))
    return (row[1], row[2] + (counted[0] if counted else 0))


def wait_until_doing(
    process: Running, folder: Path, activity: str, step: int = 0, seconds: float = 0.05
) -> None:
    """Until the run spends on ``activity``, past ``step``, and has begun to, ``seconds`` ago."""

    def is_doing() -> bool:
        assert process.is_there(), process.said
        now = doing(folder)
        return now is not None and now[0] == activity and now[1] >= step

    wait_for(is_doing)
    time.sleep(seconds)


def signal_while_doing(
    process: Running, folder: Path, activity: str, number: signal.Signals, step: int = 0
) -> None:
    """As above, and send a signal before it is over, however short it is: the process stands
    still between the look and the signal."""
    while True:
        wait_until_doing(process, folder, activity, step, seconds=0)
        process.send(signal.SIGSTOP)
        now = doing(folder)
        comes_in_time = now is not None and now[0] == activity and now[1] >= step
        if comes_in_time:
            process.send(number)
        process.send(signal.SIGCONT)
        if comes_in_time:
            return


def step_saved(folder: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max((each.step for each in checkpoints.committed(folder / "checkpoints")), default=0)


def open_leases(folder: Path) -> int:
    """How many the run holds."""
    with sqlite3.connect(f"file:{folder / 'ledger.sqlite'}?mode=ro", uri=True) as books:
        (count,) = books.execute("SELECT COUNT(*) FROM leases WHERE state = 'open'").fetchone()
    return int(count)


def same_end(one: Path, other: Path) -> None:
    """Two runs came to the same weights, by the same way."""
    models = [each / "model" / "model.safetensors" for each in (one, other)]
    assert models[0].read_bytes() == models[1].read_bytes()
    keys = ("step", "objective", "stderr")
    paths = [[[e[k] for k in keys] for e in ledger(each).evaluations()] for each in (one, other)]
    assert paths[0] == paths[1]
