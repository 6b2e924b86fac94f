"""Prompt and pair under the chat templates and tokenizers that people have: the pair begins with the prompt, or a refusal."""

import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from pmc_fast import (
    PMC,
    PMCArguments,
    PMCConfig,
    PMCTrainer,
)
from pmc_fast.data import (
    Chat,
    Encoder,
    Row,
    Turn,
    encode_pair,
    encode_prompt,
    sequences_of,
)
from pmc_fast.data.encoding import SYSTEM_PROMPT
from pmc_fast.errors import PMCError
from tests.command_line import replaced, run

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
PLAIN = (
    HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHT = (
    HEAD + "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
)
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
REASONING = {
    "hybrid": THOUGHT + ASK,  # as Qwen3's
    "no thinking": THOUGHT + ASK.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n"),
    "thinking": THOUGHT
    + ASK.replace("assistant\n", "assistant\n<think>\n"),  # as Qwen3's of 2507: "\n\n" is one token
    "line end": PLAIN.replace("{{ m.content }}", "{% if m.role == 'assistant' %}\n{% endif %}{{ m.content }}"),
}
DISTILLED = PLAIN.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")  # as DeepSeek-R1's
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
)
LAST_ALONE = (  # as Mistral's of 2024: the system prompt stands before the last turn if that is the user's
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{% if s and loop.last %}{{ s }}\n\n{% endif %}{{ m.content }}"
    "[/INST]{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
IGNORES_SYSTEM = PLAIN.replace("{{ m.content }}", "{% if m.role != 'system' %}{{ m.content }}{% endif %}")


@pytest.fixture
def speaking(tokenizer):
    """Return a function that gives the tests' tokenizer another chat template, or another attribute."""

    def make(template=PLAIN, **attributes):
        changed = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path)
        changed.chat_template = template
        for name, value in attributes.items():
            setattr(changed, name, value)
        return changed

    return make


def parts(encoder, question, answer):
    pair, prompt = encoder.pair(question, answer), encoder.prompt(question)
    assert pair.input_ids[: len(prompt)] == prompt
    assert pair.labels == [-100] * len(prompt) + pair.input_ids[len(prompt) :]
    return encoder.tokenizer.decode(prompt), encoder.tokenizer.decode(pair.input_ids[len(prompt) :])


@pytest.mark.parametrize("name", REASONING)
def test_what_follows_the_prompt_is_trained_whole(speaking, name):
    """What is sampled from is what precedes the answer in training: no part of an answer is masked, none of a prompt trained."""
    encoder = Encoder(speaking(REASONING[name]), PMCConfig(system_prompt="Be brief."))
    prompt, trained = parts(encoder, "Who?", "Ann did.")
    tokenizer = encoder.tokenizer
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    assert prompt == tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = [*asked, {"role": "assistant", "content": "Ann did."}]
    assert prompt + trained == tokenizer.apply_chat_template(whole, tokenize=False)


def test_a_template_that_opens_answers_otherwise_is_refused(speaking, tiny, tmp_path):
    """The prompt ends in <think>, given answers begin without: the first tokens of every answer would go untrained."""
    tokenizer, refusal = speaking(DISTILLED), "chat template does not begin a given answer .* --prompt-format tags"
    with pytest.raises(PMCError, match=refusal):
        Encoder(tokenizer, PMCConfig())
    with pytest.raises(PMCError, match=refusal):
        encode_pair(tokenizer, "Who?", "Ann.", prompt_format="chat")
    with pytest.raises(PMCError, match=refusal):
        PMC(tiny, tokenizer, PMCConfig(), ["Who?"])
    kept = [{"question": "Is it?", "answer": "No."}]
    with pytest.raises(PMCError, match=refusal):
        PMCTrainer(tiny, PMCArguments(str(tmp_path), use_cpu=True), ["Who?"], kept, PMCConfig(), tokenizer)
    Encoder(tokenizer, PMCConfig(prompt_format="tags"))


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_template_that_leaves_a_text_out_is_refused(speaking, role):
    """As those of vision models (Idefics3, SmolVLM), which read parts alone: an end was all that was trained."""
    parts_alone = PLAIN.replace("{{ m.content }}", "{% if m.role != '" + role + "' %}{{ m.content }}{% endif %}")
    what = {"user": "question", "assistant": "answer"}[role]
    with pytest.raises(PMCError, match=f"the chat template leaves the {what} out"):
        Encoder(speaking(parts_alone), PMCConfig())


