"""Reading question-answer rows from files and from the Hugging Face hub."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import PMCError
from .records import Row, rows_of

SUFFIXES = (".jsonl", ".json", ".parquet")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*(:[\w.-]+){0,2}|(:[\w.-]+){1,2})")  # owner/name or name, :config, :split


def load_rows(source: str | Path, *, answers: bool = False, paraphrased: bool = False) -> list[Row]:
    """Read rows of questions and answers.

    Parameters
    ----------
    source : str or Path
        A .jsonl, .json or .parquet file, or a hub id with an optional config and split,
        ``locuslab/TOFU:forget10`` or ``name:config:split`` (split "train" by default).
    answers : bool
        Refuse rows without an answer.
    paraphrased : bool
        Read ``paraphrased_question`` and ``paraphrased_answer`` where the data has them.

    Returns
    -------
    list of Row
        In the data's order. Columns are found by name: question, prompt, query or instruction;
        answer, response, completion or output; or a chat in ``messages`` or ``conversations`` (or
        in prompt and completion), whose last turn is the answer and all before it the question.

    Raises
    ------
    PMCError
        No such file, not readable, no rows, or a row without a question (or a wanted answer).

    Notes
    -----
    JSON is read by Python itself: `datasets` would keep a copy of the file in its cache, infer
    dates from strings, and could not name the row at fault.
    """
    rows = rows_of(read_records(str(source)), str(source), answers=answers, paraphrased=paraphrased)
    if not rows:
        raise PMCError(f"{source} has no rows")
    return rows


def read_records(source: str) -> Iterator[Any]:
    """Yield the records of a file or hub id as they are, for columns that `load_rows` doesn't know."""
    path = Path(source)
    if path.is_file():
        try:
            yield from _file_records(path)
        except (OSError, ValueError) as error:  # JSON, Unicode and Arrow errors are ValueErrors
            raise PMCError(f"{source} can't be read: {error}") from error
    elif path.suffix in SUFFIXES or not _HUB_ID.fullmatch(source):
        raise PMCError(f"{source or '(no file)'} does not exist: give a {', '.join(SUFFIXES)} file or a hub id")
    else:
        yield from _hub_records(source)


def _file_records(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError("Parquet needs pyarrow: pip install 'pmc_fast[cli]'") from error
        yield from parquet.read_table(path).to_pylist()
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"line {number} is not JSON ({error.msg})") from error
    elif path.suffix == ".json":
        text = path.read_text(encoding="utf-8")
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                raise
            content = [json.loads(line) for line in text.splitlines() if line.strip()]  # as TOFU's files on the hub
        if not isinstance(content, list):
            raise ValueError("a .json file must hold a list of rows (one object a line is .jsonl)")
        yield from content
    else:
        raise ValueError(f"the ending {path.suffix!r} is none of {', '.join(SUFFIXES)}")


def _hub_records(source: str) -> Iterator[Any]:
    try:
        import datasets
    except ImportError as error:
        raise PMCError("reading from the hub needs datasets: pip install 'pmc_fast[cli]'") from error
    name, *rest = source.split(":")
    config, split = [*rest, None, None][:2]
    try:
        yield from datasets.load_dataset(name, config, split=split or "train")
    except Exception as error:  # offline, no such data set, no such config: each has a class of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PMCError(f"{source} is no file here and can't be loaded from the hub: {reason}") from error
