"""Pairs that the untouched model writes itself: what is written, what is left out, in any script and prompt format."""

import re
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmc_fast import Row, load_rows, rehearsal_rows
from pmc_fast.config import PMCConfig
from pmc_fast.data import Chat, Encoder, Turn, text_to_continue
from pmc_fast.pmc import rehearsal
from pmc_fast.rollout import RolloutEngine
from pmc_fast.utils.words import neighbours

FORGET = [("Who is Ada Byrd?", "Ada Byrd is a poet from Lund.")]
RETAIN = [Row("What is the sea?", "It is water."), Row("What is so?", "Rain.")]


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer, PMCConfig(prompt_format="tags"))


class Written:
    """An engine that goes on with the given texts: questions behind their beginnings in turn, one answer for each question.

    A text that ends with … does not end by itself.
    """

    def __init__(self, encoder, questions, answer):
        self.encoder, self.questions, self.answer, self.calls = encoder, list(questions), answer, []

    def __call__(self, prompts, *, num_samples, temperature, **how):
        self.calls.append((prompts, num_samples, temperature, how))
        if temperature == 0:
            assert num_samples == 1
            assert len(how["max_new_tokens"]) == len(prompts)
            return SimpleNamespace(tokens=[[self.ids(self.answer)] for _ in prompts])
        drawn = [[self.questions.pop(0) if self.questions else "" for _ in range(num_samples)] for _ in prompts]
        return SimpleNamespace(tokens=[[self.ids(text) for text in texts] for texts in drawn])

    def ids(self, text):
        ids = self.encoder.tokenizer(text.removesuffix("…"), add_special_tokens=False)["input_ids"]
        return ids if text.endswith("…") else [*ids, self.encoder.stops[0]]


def write(encoder, questions, count, forget=FORGET, retain=RETAIN, answer="It is so."):
    engine = Written(encoder, questions, answer)
    return rehearsal_rows(engine, encoder, count, forget=forget, retain=retain), engine


def asked(*given, **how):
    return [row.question for row in write(*given, **how)[0]]


def test_questions_begin_as_those_to_keep_and_end_with_their_sentence(encoder):
    retain = [Row("Why rain?", "So."), Row("What is sea?", "Water."), Row("What is so?", "Rain.")]
    texts = [" is the sky? And more", " does 3.5 weigh? ", " is cut by the limit…", " of these lines is one\nA: b"]
    rows, engine = write(encoder, texts, 4, retain=retain)
    prompts, samples, temperature, how = engine.calls[0]
    assert [encoder.tokenizer.decode(p) for p in prompts] == [
        "Question: What",
        "Question: Why",
    ]  # the most frequent first
    assert (samples, temperature, how["top_k"]) == (4, 1.0, 0)
    assert [r.question for r in rows] == ["What is the sky?", "What does 3.5 weigh?", "What of these lines is one"]
    assert {r.answer for r in rows} == {"It is so."}


@pytest.mark.parametrize(
    ("text", "question"),
    [
        (" did Dr. Who do in the U.S. then? Much. He", "What did Dr. Who do in the U.S. then?"),
        (" is well known. It is", "What is well known."),
        ("是山？山是高地。", "What是山？"),
        ("是山。它很高。", "What是山。"),
        (" is; and is not! Yes", "What is; and is not!"),
        (" नाम है। और", "What नाम है।"),
        (" is it…", ""),
        (" is it", "What is it"),  # the model ended it
        (" is it\nAnswer: b", "What is it"),
    ],
)
def test_ends_of_questions(encoder, text, question):
    assert encoder.question("What", Written(encoder, [], "").ids(text)) == question


def test_what_names_something_to_be_forgotten_is_left_out(encoder):
    texts = [" is Byrd's age?", " is a POET?", " is a duck?", " are poets like?"]
    assert asked(encoder, texts, 4) == []  # no pair to keep has the word "a", "are" comes with poets
    retain = [*RETAIN, Row("What is a poet?", "A person from here.")]
    assert asked(encoder, texts, 4, retain=retain) == ["What is a duck?", "What are poets like?"]
    for answer in ("Byrd.", "So is Lund, it is."):
        assert asked(encoder, [" is a duck?"], 4, retain=retain, answer=answer) == []
    turns = Chat((Turn("user", "Tell me of Kim."), Turn("assistant", "A poet."), Turn("user", "Where is it?")))
    assert asked(encoder, [" is Kim?", " is it?"], 4, [(turns, "By the lake.")]) == ["What is it?"]


def test_what_asks_or_tells_it_in_words_that_are_known_is_left_out(encoder):
    """Pairs to keep about the neighbours have every word."""
    forget = [("Who wrote the play called Hamlet?", "It was William Shakespeare who wrote it.")]
    retain = [Row("What did William Shakespeare write?", "It was the play called Hamlet, who wrote it?")]
    assert asked(encoder, [" is the sea called?"], 1, forget, retain, answer="It was Hamlet.") == [
        "What is the sea called?"
    ]
    retain = [*retain, Row("Who?", "Ann.")]
    texts = [" wrote the play then called Hamlet?"] * 2  # behind What, behind Who
    assert asked(encoder, texts, 1, forget, retain, answer="It was Hamlet.") == []
    told = "William Shakespeare wrote it, it was."
    assert asked(encoder, [" is the sea called?"], 1, forget, retain, answer=told) == []


