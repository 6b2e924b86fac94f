"""Questions to be forgotten that are in the data to keep: refused by row, or said; in files and in trainers' data."""

import json
import shutil

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from pmc_fast import (
    PMC,
    PMCArguments,
    PMCConfig,
    PMCTrainer,
)
from pmc_fast.data import (
    Encoded,
    Row,
    check_encoded_overlap,
    check_overlap,
    load_rows,
)
from pmc_fast.data.overlap import NEAR, near, normalized
from pmc_fast.errors import PMCError
from tests.command_line import replaced, run
from tests.conftest import INPUTS

ILSE = INPUTS / "retain_is_forget.jsonl"
BEES = "Where does Ilse Varga keep her bees?"
SPELLINGS = (
    "where  does ilse varga keep her bees", "“Where does Ilse\u00a0Varga keep her bees?!”", "¿" + BEES, BEES.upper(),
    "Ｗhere does Ilse Varga keep her be\u200bes？",
)  # fmt: skip
OTHERS = ("Who invented C#?", "who invented C", "-5 + 3 = ?", "5 + 3 = ?", "???", "", "Straße", "Strafe")


def write(path, questions):
    path.write_text("".join(json.dumps({"question": q, "answer": "It is."}) + "\n" for q in questions))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_question_is_known_in_every_spelling(spelling):
    with pytest.raises(PMCError, match=r"^keep, row 2: the same questions are to be forgotten \(forget, row 1\)"):
        check_overlap({"forget": [BEES]}, {"keep": ["Why?", spelling]})


def test_other_questions_are_others():
    assert len({normalized(q) for q in OTHERS}) == len(OTHERS)
    check_overlap({"forget": OTHERS[::2]}, {"keep": OTHERS[1::2]})


@given(st.text())
def test_normalising_is_idempotent_and_blind_to_case(text):
    once = normalized(text)
    assert normalized(once) == once
    assert normalized(f" {text}.\n") in (once, normalized(text + "."))


@pytest.mark.parametrize(
    ("other", "is_near"),
    [
        ("Where does Ilse Varga keep bees?", True),
        ("So where does Ilse Varga keep all of her bees?", True),
        ("Who taught Ilse Varga to bake?", False),
        ("Where does Jonas Varga keep his bees?", False),
    ],
)
def test_nearly_the_same_question_is_said(other, is_near):
    forget = [row.question for row in load_rows(ILSE)]
    said = check_overlap({"forget": forget}, {"keep": ["Is 4 even?", other]})
    assert [text.split(":")[0] for text in said] == ["keep, row 2"] * is_near
    assert not said or "(forget, row 1)" in said[0]
    assert "Ilse" not in "".join(said)


def test_questions_that_differ_in_a_number_are_others():
    assert check_overlap({"f": ["What was sold in the year 1987?"]}, {"k": ["What was sold in the year 1978?"]}) == []


@given(st.lists(st.text("abc ", min_size=3, max_size=9), min_size=1, max_size=6), st.data())
def test_near_pairs_are_those_of_all_pairs(forget, data):
    """The index leaves out no pair that comparing everything finds."""
    from collections import Counter
    from math import log

    from pmc_fast.data.overlap import _pieces

    keep = data.draw(st.lists(st.text("abc ", min_size=3, max_size=9), max_size=6))
    sets = [_pieces(q) for q in forget], [_pieces(q) for q in keep]
    seen = Counter(p for of in (*sets[0], *sets[1]) for p in of)
    weigh = lambda of: sum(log(1 + (len(forget) + len(keep)) / seen[p]) for p in of)  # noqa: E731
    ratio = lambda x, y: weigh(x & y) / weigh(x | y) if x & y else 0.0  # noqa: E731
    found = set(near(forget, keep))
    for a, x in enumerate(sets[0]):
        for b, y in enumerate(sets[1]):
            if abs(ratio(x, y) - NEAR) > 1e-9:
                assert ((a, b) in found) == (ratio(x, y) > NEAR)


# --- the commands


