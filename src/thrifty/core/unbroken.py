"""A few lines that no signal breaks: what it asks for is done once they are through.

A lease that was reserved and has no block yet, or is half settled, would stay open. Signals are
heard by the main thread alone; blocks of others hold nothing back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_depth = 0
_waiting: Callable[[], None] | None = None


@contextmanager
def unbroken() -> Iterator[None]:
    """May be nested; what waits is done at the end of the outermost, and may raise there."""
    global _depth, _waiting
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if not _depth and _waiting is not None:
            act, _waiting = _waiting, None
            act()


def do(act: Callable[[], None]) -> None:
    """From a signal's handler: now, or at the end of the block under way."""
    global _waiting
    if _depth:
        _waiting = act
    else:
        act()
