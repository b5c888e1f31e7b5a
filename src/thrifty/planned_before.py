"""A run folder that a plan of the very same request has made, and in which nothing was done since.

A ``thrifty plan`` that is killed after its last rename has made its run, and the same command is to
go on. It plans anew, in its draft; where all comes out the same the folder is kept as it is. A
request is known by its digest, so that another one is refused before anything is read.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import thrifty
from thrifty.core import sums
from thrifty.core.redaction import redact
from thrifty.run_folder import RunFolder

if TYPE_CHECKING:
    from thrifty.preparation import Asked

ASKED = "asked"
"""The digest's key in prepared.json."""
_COMPARED = (".yaml", ".json", ".sha256")
"""Of files: the plan, what it was made from, and manifests, which have a digest of their rows."""


def digest(asked: Asked) -> str:
    """Of a request to this version of thrifty; no secret of a URL goes into it."""
    text = json.dumps([thrifty.__version__, asdict(asked)], default=str)
    return hashlib.sha256(redact(text).encode()).hexdigest()


def is_of(run: RunFolder, mark: str) -> bool:
    """Whether nothing but a plan of the request with that digest seems to lie in the folder."""
    try:
        prepared = json.loads(run.prepared.read_text(encoding="utf-8"))
        if prepared.get(ASKED) != mark:
            return False
        sums.check(run.plan_file, "somebody edited it")
        with run.reading() as ledger:
            return not ledger.stages()
    except (OSError, ValueError):
        return False


def is_same(run: RunFolder, draft: RunFolder) -> bool:
    """Whether the folder holds what the draft of a plan holds, and nothing more."""
    return _held(run) == _held(draft)


def _held(run: RunFolder) -> dict[str, bytes]:
    """Its files, of those that are compared with what they say; of the ledger nothing, which a
    reader may have made files beside."""
    return {
        path.relative_to(run.path).as_posix(): (
            path.read_bytes() if path.suffix in _COMPARED else b""
        )
        for path in run.path.rglob("*")
        if path.is_file() and not path.name.startswith(run.ledger_file.name)
    }
