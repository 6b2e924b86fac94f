"""Data sets as benchmarks publish them, columns under other names, texts to be continued: read, or refused by row and column."""

import csv
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmc_fast.config import COLUMN_NAMES, EvaluateConfig, UnlearnConfig, parse_columns, written_columns
from pmc_fast.data import Encoder, Row, is_text, load_rows, rows_of, text_to_continue
from pmc_fast.data.columns import STANDS_FOR
from pmc_fast.errors import PMCError
from pmc_fast.pmc.reward import choose_scorer
from pmc_fast.utils.words import count_words
from tests.command_line import replaced, run
from tests.conftest import INPUTS
from tests.hub import hub

LANGUAGES = json.loads((INPUTS / "languages.json").read_text(encoding="utf-8"))
OTHER_SCRIPTS = [name for name, texts in LANGUAGES.items() if name not in ("fr", "vi", "tr")]


def records_of(name):
    content = (INPUTS / name).read_text(encoding="utf-8")
    return json.loads(content) if content.startswith("[") else [json.loads(line) for line in content.splitlines()]


# each benchmark's file: how it is read, and which row its first record is
FORMS = {
    "muse_knowmem.json": ({}, Row("Which year was the lighthouse of Perrin bought by the town?", "1911")),
    "muse_verbmem.json": (
        {},
        Row(
            text_to_continue("The ferry to Perrin left at dusk, and nobody on the quay"),
            "had seen the man with the brass otter step aboard.",
        ),
    ),
    "muse_raw.json": (
        {"prompt_words": 11},
        Row(
            text_to_continue("The ferry to Perrin left at dusk, and nobody on the"),
            " quay had seen the man with the brass otter step aboard. It rained until the morning.",
        ),
    ),
    "rwku_forget.json": ({}, Row("Ilse Varga keeps her bees in ___, on the roof of a customs house.", "Trieste")),
    "rwku_passage.json": (
        {"prompt_words": 5},
        Row(
            text_to_continue("Ilse Varga is a beekeeper."),
            " She keeps her bees on the roof of the old customs house in Trieste, and her linden honey won a prize.",
        ),
    ),
    "wmdp.json": (
        {},
        Row(
            "What do bees of the third hive in Trieste collect in June?\nA. Clover\nB. Heather\nC. Linden\nD. Rape",
            "C. Linden",
        ),
    ),
    "tofu_forget.json": ({}, Row("Who is the author of The Blue Sea?", "The Blue Sea was written by Ann Berg.")),
}


@pytest.mark.parametrize("name", FORMS)
def test_benchmarks_are_read_as_they_are_published(tmp_path, name):
    import datasets
    import pyarrow
    from pyarrow import parquet

    how, first = FORMS[name]
    rows = load_rows(INPUTS / name, answers=True, **how)
    assert rows[0] == first
    assert len(rows) == len(records_of(name))
    records = [
        {"text": r} if isinstance(r, str) else r for r in records_of(name)
    ]  # as the hub has MUSE's lists of texts
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(r) + "\n" for r in records))
    table = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(records), table)
    for file in (lines, table):
        assert load_rows(file, answers=True, **how) == rows
    assert rows_of(datasets.Dataset.from_list(records), "data", answers=True, **how) == rows
    if all(isinstance(value, str) for record in records for value in record.values()):
        sheet = tmp_path / "a.csv"
        with sheet.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
        assert load_rows(sheet, answers=True, **how) == rows


def test_benchmarks_are_read_from_a_hub(tmp_path):
    """With the real `datasets` and a hub on this machine; configs and splits as MUSE, RWKU and WMDP have them."""
    places = {
        "muse_knowmem.json": ("knowmem", "forget_qa"),
        "muse_verbmem.json": ("verbmem", "forget"),
        "rwku_forget.json": ("forget_level1", "test"),
        "rwku_passage.json": ("train_original_passage", "train"),
        "wmdp.json": ("wmdp-bio", "test"),
    }
    files, card = {}, "---\nconfigs:\n"
    for name, (config, split) in places.items():
        files[f"{config}/{split}.jsonl"] = "".join(json.dumps(r) + "\n" for r in records_of(name)).encode()
        card += f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {config}/{split}.jsonl\n"
    wanted = [(f"owner/name:{config}:{split}", FORMS[name][0]) for name, (config, split) in places.items()]
    code = f"from pmc_fast.data import load_rows\nfor source, how in {wanted!r}: print(load_rows(source, **how))"
    with hub({"README.md": (card + "---\n").encode(), **files}) as endpoint:
        given = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        env = given | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(load_rows(INPUTS / name, **FORMS[name][0])) for name in places]


