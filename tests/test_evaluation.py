"""The paper's numbers on cases small enough to do by hand."""

import json

import numpy as np
import pytest

from pmc_fast.config import UnlearnConfig
from pmc_fast.data import Row
from pmc_fast.evaluation import (
    EvalSet,
    degenerate_share,
    evaluate,
    load_sets,
    mean_words,
    unlearn_quality,
    utility,
    with_initial_answers,
)


def test_unlearn_quality_and_utility():
    assert unlearn_quality(0.25, 0.75) == 50 * (2 - 0.25 - 0.75)
    assert unlearn_quality(0.25) == 75
    assert utility(1.0, 0.5, 0.0) == pytest.approx(100 / 3 * 1.5)


def test_degenerate_answers_are_counted():
    answers = ["", "one two", "one two three", "  spaced   out words "]
    assert degenerate_share(answers) == 0.5
    assert mean_words(answers) == 2


def test_evaluate_by_hand():
    sets = [
        EvalSet("forget", "forget", [Row("a", "one two"), Row("b", "one two")]),
        EvalSet("retain", "keep", [Row("c", "red green blue black")]),
    ]
    said = {"a": "one two three", "b": "", "c": "red and blue"}
    result = evaluate(lambda questions: [said[q] for q in questions], sets)
    assert result["sets"]["forget"]["rouge_l_recall"] == 0.5
    assert result["sets"]["forget"]["degenerate"] == 0.5
    assert result["sets"]["retain"]["rouge_l_recall"] == 0.5
    assert (result["unlearn_quality"], result["utility"]) == (50, 50)
    assert "texts" not in json.dumps(result)
    texts = evaluate(lambda questions: [said[q] for q in questions], sets, log_text=True)["sets"]["retain"]["texts"]
    assert texts == [
        {"question": "c", "truth": "red green blue black", "answer": "red and blue", "rouge_l_recall": 0.5}
    ]


def test_long_retain_sets_are_drawn_as_published():
    rows = [Row(str(i), str(i)) for i in range(3600)]
    _, retain = load_sets(UnlearnConfig(), [Row("q")], rows)
    chosen = np.random.default_rng(12345).integers(0, 3600, 400)
    assert [r.question for r in retain.rows] == [str(i) for i in chosen]
    _, short = load_sets(UnlearnConfig(), [Row("q")], rows[:400])
    assert short.rows == rows[:400]


def test_questions_without_answers_are_measured_against_the_initial_ones():
    sets = [EvalSet("forget", "forget", [Row("a"), Row("b", "given")])]
    (forget,) = with_initial_answers(sets, ["first", "second"])
    assert forget.rows == [Row("a", "first"), Row("b", "given")]
