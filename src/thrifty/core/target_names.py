"""Names that people give to targets, which become folders."""

from __future__ import annotations

import unicodedata

MOST_BYTES = 100
_DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{n}" for port in ("com", "lpt") for n in range(10)),
}
"""No files on Windows, with or without an ending."""


def check_target_name(name: str) -> None:
    """Raises ValueError for a name that leads elsewhere, or that no folder can have everywhere."""
    why = None
    if not name.strip():
        why = "is empty"
    elif len(name.encode("utf-8", "replace")) > MOST_BYTES:
        why = f"has more than {MOST_BYTES} bytes"
    elif any(unicodedata.category(character)[0] == "C" for character in name):
        why = "has a character that is not seen"
    elif set(name) & set('/\\:*?"<>|') or name[0] in ".- " or name[-1] in ". ":
        why = "is not the name of a folder"
    elif name.partition(".")[0].casefold() in _DEVICES:
        why = "is a device on Windows"
    if why is not None:
        raise ValueError(
            f"the target name {name[:60]!r} {why}\n"
            "hint: letters, digits, spaces, dashes and underscores, as in --target sums=ROWS"
        )
