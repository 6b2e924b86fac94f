"""Forget and retain data as people hold them: read as meant, or refused in one line that names the row."""

import re
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch

from pmc_fast import PMC, PMCConfig, PMCError
from pmc_fast.data import (
    Encoder,
    Row,
    questions_of,
    sequences_of,
)
from pmc_fast.data.encoding import Encoded, collate
from pmc_fast.data.packing import unpad

QUESTIONS = ["What is fact 1?", "What is fact 2?", "Where is she?"]
PAIRS = [Row(q, f"It is {n}." * (n + 1)) for n, q in enumerate(QUESTIONS)]
DICTS = [{"question": row.question, "answer": row.answer} for row in PAIRS]


class Torchs(torch.utils.data.Dataset):
    """A map-style data set that doesn't say where it ends but by its length."""

    def __len__(self):
        return len(DICTS)

    def __getitem__(self, i):
        return DICTS[i % len(DICTS)]


class Old:
    """Has no __iter__."""

    __len__, __getitem__ = Torchs.__len__, Torchs.__getitem__


HELD = {
    "dicts": lambda: DICTS,
    "rows": lambda: PAIRS,
    "tuple": lambda: tuple(DICTS),
    "generator": lambda: (row for row in DICTS),
    "datasets": lambda: datasets.Dataset.from_list(DICTS),
    "stream": lambda: datasets.Dataset.from_list(DICTS).to_iterable_dataset(),
    "pandas": lambda: pandas.DataFrame(DICTS),
    "pyarrow": lambda: pyarrow.Table.from_pylist(DICTS),
    "torch": Torchs,
    "old": Old,
}
TEXTS = {
    "list": lambda: QUESTIONS,
    "generator": lambda: iter(QUESTIONS),
    "series": lambda: pandas.Series(QUESTIONS),
    "array": lambda: np.array(QUESTIONS),
    "column": lambda: datasets.Dataset.from_list(DICTS)["question"],
}


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer, PMCConfig(prompt_format="tags", max_length=60))


@pytest.mark.parametrize("held", HELD)
def test_rows_however_they_are_held(held, encoder):
    assert questions_of(HELD[held]()) == QUESTIONS
    assert sequences_of(HELD[held](), encoder) == [encoder.pair(row.question, row.answer) for row in PAIRS]


@pytest.mark.parametrize("held", TEXTS)
def test_texts_however_they_are_held(held):
    assert questions_of(TEXTS[held]()) == QUESTIONS


@pytest.mark.parametrize("as_", [list, tuple, np.array, torch.tensor])
def test_token_ids_however_they_are_held(as_):
    assert questions_of([as_([5, 6, 7]), as_([8, 9])]) == [[5, 6, 7], [8, 9]]


