"""A request's record: hashes, numbers and settings, no text."""

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..data import Row, read_records, rows_of
from ..errors import PMCError
from ..report.environment import code
from ..utils.files import digest

FORMAT = 3  # format 1 has no hashes of single questions, format 2 all entries of the requests before
CLAIM = (
    "output-level evidence: what the model answers was measured as stated here; this is no proof that its weights hold "
    "nothing of the data"
)


def record_of(result: Mapping[str, Any], **parts: Any) -> dict[str, Any]:
    """Return a request's record.

    Parameters
    ----------
    result : mapping
        Of `jobs.unlearn.unlearn`.
    **parts
        ``request``, ``model``, ``stack``, ``adapter``, ``files``.
    """
    settings = result["settings"]
    return {
        "format": FORMAT,
        "claim": CLAIM,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **parts,
        "data": result["data"],
        "metrics": {when: _numbers(result[when]) for when in ("before", "after") if when in result},
        "truth_of_forget": result["truth_of_forget"],
        "gates": {name: settings[name] for name in ("min_quality", "min_utility", "max_degenerate")},
        "failed_gates": result["failed_gates"],
        "steps": len(result["history"]),
        "stopped": result["stopped"],
        "known_forgotten": result.get("known_forgotten"),  # the rows that were left out, by number
        "seeds": {"seed": settings["seed"]},
        "settings": settings,
        "settings_sha256": digest(settings),
        "stage_seconds": dict(result["stage_seconds"]),
        "code": code(),
        "versions": result["versions"],
        "machine": result["machine"],
    }


def _numbers(value: Any) -> Any:
    """Return metrics without the texts that --log-text adds."""
    if isinstance(value, Mapping):
        return {name: _numbers(v) for name, v in value.items() if name != "texts"}
    return value


def write_private(path: Path, sets: Mapping[str, Sequence[Row]]) -> None:
    """Write rows to a file of mode 0600."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(handle, "w", encoding="utf-8") as file:
        for name, rows in sets.items():
            for row in rows:
                entry = {"set": name, "question": row.question, "answer": row.answer}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def read_private(path: Path) -> dict[str, list[Row]]:
    """Read what `write_private` wrote."""
    records = list(read_records(str(path)))
    if not all(isinstance(r, Mapping) and isinstance(r.get("set"), str) for r in records):
        raise PMCError(f"{path} has rows without a set: it is not what was written")
    names = dict.fromkeys(r["set"] for r in records)
    return {name: rows_of([r for r in records if r["set"] == name], str(path)) for name in names}
