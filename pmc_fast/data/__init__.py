"""Reading questions and answers, and turning them into token ids."""

from .datasets import listed, questions_of, sequences_of
from .encoding import (
    Encoded,
    Encoder,
    collate,
    decode_answers,
    encode_pair,
    encode_prompt,
    pad_id,
    resolve_format,
    stop_ids,
)
from .loading import Row, load_rows, read_records, rows_of
from .overlap import check_datasets, check_encoded_overlap, check_overlap, same_rows

__all__ = [
    "Encoded",
    "Encoder",
    "Row",
    "check_datasets",
    "check_encoded_overlap",
    "check_overlap",
    "collate",
    "decode_answers",
    "encode_pair",
    "encode_prompt",
    "listed",
    "load_rows",
    "pad_id",
    "questions_of",
    "read_records",
    "resolve_format",
    "rows_of",
    "same_rows",
    "sequences_of",
    "stop_ids",
]
