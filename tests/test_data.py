"""Reading rows: the names people use, and refusals that name the row."""

import json
from collections import UserDict

import pytest

from pmc_fast.config import PMCConfig
from pmc_fast.data import Chat, Encoder, Row, Turn, load_rows, questions_of, sequences_of
from pmc_fast.errors import PMCError


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("question", ["question", "prompt", "query", "instruction"])
@pytest.mark.parametrize("answer", ["answer", "response", "completion", "output"])
def test_names_people_use(tmp_path, question, answer):
    file = write(tmp_path / "a.jsonl", [{question: "Wer?", answer: "Søren", "other": 1}])
    assert load_rows(file) == [Row("Wer?", "Søren")]


def test_chats(tmp_path):
    user, assistant = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    rows = [
        {"messages": [user, assistant]},
        {"prompt": [user], "completion": [assistant]},
        {"messages": [user]},
    ]
    assert load_rows(write(tmp_path / "a.jsonl", rows)) == [Row("Q", "A"), Row("Q", "A"), Row("Q")]
    parts = {"role": "user", "content": [{"type": "text", "text": "Q"}]}
    assert load_rows(write(tmp_path / "d.jsonl", [{"messages": [parts]}])) == [Row("Q")]


def test_formats_agree(tmp_path):
    import pyarrow
    from pyarrow import parquet

    # dates and numbers stay the text that was written
    rows = [{"question": "When?", "answer": "2011-05-11"}, {"question": "How many?", "answer": "42"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    expected = [Row("When?", "2011-05-11"), Row("How many?", "42")]
    for file in (write(tmp_path / "a.jsonl", rows), tmp_path / "a.json", tmp_path / "a.parquet"):
        assert load_rows(file) == expected


def test_only_questions_are_needed(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"question": "Who?"}])
    assert load_rows(file) == [Row("Who?")]
    with pytest.raises(PMCError, match=r"a\.jsonl, row 1 has no answer"):
        load_rows(file, answers=True)


def test_paraphrases_are_read_where_they_are(tmp_path):
    rows = [{"question": "a", "answer": "b", "paraphrased_question": "c", "paraphrased_answer": "d"}]
    file = write(tmp_path / "a.jsonl", rows)
    assert load_rows(file, paraphrased=True) == [Row("c", "d")]
    assert load_rows(file) == [Row("a", "b")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "has no rows"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.jsonl", '{"question": "a"}\n{"question": \n', "line 2 is not JSON"),
        ("a.jsonl", '{"question": "a"}\n{"answer": "b"}\n', "row 2 has no question"),
        ("a.jsonl", '{"question": "  "}\n', "row 1 has no question"),
        ("a.jsonl", '"text"\n', "row 1 is str"),
        ("a.json", '{"question": "a"}', "must hold a list"),
        ("a.json", "[", "can't be read"),
        ("a.csv", "question\n", "the ending '.csv' is none of"),
        ("a.parquet", "no parquet", "can't be read"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(PMCError, match=message) as refused:
        load_rows(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_missing_files_are_not_looked_up_on_the_hub(tmp_path):
    for missing in (tmp_path / "no.jsonl", "no.json", "no/such/file", ""):
        with pytest.raises(PMCError, match="does not exist"):
            load_rows(missing)


def test_a_hub_id_that_can_not_be_reached_is_one_error():
    with pytest.raises(PMCError, match=r"locuslab/TOFU:forget10 .* can't be loaded from the hub"):
        load_rows("locuslab/TOFU:forget10")


def test_hub_ids_are_passed_on_with_config_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [{"question": "Who?", "answer": "Ann"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("locuslab/TOFU:forget10", "locuslab/TOFU", "squad:plain_text:validation"):
        assert load_rows(source) == [Row("Who?", "Ann")]
    assert asked == [
        ("locuslab/TOFU", "forget10", "train"),
        ("locuslab/TOFU", None, "train"),
        ("squad", "plain_text", "validation"),
    ]


def say(role, content):
    return {"role": role, "content": content}


# one question and its answer in the forms that TRL's datasets have
FORMS = {
    "standard": {"prompt": "Who?", "completion": "Ann."},
    "conversational": {"prompt": [say("user", "Who?")], "completion": [say("assistant", "Ann.")]},
    "system prompt": {"prompt": [say("system", "Be kind."), say("user", "Who?")], "completion": [say("assistant", "Ann.")]},
    "messages": {"messages": [say("user", "Who?"), say("assistant", "Ann.")]},
    "parts": {"messages": [say("user", [{"type": "text", "text": "Who?"}]), say("assistant", [{"type": "text", "text": "Ann."}])]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_datasets_of_prompts_and_completions(form, tokenizer):
    import datasets

    encoder = Encoder(tokenizer, PMCConfig())
    for rows in ([FORMS[form]], datasets.Dataset.from_list([FORMS[form]])):
        question = (
            Chat(map(Turn._make, (("system", "Be kind."), ("user", "Who?")))) if form == "system prompt" else "Who?"
        )
        assert questions_of(rows) == [question]
        assert sequences_of(rows, encoder) == [encoder.pair(question, "Ann.")]


class Sealed(UserDict):
    """A row or a message whose answer must not be looked at."""

    def __getitem__(self, key):
        assert key not in ("completion", "answer"), "the answer was read"
        assert key != "content" or self.data["role"] != "assistant", "the answer was read"
        return super().__getitem__(key)


def test_answers_to_forget_questions_are_not_read():
    assert questions_of([Sealed({"prompt": "Who?", "completion": "Ann."})]) == ["Who?"]
    assert questions_of([Sealed({"question": "Who?", "answer": "Ann."})]) == ["Who?"]
    assert questions_of([{"messages": [Sealed(m) for m in FORMS["messages"]["messages"]]}]) == ["Who?"]


def test_a_dict_of_splits_is_no_dataset(tokenizer):
    import datasets

    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list([FORMS["standard"]])})
    with pytest.raises(PMCError, match="forget_dataset is a dict of train: pass one of these splits"):
        questions_of(splits)
    with pytest.raises(PMCError, match="retain_dataset is a dict of train"):
        sequences_of(splits, Encoder(tokenizer, PMCConfig()))
