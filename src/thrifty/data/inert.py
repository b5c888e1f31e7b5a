"""Text that nobody vouches for, made harmless to show: in a terminal, a log or a page.

Rows, file names and error messages come from data sets. Control characters, terminal escapes and
invisible or direction-changing marks are written as Python escapes (``\\x1b``, ``\\u202e``), long
text is cut, and secrets are masked (``core/redaction.py``). Escaping HTML is left to the template,
which does it for everything.
"""

from __future__ import annotations

import unicodedata

from markupsafe import Markup, escape

from thrifty.core.redaction import redact

_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories of what is not seen, or moves what is."""
_LOOKAHEAD = 1000
"""Characters past the limit that are looked at, so that no password is cut in half and missed."""


def for_terminal(text: str) -> str:
    """Lines of talk as they may be shown: no escape, no secret, whatever they quote."""
    return visible(text, 100_000, lines=True)


def visible(text: object, limit: int = 600, *, lines: bool = False) -> str:
    """At most ``limit`` characters of ``text``, hidden ones written out; line ends and tabs stay
    with ``lines``."""
    return "".join(piece for piece, _ in _pieces(str(text), limit, lines))


def marked(text: object, limit: int = 600, *, lines: bool = False) -> Markup:
    """``visible`` as HTML, in which what was written out is set apart from what was there."""
    shown = []
    for piece, hidden in _pieces(str(text), limit, lines):
        shown.append(Markup('<span class="hidden">{}</span>').format(piece) if hidden else piece)
    return Markup("").join(escape(piece) for piece in shown)


def _pieces(text: str, limit: int, lines: bool) -> list[tuple[str, bool]]:
    """Runs of (text to show, whether it was hidden)."""
    start = redact(text[: limit + _LOOKAHEAD])
    pieces: list[tuple[str, bool]] = []
    length = 0
    for character in start:
        kept = lines and character in "\n\t"
        hidden = not kept and unicodedata.category(character) in _HIDDEN
        piece = ascii(character)[1:-1] if hidden else character
        length += len(piece)
        if length > limit:
            pieces.append(("…", False))
            break
        if pieces and pieces[-1][1] == hidden:
            pieces[-1] = (pieces[-1][0] + piece, hidden)
        else:
            pieces.append((piece, hidden))
    return pieces
