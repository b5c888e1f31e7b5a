"""What a status other than 2xx means: whether to ask again, and what to tell the user."""

from __future__ import annotations

import email.utils
import math
import time
from collections.abc import Mapping

from thrifty.backends.retries import AttemptFailed
from thrifty.core.quantities import show
from thrifty.data.faults import Fault
from thrifty.data.json_text import parse

AGAIN = frozenset((408, 409, 425, 429, 500, 502, 503, 504))
_COMPUTED = frozenset((408, 504))
"""Time-outs of someone in between: whoever was asked may have answered. The others are told by a
server that did not, and that nobody is billed for."""
_HINTS = {
    401: "is the key right? name the environment variable that holds it",
    402: "the account behind the key has nothing left",
    403: "the key is not allowed to ask this model",
    404: "is the model's name right, and the URL? it usually ends in /v1",
    405: "is the URL right? it usually ends in /v1",
}
"""Of those after which everything else that is asked fails alike."""
_EMPTY_ACCOUNT = "insufficient_quota"
"""The code of a 429 that no waiting mends."""


def refusal(status: int, headers: Mapping[str, str], body: bytes) -> AttemptFailed:
    """``body``: its beginning is enough."""
    said = _said(body)
    message = f"it answered with status {status}" + (f": {said}" if said else "")
    if 300 <= status < 400:
        location = headers.get("location", "")
        return AttemptFailed(
            f"it answered with status {status} and sends us to {location!r}",
            "a key and a question go nowhere but where they were meant to; if that is the right "
            "place, give its URL",
            fatal=True,
        )
    if status in _HINTS:
        return AttemptFailed(message, _HINTS[status], fatal=True)
    if status == 429 and _EMPTY_ACCOUNT in said:
        return AttemptFailed(message, _HINTS[402], fatal=True)
    return AttemptFailed(
        message,
        "the server is busy or broken; fewer requests at a time may help"
        if status in AGAIN
        else "the server cannot do what it was asked for: is the question too long, a setting one "
        "that it does not know, or does it not continue answers (then kind: completions may)?",
        again=status in AGAIN,
        computed=status in _COMPUTED,
        told_seconds=told_seconds(headers.get("retry-after", "")),
    )


def told_seconds(retry_after: str) -> float:
    """Of a Retry-After header, in seconds or as a date; 0 where it says nothing that makes
    sense."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            then = email.utils.parsedate_to_datetime(retry_after)
            seconds = then.timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _said(body: bytes) -> str:
    """The message and the code in it, as servers put them; else its beginning."""
    try:
        reply = parse(body)
    except Fault:
        return body[:1000].decode("utf-8", "replace").strip()
    error = reply.get("error", reply)
    if not isinstance(error, dict):
        return error[:1000] if isinstance(error, str) else show(error)
    told = [error.get(name) for name in ("message", "detail", "code")]
    return "; ".join(part[:1000] for part in told if isinstance(part, str)) or show(error)
