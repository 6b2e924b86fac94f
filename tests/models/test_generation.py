"""A model's generation_config: answers are what `generate` says, or a warning names what is not followed."""

import warnings

import numpy as np
import pytest
import torch

from pmc_fast import PMC, PMCConfig
from pmc_fast.errors import PMCError
from pmc_fast.evaluation import greedy_answers
from pmc_fast.reference import Reference
from pmc_fast.rollout import RolloutEngine
from tests.families import FAMILIES, HOW, PROMPTS, SIZES, build

GREEDY = {"num_samples": 1, "temperature": 0, "stop_ids": [1, 2], "as_generate": True}
VOCAB = SIZES["vocab_size"]
SETTINGS = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "rewarded repetition": {"repetition_penalty": 0.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[t] for t in range(3, 30)] + [[40, 41], [33, 8, 2]]},
    "sequence_bias": {"sequence_bias": [[[t], 4.0] for t in range(3, 12)]},
    "min_length": {"min_length": 18, "suppress_tokens": list(range(30, VOCAB))},
    "min_new_tokens": {"min_new_tokens": 9, "suppress_tokens": list(range(6, VOCAB))},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "forced_bos_token_id": {"forced_bos_token_id": 7, "begin_suppress_tokens": list(range(20, 50))},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.6)},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(2, 55))},
    "several": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 3,
        "suppress_tokens": [5, 17],
    },
}


@pytest.fixture(scope="module")
def llama():
    return build(FAMILIES["llama"]())


@pytest.fixture
def model(llama):
    """Its generation_config is put back."""
    before = llama.generation_config
    llama.generation_config = type(before)()
    yield llama
    llama.generation_config = before


