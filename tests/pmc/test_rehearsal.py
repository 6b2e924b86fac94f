"""Pairs that the untouched model writes itself: what is written, what is left out, in any script and prompt format."""

import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmc_fast import Row, load_rows, rehearsal_rows
from pmc_fast.config import PMCConfig
from pmc_fast.data import Chat, Encoder, Turn, text_to_continue
from pmc_fast.errors import PMCError
from pmc_fast.pmc import rehearsal
from pmc_fast.rollout import RolloutEngine
from pmc_fast.utils.words import unicode_units

STOP = 0


class Letters:
    """A tokenizer whose tokens are characters; 0 ends an answer."""

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(i) for i in ids if i != STOP)


class Letterwise:
    """An encoder of it."""

    tokenizer, stops, max_length = Letters(), [STOP], 400

    def prompt(self, question):
        return [ord(c) for c in f"Q {question}\n"]

    def question_prompt(self, start):
        return [ord(c) for c in f"Q {start}"]

    def answers(self, generated):
        return [self.tokenizer.decode(ids, True) for ids in generated]


class Written:
    """An engine that goes on with the given texts: questions behind their beginnings in turn, one answer for each question."""

    def __init__(self, questions, answer="It is so."):
        self.questions, self.answer, self.calls = list(questions), answer, []

    def __call__(self, prompts, *, num_samples, temperature, **how):
        self.calls.append((prompts, num_samples, temperature, how))
        if temperature == 0:
            assert num_samples == 1
            return SimpleNamespace(tokens=[[self.ids(self.answer)] for _ in prompts])
        drawn = [[self.questions.pop(0) if self.questions else "" for _ in range(num_samples)] for _ in prompts]
        return SimpleNamespace(tokens=[[self.ids(text) for text in texts] for texts in drawn])

    @staticmethod
    def ids(text):
        return [*map(ord, text)] if text.endswith("…") else [*map(ord, text), STOP]


FORGET = [("Who is Ada Byrd?", "Ada Byrd is a poet from Lund.")]
RETAIN = [Row("What is the sea?", "It is water."), Row("What is so?", "Rain.")]


def write(questions, count, forget=FORGET, retain=RETAIN, answer="It is so."):
    engine = Written(questions, answer)
    return rehearsal_rows(engine, Letterwise(), count, forget=forget, retain=retain), engine


def test_questions_begin_as_those_to_keep_and_end_with_their_sentence():
    retain = [Row("Why rain?", "So."), Row("What is sea?", "Water."), Row("What is so?", "Rain.")]
    texts = [" is the sky? And more", " does 3.5 weigh? ", " is cut by the limit…", " of these lines is one\nA: b"]
    rows, engine = write(texts, 4, retain=retain)
    prompts, samples, temperature, how = engine.calls[0]
    assert [chr(p[2]) + "".join(map(chr, p[3:])) for p in prompts] == ["What", "Why"]  # the most frequent first
    assert (samples, temperature, how["top_k"]) == (4, 1.0, 0)
    assert [r.question for r in rows] == ["What is the sky?", "What does 3.5 weigh?", "What of these lines is one"]
    assert {r.answer for r in rows} == {"It is so."}


def test_what_names_something_to_be_forgotten_is_left_out():
    texts = [" is Byrd's age?", " is a POET?", " is a duck?", " is Lund like?"]
    assert write(texts, 4)[0] == []  # no pair to keep has the word "a"
    retain = [*RETAIN, Row("What is a poet?", "A person from here.")]  # the POET is asked for already
    assert [r.question for r in write(texts, 4, retain=retain)[0]] == ["What is a duck?"]
    assert write([" is a duck?"], 4, retain=retain, answer="Byrd.")[0] == []


def known(rows):
    return {u for r in rows for u in unicode_units(f"{r.question} {r.answer}")}


def test_answers_that_do_not_end_or_say_nothing_are_left_out():
    for answer in ("It goes on…", "", " ."):
        assert write([" is the sky?"], 1, answer=answer)[0] == []


def test_sampling_goes_on_until_there_are_enough_and_not_for_ever():
    texts = [" is it?", " is it?", " is water like?"]
    rows, engine = write(texts, 2)
    assert [r.question for r in rows] == ["What is it?", "What is water like?"]
    _, engine = write([], 3)
    sampled = [call for call in engine.calls if call[2]]
    assert len(sampled) == rehearsal.ROUNDS
    assert len({call[3]["seed"] for call in sampled}) == rehearsal.ROUNDS
    assert len(sampled) == len(engine.calls)  # nothing was asked
    assert write([" is it?"], 0)[1].calls == []


def test_chinese_begins_with_a_character_and_leaves_out_pairs_of_them():
    retain = [Row("什么是海?", "海是水。")]
    forget = [("李白住在哪里?", "李白住在成都。")]
    rows, _ = write(["么是山?", "么是成都?", "么是白水?"], 3, forget, retain, answer="海是水。")
    assert [r.question for r in rows] == ["什么是山?", "什么是白水?"]  # 白 alone is no name


def test_texts_to_be_continued_are_no_questions():
    text = Row(text_to_continue("Once upon"), "a time")
    with pytest.raises(PMCError, match="all rows of retain are texts to be continued: leave it out"):
        write([" is it?"], 1, retain=[text])
    assert len(write([" is it?"], 1, retain=[text, *RETAIN])[0]) == 1
    chat = Row(Chat((Turn("system", "Be brief."), Turn("user", "What is so?"))), "Rain.")
    assert [row.question for row in write([" is it?"], 1, retain=[chat])[0]] == ["What is it?"]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text(alphabet="abc ?.\n白水", max_size=12).map(lambda t: " " + t), max_size=20),
    st.text(alphabet="abc ?白水", max_size=8),
    st.integers(0, 6),
)
def test_no_word_to_be_forgotten_is_ever_kept(texts, gone, count):
    rows, _ = write(texts, count, forget=[(gone, gone)], answer="cc bb.")
    assert len(rows) <= count
    secret = {u for u in unicode_units(gone) if len(u) > 1 or u.isascii()} - known(RETAIN)
    assert not any(secret & known([row]) for row in rows)
    names = [row.question for row in rows]
    assert len(set(names)) == len(names)


def test_a_chats_question_is_sampled_where_its_template_has_one(tokenizer):
    encoder = Encoder(tokenizer, PMCConfig(prompt_format="chat"))
    begun, whole = encoder.question_prompt("Which"), encoder.prompt("Which one is it?")
    assert whole[: len(begun)] == begun
    assert tokenizer.decode(begun).endswith("<|im_start|>user\nWhich")
    tags = Encoder(tokenizer, PMCConfig(prompt_format="tags"))
    assert tokenizer.decode(tags.question_prompt("Which")) == "Question: Which"


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