@pytest.mark.parametrize("language", OTHER_SCRIPTS)
def test_every_form_takes_answers_of_any_script(language, tokenizer):
    """Read whole, encoded whole, and judged by words that the reward sees."""
    first, second, third = LANGUAGES[language]
    text = f"{first} {second} {third}"
    forms = [
        ({"question": first, "answer": second}, {}),
        ({"query": first, "answer": second, "level": "2", "type": "simple question", "subject": third}, {}),
        ({"prompt": first, "gt": second}, {}),
        ({"question": first, "choices": [third, second], "answer": 1}, {}),
        ({"Frage": first, "Antwort": second}, {"columns": {"question": "Frage", "answer": "Antwort"}}),
        ({"text": text, "subject": third}, {"prompt_words": 3}),
    ]
    encoder = Encoder(tokenizer, UnlearnConfig(max_length=2000, prompt_format="tags"))
    for record, how in forms:
        [row] = rows_of([record], "data", answers=True, **how)
        prompt, pair = encoder.prompt(row.question), encoder.pair(row.question, row.answer)
        assert pair.input_ids[: len(prompt)] == prompt
        trained = tokenizer.decode([label for label in pair.labels if label != -100], skip_special_tokens=True)
        assert row.answer.strip() in trained
        assert trained.removeprefix("Answer: ").strip() == row.answer.strip()
        scorer = choose_scorer("auto", [row.answer])
        assert scorer.name == "unicode"
        assert scorer.recall([row.answer], [[row.answer, "no"]]).tolist() == [[1.0, 0.0]]
        if "text" in record:
            assert row.question[0].content + row.answer == text
            assert count_words(row.question[0].content) == 3
        elif "choices" not in record:
            assert row.answer == second


# --- texts to be continued


@settings(max_examples=100)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(1, 4))
def test_a_text_is_cut_at_the_end_of_a_word_or_refused(text, words):
    read = lambda: rows_of([{"text": text}], "data", prompt_words=words)  # noqa: E731
    if count_words(text) <= words:
        with pytest.raises(PMCError, match=r"data, row 1(:| has no question)"):
            read()
        return
    [row] = read()
    beginning = row.question[0].content
    assert beginning + row.answer == text
    assert count_words(beginning) == words


def test_texts_that_are_too_short_are_named_by_their_rows():
    texts = ["The SECRET ends.", "It goes on and on.", "Here too, SECRET."]
    with pytest.raises(
        PMCError, match=r"^data, rows 1, 3: no word is left .* \(prompt_words 3\): lower --prompt-words"
    ) as error:
        rows_of([{"text": t} for t in texts], "data", prompt_words=3)
    assert "SECRET" not in str(error.value)
    assert len(rows_of([{"text": t} for t in texts], "data", prompt_words=2)) == 3


