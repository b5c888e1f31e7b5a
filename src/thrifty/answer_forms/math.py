"""Math: the last mathematical expression of the text; equal where mathematics says so.

Read and compared by math-verify (github.com/huggingface/Math-Verify, the extra ``math``): LaTeX in
``\\boxed`` or dollars, else a plain expression or number. ``1/2``, ``0.5`` and ``\\frac{1}{2}`` are
equal.

Its own time limits work on a main thread alone, and no signal stops an exponentiation of large
numbers. So it works in a process of its own, which is ended, and begun anew for the next text,
where an answer takes more than ``seconds`` or 2 GiB of memory: then there was no answer, or the two
are not the same.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from thrifty.core.contracts import AnswerForm
from thrifty.core.ranges import check_ranges

_MOST_CHARACTERS = 20_000
"""Of the end of a text that are looked at."""
_MOST_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class MathForm(AnswerForm):
    """The last mathematical expression of the text, compared as mathematics."""

    seconds: float = 3.0
    """That reading a text, or comparing two answers, may take."""

    source: ClassVar[str] = "github.com/huggingface/Math-Verify"

    def __post_init__(self) -> None:
        check_ranges(self, seconds=(0.1, math.inf))

    def check(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(
                "answer math takes math-verify, which is not installed\n"
                "hint: pip install 'thrifty[math]'"
            )

    def read(self, text: str, prompt: str = "") -> str | None:
        text = text[-_MOST_CHARACTERS:].encode("utf-8", "replace").decode()
        if not text.strip():
            return None
        found = _asked({"read": text}, self.seconds)
        return found if isinstance(found, str) and found else None

    def same(self, one: str, other: str) -> bool:
        return one == other or _same(*sorted((one, other)), self.seconds)


@lru_cache(maxsize=1 << 14)
def _same(one: str, other: str, seconds: float) -> bool:
    return _asked({"same": [one, other]}, seconds) is True


class _Reader:
    """The process: a JSON object a line to it, and one from it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0
        """The process that began it: after a fork it is not ours."""

    def ask(self, request: dict[str, Any], seconds: float) -> Any:
        """What it says; None where it did not come to an answer in time."""
        with self.lock:
            if self.process is None or self.owner != os.getpid():
                self._begin()
            return self._say(request, seconds)

    def end(self) -> None:
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()
        self.process = None

    def _begin(self) -> None:
        code = "from thrifty.answer_forms.math import answer_requests; answer_requests()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.owner = os.getpid()
        if self._say({}, 120.0) is not True:
            raise ValueError(
                "the process that reads mathematics does not begin\n"
                "hint: does `python -c 'import math_verify'` work?"
            )

    def _say(self, request: dict[str, Any], seconds: float) -> Any:
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            said = process.stdout.readline()
        except OSError:
            said = b""
        finally:
            timer.cancel()
        if not said:  # it took too long, or too much memory
            self.end()
            return None
        return json.loads(said)


_reader = _Reader()
atexit.register(_reader.end)


def _asked(request: dict[str, Any], seconds: float) -> Any:
    return _reader.ask(request, seconds)


def answer_requests() -> None:
    """The process: until its input ends."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    except (ImportError, ValueError, OSError):  # not on this system: time alone is limited
        pass
    import logging

    logging.disable()
    from math_verify import parse, verify

    def parsed(text: str) -> list[Any]:
        return list(parse(text, parsing_timeout=None))

    def read(text: str) -> str | None:
        found = parsed(text)
        if not found:
            return None
        value, written = found[0], str(found[-1])
        return str(value) if getattr(value, "is_Rational", False) else written.strip()

    def same(one: str, other: str) -> bool:
        first, second = (parsed(f"${each}$") or parsed(each) for each in (one, other))
        # It is not symmetric, which being equal is.
        return verify(first, second, timeout_seconds=None) or verify(
            second, first, timeout_seconds=None
        )

    out = sys.stdout
    sys.stdout = sys.stderr  # nobody else writes answers
    for line in sys.stdin:
        request = json.loads(line)
        said: Any = True
        try:
            if "read" in request:
                said = read(request["read"])
            elif "same" in request:
                said = same(*request["same"])
        except (Exception, RecursionError, MemoryError):  # whatever a text makes it do
            said = None
        out.write(json.dumps(said) + "\n")
        out.flush()