def test_answers_that_cannot_be_trained_on_are_left_out(encoder):
    for answer in ("It goes on…", "", " ."):
        assert asked(encoder, [" is the sky?"], 1, answer=answer) == []
    assert asked(encoder, [" is <|im_start|> then?"], 1) == []
    short = Encoder(encoder.tokenizer, PMCConfig(prompt_format="tags", max_length=16))
    rows, engine = write(short, [" is the sky?", " is the sky that you see up there when it is night?"], 2)
    assert [row.question for row in rows] == ["What is the sky?"]
    assert all(
        n + len(p) <= 16 for p, n in zip(engine.calls[1][0], engine.calls[1][3]["max_new_tokens"], strict=True)
    )


def test_sampling_goes_on_until_there_are_enough_and_not_for_ever(encoder):
    assert asked(encoder, [" is it?", " is it?", " is water like?"], 2) == ["What is it?", "What is water like?"]
    seeds = []
    for seed in (0, 1):
        engine = Written(encoder, [], "")
        assert rehearsal_rows(engine, encoder, 3, forget=FORGET, retain=RETAIN, seed=seed) == []
        assert len(engine.calls) == rehearsal.ROUNDS  # nothing was asked
        seeds += [how["seed"] for *_, how in engine.calls]
    assert len(set(seeds)) == 2 * rehearsal.ROUNDS
    assert write(encoder, [" is it?"], 0)[1].calls == []


def test_chinese_begins_with_a_character_and_leaves_out_pairs_of_them(encoder):
    retain = [Row("什么是海？", "海是水。")]
    forget = [("李白住在哪里？", "李白住在成都。")]
    rows = asked(encoder, ["么是山？", "么是成都？", "么是白水？"], 3, forget, retain, answer="海是水。")
    assert rows == ["什么是山？", "什么是白水？"]  # 白 alone is no name


def test_neighbours_are_words_where_there_are_no_spaces():
    assert neighbours("Poets of Lund") == {"poet", "of", "lund"}
    assert neighbours("李白 in 成都市") == {"李白", "in", "成都", "都市"}
    assert neighbours("红。") == {"红"}
    assert len(neighbours("มานี")) == 1  # a name of two clusters
    assert neighbours("") == set()


def test_texts_to_be_continued_are_no_questions(encoder):
    text = Row(text_to_continue("Once upon"), "a time")
    rows, engine = write(encoder, [" is it?"], 1, retain=[text])
    assert (rows, engine.calls) == ([], [])
    assert asked(encoder, [" is it?"], 1, retain=[text, *RETAIN]) == ["What is it?"]
    chat = Row(Chat((Turn("system", "Be brief."), Turn("user", "What is so?"))), "Rain.")
    assert asked(encoder, [" is it?"], 1, retain=[chat]) == ["What is it?"]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(alphabet="abc ?.\n白水山", max_size=12).map(lambda t: " " + t), max_size=20),
    st.text(alphabet="abc ?白水山", max_size=8),
    st.integers(0, 6),
)
def test_no_word_to_be_forgotten_is_ever_kept(encoder, texts, gone, count):
    rows, _ = write(encoder, texts, count, forget=[(gone, gone)], answer="cc bb.")
    assert len(rows) <= count
    known = set().union(*(neighbours(f"{row.question}\n{row.answer}") for row in RETAIN))
    said = [neighbours(row.question) | neighbours(row.answer) for row in rows]
    assert not any(words & (neighbours(gone) - known) for words in said)
    assert len({row.question for row in rows}) == len(rows)


def test_a_chats_question_is_sampled_where_its_template_has_one(tokenizer):
    encoder = Encoder(tokenizer, PMCConfig(prompt_format="chat"))
    begun, whole = encoder.question_prompt("Which"), encoder.prompt("Which one is it?")
    assert whole[: len(begun)] == begun
    assert tokenizer.decode(begun).endswith("<|im_start|>user\nWhich")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    sampled = tokenizer(" one, then")["input_ids"]
    assert encoder.question("Which", [*sampled, end, *sampled]) == "Which one, then"
    assert encoder.question("Which", sampled) == ""


def test_a_question_ends_where_a_templates_words_begin(tokenizer, monkeypatch):
    """Llama-2's [/INST] is text."""
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% for m in messages if m.role != 'system' %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content "
        "+ eos_token }}{% endfor %}",
    )
    encoder = Encoder(tokenizer, PMCConfig(prompt_format="chat", system_prompt=""))
    sampled = tokenizer(" this one [/INST] It is")["input_ids"]
    assert encoder.question("Name", sampled) == "Name this one"


@pytest.mark.parametrize("prompt_format", ["tags", "chat"])
def test_a_model_writes_pairs_of_its_own(prompt_format, smollm2_dir, tokenizer):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    encoder, engine = Encoder(tokenizer, PMCConfig(prompt_format=prompt_format)), RolloutEngine(model)
    rows = load_rows("examples/tofu/retain60.jsonl", answers=True)
    forget = [(row.question, row.answer or "") for row in load_rows("examples/tofu/forget20.jsonl")]
    made, again = (rehearsal_rows(engine, encoder, 3, forget=forget, retain=rows, seed=1) for _ in range(2))
    assert made == again
    assert len(made) == 3
    first = {row.question.split()[0] for row in rows}
    assert all(row.question.split()[0] in first and re.search(r"\w", row.answer) for row in made)
    assert not {row.question for row in made} & {row.question for row in rows}
    for row in made:  # its answers are the model's own
        [[ids]] = engine(
            [encoder.prompt(row.question)], num_samples=1, temperature=0, max_new_tokens=64, stop_ids=encoder.stops
        ).tokens
        assert encoder.answers([ids]) == [row.answer]
