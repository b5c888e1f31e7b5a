"""Secrets in a text, masked: the one place that knows what looks like one."""

from __future__ import annotations

import os
import re

_CREDENTIALS = re.compile(r"://[^/\s@]*@")
_SIGNED = re.compile(
    r"([?&][\w.-]*(?:token|key|secret|signature|sig|password|credential)[\w.-]*=)[^&#\s'\"]+", re.I
)
"""In a URL's query."""
_SECRET_NAMES = re.compile(r"(TOKEN|KEY|KEY_ID|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.I)
"""Of variables of the environment."""
MASK = "***"
_LEAST_SECRET = 8
"""Characters; what is shorter may well be a word."""


def redact(text: str) -> str:
    """``text`` with the user and password of every URL in it masked, the keys in its query, and
    the value of every variable of the environment whose name says that it is a secret."""
    for name, value in os.environ.items():
        if len(value) >= _LEAST_SECRET and value in text and _SECRET_NAMES.search(name):
            text = text.replace(value, MASK)
    return _SIGNED.sub(rf"\1{MASK}", _CREDENTIALS.sub(f"://{MASK}@", text))