def generated(model, prompt, **how):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=[1, 2], pad_token_id=0, **how)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("length", [{"max_length": 24}, {"max_new_tokens": 12}], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_answers_are_generates(model, name, length):
    engine = RolloutEngine(model)
    plain = engine(PROMPTS, **GREEDY, **length).tokens
    model.generation_config.update(**SETTINGS[name])
    expected = [[generated(model, p, do_sample=False, **length)] for p in PROMPTS]
    assert expected != plain  # the setting says something here
    ours = engine(PROMPTS, **GREEDY, **length, drafts=list(expected))
    assert ours.tokens == expected
    assert engine(PROMPTS, **GREEDY | {"as_generate": False}, **length).tokens == plain


def test_each_prompt_may_have_a_length_of_its_own(model):
    """An end is forced where each one's answer is to end."""
    model.generation_config.update(forced_eos_token_id=2)
    lengths = [3 + 2 * (len(PROMPTS) - i) for i in range(len(PROMPTS))]
    expected = [
        [generated(model, p, do_sample=False, max_new_tokens=n)] for p, n in zip(PROMPTS, lengths, strict=True)
    ]
    assert sum(len(own) == n for [own], n in zip(expected, lengths, strict=True)) > 1
    assert RolloutEngine(model)(PROMPTS, **GREEDY, max_new_tokens=lengths).tokens == expected


@pytest.mark.parametrize(
    "change",
    [{"trie": False}, {"ngram_drafts": False}, {"max_rows": 3}, {"pool_tokens": 60}, {"pads": True}],
    ids=str,
)
def test_samples_do_not_depend_on_how_they_are_computed(model, change):
    change = dict(change)
    engine = RolloutEngine(model, pad_steps=change.pop("pads", False))
    plain = engine(PROMPTS, **HOW)
    model.generation_config.update(**SETTINGS["several"])
    first = engine(PROMPTS, **HOW, as_generate=True)
    assert first.tokens != plain.tokens
    assert engine(PROMPTS, **HOW, as_generate=True, **change).tokens == first.tokens
    for prompt, samples, of in zip(PROMPTS, first.tokens, first.logps, strict=True):
        for tokens, logps in zip(samples, of, strict=True):  # raw: the model's own
            with torch.no_grad():
                all_ = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
            own = all_[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]
            np.testing.assert_allclose(logps, own.numpy(), atol=1e-5)


def test_samples_have_generates_distribution(model):
    """First tokens: chi-square against softmax of what transformers' own processor makes of the logits."""
    model.generation_config.update(repetition_penalty=1.8)
    prompt, count = PROMPTS[2], 4000
    how = {"num_samples": count, "temperature": 1.0, "top_k": 0, "max_new_tokens": 1, "as_generate": True}
    made = RolloutEngine(model)([prompt], **how)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    for t in set(prompt):
        logits[t] = logits[t] / 1.8 if logits[t] > 0 else logits[t] * 1.8
    expected = count * logits.softmax(-1).numpy()
    seen = np.bincount([tokens[0] for tokens in made.tokens[0]], minlength=VOCAB)
    often = expected >= 5
    seen, expected = (np.append(x[often], x[~often].sum()) for x in (seen, expected))
    assert ((seen - expected) ** 2 / np.maximum(expected, 1e-9)).sum() < 2.5 * len(expected) + 20


def test_initial_answers_and_evaluation_are_the_references(tiny, tokenizer):
    questions = ["Who wrote it?", "Why?"]
    config = PMCConfig(prompt_format="tags", max_length=40, num_samples=3)
    plain = PMC(tiny, tokenizer, config, questions).prepare()
    tiny.generation_config.repetition_penalty = 1.4
    pmc, reference = PMC(tiny, tokenizer, config, questions), Reference(tiny, tokenizer, config, questions)
    assert pmc.prepare() == reference.prepare(batch_size=1) != plain
    assert greedy_answers(pmc.engine, pmc.encoder, questions) == reference.initial_answers
    asked = []
    pmc.engine = lambda prompts, engine=pmc.engine, **how: [asked.append(how["as_generate"]), engine(prompts, **how)][
        1
    ]
    pmc.sample([0, 1])
    assert asked == [True]


@pytest.mark.parametrize(
    ("setting", "temperature"), [({"num_beams": 4}, 0), ({"guidance_scale": 1.5}, 0), ({"stop_strings": ["a"]}, 0),
                                 ({"min_p": 0.1}, 1.0), ({"typical_p": 0.5}, 1.0)], ids=str,
)  # fmt: skip
def test_what_is_not_followed_is_named_once(model, setting, temperature):
    engine = RolloutEngine(model)
    how = GREEDY | {"max_new_tokens": 2, "temperature": temperature}
    [[name, value]] = setting.items()
    setattr(model.generation_config, name, value)
    with pytest.warns(UserWarning, match=f"generation_config has {name} .* do not follow"):
        engine(PROMPTS, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine(PROMPTS, **how)
        if temperature:
            RolloutEngine(model)(PROMPTS, **how | {"temperature": 0})  # greedy answers know no such setting
        model.generation_config = type(model.generation_config)(
            do_sample=True, temperature=0.6, top_p=0.9, num_beams=1
        )
        RolloutEngine(model)(PROMPTS, **how)


@pytest.mark.parametrize(
    "how", [GREEDY | {"max_new_tokens": 8}, HOW, HOW | {"trie": False}], ids=["greedy", "", "flat"]
)
def test_a_logit_bias_is_generates_sequence_bias(model, how):
    biases = [{}, {3: 4.0, 7: -3.5}, dict.fromkeys(range(0, VOCAB, 2), -50.0)][: len(PROMPTS)]
    biases += [{}] * (len(PROMPTS) - len(biases))
    engine = RolloutEngine(model)
    plain = engine(PROMPTS, **how)
    ours = engine(PROMPTS, **how, logit_bias=biases)
    for q, (prompt, bias) in enumerate(zip(PROMPTS, biases, strict=True)):
        model.generation_config.sequence_bias = [[[t], x] for t, x in bias.items()] or None
        [theirs] = engine([prompt], **how | {"as_generate": True}).tokens
        assert ours.tokens[q] == theirs
    assert ours.tokens[0] == plain.tokens[0]
    assert ours.tokens != plain.tokens
    for prompt, samples, of in zip(PROMPTS, ours.tokens, ours.logps, strict=True):
        for tokens, logps in zip(samples, of, strict=True):  # the model's own
            with torch.no_grad():
                all_ = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
            own = all_[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]
            np.testing.assert_allclose(logps, own.numpy(), atol=1e-5)


def test_a_wrong_logit_bias_is_refused(model):
    engine, how = RolloutEngine(model), GREEDY | {"max_new_tokens": 2}
    for bias, words in (
        ([{}], f"logit_bias for 1 of {len(PROMPTS)} prompts"),
        ([{VOCAB: 1.0}] * len(PROMPTS), f"has token {VOCAB}: the model predicts {VOCAB}"),
        ([{1: float("inf")}] * len(PROMPTS), "has inf: it must be finite"),
    ):
        with pytest.raises(PMCError, match=words):
            engine(PROMPTS, **how, logit_bias=bias)
