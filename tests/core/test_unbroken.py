"""A signal between a lease and its block, or in the middle of its settling, leaves none open."""

import os
import signal
import threading

import pytest

from thrifty.core.budget import Budget, Cost
from thrifty.core.ledger import Ledger
from thrifty.core.unbroken import do, unbroken
from thrifty.stop_signals import heeded


class Stopped(BaseException):
    pass


def stop(reason):
    raise Stopped(reason)


@pytest.mark.parametrize("where", ["_reserve", "_settle"])
def test_a_signal_while_a_lease_opens_or_settles(where, tmp_path, monkeypatch):
    real = getattr(Ledger, where)

    def interrupted(*given, **named):
        result = real(*given, **named)
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(Ledger, where, interrupted)
    with Ledger.create(tmp_path / "ledger.sqlite", Budget(flops=100)) as ledger:
        with pytest.raises(Stopped, match="SIGTERM"):
            score(ledger)
        assert ledger.reserved().flops == 0
        assert ledger.spent().flops == (0 if where == "_reserve" else 4)


def score(ledger):
    with (
        heeded(stop),
        ledger.stage("score", "score") as stage,
        stage.spending("score", Cost(flops=10)) as lease,
    ):
        lease.tick(Cost(flops=4))


def test_what_waits_is_done_once_at_the_end_of_the_outermost():
    done = []
    with unbroken():
        with unbroken():
            do(lambda: done.append("late"))
        assert not done
    assert done == ["late"]
    with unbroken():
        pass
    do(lambda: done.append("now"))
    assert done == ["late", "now"]


def test_another_threads_block_holds_nothing_back():
    done, inside, leave = [], threading.Event(), threading.Event()

    def block():
        with unbroken():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=block)
    thread.start()
    assert inside.wait(10)
    do(lambda: done.append("now"))
    leave.set()
    thread.join()
    assert done == ["now"]