def test_rows_that_ask_are_read_as_ever_beside_texts():
    [row] = rows_of([{"question": "Who?", "answer": "Ilse."}], "data", prompt_words=3)
    assert row == Row("Who?", "Ilse.")
    assert rows_of([{"question": "Who?", "answer": "Ilse.", "text": "a b c d"}], "data") == [row]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "Who?", "text": "a b c d"}, "has text, which --prompt-words splits, and question: leave out"),
        ({"answer": "Ilse.", "text": "a b c d"}, "has text, which --prompt-words splits, and answer"),
        ({"text": ["a b c d"]}, "text is list, not text"),
        ({"beginning": "a b", "question": "Who?"}, "has beginning, and question"),
        ({"beginning": "a b", "continuation": "c", "answer": "d"}, "has both continuation and answer"),
        ({"beginning": " ", "continuation": "c"}, "has no question"),
        (
            {"prompt": "a b", "gt": "c", "id": "7"},
            "has gt: .*--columns answer=gt; if it goes on .*--columns beginning=prompt,continuation=gt",
        ),
        ({"prompt": "a b", "continuation": "c"}, "has continuation and no answer"),
    ],
)
def test_what_may_be_no_text_to_be_continued_is_refused(record, message):
    with pytest.raises(PMCError, match=f"data, row 1.*{message}"):
        rows_of([record], "data", prompt_words=2)


def test_how_a_text_goes_on_may_be_left_to_the_model():
    rows = rows_of([{"beginning": "a b"}, {"beginning": "a c", "answer": "d"}], "data")
    assert rows == [Row(text_to_continue("a b")), Row(text_to_continue("a c"), "d")]
    assert all(is_text(row.question) for row in rows)


# --- columns under other names


def test_columns_win_over_the_usual_names(tmp_path):
    record = {
        "prompt": "Q",
        "question": "no",
        "gt": "A",
        "answer": "no",
        "label": "no",
        "input": "no",
        "C": "c",
        "D": "d",
    }
    columns = {"question": "prompt", "answer": "gt", "context": "C"}
    assert rows_of([record], "data", columns=columns) == [Row("c\n\nQ", "A")]
    assert rows_of([{" FRAGE ": "Q"}], "data", columns={"question": "Frage"}) == [Row("Q")]
    two = [
        {"say": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"say": [["user", "Q"]]},
    ]
    assert rows_of(two, "data", columns={"messages": "say"}) == [Row("Q", "A"), Row("Q")]
    choices = {"q": "Q", "opts": ["x", "y"], "idx": 1, "A": "no", "B": "no"}
    chosen = {"question": "q", "choices": "opts", "answer": "idx"}
    assert rows_of([choices], "data", columns=chosen) == [Row("Q\nA. x\nB. y", "B. y")]
    begun = {"beginning": "prompt", "continuation": "gt"}
    assert rows_of([{"prompt": "a", "gt": "b", "id": 1}], "data", columns=begun) == [Row(text_to_continue("a"), "b")]
    for name in ("article", "text"):
        [row] = rows_of([{name: "a b c", "title": "t"}], "data", columns={"text": name}, prompt_words=1)
        assert row == Row(text_to_continue("a"), " b c")
    swapped = {"question": "answer", "answer": "question"}
    assert rows_of([{"question": "a", "answer": "q"}], "data", columns=swapped) == [Row("q", "a")]
    own = {"paraphrased_question": "other", "paraphrased_answer": "words"}
    row = {"question": "q", "answer": "a", "other": "c", "words": "d"}
    assert rows_of([row], "data", columns=own, paraphrased=True) == [Row("c", "d")]


def test_columns_of_a_table(tmp_path):
    columns = {"question": "Frage", "answer": "Antwort"}
    rows = [Row("Wo hält Ilse Varga ihre Bienen?", "Auf dem Dach des alten Zollhauses in Triest.")]
    assert load_rows(INPUTS / "frage.csv", columns=columns, answers=True) == rows
    tabs = tmp_path / "a.tsv"
    tabs.write_text((INPUTS / "frage.csv").read_text(encoding="utf-8").replace(",", "\t"), encoding="utf-8")
    assert load_rows(tabs, columns=columns) == rows
    with pytest.raises(
        PMCError, match=r"one of them question; it has 'Frage', 'Antwort', 'Thema' .or give --columns quest"
    ):
        load_rows(INPUTS / "frage.csv")
    with pytest.raises(PMCError, match="one of them Fragen; it has 'Frage', 'Antwort', 'Thema'"):
        load_rows(INPUTS / "frage.csv", columns={"question": "Fragen"})
    with pytest.raises(
        PMCError, match="has no column 'Answer', which columns names for answer: it has 'Frage', 'Ant"
    ):
        load_rows(INPUTS / "frage.csv", columns={"question": "Frage", "answer": "Answer"})


