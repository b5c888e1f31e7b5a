"""The signals that ask a command to stop: what the first does, and what a second.

SIGINT (Ctrl-C), SIGTERM, SIGUSR1 (a scheduler's warning) and SIGHUP (the terminal closes) mean the
same. The first is handed to the innermost block of ``heeded``: training finishes its step and
saves, all else ends where it is. A SIGINT after it leaves at once, as safely as a kill does. What
comes within a second of the first is the first once more: ``timeout``, ``torchrun`` and a terminal
tell processes that were told already. What was ignored from the start (``nohup``) stays ignored.

An exception that a handler raises can get lost: in a finaliser, in a library that catches all. So a
block that is to end, and is still there ``INSIST_SECONDS`` later, is told again.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NoReturn

from thrifty.core import unbroken

RESUMABLE = 5
"""The exit code of a command that was stopped: the same command goes on."""

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)  # Windows has not all of them
)
SAME_SECONDS = 1.0
INSIST_SECONDS = 10.0
_AGAIN = getattr(signal, "SIGALRM", None)

Stop = Callable[[str], None]
"""Given why, in words."""

_blocks: list[tuple[Stop, bool]] = []
_first: float | None = None
_reason = ""
_terminals: list[int] = []


@contextmanager
def heeded(stop: Stop, *, saves: bool = False) -> Iterator[None]:
    """In the block a signal calls ``stop``. ``saves``: it may take its time to save what there is.

    Off the main thread signals cannot be handled; the caller's own handling stands.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {} if _blocks else _take_over()
    _blocks.append((stop, saves))
    try:
        yield
    finally:
        if _AGAIN in before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        _blocks.pop()


def _take_over() -> dict[signal.Signals, Any]:
    global _first, _reason
    _first, _reason = None, ""
    _terminals[:] = [file for file in (0, 1, 2) if os.isatty(file)]
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    if _AGAIN is not None and signal.getsignal(_AGAIN) == signal.SIG_DFL:  # nobody else uses it
        heard.append(_AGAIN)
    return {number: signal.signal(number, _handle) for number in heard}


def _handle(number: int, frame: Any) -> None:
    global _first, _reason
    if in_words(number).endswith("SIGHUP"):
        _let_go_of_terminals()
    now = time.monotonic()
    if _first is not None and now - _first < SAME_SECONDS:
        return
    if _first is not None and number == signal.SIGINT:
        leave("left at once")
    _first = now if _first is None else _first
    _reason = _reason or in_words(number)
    if _AGAIN is not None and signal.getsignal(_AGAIN) is _handle and not is_saving():
        signal.setitimer(signal.ITIMER_REAL, INSIST_SECONDS)
    unbroken.do(partial(_blocks[-1][0], _reason))


def in_words(number: int) -> str:
    """What a signal is called where it is told of."""
    name = signal.Signals(number).name
    return "interrupted" if name == "SIGINT" else f"interrupted by {name}"


def ask(reason: str) -> None:
    """Do what a signal would, from any thread."""
    global _reason
    _reason = _reason or reason
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGTERM)


def asked() -> str:
    """Why the command was asked to stop, since its outermost block began; empty: it was not."""
    return _reason


def is_saving() -> bool:
    """Whether what is under way answers a signal by saving, which takes as long as it takes."""
    return bool(_blocks) and _blocks[-1][1]


def tell(line: str) -> None:
    """On standard error, from a signal's handler or any thread, where ``print`` may not be used."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())


def leave(why: str) -> NoReturn:
    """End this process now, from any thread: nothing is settled or saved, as after a kill."""
    tell(f"{why}\nhint: the same command goes on from what was saved")
    os._exit(RESUMABLE)


def _let_go_of_terminals() -> None:
    """Writing to one that has closed is an error, and it is no reason to lose a step."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for file in _terminals:
            os.dup2(nowhere, file)
        os.close(nowhere)
    _terminals.clear()