def test_what_a_template_writes_before_answers_is_said_where_answers_are_kept_as_text(speaking, tiny):
    """A thought that max_length cut would be trained as the answer after an empty one."""
    tokenizer = speaking(REASONING["hybrid"])
    pmc = PMC(tiny, tokenizer, PMCConfig(), ["Who?"])
    assert len(pmc.warnings) == 1
    assert r"begins every given answer with '<think>\n\n</think>'" in pmc.warnings[0]
    assert PMC(tiny, tokenizer, PMCConfig(store="ids"), ["Who?"]).warnings == []
    assert PMC(tiny, speaking(PLAIN), PMCConfig(), ["Who?"]).warnings == []


def test_a_pair_is_refused_though_others_pass(speaking):
    """A template may treat one content otherwise than another."""
    odd = PLAIN.replace("{% for m", "{% if messages[-1].content == 'No.' %}{{ 'Odd' }}{% endif %}{% for m", 1)
    encoder = Encoder(speaking(odd), PMCConfig())
    parts(encoder, "Who?", "Yes.")
    with pytest.raises(PMCError, match="chat template does not begin"):
        encoder.pair("Who?", "No.")


@pytest.mark.parametrize("prompt_format", ["tags", "chat"])
@settings(max_examples=60, deadline=None)
@given(
    question=st.text("a \n\t?é中", min_size=1, max_size=6).filter(str.strip),
    answer=st.text("b \n\t.é中", min_size=1, max_size=6).filter(str.strip),
)
def test_every_pair_begins_with_its_prompt(tokenizer, prompt_format, question, answer):
    """A question that ends in a line end: the tokenizer joins it with the next one."""
    parts(Encoder(tokenizer, PMCConfig(prompt_format=prompt_format)), question, answer)


def test_a_line_end_after_a_question_moves_no_label(tokenizer):
    encoder = Encoder(tokenizer, PMCConfig(prompt_format="tags"))
    assert parts(encoder, "Who?\n", "Ann.") == ("Question: Who?\n\n", "Answer: Ann.<|im_end|>")


@pytest.mark.parametrize("template", [NO_SYSTEM, LAST_ALONE, IGNORES_SYSTEM])
def test_templates_without_a_system_prompt(speaking, template):
    encoder = Encoder(speaking(template), PMCConfig())
    assert len(encoder.warnings) == 1
    assert "the model is asked without" in encoder.warnings[0]
    prompt, trained = parts(encoder, "Who?", "Ann did.")
    assert "helpful" not in prompt
    assert trained.strip() in ("Ann did.<|im_end|>", "Ann did.<|im_end|>")
    if template != IGNORES_SYSTEM:
        with pytest.raises(PMCError, match="takes no system prompt: give --system-prompt ''"):
            Encoder(speaking(template), PMCConfig(system_prompt="Be brief."))
    assert Encoder(speaking(template), PMCConfig(system_prompt="")).warnings == []


@pytest.mark.parametrize(
    ("template", "refusal"),
    [
        (
            "{% for m in messages %}",
            "chat template fails .TemplateSyntaxError.: .*fix it, or use --prompt-format tags",
        ),
        ("{{ messages[0].content + 1 }}", "chat template fails .TypeError.: .*fix it"),
        ({"tool_use": PLAIN, "rag": PLAIN}, r"several chat templates \(rag, tool_use\) and none called default"),
    ],
)
def test_templates_that_can_not_be_used(speaking, template, refusal):
    for prompt_format in ("auto", "chat"):
        with pytest.raises(PMCError, match=refusal):
            Encoder(speaking(template), PMCConfig(prompt_format=prompt_format))
    assert Encoder(speaking(template), PMCConfig(prompt_format="tags")).warnings == []


