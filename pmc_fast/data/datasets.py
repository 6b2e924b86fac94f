"""Forget and retain data as trainers hold them: texts, rows or token ids."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import PMCError
from .encoding import Encoded, Encoder
from .loading import Row, rows_of


def questions_of(dataset: Sequence[Any]) -> list[Any]:
    """Return the questions of a forget dataset: texts or token ids, as `PMC` takes them. Answers are not read."""
    first = _first_of(dataset, "forget_dataset")
    if isinstance(first, str) or (isinstance(first, Sequence) and first and isinstance(first[0], int)):
        return list(dataset)
    rows = list(dataset) if isinstance(first, Row) else rows_of(dataset, "forget_dataset", answers=None)
    return [row.question for row in rows]


def sequences_of(dataset: Sequence[Any], encoder: Encoder) -> list[Encoded]:
    """Return a retain dataset's sequences."""
    first = _first_of(dataset, "retain_dataset")
    if isinstance(first, Encoded):
        return list(dataset)
    if isinstance(first, Mapping) and "input_ids" in first and "labels" in first:
        return [Encoded(list(map(int, r["input_ids"])), list(map(int, r["labels"]))) for r in dataset]
    rows = list(dataset) if isinstance(first, Row) else rows_of(dataset, "retain_dataset", answers=True)
    for number, row in enumerate(rows, start=1):
        encoder.check_text(f"retain_dataset, row {number}", f"{row.question}\n{row.answer or ''}")
    return [encoder.pair(row.question, row.answer or "") for row in rows]


def _first_of(dataset: Any, name: str) -> Any:
    if isinstance(dataset, Mapping):  # a DatasetDict
        raise PMCError(f"{name} is a dict of {', '.join(map(str, dataset))}: pass one of these splits")
    return dataset[0]
