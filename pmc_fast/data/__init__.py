"""Reading questions and answers, and turning them into token ids."""

from .chats import Chat, Question, Turn, is_text, text_to_continue
from .datasets import listed, questions_of, rows_in, sequences_of
from .encoder import Encoder
from .encoding import Encoded, collate, decode_answers, encode_pair, encode_prompt, pad_id, resolve_format, stop_ids
from .loading import load_rows, read_records
from .overlap import check_answers, check_datasets, check_encoded_overlap, check_overlap, check_repeats, same_rows
from .records import Row, rows_of

__all__ = [
    "Chat", "Encoded", "Encoder", "Question", "Row", "Turn", "check_answers", "check_datasets",
    "check_encoded_overlap", "check_overlap", "check_repeats", "collate", "decode_answers", "encode_pair",
    "encode_prompt", "is_text", "listed", "load_rows", "pad_id", "questions_of", "read_records", "resolve_format", "rows_in", "rows_of",
    "same_rows", "sequences_of", "stop_ids", "text_to_continue",
]  # fmt: skip
