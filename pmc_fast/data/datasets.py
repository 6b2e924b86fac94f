"""Questions and sequences from data sets in memory: texts, rows or token ids."""

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral
from typing import Any

from ..errors import PMCError
from ..utils.labels import IGNORED
from ..utils.text import row_numbers
from .chats import Chat
from .encoder import Encoder
from .encoding import Encoded
from .packing import num_targets, unpadded
from .records import Row, rows_of


def questions_of(dataset: Iterable[Any] | None, name: str = "forget_dataset") -> list[Any]:
    """Return the questions of a data set, texts or token ids, for `PMC`. Answers are not read.

    Parameters
    ----------
    dataset : iterable
        Of texts, lists of token ids, or rows; see `listed`.
    name : str
        Names it in errors.
    """
    items = listed(dataset, name, "it needs the questions to forget")
    kind = _kind_of(items, name)
    if kind == "str":
        empty = [number for number, text in enumerate(items, start=1) if not str(text).strip()]
        if empty:
            raise PMCError(f"{name}, {row_numbers(empty)}: the text is empty, it needs a question")
        return [text if isinstance(text, Chat) else str(text) for text in items]  # numpy.str_ becomes str
    if kind == "list":
        return [_ids(item, f"{name}, row {number}") for number, item in enumerate(items, start=1)]
    if kind == "Encoded" or (kind == "dict" and "input_ids" in items[0]):
        raise PMCError(f"{name} is tokenised: pass questions, or each prompt's ids alone as a list")
    return [row.question for row in _rows(items, name, answers=None)]


def rows_in(dataset: Iterable[Any] | None, name: str = "forget_dataset") -> list[Row]:
    """Return the questions of a data set with their answers, where it has any.

    Parameters
    ----------
    dataset : iterable
        Of rows, or texts, which have no answers; see `listed`.
    name : str
        Names it in errors.
    """
    items = listed(dataset, name, "it needs the questions to forget")
    kind = _kind_of(items, name)
    if kind == "str":
        return [Row(question) for question in questions_of(items, name)]
    if kind in ("list", "Encoded") or (kind == "dict" and "input_ids" in items[0]):
        raise PMCError(f"{name} is tokenised: pass rows with a question and an answer")
    return _rows(items, name, answers=False)


def sequences_of(dataset: Iterable[Any] | None, encoder: Encoder, name: str = "retain_dataset") -> list[Encoded]:
    """Return the sequences of a data set of pairs: rows, tokenised rows (padded ones too), or encoded ones.

    Raises
    ------
    PMCError
        Among others: no token of a sequence is trained.
    """
    items = listed(dataset, name, "without pairs to keep, forgetting takes all else along")
    kind = _kind_of(items, name)
    if kind in ("str", "list"):
        what = type(items[0]).__name__
        raise PMCError(f"{name}, row 1 is a {what}: give a dict of question and answer, a Row, or a tokenised row")
    if kind == "Encoded":
        sequences = items
        for number, s in enumerate(items, start=1):
            _same_length(f"{name}, row {number}", s.input_ids, labels=s.labels)
    elif kind == "dict" and "input_ids" in items[0]:
        sequences = [_tokenised(row, f"{name}, row {number}") for number, row in enumerate(items, start=1)]
    else:
        rows = _rows(items, name, answers=True)
        for number, row in enumerate(rows, start=1):
            encoder.check_text(f"{name}, row {number}", row.question)
            encoder.check_text(f"{name}, row {number}", row.answer or "")
        sequences = [
            encoder.pair(row.question, row.answer or "", where=f"{name}, row {number}")
            for number, row in enumerate(rows, start=1)
        ]
    if kind == "Encoded" or (kind == "dict" and "input_ids" in items[0]):
        for number, s in enumerate(sequences, start=1):
            _check_labels(s, encoder.tokenizer, f"{name}, row {number}")
    if untrained := [number for number, sequence in enumerate(sequences, start=1) if not num_targets(sequence)]:
        which = "all rows" if len(untrained) == len(sequences) else row_numbers(untrained)
        raise PMCError(
            f"{name}, {which}: no token is trained (every label is {IGNORED}, or none fits max_length): "
            "check what masks the labels, or leave such rows out"
        )
    return sequences


def listed(dataset: Any, name: str, needs: str) -> list[Any]:
    """Return a data set's rows as a list; a stream is read to its end.

    Parameters
    ----------
    dataset : iterable
        A list, a datasets.Dataset, a generator, a torch Dataset, a data frame of pandas or polars, a pyarrow table.
    name : str
        Names it in errors.
    needs : str
        Ends the error for an empty data set.
    """
    if isinstance(dataset, (str, bytes, os.PathLike)):
        raise PMCError(f"{name} is one {type(dataset).__name__}: pass a list of rows; load_rows(path) reads a file")
    if isinstance(dataset, Mapping):  # a DatasetDict, columns, a tokenizer's output
        raise PMCError(
            f"{name} is a dict of {', '.join(map(str, dataset))}: pass one of these splits, or a list of rows"
        )
    if isinstance(dataset, Set):
        raise PMCError(f"{name} is a set, whose order changes from run to run: pass a list")
    if hasattr(dataset, "iloc") and hasattr(dataset, "columns"):  # pandas
        items = dataset.to_dict("records")
    elif hasattr(dataset, "to_dicts"):  # polars
        items = dataset.to_dicts()
    elif hasattr(dataset, "to_pylist"):  # pyarrow
        items = dataset.to_pylist()
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not hasattr(dataset, "__iter__"):
        items = [dataset[i] for i in range(len(dataset))]  # a torch Dataset, which need not raise IndexError
    elif dataset is None or isinstance(dataset, Iterable) or hasattr(dataset, "__getitem__"):
        items = [] if dataset is None else list(dataset)
    else:
        raise PMCError(f"{name} is {type(dataset).__name__}: pass a list of rows")
    if not items:
        raise PMCError(f"{name} is empty: {needs}")
    return items


