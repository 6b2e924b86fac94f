"""What earlier runs made a model forget, as salted hashes, and rows of a new run that would teach it again."""

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import PromptConfig
from ..data import Row
from ..data.overlap import normalized
from ..errors import PMCError
from ..evaluation import FORGET_SETS
from ..utils.text import row_numbers

PROMPT = ("prompt_format", "system_prompt", "date_string")  # settings of a prompt; with tags the first one counts
REPORT, MERGED = "report.json", "requests.json"  # beside a model that `unlearn` or `merge` wrote


def rows_hash(rows: Iterable[Row], salt: str) -> str:
    """Return a hash of questions and answers in their order, whatever file they come from.

    With a salt, records of the same data can't be matched with each other or with lists of hashes made in advance. It
    does not hide rows from someone who guesses them.
    """
    content = json.dumps([[row.question, row.answer] for row in rows], ensure_ascii=False)
    return hashlib.sha256(f"{salt}\0{content}".encode()).hexdigest()


def question_hash(row: Row, salt: str) -> str:
    """Return a hash of a question alone, as `normalized` compares it."""
    return hashlib.sha256(f"{salt}\0{normalized(row.question)}".encode()).hexdigest()[:32]


def hashes_of(sets: Mapping[str, Sequence[Row]], salt: str) -> dict[str, Any]:
    """Return the number of rows of each set and their hash."""
    return {name: {"rows": len(rows), "sha256": rows_hash(rows, salt)} for name, rows in sets.items()}


def data_of(sets: Mapping[str, Sequence[Row]], earlier: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Return the record of a run's data: hashes, no text.

    Returns
    -------
    dict
        ``salt``; by each set's name its number of ``rows`` and their ``sha256``; ``forgotten``, a hash a question that
        was to be forgotten; ``earlier``, as `read` returns it, for runs that start from this one's model.
    """
    salt = secrets.token_hex(16)
    hashes = hashes_of(sets, salt)
    forgotten = (row for name, rows in sets.items() if name in FORGET_SETS for row in rows)
    hashed = sorted({question_hash(row, salt) for row in forgotten})
    return {"salt": salt, **hashes, "forgotten": hashed, "earlier": list(earlier)}


def entry(name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a run's data that later runs compare with; ``forgotten`` is None in old records."""
    return {"name": name, "salt": data["salt"], "forgotten": data.get("forgotten")}


def read(model: str) -> list[dict[str, Any]]:
    """Return an entry for each run that a local model came from, oldest first, from the files beside it."""
    found = []
    for file, name in ((REPORT, f"the run that made {model}"), (MERGED, "")):
        try:
            content = json.loads((Path(model) / file).read_text(encoding="utf-8"))
            data = content["data"]
            found += [{k: e[k] for k in ("name", "salt", "forgotten")} for e in data["earlier"]]
            if name:
                found.append(entry(name, data))
        except (OSError, ValueError, LookupError, TypeError):  # no such file, or another program's
            continue
    return found


def check_prompts(model: str, settings: PromptConfig) -> list[str]:
    """Return a warning if questions are put in other prompts than in the run that wrote a model.

    Parameters
    ----------
    model : str
        A directory beside whose weights `unlearn` left a report, or any other.
    settings : PromptConfig
        Its prompt_format is resolved ("tags" or "chat").
    """
    try:
        was = json.loads((Path(model) / REPORT).read_text(encoding="utf-8"))["settings"]
        fields = PROMPT[: 1 if settings.prompt_format == "tags" else None]
        other = [f"{f} {was[f]!r}, now {getattr(settings, f)!r}" for f in fields if was[f] != getattr(settings, f)]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    if not other:
        return []
    return [f"{model} was unlearned with {'; '.join(other)}: it is asked otherwise than it was trained"]


def check(
    earlier: Iterable[Mapping[str, Any]],
    forget: tuple[str, Sequence[Row]],
    retain: tuple[str, Sequence[Row]],
    *,
    allow: bool,
) -> list[str]:
    """Refuse rows that an earlier run made the model forget, or with `allow` return warnings of them.

    `forget` and `retain` are each a source's name, for errors, and its rows. Runs that can't be compared with are
    warned of, too.
    """
    found, warnings = [], []
    for run in earlier:
        if run["forgotten"] is None:
            warnings.append(f"{run['name']} kept no hashes of its questions: rows that it forgot can't be found")
            continue
        known = frozenset(run["forgotten"])
        for (source, rows), effect in (
            (retain, "training on them would teach it again"),
            (forget, "it would be trained away from harmless answers"),
        ):
            numbers = [n for n, row in enumerate(rows, start=1) if question_hash(row, run["salt"]) in known]
            if numbers:
                found.append(f"{source}, {row_numbers(numbers)}: {run['name']} made the model forget this; {effect}")
    if found and not allow:
        raise PMCError(f"{'. '.join(found)}. Leave these rows out, or insist with --allow-relearn")
    return warnings + found
