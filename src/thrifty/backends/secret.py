"""A key that is sent, and never shown: not in a repr, an error, a log or a file."""

from __future__ import annotations

import os
from typing import NoReturn

USUAL = "OPENAI_API_KEY"
"""The variable that is read where none is named."""
HIDDEN = "***"
_LEAST = 8
"""Characters of a key that is taken for one: ``EMPTY`` and the like, which servers without keys are
given, may well stand in an answer."""


class Secret:
    """A key for a server. Copies and pickles of it are refused."""

    __slots__ = ("_value",)

    def __init__(self, value: str, source: str = "the key") -> None:
        self._value = value.strip()
        if not (self._value and self._value.isascii() and self._value.isprintable()):
            raise ValueError(
                f"{source} is empty or has characters that no key has\n"
                "hint: it is one line of printable ASCII; look for a line end or a quote too many"
            )

    def __repr__(self) -> str:
        return HIDDEN

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is not written down\nhint: keep the name of its variable instead")

    def reveal(self) -> str:
        return self._value

    def scrub(self, text: str) -> str:
        """``text`` with the key, should someone have put it there, hidden."""
        return text.replace(self._value, HIDDEN) if len(self._value) >= _LEAST else text


def secret_of(variable: str = "") -> Secret | None:
    """The key in an environment variable; in the usual one, if it is set, where none is named.

    Raises ValueError where the named one is not set.
    """
    value = os.environ.get(variable or USUAL, "")
    if value.strip():
        return Secret(value, f"${variable or USUAL}")
    if variable:
        raise ValueError(
            f"the environment variable {variable} is not set\n"
            f"hint: export {variable}=... before, or leave its name out for a server without keys"
        )
    return None
