"""The process that chat templates run in: a request a line on standard input, an answer a line on
standard output.

    {"source", "special", "ends"}            the template from here on; no answer
    {"turns", "first_answer"}  -> {"text", "spans"}   where the answers stand (``chat.py``)
    {"turns"}                  -> {"text"}            what a model is asked with
    either                     -> {"fault"}           why there is none
"""

from __future__ import annotations

import faulthandler
import io
import os
import sys
from typing import Any

import orjson

from thrifty.data import chat
from thrifty.data.faults import Fault
from thrifty.data.template_process import Template

SECONDS = float(os.environ.get("THRIFTY_TEMPLATE_SECONDS", 20))
"""Of one request. A conversation of a thousand turns takes one."""
MEMORY_BYTES = 2 << 30
"""Beyond what the process has when it begins."""
MOST_CHARACTERS = 64 << 20


class Rendering:
    """A template as transformers renders it."""

    def __init__(self, template: Template) -> None:
        self.template = template

    def text(self, turns: list[dict[str, str]], prompt: bool = False) -> str:
        return self._rendered(turns, add_generation_prompt=prompt)[0]

    def marked(self, turns: list[dict[str, str]]) -> tuple[str, list[chat.Span]]:
        """And the spans that the template marks."""
        text, marks = self._rendered(turns, return_assistant_tokens_mask=True)
        return text, [(int(start), int(end)) for start, end in marks]

    def _rendered(self, turns: list[dict[str, str]], **options: Any) -> tuple[str, Any]:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, marks = render_jinja_template(
            conversations=[turns],
            chat_template=self.template.source,
            **options,
            **self.template.special,
        )
        if len(texts[0]) > MOST_CHARACTERS:
            raise ValueError(f"{len(texts[0]):,} characters; the most are {MOST_CHARACTERS:,}")
        return texts[0], marks[0] if marks else []


def answer(rendering: Rendering, request: dict[str, Any]) -> bytes:
    """The line that answers a request."""
    turns = request["turns"]
    try:
        if "first_answer" in request:
            text, spans = chat.placed(turns, request["first_answer"], rendering)
            return orjson.dumps({"text": text, "spans": spans})
        return orjson.dumps({"text": rendering.text(turns, prompt=True)})
    except Fault as fault:
        detail = fault.reason.partition(": ")[2]
    except Exception as error:  # a template is a foreign program: it may raise anything
        told = f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace")
        detail = f"the chat template refused the row: {told.decode()}"
    return orjson.dumps({"fault": detail[:300]})


def main() -> None:
    # A template that prints, should one find a way, is not taken for an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import transformers.utils.chat_template_utils  # noqa: F401 (before memory is limited)

    _limit_memory()
    rendering: Rendering | None = None
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        for line in io.BufferedReader(io.FileIO(sys.stdin.fileno(), closefd=False)):
            request = orjson.loads(line)
            if "source" in request:
                rendering = Rendering(Template(**request))
                continue
            assert rendering is not None
            # Ends the process whatever it is doing: also within one call that never returns.
            faulthandler.dump_traceback_later(SECONDS, exit=True, file=nowhere)
            reply = answer(rendering, request)
            faulthandler.cancel_dump_traceback_later()
            answers.write(reply + b"\n")


def _limit_memory() -> None:
    """No more of it from here on than ``MEMORY_BYTES``; without effect where systems have none."""
    try:
        import resource

        import psutil
    except ImportError:
        return
    most = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main()