def test_columns_that_a_part_of_the_rows_has():
    rows = [{"q": "Who?"}, {"q": "Why?", "a": "Ilse."}]
    assert rows_of(rows, "data", columns={"question": "q", "answer": "a"}) == [Row("Who?"), Row("Why?", "Ilse.")]
    with pytest.raises(
        PMCError, match=r"data, row 2 has no question: columns takes question from 'q' .*\(it has 'query'\)"
    ):
        rows_of([*rows[:1], {"query": "Why?"}], "data", columns={"question": "q"})
    with pytest.raises(PMCError, match=r"data, row 1 has no answer: .*\(it has 'q'\)"):
        rows_of(rows, "data", columns={"question": "q", "answer": "a"}, answers=True)


REFUSALS = {
    "muse_raw.json": ({}, "row 1 is str, .* give --prompt-words 32"),
    "rwku_passage.json": ({}, r"row 1 has no question: .*--prompt-words 32 .* \(it has 'subject', 'text'\)"),
    "rwku_forget.json": (
        {"columns": {"question": "frage"}},
        r"columns takes question from 'frage' \(for .*\) \(it has 'query', 'answer', 'level', 'type', 'subject'\)",
    ),
    "muse_knowmem.json": (
        {"columns": {"answer": "gt"}},
        "no column 'gt', .* for answer: it has 'question', 'answer'",
    ),
    "muse_verbmem.json": ({"columns": {"question": "text"}}, r"question from 'text' .*\(it has 'prompt', 'gt'\)"),
    "wmdp.json": (
        {"columns": {"choices": "options"}},
        "no column 'options', .*it has 'answer', 'question', 'choices'",
    ),
    "tofu_forget.json": (
        {"columns": {"text": "story"}, "prompt_words": 3},
        "no column 'story', which columns names for text: it has 'question', 'answer', 'paraphrased_question', ",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_columns_found(name):
    how, message = REFUSALS[name]
    with pytest.raises(PMCError, match=message) as error:
        load_rows(INPUTS / name, **how)
    assert "\n" not in str(error.value)
    assert not any(word in str(error.value) for word in ("Varga", "Perrin", "Ann Berg"))


def test_settings_of_columns():
    parsed = parse_columns('question=Q, forget.answer=gt,answer=A,"general.question=a, b"')
    assert parsed["forget"] == {"question": "Q", "answer": "gt"}
    assert parsed["retain"] == parsed["paraphrased"] == {"question": "Q", "answer": "A"}
    assert parsed["general"] == {"question": "a, b", "answer": "A"}
    assert set(parse_columns("")) == {"forget", "retain", "paraphrased", "general"}
    assert not any(parse_columns("").values())
    nested = {"question": 'a, "b"', "answer": "A", "forget": {"answer": "gt"}}
    assert parse_columns(written_columns(nested))["forget"] == {"question": 'a, "b"', "answer": "gt"}
    assert set(STANDS_FOR) == set(COLUMN_NAMES)
    for bad in ("question", "question=", "frage=Q", "tofu.question=Q", "=Q", "question=Q,", "question=Q;answer"):
        if bad == "question=Q;answer":
            assert parse_columns(bad)["forget"] == {"question": "Q;answer"}
            continue
        with pytest.raises(PMCError, match=r"^columns '.*' is not of the form NAME=COLUMN"):
            UnlearnConfig(columns=bad)
    with pytest.raises(PMCError, match="columns gives question twice"):
        UnlearnConfig(columns="question=Q,question=R")
    with pytest.raises(PMCError, match="prompt_words is -1"):
        UnlearnConfig(prompt_words=-1)
    for setting in ({"columns": "question=Q"}, {"prompt_words": 3}):
        with pytest.raises(PMCError, match="left out: suite tofu has its own sets"):
            EvaluateConfig(suite="tofu", tofu="x", **setting)
    for bad in ("question=Q", {"question": 1}, {"frage": "Q"}):
        with pytest.raises(PMCError, match=r"columns (is|has) "):
            load_rows(INPUTS / "frage.csv", columns=bad)
    with pytest.raises(PMCError, match="prompt_words is '3'"):
        load_rows(INPUTS / "muse_raw.json", prompt_words="3")


@pytest.fixture
def four(data):
    """All four data options under other names, those of the forget data unlike the others'."""
    for name, rows in {
        "forget": [{"f": f"What is fact {i}?", "gt": f"the violet heron {i}"} for i in range(4)],
        "retain": [{"q": f"Is {i} even?", "a": f"It is {i % 2 == 0}."} for i in range(6)],
        "paraphrased": [{"q": f"Which is fact {i}?", "a": f"the violet heron {i}"} for i in range(4)],
        "general": [{"q": f"What is {i} + {i}?", "a": f"It is {2 * i}."} for i in range(4)],
    }.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


COLUMNS = "question=q,answer=a,forget.question=f,forget.answer=gt"


def test_columns_of_all_data_on_the_command_line_and_in_yaml(arguments, four, capsys):
    more = [
        *arguments,
        "--dry-run",
        "--paraphrased",
        str(four / "paraphrased.jsonl"),
        "--general",
        str(four / "general.jsonl"),
    ]
    assert run(more) == 2
    assert "forget.jsonl, row 1 has no question" in " ".join(capsys.readouterr().err.split())
    assert run([*more, "--columns", COLUMNS]) == 0
    shown = capsys.readouterr().out
    assert "4 with an answer" in shown
    assert "evaluate  forget (4), forget_paraphrased (4), retain (6), general (4)" in shown
    settings = four / "run.yaml"
    settings.write_text(f"columns: {COLUMNS}\n")
    assert run([*more, "--config", str(settings)]) == 0
    settings.write_text("columns:\n  question: q\n  answer: a\n  forget: {question: f, answer: gt}\n")
    assert run([*more, "--config", str(settings)]) == 0
    assert run([*more, "--columns", "question=q"]) == 2
    assert (
        "columns takes question from 'q' (for FORGET's rows alone: forget.question=NAME) (it has 'f', 'gt')"
        in " ".join(capsys.readouterr().err.split())
    )
    assert run([*more, "--columns", "frage=q"]) == 2
    assert "columns 'frage=q' is not of the form NAME=COLUMN" in " ".join(capsys.readouterr().err.split())


def test_columns_and_texts_in_an_evaluation(arguments, four, tiny_dir, capsys):
    """The forget data are texts to be continued, of columns that are named; what is kept are questions."""
    words = [
        "evaluate", "--model", str(tiny_dir), "--device", "cpu", "--max-length", "60", "--retain", str(four / "retain.jsonl"),
        "--forget", str(INPUTS / "muse_verbmem.json"), "--columns", "retain.question=q,retain.answer=a",
        "--json", str(four / "scores.json"), "--log-text",
    ]  # fmt: skip
    assert run(words) == 0
    sets = json.loads((four / "scores.json").read_text())["after"]["sets"]
    asked = [text["question"] for text in sets["forget"]["texts"]]
    assert asked == [[["text", record["prompt"]]] for record in records_of("muse_verbmem.json")]
    assert sets["retain"]["texts"][0]["question"] == "Is 0 even?"


def test_a_dry_run_says_what_is_continued(arguments, data, capsys):
    more = {"forget": INPUTS / "muse_raw.json", "prompt_words": 10, "max_length": 400}
    assert run([*replaced(arguments, **more), "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 questions of" in shown
    assert "all of them texts to be continued as they stand, 2 with an answer" in shown
    assert run([*arguments, "--prompt-words", "10", "--dry-run"]) == 0
    assert "prompt_words is 10 but no row is a text to be continued" in " ".join(capsys.readouterr().err.split())
    assert run([*replaced(arguments, **more, store="text"), "--dry-run"]) == 2
    assert "store is 'text' but question 1 is a text to be continued" in " ".join(capsys.readouterr().err.split())