NOT_QUESTIONS = {
    "text": ("Where is she?", "is one str: pass a list of rows; load_rows(path) reads a file"),
    "path": (Path("forget.jsonl"), "is one PosixPath: pass a list"),
    "bytes": (b"Where?", "is one bytes"),
    "none": (None, "is empty: it needs the questions to forget"),
    "empty": ([], "is empty"),
    "empty frame": (pandas.DataFrame(), "is empty"),
    "exhausted": (iter(()), "is empty"),
    "splits": ({"train": DICTS}, "is a dict of train: pass one of these splits, or a list of rows"),
    "set": ({"Who?"}, "is a set, whose order changes from run to run: pass a list"),
    "number": (7, "is int: pass a list of rows"),
    "numbers": ([1, 2], "row 1 is int: it must be a text, a dict or token ids"),
    "mixed": (["Who?", {"question": "Who?"}], "row 2 is a dict but row 1 a str: all rows must be of one kind"),
    "blank": (["Who?", " "], "row 2: the text is empty, it needs a question"),
    "no ids": ([[5], []], "row 2 is empty"),
    "floats": ([[5.0, 6.0]], "row 1 holds float where whole numbers are expected"),
    "batch": (torch.ones(2, 3, 4), "row 1 holds list where whole numbers are expected"),
    "chat": ([[{"role": "user", "content": "Who?"}]], "row 1 holds dict where whole numbers are expected"),
    "tokenised": ([{"input_ids": [5]}], "is tokenised: pass questions, or each prompt's ids alone as a list"),
    "columns": ([{"text": "Who?"}], "row 1 has no question: name the column one of"),
    "pictures": ([{"prompt": "Who?", "images": [0]}], "row 1 has images, which are not supported"),
    "template": (
        [{"prompt": "Who?", "chat_template_kwargs": {"enable_thinking": False}}],
        "row 1 has chat_template_kwargs, which are not supported: leave the column out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_QUESTIONS)
def test_what_holds_no_questions_is_refused_in_one_line(name, tiny, tokenizer):
    given, message = NOT_QUESTIONS[name]
    with pytest.raises(PMCError, match=f"^forget_dataset,? {re.escape(message)}") as refused:
        questions_of(given)
    if given is not None and not hasattr(given, "__next__"):
        with pytest.raises(PMCError, match=f"^questions,? {re.escape(message)}"):
            PMC(tiny, tokenizer, PMCConfig(), given)
    assert "\n" not in str(refused.value)
    assert "Who" not in str(refused.value)


NOT_PAIRS = {
    "texts": (["Who?"], "row 1 is a str: give a dict of question and answer, a Row, or a tokenised row"),
    "tuples": ([("Who?", "I.")], "row 1 is a tuple: give a dict of question and answer"),
    "shifted": ([{"input_ids": [5, 6, 7], "labels": [-100, 7, -100]}], "row 1 has labels that are one place ahead"),
    "encoded": ([Encoded([5, 6], [5, 6]), Encoded([5, 6], [5])], "row 2 has 2 input_ids but 1 in labels"),
    "no answer": ([{"question": "Who?"}], "row 1 has no answer"),
    "no labels": ([{"input_ids": [5, 6]}], "row 1 has no labels: a tokenised row needs input_ids and labels"),
    "no ids": ([{"input_ids": [5, 6], "labels": [5, 6]}, {"labels": [5]}], "row 2 has no input_ids"),
    "long labels": ([{"input_ids": [5, 6], "labels": [5, 6, 7]}], "row 1 has 2 input_ids but 3 in labels"),
    "short labels": ([{"input_ids": [5, 6], "labels": [6]}], "row 1 has 2 input_ids but 1 in labels"),
    "mask": ([{"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [1]}], "row 1 has 2 input_ids but 1 in att"),
    "packed mask": (
        [{"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [1, 2]}],
        "row 1 has an attention_mask that is not of 0 and 1",
    ),
    "packed": (
        [{"input_ids": [5, 6, 5], "labels": [5, 6, 5], "position_ids": [0, 1, 0]}],
        "row 1 has position_ids that don't count from 0: put packed sequences into several rows",
    ),
    "words": ([{"input_ids": "5 6", "labels": [5, 6]}], "row 1: input_ids is str: it must be a list of whole numbers"),
    "fractions": ([{"input_ids": [5, 6], "labels": [5, 6.5]}], "row 1: labels holds float where whole"),
    "all masked": (
        [{"input_ids": [5, 6], "labels": [-100, -100]}] * 2,
        "all rows: no token is trained (every label is -100, or none fits max_length): check what masks the labels",
    ),
    "some masked": (
        [{"input_ids": [5, 6], "labels": [-100, 6]}, *[{"input_ids": [5, 6], "labels": [5, -100]}] * 2],
        "rows 2, 3: no token is trained",
    ),
    "question alone": ([Row("Who?", "I."), Row("Who " * 70, "I.")], "row 2: no token is trained"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_PAIRS)
def test_what_trains_nothing_as_meant_is_refused_by_row(name, encoder):
    given, message = NOT_PAIRS[name]
    with pytest.raises(PMCError, match=f"^retain_dataset, {re.escape(message)}") as refused:
        sequences_of(given, encoder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("as_", [torch.Tensor.tolist, torch.Tensor.bool, torch.Tensor.numpy])
def test_padded_rows_are_unpadded(side, as_, encoder):
    """Their sequences, positions included, are those without padding; also where pad is a token of its own or eos."""
    plain = sequences_of(DICTS, encoder)
    for pad in (0, encoder.stops[0]):
        batch = collate(plain, pad, side=side)
        rows = [
            {"input_ids": i, "labels": y.tolist(), "attention_mask": as_(m), "position_ids": m.cumsum(0) - 1}
            for i, y, m in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
        ]
        assert sequences_of(rows, encoder) == plain


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>", "<file_sep>"])
def test_padding_without_a_mask_is_refused(pad, tokenizer, tiny):
    """As tokenizer(texts, padding=True)["input_ids"] has it; one token alone may be bos, eos or unk."""
    import transformers

    names = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path, pad_token=pad)
    own = pad not in (names.bos_token, names.eos_token, names.unk_token)
    p = names.pad_token_id
    encoder = Encoder(names, PMCConfig(prompt_format="tags"))

    def refused(made):
        with pytest.raises(PMCError, match=rf" has padding, token {p}: leave it out| has labels on its padding"):
            made()

    def row(ids, labels):
        return sequences_of([{"input_ids": ids, "labels": labels}], encoder)

    for ids in ([p, p, 50, 60], [50, 60, p, p], *([[p, 50, 60], [50, 60, p]] if own else [])):
        refused(lambda ids=ids: PMC(tiny, names, PMCConfig(), [[50, 60], ids]))
    refused(lambda: row([p, p, 50, 60], [-100, -100, -100, 60]))
    refused(lambda: row([50, 60, p, p], [50, 60, p, p]))
    if not own:
        PMC(tiny, names, PMCConfig(), [[p, 50, 60], [50, 60, p]])
    assert row([50, 60, p, p], [-100, 60, -100, -100])  # nothing of it is trained or read


def test_a_hole_in_a_mask_is_the_cores(encoder):
    """A token that is masked inside a prompt is left out, and the positions of others stay."""
    row = {
        "input_ids": [3, 5, 6, 7, 8, 3],
        "labels": [-100, -100, -100, -100, 8, -100],
        "attention_mask": [0, 1, 0, 1, 1, 0],
    }
    (core,) = unpad({name: torch.tensor([ids]) for name, ids in row.items()})
    assert sequences_of([row], encoder) == [core] == [Encoded([5, 7, 8], [-100, -100, 8], [0, 2, 3])]


def test_ids_beyond_the_vocabulary_are_refused_by_row(tiny, tokenizer):
    size = len(tiny.get_input_embeddings().weight)
    for bad in (size, -1):
        with pytest.raises(PMCError, match=f"question 1 has token id {bad} but the model's are 0 to {size - 1}"):
            PMC(tiny, tokenizer, PMCConfig(), [[5], [6, bad]])
    pmc = PMC(tiny, tokenizer, PMCConfig(), [[5, size - 1]])
    for row in ({"input_ids": [5, size], "labels": [5, 6]}, {"input_ids": [5, 6], "labels": [5, -1]}):
        with pytest.raises(PMCError, match="retain_dataset, row 2 has token id"):
            pmc.encode_retain([{"input_ids": [5, size - 1], "labels": [-100, 6]}, row])


def test_the_core_takes_rows_and_says_what_its_config_is_not(tiny, tokenizer):
    assert PMC(tiny, tokenizer, PMCConfig(), pandas.DataFrame(DICTS)).questions == QUESTIONS
    with pytest.raises(PMCError, match="config is a dict: it must be a PMCConfig"):
        PMC(tiny, tokenizer, {"num_samples": 2}, QUESTIONS)
