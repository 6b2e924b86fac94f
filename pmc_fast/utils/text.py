"""Text of unknown origin, escaped for terminals, logs and Markdown; lists of rows and names for messages."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

_NAME = re.compile("[A-Za-z][A-Za-z0-9_-]{0,40}")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#|~!$])")


def printable(text: str) -> str:
    """Return `text` with what could control a terminal escaped, as in ``\\x1b``; line ends stay.

    Control characters, marks of writing direction, and characters without a glyph are escaped.
    """
    if text.isprintable():
        return text
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def markdown(text: str) -> str:
    """Return `text` as one line of Markdown without markup or HTML."""
    return _MARKDOWN.sub(r"\\\1", printable(" ".join(text.split())))


def row_numbers(rows: Sequence[int], most: int = 20) -> str:
    """Return rows by their numbers, such as ``row 3`` or ``rows 1, 2, 5 and 40 more``."""
    return listed("row", rows, most)


def listed(what: str, values: Sequence[Any], most: int = 20) -> str:
    """Return things of one kind by their numbers or names, the first `most` of them."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return f"{what}{'s' if len(values) > 1 else ''} {', '.join(map(str, values[:most]))}{more}"


def names(values: Iterable[Any]) -> str:
    """Return the names that look like identifiers; others, which may be texts of the data, are only counted."""
    given = list(values)
    shown = [repr(name) for name in given if isinstance(name, str) and _NAME.fullmatch(name)]
    more = len(given) - len(shown)
    return ", ".join([*shown, *([f"{more} not shown"] if more else [])]) or "none"
