"""Text of unknown origin, made fit for a terminal, a log or a page of Markdown."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

_NAME = re.compile("[A-Za-z][A-Za-z0-9_-]{0,40}")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#|~!$])")


def printable(text: str) -> str:
    """Return `text` with everything that steers a terminal written out, such as ``\\x1b``; line ends stay.

    Control characters, marks that turn the direction of writing, and what has no glyph become escapes.
    """
    if text.isprintable():
        return text
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def markdown(text: str) -> str:
    """Return `text` as one line of Markdown that shows it as it is: neither markup nor HTML."""
    return _MARKDOWN.sub(r"\\\1", printable(" ".join(text.split())))


def row_numbers(rows: Sequence[int], most: int = 20) -> str:
    """Return rows by their numbers, such as ``row 3`` or ``rows 1, 2, 5 and 40 more``."""
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:most]))}{more}"


def names(of: Iterable[Any]) -> str:
    """Return those of a data set's names that look like names; what is a text, of a question say, is only counted."""
    given = list(of)
    shown = [repr(name) for name in given if isinstance(name, str) and _NAME.fullmatch(name)]
    more = len(given) - len(shown)
    return ", ".join([*shown, *([f"{more} not shown"] if more else [])]) or "none"