def _kind_of(items: Sequence[Any], name: str) -> str:
    """Return the kind of all rows: str, list (of ids), dict, Row or Encoded."""
    first = _kind(items[0])
    for number, item in enumerate(items, start=1):
        kind = _kind(item)
        if kind is None:
            raise PMCError(f"{name}, row {number} is {type(item).__name__}: it must be a text, a dict or token ids")
        if kind != first:
            raise PMCError(f"{name}, row {number} is a {kind} but row 1 a {first}: all rows must be of one kind")
    return str(first)


def _kind(item: Any) -> str | None:
    for kind, name in ((str, "str"), (Chat, "str"), (Mapping, "dict"), (Row, "Row"), (Encoded, "Encoded")):
        if isinstance(item, kind):
            return name
    listing = hasattr(item, "tolist") or (isinstance(item, Sequence) and not isinstance(item, (bytes, bytearray)))
    return "list" if listing else None


def _rows(items: list[Any], name: str, *, answers: bool | None) -> list[Row]:
    if isinstance(items[0], Row):
        return items
    return rows_of(items, name, answers=answers)


def _tokenised(row: Mapping[str, Any], where: str) -> Encoded:
    """Return a tokenised row's sequence without the padding that its attention mask marks."""
    for name in ("input_ids", "labels"):
        if row.get(name) is None:
            raise PMCError(
                f"{where} has no {name}: a tokenised row needs input_ids and labels ({IGNORED}: not trained)"
            )
    ids, labels = (_ids(row[name], f"{where}: {name}") for name in ("input_ids", "labels"))
    seen = [1] * len(ids)
    if row.get("attention_mask") is not None:
        seen = _ids(row["attention_mask"], f"{where}: attention_mask", bools=True)
    _same_length(where, ids, labels=labels, attention_mask=seen)
    if any(x not in (0, 1) for x in seen):
        raise PMCError(
            f"{where} has an attention_mask that is not of 0 and 1: several sequences go into several rows"
        )
    sequence = Encoded(ids, labels) if all(seen) else unpadded(ids, labels, seen)
    if row.get("position_ids") is not None:
        shown = [t for t, x in enumerate(seen) if x]
        given = _ids(row["position_ids"], f"{where}: position_ids")
        if [given[t] for t in shown if t < len(given)] != [t - shown[0] for t in shown]:
            raise PMCError(
                f"{where} has position_ids that don't count from 0: put packed sequences into several rows"
            )
    return sequence


def _same_length(where: str, ids: Sequence[int], **others: Sequence[int]) -> None:
    for name, values in others.items():
        if len(values) != len(ids):
            raise PMCError(f"{where} has {len(ids)} input_ids but {len(values)} in {name}: both must be as long")


def _check_labels(s: Encoded, tokenizer: Any, where: str) -> None:
    """Refuse labels on padding, and labels that are already shifted by one."""
    check_padding(s.input_ids, tokenizer, where)
    pad = tokenizer.pad_token_id
    if pad is not None and s.labels[-2:] == [pad, pad]:
        raise PMCError(f"{where} has labels on its padding, token {pad}: set them to {IGNORED}")
    trained = [t for t, label in enumerate(s.labels[:-1]) if label != IGNORED]
    moved = all(s.labels[t] == s.input_ids[t + 1] for t in trained)
    if moved and any(s.labels[t] != s.input_ids[t] for t in trained):
        raise PMCError(f"{where} has labels that are one place ahead of input_ids: the loss alone shifts them")


def check_padding(ids: Sequence[int], tokenizer: Any, where: str, *, prompt: bool = False) -> None:
    """Refuse token ids that begin with padding or, in a prompt, end with it: it would be read as text."""
    pad = tokenizer.pad_token_id
    two = [pad, pad]  # a single one may have another meaning
    alone = pad not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    ends = [list(ids[:2]), *([list(ids[-2:])] if prompt else [])]
    if pad is not None and (two in ends or (alone and pad in (ids[0], *(ids[-1:] if prompt else ())))):
        raise PMCError(f"{where} has padding, token {pad}: leave it out, or give tokenised rows an attention_mask")


def check_ids(where: str, ids: Sequence[int], known: int) -> None:
    """Refuse token ids that a model with so many embeddings does not have."""
    if unknown := [t for t in (min(ids), max(ids)) if not 0 <= t < known]:
        raise PMCError(
            f"{where} has token id {unknown[0]} but the model's are 0 to {known - 1}: use the model's own tokenizer"
        )


def check_sequences(sequences: Sequence[Encoded], name: str, known: int) -> None:
    """Refuse sequences with token ids that a model with so many embeddings does not have."""
    for number, s in enumerate(sequences, start=1):
        check_ids(f"{name}, row {number}", [*s.input_ids, *(x for x in s.labels if x != IGNORED)], known)


def _ids(values: Any, where: str, *, bools: bool = False) -> list[int]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise PMCError(f"{where} is {type(values).__name__}: it must be a list of whole numbers")
    if not values:
        raise PMCError(f"{where} is empty")
    for kind in set(map(type, values)):
        if not issubclass(kind, Integral) or (kind is bool and not bools):
            raise PMCError(f"{where} holds {kind.__name__} where whole numbers are expected")
    return [int(x) for x in values]
