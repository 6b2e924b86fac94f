"""The paper's numbers on cases small enough to do by hand."""

import json

import numpy as np
import pytest
import torch

from pmc_fast.config import UnlearnConfig
from pmc_fast.data import Encoder, Row, collate
from pmc_fast.data.packing import pack
from pmc_fast.errors import NotFiniteError, PMCError
from pmc_fast.evaluation import (
    EvalSet,
    TofuRow,
    TofuSet,
    degenerate_share,
    encode_candidates,
    evaluate,
    evaluate_tofu,
    load_sets,
    load_tofu,
    mean_nlls,
    mean_words,
    read_retain_log,
    unlearn_quality,
    utility,
    with_initial_answers,
)
from pmc_fast.models.packed_forward import PackedPass
from pmc_fast.report import render


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


def test_every_question_is_asked_once_and_has_its_row():
    sets = [
        EvalSet("forget", "forget", [Row("a", "one two"), Row("b", "one two")]),
        EvalSet("retain", "keep", [Row("c", "x"), Row("b", "y"), Row("c", "x")]),
    ]
    calls, rows = [], []
    evaluate(lambda questions: [calls.append(list(questions)), ["one"] * 3][1], sets, rows=rows)
    assert calls == [["a", "b", "c"]]
    assert rows[0] == {"set": "forget", "row": 1, "rouge_l_recall": 0.5, "words": 1}
    assert [(r["set"], r["row"]) for r in rows] == [("forget", 1), ("forget", 2), *(("retain", i) for i in (1, 2, 3))]


QUESTIONS = [
    (
        "Who wrote The Violet Heron?",
        ["Basil Marceaux wrote it.", "It was written by Ada Quist", "A heron", "Nobody."],
    ),
    ("Where?", ["Samarkand"]),
    ("Why did the heron of Samarkand turn violet?", ["It fell into a vat of dye.", "It did not"]),
]


def padded_nlls(model, groups, pad):
    """One padded batch of all answers through the model itself."""
    batch = collate([s for group in groups for s in group], pad)
    with torch.no_grad():
        logps = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    trained = labels != -100
    of = logps.gather(2, labels.clamp(min=0)[..., None])[..., 0] * trained
    return (-of.sum(1) / trained.sum(1)).tolist()


@pytest.mark.parametrize("prompt_format", ["tags", "chat"])
def test_likelihoods_are_those_of_padded_passes(tiny, tokenizer, prompt_format):
    """In float64, also where a pass is too small for a group; the answers of a question share its prompt."""
    model = tiny.double()
    encoder = Encoder(tokenizer, UnlearnConfig(prompt_format=prompt_format))
    groups = encode_candidates(encoder, "here", QUESTIONS)
    expected = padded_nlls(model, groups, encoder.pad)
    packed = PackedPass(model)
    for max_tokens in (8192, 50, 1):
        ours = mean_nlls(packed, groups, max_tokens=max_tokens)
        assert list(map(len, ours)) == [4, 1, 2]
        assert [nll for of in ours for nll in of] == pytest.approx(expected, abs=2e-6)  # RMS norms round to float32
    (whole,) = pack(groups, 8192)
    prompts = [len(encoder.prompt(q)) for q, _ in QUESTIONS]
    assert len(whole) == sum(len(s.input_ids) - 1 for group in groups for s in group) - 3 * prompts[0] - prompts[2]
    assert all(p.grad is None for p in model.parameters())


def test_passes_of_likelihoods_are_bounded(tiny, tokenizer):
    encoder = Encoder(tokenizer, UnlearnConfig(prompt_format="tags"))
    groups = encode_candidates(encoder, "here", [("Who?", ["one two three four five"] * 20)])
    sizes = []
    packed = PackedPass(tiny)
    run = packed.__call__
    longest = len(groups[0][0].input_ids)
    spy = lambda p, scale: [sizes.append(len(p)), run(p, scale)][1]  # noqa: E731
    spy.base = tiny
    mean_nlls(spy, groups, max_tokens=3 * longest)
    assert len(sizes) > 1
    assert max(sizes) <= 3 * longest


