"""Texts to be continued: prompts, training pairs, samples, evaluation and records agree, whatever the prompt format is."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmc_fast import PMC, PMCConfig
from pmc_fast.data import (
    Encoder,
    Row,
    encode_pair,
    encode_prompt,
    is_text,
    load_rows,
    questions_of,
    rows_of,
    sequences_of,
    text_to_continue,
)
from pmc_fast.data.encoding import continued
from pmc_fast.erasure.record import read_private, write_private
from pmc_fast.erasure.stack import Stack
from pmc_fast.errors import PMCError
from pmc_fast.evaluation import greedy_answers, sampling_attack
from pmc_fast.jobs.earlier_runs import rows_hash
from pmc_fast.models.loading import load_model
from pmc_fast.reference import Reference
from tests.command_line import replaced, run
from tests.conftest import INPUTS

LANGUAGES = json.loads((INPUTS / "languages.json").read_text(encoding="utf-8"))
FERRY = text_to_continue("The ferry to Perrin left at dusk, and")


@pytest.mark.parametrize(
    ("beginning", "more", "whole"),
    [
        ("The ferry", "left", "The ferry left"),
        ("The ferry", " left", "The ferry left"),
        ("The ferry ", "left", "The ferry left"),
        ("The ferry\n\n", "It rained", "The ferry\n\nIt rained"),
        ("The ferry", ", late,", "The ferry, late,"),
        ("The ferry", "(late)", "The ferry (late)"),
        ("Паром", "ушёл", "Паром ушёл"),
        ("العبّارة", "غادرت", "العبّارة غادرت"),
        ("العبّارة", "، ثم", "العبّارة، ثم"),
        ("नाव", "चली गई", "नाव चली गई"),
        ("배가", "떠났다", "배가 떠났다"),
        ("渡轮", "离开了", "渡轮离开了"),
        ("渡轮离开了。", "No one saw", "渡轮离开了。No one saw"),
        ("船は", "出た", "船は出た"),
        ("เรือ", "ออกไป", "เรือออกไป"),
        ("Ann", "", "Ann"),
        ("Ann ", "", "Ann"),
    ],
)
def test_a_text_and_how_it_goes_on_make_one_text(beginning, more, whole):
    assert continued(text_to_continue(beginning), more) == continued(beginning, more) == whole


def test_a_conversation_is_no_text():
    [row] = rows_of([{"messages": [["user", "Q"], ["assistant", "A"], ["user", "R"]]}], "data")
    with pytest.raises(PMCError, match="a conversation is no text to be continued"):
        continued(row.question)


@pytest.mark.parametrize("prompt_format", ["tags", "chat"])
@pytest.mark.parametrize("language", [None, *LANGUAGES])
def test_a_text_is_encoded_as_it_stands(tokenizer, prompt_format, language):
    """By the tokenizer alone: no tag, no template, no end that an excerpt does not have."""
    first, second, _ = LANGUAGES[language] if language else ("The ferry left at dusk, and", "nobody saw it.", "")
    encoder = Encoder(tokenizer, PMCConfig(prompt_format=prompt_format, max_length=2000))
    question, whole = text_to_continue(first), continued(first, second)
    prompt, pair = encoder.prompt(question), encoder.pair(question, second)
    assert prompt == encode_prompt(tokenizer, first, prompt_format="plain") == tokenizer(first)["input_ids"]
    assert pair == encode_pair(tokenizer, question, second, prompt_format="plain", max_length=2000)
    assert pair.input_ids[: len(prompt)] == prompt
    assert pair.labels == [-100] * len(prompt) + pair.input_ids[len(prompt) :]
    assert tokenizer.decode(pair.input_ids) == whole
    assert not set(pair.input_ids) & {*encoder.stops, *tokenizer.all_special_ids}
    start = second[: len(second) // 2]
    begun = encoder.prompt(question, start)
    assert tokenizer.decode(begun) == continued(first, start.rstrip())
    cut = encode_pair(tokenizer, question, second, prompt_format="plain", max_length=len(prompt) + 1)
    assert cut.input_ids == pair.input_ids[: len(prompt) + 1]
    assert cut.cut == len(pair.input_ids) - len(prompt) - 1


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip), st.text(min_size=1))
def test_every_pair_begins_with_its_prompt(tokenizer, beginning, more):
    more = more.encode(errors="ignore").decode()
    prompt = encode_prompt(tokenizer, beginning, prompt_format="plain")
    pair = encode_pair(tokenizer, beginning, more, prompt_format="plain", max_length=10_000)
    assert pair.input_ids[: len(prompt)] == prompt
    whole = tokenizer(continued(beginning, more))["input_ids"]  # the vocabulary lacks some characters
    assert tokenizer.decode(pair.input_ids) == tokenizer.decode(whole)


def with_template(tokenizer, single):
    """The same tokenizer, but for the tokens that it puts around a text."""
    import copy

    from tokenizers.processors import TemplateProcessing

    other = copy.deepcopy(tokenizer)
    token = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
    other._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[token])
    return other, token[1]


def test_what_a_tokenizer_puts_before_texts_is_kept(tokenizer):
    other, bos = with_template(tokenizer, "<|im_start|> $A")
    encoder = Encoder(other, PMCConfig(prompt_format="chat"))
    plain = tokenizer("The ferry left at dusk")["input_ids"]
    assert encoder.prompt(text_to_continue("The ferry left at")) == [bos, *plain[:-1]]
    assert encoder.pair(text_to_continue("The ferry left at"), " dusk").input_ids == [bos, *plain]


def test_texts_that_can_not_be_encoded_rightly_are_refused(tokenizer):
    other, _ = with_template(tokenizer, "$A <|im_start|>")
    encoder = Encoder(other, PMCConfig(prompt_format="chat"))
    for check in (
        lambda: encoder.prompt(FERRY, where="x, row 3"),
        lambda: encoder.pair(FERRY, "so", where="x, row 3"),
    ):
        with pytest.raises(PMCError, match=r"x, row 3: the tokenizer does not begin .*add_eos_token"):
            check()
    published = Encoder(tokenizer, PMCConfig(prompt_format="chat", accidents=True))
    with pytest.raises(
        PMCError, match="row 3: the published code knows no texts to be continued: leave accidents out"
    ):
        published.prompt(FERRY, where="row 3")
    with pytest.raises(PMCError, match=r"row 1: the question holds '<\|im_end\|>'"):
        Encoder(tokenizer, PMCConfig(prompt_format="tags")).check_lengths(
            "x", [(text_to_continue("a <|im_end|>"), "b")]
        )


def test_an_answers_tag_belongs_to_answers_alone(tokenizer):
    encoder = Encoder(tokenizer, PMCConfig(prompt_format="tags"))
    ids = tokenizer("Answer: so it is")["input_ids"]
    assert encoder.answers([ids, ids], ["Who?", FERRY]) == ["so it is", "Answer: so it is"]
    assert encoder.samples([ids], FERRY) == ["Answer: so it is"]


def test_rows_of_texts_are_written_and_read_again(tmp_path):
    rows = [Row(FERRY, " nobody saw it."), Row("Who?", "Ilse."), Row(text_to_continue("a"))]
    assert rows_of(json.loads(json.dumps([{"question": r.question, "answer": r.answer} for r in rows])), "x") == rows
    write_private(tmp_path / "private.jsonl", {"forget": rows})
    assert read_private(tmp_path / "private.jsonl") == {"forget": rows}
    assert len({rows_hash([row], "salt") for row in (rows[0], Row(FERRY[0].content, rows[0].answer))}) == 2
    assert questions_of([FERRY, "Who?"]) == [FERRY, "Who?"]
    assert questions_of([{"beginning": "a", "continuation": "b"}, {"question": "Who?"}]) == [
        text_to_continue("a"),
        "Who?",
    ]


def test_in_trainers_data_too(tokenizer):
    encoder = Encoder(tokenizer, PMCConfig())
    rows = [{"beginning": "The ferry left", "continuation": "at dusk"}, {"question": "Who?", "answer": "Ilse."}]
    text, answer = sequences_of(rows, encoder)
    assert text.input_ids == tokenizer("The ferry left at dusk")["input_ids"]
    assert answer == encoder.pair("Who?", "Ilse.")


# --- the algorithm, the evaluation, a request


@pytest.fixture(scope="module")
def sharp(sharp_dir):
    return load_model(str(sharp_dir), device=torch.device("cpu")).model


def generated(model, tokenizer, text, length):
    """What transformers' own generate says after a text, greedily."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_length=length, **ends)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("prompt_format", ["tags", "chat"])