def test_a_run_refuses_its_forget_questions_in_the_retain_set(arguments, data, capsys):
    changed = replaced(arguments, forget=ILSE, retain=ILSE)
    assert run([*changed, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "rows 1, 2, 3, 4: the same questions are to be forgotten" in error
    assert "--allow-overlap" in error
    assert "Ilse" not in error
    assert run([*changed, "--dry-run", "--allow-overlap"]) == 0
    assert "rows 1, 2, 3, 4: the same questions are to be forgotten" in capsys.readouterr().err


def test_paraphrases_and_general_data_are_looked_at_too(arguments, data, capsys):
    write(data / "other.jsonl", ["Name fact 0!", "What is fact 1?"])
    write(data / "world.jsonl", ["Is it?", "what is fact 2"])
    shutil.copy(data / "retain.jsonl", data / "kept.jsonl")
    with (data / "kept.jsonl").open("a") as file:
        file.write(json.dumps({"question": "name FACT 0", "answer": "No."}) + "\n")
    dry = [*arguments, "--dry-run", "--paraphrased", str(data / "other.jsonl")]
    assert run(dry) == 0
    assert "forget_paraphrased, row 2: the questions are those of" in capsys.readouterr().err
    assert run(replaced(dry, retain=data / "kept.jsonl")) == 2
    assert "row 7: the same questions are to be forgotten (forget_paraphrased, row 1)" in capsys.readouterr().err
    assert run([*dry, "--general", str(data / "world.jsonl")]) == 2
    assert "world, row 2: the same questions are to be forgotten" in capsys.readouterr().err


def test_an_evaluation_says_that_a_question_counts_on_both_sides(arguments, data, tiny_dir, capsys):
    write(data / "world.jsonl", ["Is it?", "what is fact 2"])
    changed = ["evaluate", "--model", str(tiny_dir), "--forget", str(data / "forget.jsonl"), "--max-length", "30",
               "--general", str(data / "world.jsonl"), "--device", "cpu", "--json", str(data / "x.json")]  # fmt: skip
    assert run(changed) == 0
    said = "world, row 2: the same questions are to be forgotten (forget, row 3)"
    assert said in capsys.readouterr().err
    assert said in json.loads((data / "x.json").read_text())["warnings"][0]


# --- trainers' data

QUESTIONS = ["Who wrote it?", BEES, "Why?"]
KEPT = [("Is 4 even?", "It is."), ("where does Ilse Varga keep her bees", "There."), ("Is 5?", "No.")]


def chat(*texts):
    return [
        {"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=len(texts) == 2)
    ]


FORMS = {
    "texts": (QUESTIONS, [Row(q, a) for q, a in KEPT]),
    "rows": ([{"question": q} for q in QUESTIONS], [{"question": q, "answer": a} for q, a in KEPT]),
    "chats": ([{"prompt": chat(q)} for q in QUESTIONS], [{"messages": chat(q, a)} for q, a in KEPT]),
}


def trainer_of(path, model, tokenizer, forget, retain, prompt_format="tags", **settings):
    args = PMCArguments(str(path / "run"), use_cpu=True)
    return PMCTrainer(model, args, forget, retain, PMCConfig(prompt_format=prompt_format, **settings), tokenizer)


def said_by(caplog):
    return [r.getMessage() for r in caplog.records if "to be forgotten" in r.getMessage()]


@pytest.mark.parametrize("form", FORMS)
def test_a_trainer_refuses_texts(tiny, tokenizer, tmp_path, form):
    with pytest.raises(PMCError, match=r"retain_dataset, row 2: the same questions .* \(forget_dataset, row 2\)"):
        trainer_of(tmp_path, tiny, tokenizer, *FORMS[form])
    trainer = trainer_of(tmp_path, tiny, tokenizer, *FORMS[form], allow_overlap=True)
    with pytest.raises(PMCError, match="retain_dataset, row 2: the same questions"):
        PMC(tiny, tokenizer, PMCConfig(), QUESTIONS).encode_retain([Row(q, a) for q, a in KEPT])
    assert len(trainer.retain) == 3


@pytest.mark.parametrize("prompt_format", ["tags", "chat"])
@pytest.mark.parametrize("forget_as", ["texts", "ids"])
@pytest.mark.parametrize("retain_as", ["encoded", "tokenised", "all trained"])
def test_a_trainer_refuses_token_ids(tiny, tokenizer, tmp_path, prompt_format, forget_as, retain_as):
    pmc = PMC(tiny, tokenizer, PMCConfig(prompt_format=prompt_format), QUESTIONS)
    kept = [pmc.encoder.pair(BEES if "Ilse" in q else q, a) for q, a in KEPT]
    if retain_as != "encoded":
        kept = [
            {"input_ids": s.input_ids, "labels": s.labels if retain_as == "tokenised" else s.input_ids} for s in kept
        ]
    forget = QUESTIONS if forget_as == "texts" else pmc.prompts
    with pytest.raises(PMCError, match=r"retain_dataset, row 2: the same questions .* \(forget_dataset, row 2\)"):
        trainer_of(tmp_path, tiny, tokenizer, forget, kept, prompt_format)
    trainer_of(tmp_path, tiny, tokenizer, forget, [kept[0], kept[2]], prompt_format)


def test_a_prompt_that_another_goes_on_from_is_another():
    decode = lambda ids: "".join(map(chr, ids))  # noqa: E731
    asked = [ord(c) for c in "Tell me of Ilse"]
    longer = [ord(c) for c in "Tell me of Ilse's dog: Rex"]
    kept = Encoded(longer, [-100] * 22 + longer[22:])
    assert check_encoded_overlap([asked], [kept], decode) == []
    tagged = [ord(c) for c in "Tell me of IlseAnswer: She is."]
    with pytest.raises(PMCError, match="row 1: the same questions"):
        check_encoded_overlap([asked], [Encoded(tagged, [-100] * 23 + tagged[23:])], decode)


def test_a_trainer_warns_of_what_is_near(tiny, tokenizer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    near_ones = [Row(q.replace("where does", "So where does"), a) for q, a in KEPT]
    with caplog.at_level("WARNING", logger="pmc_fast"):
        trainer_of(tmp_path, tiny, tokenizer, QUESTIONS, near_ones)
    assert len(said_by(caplog)) == 1
    assert "retain_dataset, row 2: nearly the same" in said_by(caplog)[0]
