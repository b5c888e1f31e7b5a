"""A model's chat template, run apart: in a process that time, memory and the length of what it
writes bound, and that has no key of the environment.

A template is a program from a model's repository. transformers runs it in Jinja's sandbox, which
keeps it from Python's objects, but neither from going on for ever nor from filling the memory.
Here the row is set aside, and a template that does so again and again is refused. The other end:
``template_child.py``.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO, Any

import orjson

from thrifty.data.faults import Fault

MOST_LOST = 3
"""Rows at which a process may end before their template is refused."""
_KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "HOME", "LANG", "LC_ALL", "TZ", "SYSTEMROOT", "TEMP")
"""Of the environment, what Python and the clock need."""
_OWN = "THRIFTY_TEMPLATE_SECONDS"
_WHY_ENDLESS = "the chat template does not come to an end, or takes all memory"
_ENDLESS = Fault("chat_template", _WHY_ENDLESS)


@dataclass(frozen=True)
class Template:
    """A tokenizer's template, the special tokens that it is given, those that may end a turn."""

    source: str
    special: Mapping[str, Any]
    ends: Sequence[str]

    @classmethod
    def of(cls, tokenizer: Any) -> Template:
        ends = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""}
        special = {name: _plain(value) for name, value in tokenizer.special_tokens_map.items()}
        return cls(tokenizer.get_chat_template(), special, tuple(sorted(ends)))


def _plain(token: Any) -> Any:
    return list(map(str, token)) if isinstance(token, (list, tuple)) else str(token)


class TemplateProcess:
    """Answers one request at a time; started when it is first asked, and anew after it ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._template: Template | None = None
        self._lost = 0

    def ask(self, template: Template, request: Mapping[str, Any]) -> dict[str, Any]:
        """What ``template_child`` answers. Raises a ``Fault`` where the template refuses the row or
        does not come to an end, ValueError where it does so again and again."""
        (found,) = self.ask_all(template, [request])
        if isinstance(found, Fault):
            raise found
        return found

    def ask_all(
        self, template: Template, requests: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any] | Fault]:
        """The same of many, at the price of few waits."""
        found: list[dict[str, Any] | Fault] = []
        with self._lock:
            if template != self._template:
                self._lost = 0
            while len(found) < len(requests):
                found += self._answers(template, requests[len(found) :])
                if len(found) < len(requests) or found[-1] is _ENDLESS:
                    self._count_loss()
        return found

    def _answers(
        self, template: Template, requests: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any] | Fault]:
        """As far as the process comes; the one at which it ends is a fault."""
        child = self._running()
        lines = [] if template == self._template else [asdict(template)]
        self._template = template
        assert child.stdin is not None
        assert child.stdout is not None
        # From another thread, or both ends might wait for the other to read.
        writing = threading.Thread(target=_write, args=(child.stdin, [*lines, *requests]))
        writing.start()
        found: list[dict[str, Any] | Fault] = []
        for _ in requests:
            reply = child.stdout.readline()
            if not reply.endswith(b"\n"):
                found.append(_ENDLESS)
                child.kill()  # so that nobody waits to write to it
                break
            answer = orjson.loads(reply)
            refused = "fault" in answer
            found.append(Fault("chat_template", answer["fault"]) if refused else answer)
        writing.join()
        return found

    def _count_loss(self) -> None:
        self.stop()
        self._lost += 1
        if self._lost >= MOST_LOST:
            raise ValueError(
                f"{_WHY_ENDLESS}: so with {self._lost} rows\n"
                "hint: this is the model's own program, and may be meant to do so"
            )

    def stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.stop()
        self._template = None
        self._child = subprocess.Popen(
            # -P: no module of the folder that one happens to be in
            [sys.executable, "-P", "-m", "thrifty.data.template_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is for the command to answer
            env={name: os.environ[name] for name in (*_KEPT, _OWN) if name in os.environ},
        )
        return self._child


def _write(stream: IO[bytes], lines: Sequence[Mapping[str, Any]]) -> None:
    with suppress(OSError, ValueError):  # it has ended: its answers tell
        for line in lines:
            stream.write(orjson.dumps(line) + b"\n")
        stream.flush()


process = TemplateProcess()
"""Shared by all templates: it takes a second or two to start."""
atexit.register(process.stop)
