"""Reporters, which the Trainer brings (TensorBoard, W&B, ...): looked at before anything is spent,
and fenced, since a run is worth more than its log.

Each works on a thread of its own and is handed events in order, with the arguments, the state and
the control as they were then, so that it can neither hold training up nor change it. What moves
under it, the optimizer and the data, it is not given. When it does not keep up, events are dropped
and counted; at the end it has some seconds, and the process does not wait for one that hangs.

Limits: a reporter shares the process. One that draws from the global random numbers, or that calls
into C and keeps the interpreter's lock, is felt.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

from transformers import TrainerCallback, TrainerState

from thrifty.data.inert import visible

MOST_WAITING = 1000
"""Events that a reporter may be behind."""
HUNG_SECONDS = 10.0
"""At one event: it hangs, and is waited for no longer."""
LAST_SECONDS = 30.0
"""At the end of training, for what is still to be reported."""
_SHOWN_CHARACTERS = 200
_GIVEN = ("model", "processing_class", "logs", "metrics")
"""Of what the Trainer tells beside the state. The model's configuration is what they look at."""


def check_reporters(names: tuple[str, ...]) -> None:
    """Raise ValueError for a reporter that is unknown or not installed.

    ``all`` and ``none`` are the Trainer's own words.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name in ("all", "none"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(
                f"training.report_to names {name!r}, which is no reporter\nhint: one of {known}"
            )
        if not _is_theirs(INTEGRATION_TO_CALLBACK[name]):
            continue  # the user's own, who has it
        if name not in get_available_reporting_integrations():
            raise ValueError(
                f"training.report_to names {name}, which is not installed\n"
                f"hint: pip install {name}, or take it out of training.report_to"
            )


def is_reporter(callback: TrainerCallback) -> bool:
    """One of the Trainer's, or one that the user registered with them."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return _is_theirs(type(callback)) or type(callback) in INTEGRATION_TO_CALLBACK.values()


def _is_theirs(reporter: type) -> bool:
    return reporter.__module__.startswith("transformers.integrations.")


class Fenced:
    """A reporter inside a fence: whatever it does, training goes on. What went wrong is said when
    it is first seen, and again at the end; ``note`` takes that last line too."""

    def __init__(
        self,
        inner: TrainerCallback,
        say: Callable[[str], None],
        note: Callable[[str], None] | None = None,
    ) -> None:
        self._inner, self._name = inner, type(inner).__name__
        self._say, self._note = say, note
        self._changed = threading.Condition()
        self._waiting: deque[tuple[str, Callable[[], Any]]] = deque()
        self._at: tuple[str, float] | None = None
        """The event that it is at, and since when."""
        self._thread: threading.Thread | None = None
        self._ended = False
        self._raised: str | None = None
        """What it raised first."""
        self._num_raised = self._num_dropped = self._num_given = 0
        self._said: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return partial(self._event, name)

    def _event(self, name: str, args: Any, state: Any, control: Any, **given: Any) -> None:
        plain = getattr(TrainerCallback, name, None)
        if self._ended:
            return
        if getattr(type(self._inner), name, plain) is not plain:  # else it does nothing there
            told = {key: _as_now(given[key]) for key in _GIVEN if key in given}
            event = getattr(self._inner, name)
            self._hand_over(
                name, partial(event, copy(args), _state_now(state), copy(control), **told)
            )
        if name == "on_train_end":
            self.close()
        else:
            self._tell()

    def _hand_over(self, name: str, call: Callable[[], Any]) -> None:
        with self._changed:
            self._num_given += 1
            if len(self._waiting) < MOST_WAITING or name == "on_train_end":
                self._waiting.append((name, call))
                self._changed.notify_all()
            else:
                self._num_dropped += 1
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._report, name=f"reporting to {self._name}", daemon=True
            )
            self._thread.start()

    def _report(self) -> None:
        """On the reporter's thread: event after event."""
        while True:
            with self._changed:
                self._at = None
                self._changed.notify_all()
                while not self._waiting:
                    if self._ended:
                        return
                    self._changed.wait()
                name, call = self._waiting.popleft()
                self._at = name, time.monotonic()
            try:
                call()
            except BaseException as error:  # SystemExit too: the run is worth more
                self._num_raised += 1
                self._raised = self._raised or _shown(error)
            del call  # it holds the model

    def close(self) -> None:
        """Wait for what is still to be reported, a bounded time; then say what was not. Harmless to
        call again."""
        if self._ended:
            return
        until = time.monotonic() + LAST_SECONDS
        with self._changed:
            while self._waiting or self._at:
                patience = until - time.monotonic()
                if self._at:
                    patience = min(patience, HUNG_SECONDS - self._seconds_at())
                if patience <= 0:
                    break
                self._changed.wait(patience)
            self._ended = True
            left = len(self._waiting) + (self._at is not None)
            self._waiting.clear()
            self._changed.notify_all()
        problems = self._problems()
        if self._num_raised > 1:
            problems["times"] = f"it raised {self._num_raised:,} times"
        if lost := left + self._num_dropped:
            problems["lost"] = f"{lost:,} of {self._num_given:,} events were not reported"
        if problems:
            line = f"reporting degraded: {'; '.join(problems.values())}"
            self._say(line)
            if self._note is not None:
                self._note(line)

    def _tell(self) -> None:
        """Of each kind of trouble once, when it is first seen."""
        for kind, problem in self._problems().items():
            if kind not in self._said:
                self._said.add(kind)
                self._say(f"reporting degraded: {problem}")

    def _problems(self) -> dict[str, str]:
        """By kind, in words."""
        problems = {}
        if self._raised is not None:
            problems["raised"] = f"{self._name} raised {self._raised}"
        with self._changed:
            if self._at and (seconds := self._seconds_at()) >= HUNG_SECONDS:
                what = f"{self._name} has been at {self._at[0]} for {seconds:.0f} s"
                problems["hangs"] = f"{what}, and is not waited for"
        return problems

    def _seconds_at(self) -> float:
        assert self._at is not None
        return time.monotonic() - self._at[1]


def _shown(error: BaseException) -> str:
    try:
        return visible(repr(error), _SHOWN_CHARACTERS)
    except Exception:  # whose own words raise
        return type(error).__name__


def _state_now(state: TrainerState | None) -> TrainerState | None:
    """As it is, whatever becomes of the Trainer's."""
    found = copy(state)
    if found is not None:
        found.log_history = [*found.log_history]
    return found


def _as_now(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value