def test_named_templates_with_a_default(speaking):
    named = {"default": PLAIN, "rag": "{{ 1 / 0 }}"}
    assert parts(Encoder(speaking(named), PMCConfig()), "Who?", "I.") == parts(
        Encoder(speaking(PLAIN), PMCConfig()), "Who?", "I."
    )


def test_a_tokenizer_that_ends_texts_is_refused(speaking):
    """add_eos_token: prompts would be sampled from after an end."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = speaking(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )
    assert encode_prompt(tokenizer, "Who?", prompt_format="tags")[-1] == tokenizer.eos_token_id
    with pytest.raises(PMCError, match="add_eos_token"):
        Encoder(tokenizer, PMCConfig())


def test_eos_of_the_generation_config_alone(tiny, tiny_dir, speaking, arguments, data, capsys):
    tokenizer = speaking(None, eos_token=None, pad_token="<|endoftext|>")
    with pytest.raises(PMCError, match="no eos token"):
        encode_pair(tokenizer, "Who?", "Ann.", prompt_format="tags")
    tiny.generation_config.eos_token_id = [2, 0]
    pmc = PMC(tiny, tokenizer, PMCConfig(), ["Who?"])
    (pair,) = pmc.encode_retain([{"question": "Is it?", "answer": "No."}])
    assert pair.input_ids[-1] == pair.labels[-1] == 2
    assert tokenizer.decode(pair.input_ids[:-1]) == "Question: Is it?\nAnswer: No."
    tiny.save_pretrained(data / "model")
    tokenizer.save_pretrained(data / "model")
    assert run([*replaced(arguments, model=data / "model"), "--dry-run"]) == 0


# --- lengths


LONG = "then they went on and on " * 20


def test_cut_answers_are_counted_in_the_report(arguments, data, capsys):
    with (data / "retain.jsonl").open("a") as file:
        file.write(json.dumps({"question": "Tell all", "answer": LONG}) + "\n")
    assert run(arguments) == 0
    said = "retain.jsonl: 1 of 7 answers are longer than max_length 40 leaves room for (row 7)"
    assert said in " ".join(capsys.readouterr().err.split())
    made = json.loads((data / "out" / "report.json").read_text())
    assert made["cut"] == {str(data / "retain.jsonl"): 1, "initial answers": 4}
    assert [text for text in made["warnings"] if "did not end before max_length 40" in text]
    assert any(said in text for text in made["warnings"])


def test_cut_answers_are_said_in_the_library(tiny, tokenizer):
    told = []
    pmc = PMC(tiny, tokenizer, PMCConfig(max_length=40, prompt_format="tags"), ["Who?", "Why?"])
    assert pmc.encode_retain([{"question": "Is it?", "answer": "No."}], warn=told.append)[0].cut == 0
    assert told == []
    kept = [{"question": "Is it?", "answer": "No."}, {"question": "Tell all", "answer": LONG}]
    assert pmc.encode_retain(kept, warn=told.append)[1].cut > 60
    assert "1 of 2 answers" in told[0]
    assert "(row 2)" in told[0]
    pmc.prepare()
    ended = [ids[-1] in pmc.encoder.stops for ids in pmc._initial_ids]
    assert pmc.cut_answers == [i for i, end in enumerate(ended, start=1) if not end]
    said = [text for text in pmc.warnings if "did not end before max_length 40" in text]
    assert len(said) == bool(pmc.cut_answers)
    with pytest.raises(PMCError, match="all rows: no token is trained"):
        pmc.encode_retain([{"question": LONG, "answer": "No."}])


def test_an_evaluation_says_which_truths_are_too_long(data, tiny_dir, capsys):
    row = {"question": "Tell all", "answer": LONG}
    (data / "forget.jsonl").write_text(json.dumps(row) + "\n")
    command = ["evaluate", "--model", str(tiny_dir), "--forget", str(data / "forget.jsonl"), "--device", "cpu",
               "--max-length", "40", "--prompt-format", "tags"]  # fmt: skip
    assert run(command) == 0
    assert "forget: 1 of 1 answers are longer than max_length 40" in " ".join(capsys.readouterr().err.split())


# --- positions and embeddings


@pytest.fixture(scope="module")
def gpt2(tokenizer, tmp_path_factory):
    """A GPT-2 with 32 positions."""
    directory = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=32, n_embd=8, n_layer=1, n_head=1, eos_token_id=2, bos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_lengths_over_a_table_of_positions_are_refused(gpt2, tokenizer, arguments, data, capsys):
    """Before: IndexError, index out of range in self."""
    refusal = "max_length is 40 but the model has 32 positions: lower --max-length to 32"
    assert run([*replaced(arguments, model=gpt2), "--dry-run"]) == 2
    assert refusal in capsys.readouterr().err
    assert run(["evaluate", "--model", str(gpt2), "--forget", str(data / "forget.jsonl"), "--max-length", "40"]) == 2
    assert refusal in capsys.readouterr().err
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    with pytest.raises(PMCError, match=refusal):
        PMC(model, tokenizer, PMCConfig(max_length=40), ["Who?"])
    pmc = PMC(model, tokenizer, PMCConfig(max_length=32, prompt_format="tags"), ["Who?"])
    pmc.prepare()


def test_lengths_over_rotary_positions_are_said(tiny, tokenizer, arguments, data, capsys):
    tiny.config.max_position_embeddings = 32
    tiny.save_pretrained(data / "model")
    tokenizer.save_pretrained(data / "model")
    said = "max_length is 40 but the model was trained for 32 positions"
    assert run([*replaced(arguments, model=data / "model"), "--dry-run"]) == 0
    assert said in " ".join(capsys.readouterr().err.split())
    pmc = PMC(tiny, tokenizer, PMCConfig(max_length=40, prompt_format="tags"), ["Who?"])
    assert said in pmc.warnings[0]


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused_before_work(arguments, tiny, tokenizer, data, capsys):
    tiny.resize_token_embeddings(100)
    tiny.save_pretrained(data / "model")
    tokenizer.save_pretrained(data / "model")
    assert run([*replaced(arguments, model=data / "model"), "--dry-run"]) == 2
    assert f"the tokenizer has {len(tokenizer)} tokens but the model embeds 100" in capsys.readouterr().err
    with pytest.raises(PMCError, match="token id"):
        PMC(tiny, tokenizer, PMCConfig(), ["Who?"])


# --- conversations


ASKED = ("user", "Who?"), ("assistant", "Ann."), ("user", "When?")


def test_a_conversation_that_the_template_refuses_is_named_by_row(speaking, tiny):
    own = Chat(map(Turn._make, (("system", "Be kind."), *ASKED)))
    for template, prompt in ((NO_SYSTEM, SYSTEM_PROMPT), (IGNORES_SYSTEM, SYSTEM_PROMPT), (IGNORES_SYSTEM, "")):
        encoder = Encoder(speaking(template), PMCConfig(system_prompt=prompt))
        with pytest.raises(
            PMCError, match="here, row 2: the chat template takes no system turn: put it into the user"
        ):
            encoder.check_lengths("here", [("Who?", "Ann."), (own, "In 1905.")])
        with pytest.raises(PMCError, match="retain_dataset, row 2: the chat template takes no system turn"):
            sequences_of([Row("Is it?", "No."), Row(own, "In 1905.")], encoder)
        parts(encoder, Chat(own[1:]), "In 1905.")
    once = (
        "{% if messages | length > 3 %}{{ raise_exception('one turn: ' + messages[1].content) }}{% endif %}" + PLAIN
    )
    with pytest.raises(PMCError, match=r"^question 1: the chat template fails \(TemplateError\)$"):
        PMC(tiny, speaking(once), PMCConfig(), ["Why?", own])


@pytest.mark.parametrize("template", [PLAIN, *REASONING.values()])
def test_earlier_turns_are_part_of_the_prompt(speaking, template):
    encoder = Encoder(speaking(template), PMCConfig())
    prompt, trained = parts(encoder, Chat(map(Turn._make, ASKED)), "In 1905.")
    assert "Ann." in prompt
    assert "Ann." not in trained
    assert "In 1905.<|im_end|>" in trained
