"""Result files of measurements: one schema, and no mixing of what was measured under different conditions."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import PMCError
from ..report.environment import commit, machine, versions

SCHEMA = 1
WIDTH, DEPTH = 160, 5  # of a line of results; nesting from which on all stands on one


def document(
    suite: str, results: list[dict[str, Any]], seed: int, facts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the one JSON schema of all suites; `facts` are the suite's own settings."""
    return {
        "schema": SCHEMA,
        "suite": suite,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seed": seed,
        **({"facts": dict(facts)} if facts else {}),
        "results": results,
    }


def read(path: Path | str) -> dict[str, Any]:
    """Read a result file; refuse a file that is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PMCError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise PMCError(f"{path} is no result file of schema {SCHEMA}")
    return content


def require_alike(documents: Mapping[str, dict[str, Any]], *parts: str) -> None:
    """Refuse documents, by their names, of which a part differs: their times say nothing about each other.

    Parameters
    ----------
    documents : mapping of str to dict
    parts : str
        Of a document, such as "machine" or "facts.settings": mappings, each field of which must be equal.
    """
    (first, one), *others = documents.items()
    for part in parts:
        a = _part(one, part)
        for name, other in others:
            b = _part(other, part)
            for field in a | b:
                if a.get(field) != b.get(field):
                    raise PMCError(
                        f"{first} and {name} are of different {part.removeprefix('facts.')} "
                        f"({field}: {a.get(field)} and {b.get(field)}): print them apart"
                    )


def _part(document: Mapping[str, Any], part: str) -> dict[str, Any]:
    found: Any = document
    for key in part.split("."):
        found = found.get(key, {})
    return dict(found)


def dumps(value: Any, indent: str = "") -> str:
    """Return JSON with one line per measurement: what is short stands on one line, floats have six digits."""
    short = json.dumps(_rounded(value), ensure_ascii=False)
    if len(indent) + len(short) <= WIDTH or not isinstance(value, (dict, list)) or len(indent) >= DEPTH:
        return short
    inner = indent + " "
    if isinstance(value, list):
        lines, brackets = [dumps(v, inner) for v in value], "[]"
    else:
        lines, brackets = [f"{json.dumps(k)}: {dumps(v, inner)}" for k, v in value.items()], "{}"
    return brackets[0] + ",".join(f"\n{inner}{line}" for line in lines) + f"\n{indent}{brackets[1]}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value