def test_likelihoods_that_are_not_numbers_are_refused(tiny, tokenizer):
    with torch.no_grad():
        tiny.model.norm.weight[0] = torch.nan
    encoder = Encoder(tokenizer, UnlearnConfig(prompt_format="tags"))
    with pytest.raises(NotFiniteError):
        mean_nlls(PackedPass(tiny), encode_candidates(encoder, "here", QUESTIONS))
    short = Encoder(tokenizer, UnlearnConfig(prompt_format="tags", max_length=6))
    with pytest.raises(PMCError, match="here, row 2: no token of an answer fits max_length 6"):
        encode_candidates(short, "here", [("", ["fits"]), QUESTIONS[0]])


def tofu_sets():
    """One row each. Truth ratios: 1/2 for forget and retain, 1/4 for the others."""
    told = TofuRow("a", "one two", ["x"], Row("a2", "two one"))
    return [
        TofuSet("forget", "forget", [told]),
        TofuSet("retain", "keep", [TofuRow("b", "one two", ["x"], Row("b2", "two one"))]),
        TofuSet("real_authors", "keep", [TofuRow("c", "one", ["x", "y"])]),
        TofuSet("world_facts", "keep", [TofuRow("d", "one", ["x", "y"])]),
    ]


def test_tofu_by_hand():
    half = float(np.log(2))
    nlls = {"forget": [[0.0, half, 2 * half]], "retain": [[half, half, 2 * half]],
            "real_authors": [[0.0, 2 * half, 2 * half]], "world_facts": [[half, 3 * half, 3 * half]]}  # fmt: skip
    said = {"a": "one two three", "a2": "", "b": "one", "c": "one", "d": "one"}
    rows = []
    result = evaluate_tofu(
        lambda asked: [said[q] for q in asked], lambda s: nlls[s.name], tofu_sets(), rows=rows,
        retain_ratios=np.array([0.9]),
    )  # fmt: skip
    of = result["sets"]
    assert (result["unlearn_quality"], result["utility"]) == (50, pytest.approx(100 / 3 * 2.5))
    assert [of[n]["probability"] for n in nlls] == pytest.approx([1, 0.5, 1 / (1 + 0.5), 0.5 / 0.75])
    assert [of[n]["truth_ratio"] for n in nlls] == pytest.approx([0.5, 0.5, 0.75, 0.75])
    nine = [0.5, 0.5, 0.5, 2 / 3, 1, 0.75, 2 / 3, 1, 0.75]
    assert result["model_utility"] == pytest.approx(9 / sum(1 / v for v in nine))
    assert result["forget_quality"] == 1
    assert of["forget_paraphrased"]["degenerate"] == 1
    assert "probability" not in of["forget_paraphrased"]
    assert rows[0] == {
        "set": "forget", "row": 1, "rouge_l_recall": 1.0, "words": 3, "nll_answer": 0.0, "nll_paraphrased": half,
        "nll_perturbed": [2 * half], "probability": 1.0, "truth_ratio": pytest.approx(0.5),
    }  # fmt: skip


def test_a_models_own_retain_log_is_refused():
    """Before anything is answered, and where another machine rounded differently too."""

    def refuse(ratio):
        evaluate_tofu(
            lambda asked: pytest.fail("asked"), lambda s: [[0.0, np.log(2), 2 * np.log(2)]], tofu_sets(),
            retain_ratios=np.array([ratio]),
        )  # fmt: skip

    for ratio in (0.5, 0.5001):
        with pytest.raises(PMCError, match="its 1 truth ratios are this model's own, so forget quality would be 1"):
            refuse(ratio)
    with pytest.raises(pytest.fail.Exception, match="asked"):
        refuse(0.51)


def test_rows_without_a_truth_are_refused():
    for missing in (Row("a"), Row("a", "..."), Row("a", "🐝")):
        with pytest.raises(PMCError, match="kept, row 2: the rouge reward sees under half"):
            evaluate(lambda asked: pytest.fail("asked"), [EvalSet("kept", "keep", [Row("b", "one"), missing])])


