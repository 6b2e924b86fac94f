"""Reading question-answer rows from files and from the Hugging Face hub."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import PMCError
from ..utils.text import names
from .columns import Columns
from .records import Row, rows_of

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
_NO_REPOSITORY = (*SUFFIXES, ".txt", ".ndjson", ".gz", ".zip", ".zst", ".xlsx", ".arrow", ".yaml")  # a file, mistyped
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+){0,2}")  # owner/name, :config, :split
_BLANK = re.compile(r"[ \t\n\r]*")


def load_rows(
    source: str | Path,
    *,
    answers: bool = False,
    paraphrased: bool = False,
    columns: Mapping[str, str] | None = None,
    prompt_words: int = 0,
) -> list[Row]:
    """Read rows of questions and answers.

    Parameters
    ----------
    source : str or Path
        A .jsonl, .json, .parquet, .csv or .tsv file, or a hub id with an optional config and split,
        ``locuslab/TOFU:forget10`` or ``owner/name:config:split`` (split "train" by default).
    answers : bool
        Refuse rows without an answer.
    paraphrased : bool
        Read ``paraphrased_question`` and ``paraphrased_answer`` where the data has them.
    columns : mapping of str to str, optional
        The data's own columns by what they hold, such as ``{"question": "frage", "answer": "antwort"}``
        (`pmc_fast.config.COLUMN_NAMES`); they win over those that are found by name.
    prompt_words : int
        Of a column ``text``, or a list of texts, so many words are the beginning that is to be continued, and the rest is
        the answer (`pmc_fast.utils.words.count_words`); 0: texts are not read.

    Returns
    -------
    list of Row
        In the data's order. Columns are found by name: question, prompt, query or instruction;
        answer, response, completion or output; or a chat in ``messages`` or ``conversations`` (or
        in prompt and completion), whose last turn is the answer and all before it the question. Rows of
        beginning and continuation, and those of MUSE's verbmem (prompt and gt), are texts to be continued.

    Raises
    ------
    PMCError
        No such file, not readable, no rows, or a row without a question (or a wanted answer); a column of `columns` that
        no row has; texts of no more than `prompt_words` words.

    Notes
    -----
    Files are not read with `datasets`, which would keep a copy in its cache, infer dates from strings, and could not name
    the row of an error. Data from the hub are not cached either.
    """
    how: dict[str, Any] = {"columns": columns, "prompt_words": prompt_words}
    rows = rows_of(read_records(str(source), columns), str(source), answers=answers, paraphrased=paraphrased, **how)
    if not rows:
        raise PMCError(f"{source} has no rows")
    return rows


def read_records(source: str, columns: Mapping[str, str] | None = None) -> Iterator[Any]:
    """Yield the records of a file or hub id with all their columns; `columns` as of `load_rows`."""
    path = Path(source)
    if source and os.path.isdir(path):
        files = sorted(f.name for f in path.iterdir() if f.suffix.lower() in SUFFIXES)[:3]
        raise PMCError(
            f"{source} is a directory: name the file ({', '.join(files) or 'none of a known kind is in it'})"
        )
    if source and os.path.exists(path):
        try:
            yield from _file_records(path, Columns(columns))
        except (OSError, ValueError, RecursionError, csv.Error) as error:  # JSON's and Arrow's are ValueErrors
            raise PMCError(f"{source} can't be read: {error}") from error
        return
    owner = source.rpartition("/")[0]
    if path.suffix.lower() in _NO_REPOSITORY or not _HUB_ID.fullmatch(source) or os.path.isdir(owner):
        raise PMCError(
            f"{source or '(no file)'} does not exist: give a {', '.join(SUFFIXES)} file, or a hub id as owner/name "
            "(not looked up where a directory has the owner's name)"
        )
    yield from _hub_records(source)


def _file_records(path: Path, columns: Columns) -> Iterator[Any]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError("Parquet needs pyarrow: pip install 'pmc_fast[cli]'") from error
        yield from parquet.read_table(path).to_pylist()
    elif suffix == ".jsonl":
        yield from json_lines(read_text(path))
    elif suffix == ".json":
        values = list(_json_values(read_text(path)))
        yield from values[0] if len(values) == 1 and isinstance(values[0], list) else values
    elif suffix in (".csv", ".tsv"):
        yield from _table(read_text(path), "," if suffix == ".csv" else "\t", columns)
    else:
        raise ValueError(f"the ending {path.suffix!r} is none of {', '.join(SUFFIXES)}")


def read_text(path: Path) -> str:
    """Return a file's text: UTF-8, also with a byte order mark, UTF-16 or UTF-32.

    Raises
    ------
    ValueError
        It is none of these. The error names the line, not its text.
    """
    content = path.read_bytes()
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"line {line} is not {encoding.upper()}: convert the file (iconv -f LATIN1 -t UTF-8, if it is Latin-1)"
        ) from error


def json_lines(text: str) -> Iterator[Any]:
    """Yield the value of each line that is not blank; only newlines end lines, since texts may hold other breaks."""
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            try:
                yield json.loads(line, object_pairs_hook=strict_object)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON ({getattr(error, 'msg', error)})") from error


def _json_values(text: str) -> Iterator[Any]:
    """Yield consecutive values: a list of rows, or an object per row, as in TOFU's files on the hub."""
    decoder = json.JSONDecoder(object_pairs_hook=strict_object)
    at = _BLANK.match(text, 0).end()  # type: ignore[union-attr]  # it matches nothing, too
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        yield value
        at = _BLANK.match(text, at).end()  # type: ignore[union-attr]


def strict_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; one that has a name twice is a ValueError."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        given = [name for name, _ in pairs]
        raise ValueError(f"an object has a name twice: {names(n for n in fields if given.count(n) > 1)}")
    return fields


def _table(text: str, delimiter: str, columns: Columns) -> Iterator[dict[str, str]]:
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = next(lines, [])
    columns.check_header(header, delimiter)
    for fields in lines:
        if fields and len(fields) != len(header):
            raise ValueError(f"line {lines.line_num} has {len(fields)} fields and the first {len(header)}")
        if fields:
            yield dict(zip(header, fields, strict=True))


def _hub_records(source: str) -> Iterator[Any]:
    """Yield a data set's rows; streaming leaves no copy of their texts in a cache."""
    try:
        import datasets
    except ImportError as error:
        raise PMCError("reading from the hub needs datasets: pip install 'pmc_fast[cli]'") from error
    name, *rest = source.split(":")
    config, split = [*rest, None, None][:2]
    try:
        yield from datasets.load_dataset(name, config, split=split or "train", streaming=True)
    except Exception as error:  # offline, no such data set or config: each raises another class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PMCError(f"{source} is no file here and can't be loaded from the hub: {reason}") from error
