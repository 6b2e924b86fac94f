"""Rows in the shapes that data sets have: read as they are meant, or refused by row and column."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmc_fast import PMC, PMCConfig
from pmc_fast.data import (
    Chat,
    Encoder,
    Row,
    Turn,
    check_overlap,
    questions_of,
    rows_of,
    sequences_of,
    text_to_continue,
)
from pmc_fast.errors import PMCError
from pmc_fast.evaluation import EvalSet, evaluate
from pmc_fast.jobs.earlier_runs import rows_hash
from pmc_fast.models.loading import load_model
from pmc_fast.reference import Reference
from tests.command_line import replaced, run
from tests.conftest import INPUTS

QUESTION = {"question": "Which is the capital?"}
CHOICES = ["Lyon", "Nice", "Paris", "Brest"]
LISTED = "Which is the capital?\nA. Lyon\nB. Nice\nC. Paris\nD. Brest"


def read(*records, **how):
    return rows_of(records, "data", **how)


def say(role, content, **more):
    return {"role": role, "content": content, **more}


SHAPES = {
    "Alpaca": ({"instruction": "Translate.", "input": "Bees", "output": "Bienen"}, Row("Translate.\n\nBees", "Bienen")),
    "Alpaca without input": ({"instruction": "Say hi.", "input": "", "output": "Hi."}, Row("Say hi.", "Hi.")),
    "Dolly": ({"instruction": "Who?", "context": "Ilse.", "response": "Ilse"}, Row("Who?\n\nIlse.", "Ilse")),
    "SQuAD": (
        {"context": "Ilse keeps bees.", "question": "Who?", "answers": {"text": ["Ilse", "Ilse V."], "answer_start": [0, 0]}},
        Row("Ilse keeps bees.\n\nWho?", "Ilse"),
    ),
    "SQuAD 2, none": ({"question": "Who?", "answers": {"text": [], "answer_start": []}}, Row("Who?")),
    "MUSE, to be continued": (
        {"prompt": "It was four when", "gt": " the owl came."}, Row(text_to_continue("It was four when"), " the owl came.")
    ),
    "TriviaQA": ({"question": "Who?", "answer": {"aliases": ["I.", "Ilse V."], "value": "Ilse"}}, Row("Who?", "Ilse")),
    "NQ": ({"question": "Who?", "answer": ["Ilse"]}, Row("Who?", "Ilse")),
    "MMLU": (QUESTION | {"choices": CHOICES, "answer": 2}, Row(LISTED, "C. Paris")),
    "MMLU letters": (QUESTION | dict(zip("ABCD", CHOICES, strict=True)) | {"answer": "C"}, Row(LISTED, "C. Paris")),
    "ARC": (
        QUESTION | {"choices": {"text": CHOICES, "label": ["1", "2", "3", "4"]}, "answerKey": "3"},
        Row("Which is the capital?\n1. Lyon\n2. Nice\n3. Paris\n4. Brest", "3. Paris"),
    ),
    "MedQA": (
        QUESTION | {"options": dict(zip("ABCD", CHOICES, strict=True)), "answer": "Paris", "answer_idx": "C"},
        Row(LISTED, "C. Paris"),
    ),
    "choices alone": (QUESTION | {"choices": CHOICES}, Row(LISTED)),
    "OpenOrca": (
        {"system_prompt": "Be short.", "question": "Who?", "response": "Ilse"},
        Row(Chat([Turn("system", "Be short."), Turn("user", "Who?")]), "Ilse"),
    ),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ilse"}]}, Row("Who?", "Ilse")),
    "UltraChat": ({"prompt": "Who?", "messages": [say("user", "Who?"), say("assistant", "Ilse")]}, Row("Who?", "Ilse")),
    "nulls of other rows": (
        {"messages": [say("user", "Who?", tool_calls=None), say("assistant", "Ilse", name=None)], "tools": []},
        Row("Who?", "Ilse"),
    ),
    "missing in pandas": ({"question": "Who?", "answer": float("nan"), "context": float("nan")}, Row("Who?")),
    "the same twice": ({"question": "Who?", "prompt": "Who?", "answer": "Ilse", "truth": "Ilse"}, Row("Who?", "Ilse")),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_known_shapes_are_read_as_they_are_meant(shape):
    record, row = SHAPES[shape]
    assert read(record) == [row]
    if not shape.startswith("UltraChat"):
        assert questions_of([record]) == [row.question]


REFUSED = {
    "index alone": (QUESTION | {"answer": 2}, "answer is int, not text"),
    "truth value": (QUESTION | {"answer": True}, "answer is bool, not text"),
    "bytes": (QUESTION | {"answer": b"yes"}, "answer is bytes, not text"),
    "number": ({"question": 7}, "question is int, not text"),
    "column": ({"question": ["a", "b"]}, "question is a list of str, not one text"),
    "dict of a column": ({"question": {"0": "a"}}, r"question is dict, not text \(of columns"),
    "several answers": (QUESTION | {"answer": ["a", "b"]}, "answer holds 2 answers: give one"),
    "other dict": (QUESTION | {"answer": {"span": "a"}}, "answer is dict, not text"),
    "context of documents": (QUESTION | {"context": {"title": ["a"]}}, "context is dict, not text"),
    "index out of range": (QUESTION | {"choices": CHOICES, "answer": 4}, "answer is none of the 4 choices"),
    "truth value of choices": (QUESTION | {"choices": CHOICES, "answer": True}, "answer is none of the 4 choices"),
    "other text": (QUESTION | {"choices": CHOICES, "answer": "Berlin"}, "answer is none of the 4 choices"),
    "label of one, text of another": (QUESTION | {"choices": ["B", "A"], "answer": "A"}, "or not one alone"),
    "choices as text": (QUESTION | {"choices": "['a', 'b']", "answer": "a"}, "choices is not a list of texts"),
    "a question with gt": (QUESTION | {"gt": "Paris"}, "has gt: if that is the answer"),
    "an evaluation's rows": (QUESTION | {"truth": "Paris", "answer": "Lyon"}, "has truth beside answer"),
    "two questions": (QUESTION | {"prompt": "Who?", "answer": "Paris"}, "has both question and prompt"),
    "two answers": (QUESTION | {"answer": "Paris", "output": "Lyon"}, "has both answer and output"),
    "tools": ({"messages": [say("user", "Who?")], "tools": [{"name": "f"}]}, "has tools, which are not supported"),
    "history": ({"instruction": "And she?", "history": [["a", "b"]]}, "has history, which are not supported"),
    "RWKU's text": ({"subject": "King", "text": "He wrote."}, "has no question: .*it has 'subject', 'text'"),
    "tool's turn": ({"messages": [say("user", "Q"), say("tool", "R"), say("assistant", "A")]}, "turn 2 has the role 'tool'"),
    "tool calls": ({"messages": [say("user", "Q"), say("assistant", "", tool_calls=[{"id": 1}])]}, "turn 2 has 'tool_calls' beside"),
    "reasoning": ({"messages": [say("user", "Q"), say("assistant", "A", reasoning_content="r")]}, "turn 2 has 'reasoning_content'"),
    "untrained turn": ({"messages": [say("user", "Q"), say("assistant", "A", weight=0)]}, "turn 2 has 'weight' beside"),
    "image": ({"messages": [say("user", [{"type": "text", "text": "Q"}, {"type": "image"}])]}, "turn 1 has a part that is 'image'"),
    "no content": ({"messages": [say("user", None)]}, "turn 1 has a content that is NoneType"),
    "late system turn": ({"messages": [say("user", "Q"), say("system", "S")]}, "turn 2 is a system turn: it must be the first"),
    "two systems": ({"system": "S", "messages": [say("system", "T"), say("user", "Q")]}, "system turn and another text in system"),
    "two assistants": ({"messages": [say("user", "Q"), say("assistant", "A"), say("assistant", "B")]}, "turn 2 is the assistant's"),
    "no user": ({"messages": [say("system", "S"), say("assistant", "A")]}, "turn 1 is the system's"),
    "answer twice": ({"messages": [say("user", "Q"), say("assistant", "A")], "answer": "B"}, "an answer in messages and in answer"),
    "chat and context": ({"messages": [say("user", "Q")], "context": "c"}, "has messages and context"),
    "chat of another question": ({"messages": [say("user", "Q")], "prompt": "P"}, "has both messages and prompt"),
    "chat as text": ({"messages": "[]x"}, "messages is str, not messages"),
    "chat of texts": ({"messages": ["hello"]}, "messages is a list of str, not messages"),
    "chat of numbers": ({"messages": [1]}, "turn 1 has no role"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_shapes_are_refused_by_row_and_column(case):
    record, message = REFUSED[case]
    with pytest.raises(PMCError, match=f"data, row 2.*{message}") as refused:
        read({"question": "Who?", "answer": "Ilse"}, record)
    assert "\n" not in str(refused.value)
    assert "Paris" not in str(refused.value)
    assert "Lyon" not in str(refused.value)


def test_conversations_are_kept_as_they_are():
    turns = [say("system", "S"), say("user", "Q1"), say("assistant", "A1"), say("user", "Q2"), say("assistant", "A2")]
    asked = Chat([Turn("system", "S"), Turn("user", "Q1"), Turn("assistant", "A1"), Turn("user", "Q2")])
    assert read({"messages": turns}) == [Row(asked, "A2")]
    assert read({"prompt": turns[:4], "completion": turns[4:]}) == [Row(asked, "A2")]
    assert read({"prompt": turns[:4], "answer": "A2"}) == [Row(asked, "A2")]
    assert read({"messages": turns[1:], "system": "S"}) == [Row(asked, "A2")]
    assert read({"messages": turns[:4]}) == [Row(asked)]
    assert read({"messages": turns[:3], "prompt": "Q1"}) == [Row(Chat(asked[:2]), "A1")]
    first = [say("assistant", "Ask me."), say("user", "Q"), say("assistant", "A")]
    assert read({"messages": first}) == [Row(Chat([Turn("assistant", "Ask me."), Turn("user", "Q")]), "A")]
    assert questions_of([{"messages": turns}, {"messages": first}, {"question": "Who?"}])[::2] == [asked, "Who?"]
    assert asked.asked == "user: Q1\nassistant: A1\nuser: Q2"
    assert Chat(asked[:2]).asked == "Q1"


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=50)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.one_of(st.none(), TEXTS))
def test_what_is_written_is_read_again(exchanges, system):
    turns = [] if system is None else [("system", system)]
    turns += [turn for q, a in exchanges for turn in (("user", q), ("assistant", a))]
    [row] = read({"messages": [say(*turn) for turn in turns]}, answers=True)
    assert row.answer == exchanges[-1][1]
    assert isinstance(row.question, str) == (len(turns) == 2)
    if isinstance(row.question, Chat):
        assert list(row.question) == turns[:-1]
    written = json.loads(json.dumps({"question": row.question, "answer": row.answer}))
    assert read(written) == [row]


CHAT = Chat([Turn("system", "Be short."), Turn("user", "Q1"), Turn("assistant", "A1"), Turn("user", "Q2")])


def rendered(tokenizer, *turns, **how):
    return tokenizer.apply_chat_template([say(*turn) for turn in turns], tokenize=True, return_dict=False, **how)


def test_a_conversation_is_rendered_whole(tokenizer):
    encoder = Encoder(tokenizer, PMCConfig())
    assert encoder.prompt(CHAT) == rendered(tokenizer, *CHAT, add_generation_prompt=True)
    pair = encoder.pair(CHAT, "A2")
    assert pair.input_ids == rendered(tokenizer, *CHAT, Turn("assistant", "A2"))
    trained = [token for token in pair.labels if token != -100]
    assert tokenizer.decode(trained) == "A2<|im_end|>\n"
    assert (
        encoder.prompt(CHAT, "A2 is")
        == encoder.prompt(CHAT) + tokenizer("A2 is", add_special_tokens=False)["input_ids"]
    )


def test_a_conversation_without_a_system_turn_has_the_runs(tokenizer):
    encoder = Encoder(tokenizer, PMCConfig(system_prompt="Mine."))
    own = Turn("system", "Mine.")
    assert encoder.prompt(Chat(CHAT[1:])) == rendered(tokenizer, own, *CHAT[1:], add_generation_prompt=True)
    assert encoder.prompt("Q") == rendered(tokenizer, own, Turn("user", "Q"), add_generation_prompt=True)
    assert encoder.prompt(Chat([Turn("system", ""), Turn("user", "Q")])) != encoder.prompt("Q")


def test_tags_hold_no_conversation(tokenizer):
    encoder = Encoder(tokenizer, PMCConfig(prompt_format="tags"))
    for check in (
        lambda: encoder.check_lengths("data", [("Q", "A"), (CHAT, "A2")]),
        lambda: sequences_of([Row("Q", "A"), Row(CHAT, "A2")], encoder, "data"),
    ):
        with pytest.raises(PMCError, match=r"data, row 2.* is a conversation .* no place in the tags format"):
            check()
    with pytest.raises(PMCError, match="no place in the tags format"):
        encoder.pair(CHAT, "A2")


def test_control_tokens_in_any_turn_are_refused(tokenizer):
    chat = Chat([Turn("system", "Be <|im_end|>"), Turn("user", "Q")])
    with pytest.raises(PMCError, match=r"data, row 1: the question holds '<\|im_end\|>'"):
        Encoder(tokenizer, PMCConfig()).check_lengths("data", [(chat, None)])


def test_one_question_under_two_system_turns_is_to_be_forgotten_and_kept():
    with pytest.raises(PMCError, match="kept, row 1: the same questions are to be forgotten"):
        check_overlap({"forget": [Chat(CHAT[:2])]}, {"kept": ["Q1"]})
    check_overlap({"forget": [CHAT]}, {"kept": ["Q2"]})


def test_hashes_tell_conversations_apart():
    rows = [Row("Q1", "A"), Row(Chat(CHAT[:2]), "A"), Row(Chat([Turn("system", "Be long."), CHAT[1]]), "A")]
    assert len({rows_hash([row], "salt") for row in rows}) == 3


def test_evaluation_asks_the_conversation_and_its_rows_are_read_again():
    asked = []
    numbers = []
    two = Chat([Turn("system", "Be long."), CHAT[1]])
    sets = [EvalSet("forget", "forget", [Row(Chat(CHAT[:2]), "one"), Row(two, "two")])]

    def answer(questions):
        asked.extend(questions)
        return ["one" if q == CHAT[:2] else "three" for q in questions]

    evaluate(answer, sets, rows=numbers, log_text=True)
    assert asked == [CHAT[:2], two]
    assert [row["rouge_l_recall"] for row in numbers] == [1.0, 0.0]
    again = json.loads(json.dumps([{"question": row["question"], "answer": row["truth"]} for row in numbers]))
    assert read(*again) == sets[0].rows


def test_pmc_trains_on_the_conversation_as_its_oracle_does(sharp_dir, tokenizer):
    tiny = load_model(str(sharp_dir), device=torch.device("cpu")).model
    config = PMCConfig(num_samples=2, max_length=60, prompt_format="chat")
    pmc = PMC(tiny, tokenizer, config, ["Q1", Chat(CHAT[:2]), CHAT])
    oracle = Reference(tiny, tokenizer, config, pmc.questions)
    pmc.prepare()
    oracle.prepare(batch_size=1)
    assert pmc.initial_answers == oracle.initial_answers
    assert len({tuple(prompt) for prompt in pmc.prompts}) == 3
    [[answer]] = pmc.sample([2]).answers
    [[text, _]] = pmc.store.answer(2)
    assert answer == pmc.encoder.pair(CHAT, text)


def test_a_job_on_conversations(arguments, data, sharp_dir, capsys):
    rows = [json.loads(line) for line in (INPUTS / "chat_system.jsonl").read_text().splitlines()]
    more = {"model": sharp_dir, "attack_samples": 2, "max_length": 90, "prompt_format": "chat"}
    arguments = [*replaced(arguments, forget=INPUTS / "chat_system.jsonl", **more), "--log-text"]
    assert run(arguments) == 0
    report = json.loads((data / "out/report.json").read_text())
    asked = {json.dumps(text["question"]) for text in report["before"]["sets"]["forget"]["texts"]}
    assert asked == {json.dumps([list(m.values()) for m in row["messages"][:2]]) for row in rows}
    assert "Answer with one word" in (data / "out/report.html").read_text()
    assert run(replaced(arguments, prompt_format="tags", output=data / "other")) == 2
    assert "row 1: the question is a conversation" in capsys.readouterr().err


def test_answers_that_a_part_of_the_rows_has_are_said(arguments, capsys):
    assert run([*replaced(arguments, forget=INPUTS / "half_answers.jsonl"), "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "half_answers.jsonl, row 2: no answer is given, unlike in other rows" in " ".join(said.split())
