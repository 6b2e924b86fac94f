"""What earlier runs forgot stays forgotten: rows that would bring it back are refused, by row and without their text."""

import json
import shutil

import pytest

from pmc_fast.data import Row
from pmc_fast.errors import PMCError
from pmc_fast.jobs import earlier_runs
from tests.command_line import left_behind, replaced, run

WORDS = "What is the Capital of Oz?"


@pytest.fixture
def write(data):
    def rows(name, *questions, answer="Emerald City"):
        lines = [json.dumps({"question": q, "answer": answer}) for q in questions]
        (data / name).write_text("\n".join(lines) + "\n")
        return data / name

    return rows


def lora(arguments, data, **flags):
    words = replaced(arguments, output=None, stack=data / "stack", lora_r=2, **flags)
    return [*words, "--lora", "--no-evaluate"]


def test_a_later_request_may_not_teach_again_what_an_earlier_one_forgot(arguments, data, write, capsys):
    pytest.importorskip("peft")
    first = write("first.jsonl", WORDS, "Who sat on the wall?")
    second = write("second.jsonl", "Who wrote it?")
    keep = write("keep.jsonl", "Is 2 even?", "  what is the capital of oz ", "Is 3 even?")
    assert run(lora(arguments, data, forget=first)) == 0
    words = lora(arguments, data, forget=second, retain=keep)
    for more in ([], ["--dry-run"]):
        assert run([*words, *more]) == 2
        shown = capsys.readouterr().err.splitlines()[-1]
        assert "keep.jsonl, row 2: request 0001 made the model forget this; training" in shown
        assert "--allow-relearn" in shown
        assert "oz" not in shown.lower().replace("jsonl", "")
    assert run(lora(arguments, data, forget=first)) == 2
    assert "first.jsonl, rows 1, 2: request 0001 made the model forget this" in capsys.readouterr().err
    assert not (data / "stack/0002").exists()
    assert run([*words, "--allow-relearn"]) == 0
    assert "warning: " in (shown := capsys.readouterr().err)
    assert "row 2: request 0001" in shown
    report = json.loads((data / "stack/0002/report.json").read_text())
    assert any("row 2: request 0001" in text for text in report["warnings"])
    third = write("third.jsonl", "Who broke it?")
    keep = write("keep.jsonl", "Is 2 even?", "Who wrote it?")
    assert run(lora(arguments, data, forget=third, retain=keep)) == 2
    assert "keep.jsonl, row 2: request 0002" in capsys.readouterr().err
    # a merged model knows its requests, and a request on it theirs
    assert run(["merge", "--stack", str(data / "stack"), "--output", str(data / "served")]) == 0
    for where in ({"output": data / "out"}, {"output": None, "stack": data / "stack2"}):
        words = replaced(arguments, model=data / "served", forget=first, **where)
        assert run([*words, *(["--lora"] if where["output"] is None else [])]) == 2
        assert "first.jsonl, rows 1, 2: request 0001" in capsys.readouterr().err
    assert not (data / "stack2").exists()


def test_what_was_rolled_back_may_be_forgotten_again(arguments, data, write):
    pytest.importorskip("peft")
    words = lora(arguments, data, forget=write("first.jsonl", WORDS))
    assert run(words) == 0
    assert run(["rollback", "--stack", str(data / "stack")]) == 0
    assert run(words) == 0


def test_an_unlearned_model_knows_what_it_forgot(arguments, data, write, capsys):
    first, second = write("first.jsonl", WORDS), write("second.jsonl", "Who wrote it?")
    words = [*replaced(arguments, forget=first, epochs=1), "--no-evaluate"]
    assert run(words) == 0
    shutil.copytree(data / "out", data / "moved")
    again = replaced(words, model=data / "moved", output=data / "out2")
    assert run(again) == 2
    assert "first.jsonl, row 1: the run that made" in capsys.readouterr().err
    assert run(replaced(again, forget=second)) == 0
    # the third knows both
    third = replaced(words, model=data / "out2", output=data / "out3", forget=write("third.jsonl", "Who?"))
    for source in (first, second):
        assert run(replaced(third, retain=source)) == 2
        assert f"{source}, row 1: the run that made" in capsys.readouterr().err
    assert "out3" not in left_behind(data)


def test_records_without_hashes_are_named():
    rows = ("f.jsonl", [Row("Is it?", "No.")])
    assert earlier_runs.check(
        [{"name": "request 0001", "salt": "s", "forgotten": None}], rows, rows, allow=False
    ) == ["request 0001 kept no hashes of its questions: rows that it forgot can't be found"]


def test_hashes_are_of_the_question_and_salted():
    rows = [Row("Is it?", "No."), Row("Was it?", None)]
    one, two = (
        earlier_runs.entry("it", earlier_runs.data_of({"forget": rows, "retain": [Row("Why?", "x")]})) for _ in "ab"
    )
    assert not set(one["forgotten"]) & set(two["forgotten"])
    with pytest.raises(PMCError, match="x, row 1: it made"):
        earlier_runs.check([one], ("y", []), ("x", [Row(" IS it", "Yes.")]), allow=False)
    assert earlier_runs.check([one, two], ("y", []), ("x", [Row("Why?", "No.")]), allow=False) == []


@pytest.mark.parametrize("content", ["", "[1]", '{"data": 3}', '{"data": {"earlier": [{}]}}'])
def test_other_programs_reports_are_passed_over(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    assert earlier_runs.read(str(tmp_path)) == []


def test_questions_put_in_other_prompts_than_the_run_before_are_told(arguments, data, capsys):
    """A preset may ask with tags where `evaluate` takes the chat template: scores of two different things."""
    assert run(arguments) == 0
    evaluated = ["evaluate", "--model", str(data / "out"), "--device", "cpu", "--max-length", "40"]
    evaluated += ["--forget", str(data / "forget.jsonl")]
    said = "was unlearned with prompt_format 'tags', now 'chat'; system_prompt"
    for more, warned in (["--system-prompt", "Be brief."], True), (["--prompt-format", "tags"], False):
        capsys.readouterr()
        assert run([*evaluated, *more]) == 0
        assert (said in capsys.readouterr().err) is warned
    again = replaced(
        arguments, model=data / "out", prompt_format="chat", output=data / "again", system_prompt="Be brief."
    )
    assert run([*again, "--allow-relearn", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert said in shown.err + shown.out
