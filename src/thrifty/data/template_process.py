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
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from thrifty.data.faults import Fault

MOST_LOST = 3
"""Rows at which a process may end before their template is refused."""
_KEPT = ("PATH", "PYTHONPATH", "PYTHONHOME", "HOME", "LANG", "LC_ALL", "TZ", "SYSTEMROOT", "TEMP")
"""Of the environment, what Python and the clock need."""
_OWN = "THRIFTY_TEMPLATE_SECONDS"


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
        with self._lock:
            if template != self._template:
                self._lost = 0
            child = self._running()
            lines = [] if template == self._template else [asdict(template)]
            self._template = template
            reply = _asked(child, [*lines, request])
            if reply is None:
                self._lost += 1
                self.stop()
        if reply is None:
            why = "the chat template does not come to an end, or takes all memory"
            if self._lost >= MOST_LOST:
                raise ValueError(
                    f"{why}: so with {self._lost} rows\n"
                    "hint: this is the model's own program, and may be meant to do so"
                )
            raise Fault("chat_template", why)
        if "fault" in reply:
            raise Fault("chat_template", reply["fault"])
        return reply

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


def _asked(child: subprocess.Popen[bytes], lines: Sequence[Mapping[str, Any]]) -> Any:
    """The answer to the last line; None where the process ended without one."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(b"".join(orjson.dumps(line) + b"\n" for line in lines))
        child.stdin.flush()
    except BrokenPipeError:
        return None
    reply = child.stdout.readline()
    return orjson.loads(reply) if reply.endswith(b"\n") else None


process = TemplateProcess()
"""Shared by all templates: it takes a second or two to start."""
atexit.register(process.stop)