def test_samples_go_on_with_the_text_and_are_trained_as_drawn(sharp, tokenizer, prompt_format):
    config = PMCConfig(num_samples=3, max_length=40, prompt_format=prompt_format)
    pmc = PMC(sharp, tokenizer, config, [FERRY, "Who?"])
    pmc.prepare()
    ids = generated(sharp, tokenizer, FERRY[0].content, 40)
    assert pmc._initial_ids[0] == ids
    assert pmc.initial_answers[0] == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert pmc.cut_answers in ([], [2])  # a text need not end
    step = pmc.sample([0, 1])
    [[text], [answer]] = step.answers
    [[kept, _]] = pmc.store.answer(0)
    assert text.input_ids == pmc.prompts[0] + kept == tokenizer(FERRY[0].content)["input_ids"] + kept
    assert text.labels == [-100] * len(pmc.prompts[0]) + kept
    assert answer == pmc.encoder.pair("Who?", pmc.store.answer(1)[0][0])  # stored as text, as ever
    retain = pmc.encode_retain([{"beginning": "Bees", "continuation": "hum"}, {"question": "Why?", "answer": "So."}])
    loss = pmc.loss(step, retain)
    assert torch.isfinite(loss.loss)
    again = PMC(sharp, tokenizer, config, [FERRY, "Who?"])  # what a checkpoint holds
    again.store.load_state_dict(json.loads(json.dumps(pmc.store.state_dict())))
    assert again._encode(0, again.store.answer(0)[0][0]) == text
    pmc._loss.packed.base.zero_grad()