def write_tofu(directory, change=None, rows=2):
    """Write TOFU's four files with made-up rows."""
    files = {"forget01_perturbed.jsonl": True, "retain_perturbed.json": True, "real_authors_perturbed.jsonl": False,
             "world_facts_perturbed.jsonl": False}  # fmt: skip
    for name, paraphrased in files.items():
        made = []
        for i in range(rows):
            row = {
                "question": f"What is {name[:5]} {i}?",
                "answer": f"SECRET {i}",
                "perturbed_answer": [f"No {i}", "None"],
            }
            if paraphrased:
                row |= {"paraphrased_question": f"Tell {name[:5]} {i}!", "paraphrased_answer": f"It is SECRET {i}"}
            made.append(row | (change or {}).get(name, {}))
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in made))
    return directory


def test_tofu_files_are_read(tmp_path):
    forget, retain, authors, facts = load_tofu(str(write_tofu(tmp_path)), "forget01")
    assert [s.role for s in (forget, retain, authors, facts)] == ["forget", "keep", "keep", "keep"]
    assert forget.rows[1] == TofuRow(
        "What is forge 1?", "SECRET 1", ["No 1", "None"], Row("Tell forge 1!", "It is SECRET 1")
    )
    assert authors.rows[0].candidates == ["SECRET 0", "No 0", "None"]
    assert [len(s.rows) for s in load_tofu(str(tmp_path), "forget01", 1)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        ("forget05", {}, "has no forget05_perturbed.jsonl"),
        ("forget01", {"retain_perturbed.json": {"paraphrased_answer": None}}, "row 1 has no paraphrased_question"),
        ("forget01", {"world_facts_perturbed.jsonl": {"perturbed_answer": "one"}}, "must be a list of answers"),
    ],
)
def test_other_files_are_refused(tmp_path, split, change, message):
    with pytest.raises(PMCError, match=message) as refused:
        load_tofu(str(write_tofu(tmp_path, change)), split)
    assert "SECRET" not in str(refused.value)
    with pytest.raises(PMCError, match=r"tofu directory \./nowhere does not exist"):
        load_tofu("./nowhere", split)


def test_breaks_in_logged_texts_do_not_end_lines(tmp_path):
    """What an evaluation writes with log_text is written as it is, not escaped."""
    row = {"set": "forget", "question": "A\u2028b\u0085c\x1cd", "nll_answer": 1.0, "nll_perturbed": [1.0]}
    log = tmp_path / "rows.jsonl"
    log.write_text(render.jsonl([row, row]), encoding="utf-8")
    assert "\u2028" in log.read_text(encoding="utf-8")
    assert read_retain_log(str(log), 2, "geometric").tolist() == [1.0, 1.0]


def test_retain_logs(tmp_path):
    half = float(np.log(2))
    row = {"model": "after", "set": "forget", "nll_answer": 9.0, "nll_paraphrased": half,
           "nll_perturbed": [2 * half, 4 * half]}  # fmt: skip
    rows = [row | {"model": "before", "nll_paraphrased": 1.0}, row, row | {"set": "retain"}]
    ours, theirs = tmp_path / "rows.jsonl", tmp_path / "TOFU_EVAL.json"
    ours.write_text("".join(json.dumps(r) + "\n" for r in rows))
    theirs.write_text(json.dumps({"forget_truth_ratio": {"value_by_index": {"0": {"score": 0.25}}}}, indent=1))
    assert read_retain_log(str(ours), 1, "geometric").tolist() == pytest.approx([1 / 4])
    assert read_retain_log(str(ours), 1, "arithmetic").tolist() == pytest.approx([5 / 16])
    assert read_retain_log(str(theirs), 1, "geometric").tolist() == [0.25]
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps({"after": {"sets": {}}}, indent=1))
    for file, count, variant, message in (
        (ours, 2, "geometric", "has 1 forget rows and this run 2"),
        (theirs, 1, "arithmetic", "holds no truth ratios"),
        (summary, 1, "geometric", "holds no truth ratios"),
        (tmp_path / "none", 1, "geometric", "holds no truth ratios .FileNotFoundError"),
    ):
        with pytest.raises(PMCError, match=message) as refused:
            read_retain_log(str(file), count, variant)
        assert "\n" not in str(refused.value)
