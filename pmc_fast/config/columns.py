"""Which columns of a data set hold what, as users write it: question=Q,answer=A."""

import csv
from collections.abc import Mapping
from typing import Any

from ..errors import PMCError

# what a column can be named for; `data/records.py` knows the names that each stands in for
COLUMN_NAMES = (
    "question", "answer", "context", "choices", "system", "messages", "beginning", "continuation", "text",
    "paraphrased_question", "paraphrased_answer",
)  # fmt: skip
DATA = ("forget", "retain", "paraphrased", "general")  # settings that name data


def parse_columns(text: str) -> dict[str, dict[str, str]]:
    """Return the columns of each data setting.

    Parameters
    ----------
    text : str
        ``NAME=COLUMN``, separated by commas, for all data; ``forget.NAME=COLUMN`` for that of one setting, where it wins. An
        entry with a comma stands in double quotes.

    Returns
    -------
    dict
        By the setting's name (`DATA`) a dict of columns by what they hold (`COLUMN_NAMES`).

    Raises
    ------
    PMCError
        Not of this form, an unknown name, or one that is given twice.
    """
    given: dict[tuple[str, str], str] = {}
    for entry in next(csv.reader([text], skipinitialspace=True), []):
        place, found, column = entry.partition("=")
        source, dot, name = place.strip().rpartition(".")
        if not found or not column.strip() or name not in COLUMN_NAMES or (dot and source not in DATA):
            raise PMCError(
                f"columns {entry!r} is not of the form NAME=COLUMN, with NAME one of {', '.join(COLUMN_NAMES)}, or of one "
                f"of the data alone, such as {DATA[0]}.question=COLUMN ({', '.join(DATA)})"
            )
        if (source, name) in given:
            raise PMCError(f"columns gives {place.strip()} twice: keep one")
        given[source, name] = column.strip()
    of_all = {name: column for (source, name), column in given.items() if not source}
    return {s: of_all | {name: c for (source, name), c in given.items() if source == s} for s in DATA}


def written_columns(columns: Mapping[str, Any]) -> str:
    """Return columns as `parse_columns` reads them: ``{"question": "Q", "forget": {"answer": "gt"}}`` as YAML files hold them."""
    entries: list[str] = []
    for name, value in columns.items():
        below = {f"{name}.{n}": v for n, v in value.items()} if isinstance(value, Mapping) else {name: value}
        entries += [f"{n}={v}" for n, v in below.items()]
    return ",".join(
        f'"{entry.replace(chr(34), 2 * chr(34))}"' if set(entry) & set(',"') else entry for entry in entries
    )
