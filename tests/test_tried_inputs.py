"""Inputs that new users tried (docs/tried_inputs.md): the most telling ones, as they typed them."""

import os

import pytest

from pmc_fast.config import UnlearnConfig
from pmc_fast.data import (
    Chat,
    Turn,
    check_answers,
    check_repeats,
    load_rows,
)
from pmc_fast.distributed import launched
from pmc_fast.errors import PMCError
from tests.command_line import replaced, run

WHO, ANN = "Who wrote The Blue Sea?", "Ann Berg wrote it."


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("space.csv", f"question, answer\n{WHO},{ANN}\n"),
        ("case.csv", f"Question,Answer\n{WHO},{ANN}\n"),
        ("excel.tsv", f"\ufeffQUESTION \tANSWER\r\n{WHO}\t{ANN}\r\n"),
        ("case.jsonl", f'{{"question": "{WHO}", " Answer": "{ANN}"}}'),
    ],
)
def test_names_of_columns_are_known_in_every_spelling(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    [row] = load_rows(tmp_path / name)
    assert (row.question, row.answer) == (WHO, ANN)


def test_two_spellings_of_a_name_that_differ_are_refused(tmp_path):
    file = tmp_path / "f.jsonl"
    file.write_text(f'{{"question": "{WHO}", "answer": "{ANN}", "Answer": "Karl."}}')
    with pytest.raises(PMCError, match="row 1 has answer twice") as error:
        load_rows(file)
    assert "Karl" not in str(error.value)


@pytest.mark.parametrize("name", ["target", "Label", "reference", "expected_output", "solution"])
def test_what_may_be_the_answer_is_asked_about(tmp_path, name):
    file = tmp_path / "f.jsonl"
    file.write_text(f'{{"question": "{WHO}", "{name}": "{ANN}"}}')
    with pytest.raises(PMCError, match=f"row 1 has {name.lower()} and no answer") as error:
        load_rows(file)
    assert "Ann" not in str(error.value)
    file.write_text(f'{{"question": "{WHO}", "answer": "{ANN}", "{name}": 1}}')
    assert load_rows(file)[0].answer == ANN  # beside an answer it is something else


def test_a_question_with_two_answers_is_said():
    said = check_repeats("f", [(WHO, ANN), ("Why?", None), (WHO.lower(), "Karl Lund."), (WHO, ANN + " ")])
    assert [text.split(":")[0] for text in said] == ["f, row 4", "f, row 3"]
    assert "counts twice" in said[0]
    assert "another answer" in said[1]
    assert "Karl" not in "".join(said)
    other = Chat((Turn("system", "Speak as Karl."), Turn("user", WHO)))
    assert check_repeats("f", [(WHO, ANN), (other, "I did.")]) == []


def test_an_answer_to_be_kept_that_is_to_be_forgotten_is_said():
    said = check_answers({"f": ["Yes", None, ANN]}, {"k": ["Yes", "ann berg wrote it", "Karl Lund wrote it."]})
    assert len(said) == 1
    assert said[0].startswith("k, row 2: the answer is one that is to be forgotten (f, row 3)")


def test_the_home_directory_in_a_file_of_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = UnlearnConfig.merge(
        None, {"output": "~/out", "general": ["~/g.jsonl", "h.jsonl"], "system_prompt": "~/"}
    )
    assert config.output == str(tmp_path / "out")
    assert config.general == [str(tmp_path / "g.jsonl"), "h.jsonl"]
    assert config.system_prompt == "~/"


def test_a_path_that_no_report_can_hold_is_refused_before_work(arguments, data, capsys):
    """The run was lost after its last evaluation, with a traceback."""
    output = os.fsdecode(os.fsencode(data) + b"/caf\xe9")
    assert run(replaced(arguments, output=output)) == 2
    assert "is not UTF-8, or the locale is not" in capsys.readouterr().err


def test_variables_of_a_scheduler_are_no_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(PMCError, match="WORLD_SIZE is 4 but MASTER_ADDR is not set"):
        launched()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert launched() == (0, 4)


@pytest.mark.parametrize(
    ("given", "said"), [(True, "4 with an answer"), (False, "none with an answer: the model's own")]
)
def test_dry_run_says_what_the_truth_is(arguments, data, capsys, given, said):
    if not given:
        (data / "forget.jsonl").write_text('{"question": "Who?"}\n')
    assert run([*arguments, "--dry-run"]) == 0
    assert said in capsys.readouterr().out
