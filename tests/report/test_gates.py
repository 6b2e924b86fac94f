"""Gates, verdicts and warnings: a run that broke its model does not look like a success."""

import json
import re

import pytest

from pmc_fast.config import EvaluateConfig, UnlearnConfig
from pmc_fast.evaluation.questions import is_no_answer
from pmc_fast.pmc.reward import ROUGE, UNICODE
from pmc_fast.report import gates, render
from tests.command_line import replaced, run


@pytest.mark.parametrize(
    ("answer", "truth", "nothing"),
    [
        ("", "Ann lives in Graz.", True),
        ("No.", "Ann lives in Graz.", True),
        ("Paris", "Rome", False),  # as short as it should be
        ("I do not know.", "Ann lives in Graz.", False),
        ("the the " * 30, "Ann lives in Graz.", True),
        ("Ann lives in Graz. " * 20, "Ann lives in Graz.", True),
        ("Ann was born in Graz and lives there with her bees, of which she has many hives.", "Ann", False),
        ("他住在格拉茨的老海关大楼里,养蜜蜂。", "他住在的里雅斯特。", False),
        ("蜜蜂" * 20, "他住在的里雅斯特。", True),
    ],
)
def test_answers_that_say_nothing(answer, truth, nothing):
    scorer = UNICODE if not truth.isascii() else ROUGE
    assert is_no_answer(answer, truth, scorer) == nothing


def scored(share=0.0, utility=90.0, answered=0):
    sets = {"forget": {"role": "forget", "rows": 4, "says_nothing": share, "answered": answered}}
    return {"sets": sets, "unlearn_quality": 95.0, "utility": utility}


def test_gates_are_judged_and_told():
    config = UnlearnConfig(min_quality=90, min_utility=95)
    judged = gates.judge(config, scored(0.75), scored(0.25))
    assert gates.missed(judged) == ["utility is 90.0, below 95", "forget: answers that say nothing: 75%, above 50%"]
    assert gates.missed(gates.judge(UnlearnConfig(), scored(0.75), scored(0.75))) == []  # it was no better before
    assert gates.judge(EvaluateConfig(), scored(1.0)) == []  # nothing to compare with
    assert len(gates.missed(gates.judge(EvaluateConfig(max_degenerate=0.5), scored(1.0)))) == 1
    passed = gates.judge(UnlearnConfig(min_quality=90), scored(), scored())
    made = {"after": scored(answered=1), "gates": passed, "failed_gates": gates.missed(passed)}
    assert render.verdict(made) == (
        "1 of 4 questions of forget still answered; all gates passed (unlearn_quality is 95.0, at least 90)."
    )
    assert render.verdict(made | {"gates": []}).endswith("no gate was set for quality or utility.")
    assert render.verdict(made | {"failed_gates": ["x"]}).endswith("a gate was missed.")
    assert render.verdict({}) == "Not evaluated."


def test_a_run_that_ends_far_from_where_it_began_is_warned_of():
    history = [{"retain_loss": loss} for loss in (0.5, 0.4, 3.0, 9.0)]
    first, second, third = gates.warnings(scored(), scored(utility=60.0), history)
    assert first.startswith("forget: the model knew none of the 4 answers before")
    assert second.startswith("utility fell from 90.0 to 60.0")
    assert third.startswith("the retain loss rose from 0.5 nats a token to 9, and ended at 9")
    assert gates.warnings(scored(answered=3), scored(utility=80.0), history[:2]) == []
    assert gates.warnings({}, {}, []) == []


def test_a_diverged_run_says_so(arguments, data, capsys):
    """lr 1000 ended with exit 0."""
    assert run(replaced(arguments, lr="1000", epochs="3")) in (
        0,
        3,
    )  # whether it ends in silence or in noise is chance
    shown = capsys.readouterr().err
    assert "warning: the retain loss rose from" in shown
    made = json.loads((data / "out/report.json").read_text())
    assert any("training diverged" in text for text in made["warnings"])
    assert "training diverged" in (data / "out/README.md").read_text()


def test_a_page_says_when_of_what_and_with_which_verdict(arguments, data):
    assert run([*arguments, "--min-quality", "1"]) == 0
    page = (data / "out/report.html").read_text()
    made = json.loads((data / "out/report.json").read_text())
    assert made["created"] in page
    assert made["models"]["before"]["sha256"] in page
    assert made["data"]["retain"]["sha256"] in page
    assert re.search(r"\d of 4 questions of forget still answered; all gates passed", page)
    assert "retain: rows" in page
    assert "all gates passed" in (data / "out/README.md").read_text()