def test_the_evaluation_asks_as_training_samples(sharp, tokenizer):
    pmc = PMC(sharp, tokenizer, PMCConfig(max_length=40, prompt_format="tags"), [FERRY, "Who?"])
    assert pmc.prepare() == greedy_answers(pmc.engine, pmc.encoder, [FERRY, "Who?"])
    rows = [Row(FERRY, " nobody saw it leave.")]
    asked = []

    def engine(prompts, **how):
        asked.extend(prompts)
        return pmc.engine(prompts, **how)

    for how in ({}, {"first_words": 2}, {"prefill": "Then"}):
        sampling_attack(engine, pmc.encoder, rows, num_samples=2, **how)
    text = FERRY[0].content
    assert [tokenizer.decode(ids) for ids in asked] == [text, text + " nobody saw", text + " Then"]


def test_what_cannot_be_stored_or_compared_is_refused(sharp, tokenizer):
    with pytest.raises(PMCError, match="store is 'text' but question 2 is a text to be continued"):
        PMC(sharp, tokenizer, PMCConfig(store="text"), ["Who?", FERRY])
    with pytest.raises(PMCError, match="the published algorithm has no texts"):
        Reference(sharp, tokenizer, PMCConfig(), [FERRY])
    pmc = PMC(sharp, tokenizer, PMCConfig(max_length=40), [FERRY])
    with pytest.raises(PMCError, match="the same questions are to be forgotten"):
        pmc.encode_retain([{"beginning": FERRY[0].content, "continuation": "so"}])


def test_a_request_of_texts_and_its_verification(data, sharp_dir, capsys):
    """The forget data as MUSE has them, in Russian; a passage to keep; questions as general data."""
    first, second, third = LANGUAGES["ru"]
    forget = [{"prompt": first, "gt": second}, {"prompt": second, "gt": third}]
    keep = [f"{third} {first} {n} {second}" for n in range(3)]
    (data / "forget.json").write_text(json.dumps(forget, ensure_ascii=False), encoding="utf-8")
    (data / "keep.json").write_text(
        json.dumps([{"article": text} for text in keep], ensure_ascii=False), encoding="utf-8"
    )
    (data / "facts.jsonl").write_text('{"question": "What is 2 + 2?", "answer": "It is 4."}\n')
    words = [
        "unlearn", "--lora", "--model", str(sharp_dir), "--stack", str(data / "stack"), "--forget", str(data / "forget.json"),
        "--retain", str(data / "keep.json"), "--general", str(data / "facts.jsonl"), "--columns", "retain.text=article",
        "--prompt-words", "4", "--preset", "small", "--epochs", "1", "--num-samples", "2", "--max-length", "150", "--device",
        "cpu", "--lora-r", "2", "--max-degenerate", "1", "--keep-private", "--allow-overlap",
    ]  # fmt: skip
    assert run(words) == 0
    stack = Stack(str(data / "stack"))
    [request] = stack.requests
    rows = load_rows(data / "forget.json")
    kept = load_rows(data / "keep.json", columns={"text": "article"}, prompt_words=4)
    assert all(is_text(row.question) for row in (*rows, *kept))
    recorded = request.record["data"]
    assert recorded["forget"]["sha256"] == rows_hash(rows, recorded["salt"])
    assert recorded["retain"]["sha256"] == rows_hash(kept, recorded["salt"])
    assert read_private(request.directory / "private.jsonl")["forget"] == rows
    assert request.record["settings"]["reward"] == "unicode"
    verify = ["verify", "--stack", str(data / "stack"), "--slack", "100", "--requests"]
    assert run([*verify, str(data / "forget.json"), "--json", str(data / "v.json")]) == 0
    asked = json.loads((data / "v.json").read_text())
    after = request.record["metrics"]["after"]["sets"]
    assert asked["requests"]["0001"]["sets"]["forget"]["rouge_l_recall"] == after["forget"]["rouge_l_recall"]
    assert asked["keep"]["sets"]["retain"]["rouge_l_recall"] == after["retain"]["rouge_l_recall"]
    (request.directory / "private.jsonl").unlink()  # the file alone is then asked, read as the request read it
    assert run([*verify, str(data / "forget.json")]) == 0
    for file, message in (
        ("facts.jsonl", "is that of no request"),
        ("keep.json", "keep.json, row 1 has no question"),
    ):
        capsys.readouterr()
        assert run([*verify, str(data / file)]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_run_on_passages_of_another_script(arguments, data, sharp_dir, capsys):
    first, second, third = LANGUAGES["zh"]
    (data / "forget.json").write_text(
        json.dumps([first + second, third + first], ensure_ascii=False), encoding="utf-8"
    )
    more = {"model": sharp_dir, "forget": data / "forget.json", "prompt_words": 6, "max_length": 70}
    assert (
        run([*replaced(arguments, **more), "--attack-samples", "1", "--attack-prefill", "", "--max-degenerate", "1"])
        == 0
    )
    report = json.loads((data / "out/report.json").read_text())
    assert report["settings"]["reward"] == "unicode"
    assert report["settings"]["prompt_words"] == 6
    assert report["after"]["leakage"]["sets"]["forget"]["first_words"]["questions"] == 2
