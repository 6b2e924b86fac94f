"""Reading questions and answers, and turning them into token ids."""

from .datasets import questions_of, sequences_of
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

__all__ = [
    "Encoded",
    "Encoder",
    "Row",
    "collate",
    "decode_answers",
    "encode_pair",
    "encode_prompt",
    "load_rows",
    "pad_id",
    "questions_of",
    "read_records",
    "resolve_format",
    "rows_of",
    "sequences_of",
    "stop_ids",
]
