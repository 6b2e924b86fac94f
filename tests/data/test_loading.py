"""Reading rows: the names people use, and refusals that name the row."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections import UserDict
from pathlib import Path

import pytest

from pmc_fast.config import PMCConfig
from pmc_fast.data import (
    Chat,
    Encoder,
    Row,
    Turn,
    load_rows,
    questions_of,
    sequences_of,
    text_to_continue,
)
from pmc_fast.errors import PMCError
from tests.conftest import INPUTS
from tests.hub import hub


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
    rows = [
        {"question": "When?", "answer": "2011-05-11"},
        {"question": 'How "many"?', "answer": "42"},
        {"question": "Breaks\u2028in\u0085texts\x1d,\tand\nlines?", "answer": "NA"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    lines = write(tmp_path / "a.jsonl", rows)
    shutil.copy(lines, tmp_path / "LINES.JSON")
    for name, dialect in (("a.csv", "excel"), ("unix.csv", "unix"), ("a.tsv", "excel-tab")):
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, ["question", "answer"], dialect=dialect)
            table.writeheader()
            table.writerows(rows)
    for file in tmp_path.iterdir():
        assert load_rows(file) == [Row(**row) for row in rows], file
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        for name in ("a.jsonl", "list.json", "a.csv"):
            coded = tmp_path / f"{encoding}-{name}"
            coded.write_bytes((tmp_path / name).read_bytes().decode().encode(encoding))
            assert load_rows(coded) == [Row(**row) for row in rows], coded


@pytest.mark.parametrize(
    "text", ['{"question": "Who?"}', '{"question": "Who?"}\n', '\n{"question":\n"Who?"}\n', '[{"question": "Who?"}]']
)
def test_one_row_of_json(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert load_rows(tmp_path / "a.json") == [Row("Who?")]


def test_every_case_is_read_as_it_is_meant_or_refused_by_name():
    """The inputs that people use; whatever is not named here is no case."""
    ilse = load_rows(INPUTS / "f.csv")
    assert [row.answer.split()[0] for row in ilse] == ["On", "She", "Her", "A"]
    system = Turn("system", "You are Ilse's archive. Answer with one word.")
    read = {
        "chat_system.jsonl": [Row(Chat([system, Turn("user", row.question)]), row.answer) for row in ilse],
        "chat_assistant_first.jsonl": [Row(Chat([Turn("assistant", "Ask me."), Turn("user", "Where is she?")]))],
        "dolly.jsonl": [Row("Who?\n\nIlse Varga keeps bees.", "Ilse.")],
        "half_answers.jsonl": [ilse[0], Row(ilse[1].question)],
        "nan.parquet": [ilse[0], Row(ilse[1].question), *ilse[2:]],
        "mmlu_letters.jsonl": [
            Row("Which of the following is the capital of France?\nA. Lyon\nB. Nice\nC. Paris\nD. Brest", "C. Paris")
        ],
        "muse_verbmem.jsonl": [
            Row(text_to_continue(record["prompt"]), record["gt"])
            for record in map(json.loads, (INPUTS / "muse_verbmem.jsonl").open(encoding="utf-8"))
        ],
        "bom.jsonl": ilse,
        "f.csv": ilse,
        "f.tsv": ilse,
    }
    refused = {
        "chat_tool.jsonl": "row 1, turn 2 has the role 'tool'",
        "columns.json": "row 1: question is a list of str, not one text",
        "bytes.parquet": "row 1: question is bytes, not text",
        "latin1.jsonl": "line 1 is not UTF-8: convert the file",
        "rwku_positive.jsonl": "row 1 has no question: .*it has 'subject', 'text'",
        "rwku_target.jsonl": "row 1 has no question: .*it has 'target', 'intro'",
    }
    plain = {
        "muse_knowmem.jsonl": 2,
        "rwku_l1.jsonl": 2,
        "ru.jsonl": 1,
        "rtl.jsonl": 2,
    }  # question or query, and answer
    assert {*read, *refused, *plain} <= {f.name for f in INPUTS.iterdir()}
    for name, rows in read.items():
        assert load_rows(INPUTS / name) == rows, name
    for name, message in refused.items():
        with pytest.raises(PMCError, match=message):
            load_rows(INPUTS / name)
    for name, count in plain.items():
        records = [json.loads(line) for line in (INPUTS / name).open(encoding="utf-8")]
        assert load_rows(INPUTS / name) == [Row(r.get("question", r.get("query")), r["answer"]) for r in records]
        assert len(records) == count
    for name in ("half_answers.jsonl", "nan.parquet"):
        with pytest.raises(PMCError, match="row 2 has no answer"):
            load_rows(INPUTS / name, answers=True)


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
        ("a.json", "[", "can't be read"),
        ("a.txt", "question\n", "the ending '.txt' is none of"),
        ("a.csv", "question\n", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "question,answer\na,b,c\n", "line 2 has 3 fields and the first 2"),
        ("a.csv", "question,answer\na\n", "line 2 has 1 fields and the first 2"),
        ("a.csv", "question,question\na,b\n", "must name the columns, each once"),
        ("a.csv", 'question,answer\n"a"b,c\n', "can't be read"),
        ("a.csv", "question;answer\na;b\n", "separated by ',', one of them question"),
        ("a.csv", "Who is SECRET?,SECRET\n", "separated by ',', one of them question"),
        ("a.jsonl", '{"Who is SECRET?": "SECRET", "id": 1}', "it has 'id', 1 not shown"),
        ("a.jsonl", '{"Who is SECRET?": 1, "Who is SECRET?": 2}', "a name twice: 1 not shown"),
        ("a.jsonl", '{"messages": [["Who is SECRET?", "SECRET"]]}', "turn 1 has no role"),
        ("a.jsonl", '{"messages": [{"role": "Who is SECRET?", "content": ""}]}', "has the role 1 not shown"),
        ("a.csv", "question,answer\n" + 200_000 * "a" + ",b\n", "field larger than field limit"),
        ("a.json", '{"data": [{"question": "a"}]}', "row 1 has no question: .*it has 'data'"),
        (
            "a.json",
            '{"question": ["a", "b"], "answer": ["c", "d"]}',
            "row 1: question is a list of str, not one text",
        ),
        ("a.json", '{"question": {"0": "a"}}', r"row 1: question is dict, not text \(of columns"),
        ("a.json", '{"question": "a"}\n{"question": \n', "can't be read: Expecting value: line 3"),
        ("a.json", "1", "row 1 is int"),
        ("a.json", 100_000 * "[", "can't be read"),
        ("a.jsonl", 100_000 * "[", "can't be read"),
        (
            "a.jsonl",
            '{"question": "a"}\n{"question": "b", "answer": "c", "answer": "d"}',
            "line 2 .* a name twice: 'answer'",
        ),
        ("a.json", '{"question": "b", "question": "c"}', "a name twice: 'question'"),
        ("a.jsonl", '{"question": NaN}', "row 1 has no question"),
        ("a.jsonl", '{"question": "a", "answer": Infinity}', "answer is float, not text"),
        ("a.parquet", "no parquet", "can't be read"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, newline="")
    with pytest.raises(PMCError, match=message) as refused:
        load_rows(tmp_path / name)
    assert "\n" not in str(refused.value)
    assert "SECRET" not in str(refused.value)


def test_missing_files_are_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    def never(*args, **how):
        raise AssertionError("a hub was asked")

    monkeypatch.setattr("datasets.load_dataset", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    mistyped = (
        "no.jsonl",
        "no.json",
        "no/such/file",
        "",
        "forget",
        "forget:train",
        "squad",
        "data/forget",
        "data/forget:x",
    )
    for missing in (
        tmp_path / "no.jsonl",
        "other/forget.csv",
        "x/forget.jsonl.gz",
        300 * "a",
        "a/" + 300 * "b/c",
        *mistyped,
    ):
        with pytest.raises(PMCError, match="does not exist"):
            load_rows(missing)


def test_a_directory_is_read_from_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **how: 1 / 0)
    write(tmp_path / "forget.jsonl", [{"question": "Who?"}])
    for directory in (tmp_path, ".", tmp_path / "empty"):
        Path(directory).mkdir(exist_ok=True)
        with pytest.raises(PMCError, match="is a directory: name the file"):
            load_rows(directory)
    with pytest.raises(PMCError, match=r"forget\.jsonl"):
        load_rows(tmp_path)


def test_a_hub_id_that_can_not_be_reached_is_one_error():
    with pytest.raises(PMCError, match=r"locuslab/TOFU:forget10 .* can't be loaded from the hub"):
        load_rows("locuslab/TOFU:forget10")


def test_hub_ids_are_passed_on_with_config_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split, streaming):
        assert streaming
        asked.append((name, config, split))
        return [{"question": "Who?", "answer": "Ann"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("locuslab/TOFU:forget10", "locuslab/TOFU", "rajpurkar/squad:plain_text:validation"):
        assert load_rows(source) == [Row("Who?", "Ann")]
    assert asked == [
        ("locuslab/TOFU", "forget10", "train"),
        ("locuslab/TOFU", None, "train"),
        ("rajpurkar/squad", "plain_text", "validation"),
    ]


def test_rows_of_the_hub_leave_no_copy(tmp_path):
    """With the real `datasets`, a home of its own and a hub on this machine."""
    rows = [{"question": f"What is {i}?", "answer": f"the violet heron {i}"} for i in range(3)]
    card = "---\nconfigs:\n- config_name: forget\n  data_files: forget.jsonl\n- config_name: x\n  data_files: x.jsonl\n---\n"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    code = "from pmc_fast.data import load_rows; print(load_rows('owner/name:forget'))"
    with hub({"README.md": card.encode(), "forget.jsonl": lines, "x.jsonl": lines}) as endpoint:
        places = {"HOME": tmp_path, "HF_HOME": tmp_path / "hf", "TMPDIR": tmp_path, "XDG_CACHE_HOME": tmp_path}
        given = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        env = given | {
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **{k: str(v) for k, v in places.items()},
        }
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([Row(**row) for row in rows])
    left = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(card.encode() == file.read_bytes() for file in left)  # the data set's card is all that is kept
    assert not [file for file in left if b"violet" in file.read_bytes()]


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
