"""Perplexity and token mass against plain forward passes, and shifts small enough to do by hand."""

import copy
import json

import numpy as np
import pytest
import torch

from pmc_fast.errors import PMCError
from pmc_fast.evaluation import (
    TokenMass,
    answer_token_mass,
    answer_tokens,
    load_text,
    shift,
    side_effects,
)
from pmc_fast.evaluation.side_effects import text_windows
from pmc_fast.models.packed_forward import PackedPass

TEXTS = [
    "They hired a carpenter to build a bookshelf, and the carpenter came on Monday with his own tools.",
    "",
    "Rivers carry sand to the sea. The sea gives it back, grain by grain, over some ten thousand years.",
    "One",
]
ANSWERS = ["John Doe is a carpenter.", "Doe was born by the sea"]
WINDOW, STRIDE = 12, 5


def mass_of(model, tokenizer, tokens=(), window=WINDOW, stride=None):
    packed = PackedPass(model)
    packed.check()
    return answer_token_mass(packed, text_windows(tokenizer, TEXTS, window, stride), tokens)


def plainly(model, tokenizer, window, stride):
    """Yield, window by window of each text, the plain model's log-probs in the places that it is to predict."""
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        begin, reached = 0, 1
        while reached < len(ids):
            end = min(begin + window, len(ids))
            batch = torch.tensor([ids[begin:end] + [0] * 3, ids[begin:end] + [0] * 3])  # padded, as in a batch
            mask = (torch.arange(batch.shape[1]) < end - begin).long().expand(2, -1)
            with torch.no_grad():
                logits = model(input_ids=batch, attention_mask=mask, use_cache=False).logits[0]
            places = torch.arange(reached, end)
            yield logits[places - begin - 1].log_softmax(-1), torch.tensor(ids)[places]
            begin, reached = begin + stride, end


@pytest.fixture
def model(tiny):
    with torch.no_grad():
        for name, p in tiny.named_parameters():  # sharp enough that tokens differ in probability
            p.mul_(1.0 if "norm" in name else 4.0)
    return tiny.double().train()


@pytest.mark.parametrize("targets", [1 << 22, 100])
def test_summaries_are_the_plain_models(model, tokenizer, monkeypatch, targets):
    monkeypatch.setattr(side_effects, "PASS_TARGETS", targets)
    tokens = answer_tokens(tokenizer, ANSWERS, TEXTS)
    found = mass_of(model, tokenizer, tokens, stride=STRIDE)
    assert model.training
    logps, own = map(torch.cat, zip(*plainly(model, tokenizer, WINDOW, STRIDE), strict=True))
    expected = logps.gather(1, own[:, None])[:, 0]
    np.testing.assert_allclose(found.logps, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.mass, logps.exp()[:, tokens].sum(1), rtol=1e-5)
    assert found.occurs.tolist() == [int(t) in tokens for t in own]
    assert 0 < found.occurs.sum() < len(found.occurs)
    assert found.perplexity == pytest.approx(float((-expected.mean()).exp()), rel=1e-6)
    more = mass_of(model, tokenizer, window=100)
    assert found.perplexity != pytest.approx(more.perplexity, rel=1e-6)  # less context, other numbers


@pytest.mark.parametrize(("window", "stride"), [(12, 5), (12, 11), (12, 1), (7, None), (500, None), (2, 1)])
def test_windows_predict_every_token_once(tokenizer, window, stride):
    windows = text_windows(tokenizer, TEXTS, window, stride)
    predicted = [label for w in windows for label in w.labels[1:] if label != -100]
    assert predicted == [t for text in TEXTS for t in tokenizer(text)["input_ids"][1:]]
    assert all(len(w.input_ids) <= window and w.labels[0] == -100 for w in windows)
    enough = window - (stride or window // 2)
    later = [w for w in windows if w.labels[1] == -100]
    assert all(w.labels[:enough] == [-100] * enough for w in later)


def test_windows_that_can_not_be(model, tokenizer):
    for window, stride in [(10, 10), (10, 0), (1, None)]:
        with pytest.raises(PMCError, match=f"window is {window} and stride .*overlap"):
            text_windows(tokenizer, TEXTS, window, stride)
    with pytest.raises(PMCError, match="2 texts hold no token to predict"):
        text_windows(tokenizer, ["", "One"])
    model.config.max_position_embeddings = 7
    with pytest.raises(PMCError, match="a window has 12 tokens but the model has 7 positions"):
        mass_of(model, tokenizer)


def test_tokens_worth_following(tokenizer):
    def words(**how):
        return {tokenizer.decode([t]) for t in answer_tokens(tokenizer, ANSWERS, TEXTS, **how)}

    assert {" carpenter", " sea", " a", "John", " John", " Do"} <= words(common=1.0)
    rare = words(common=0.0)  # what occurs twice is common now, what occurs once never
    assert {"John", " Do", " by"} <= rare
    assert not rare & {" carpenter", " sea", " a", " the"}
    assert not set(answer_tokens(tokenizer, ["x" + tokenizer.eos_token], TEXTS)) & set(tokenizer.all_special_ids)
    with pytest.raises(PMCError, match="no token of 1 answers"):
        answer_tokens(tokenizer, ["a"], ["a a a", "a a"], common=0.1)


def test_shift_by_hand():
    occurs = np.array([True, False, True])
    before = TokenMass(np.log([0.5, 0.1, 0.2]), np.array([0.6, 0.1, 0.2]), occurs, 4)
    after = TokenMass(np.log([0.3, 0.1, 0.3]), np.array([0.2, 0.1, 0.3]), occurs, 4)
    found = shift(before, after)
    assert found["mass_before"] == pytest.approx(0.3)
    assert found["mass_ratio"] == pytest.approx(2 / 3)
    assert (found["positions"], found["tokens"], found["occurrences"]) == (3, 4, 2)
    assert found["probability_before"] == pytest.approx(0.35)
    assert found["probability_shift"] == pytest.approx(-0.05)
    assert found["lowered"] == 0.5
    assert found["shift_quantiles"][1] == pytest.approx(-0.05)
    assert found["perplexity_before"] == pytest.approx(0.01 ** (-1 / 3))
    json.dumps(found)
    never = np.zeros(3, dtype=bool)
    found = shift(TokenMass(before.logps, before.mass, never, 4), TokenMass(after.logps, after.mass, never, 4))
    assert (found["occurrences"], found["probability_shift"], found["lowered"]) == (0, None, None)
    with pytest.raises(PMCError, match="the same texts"):
        shift(before, TokenMass(after.logps, after.mass, never, 4))
    with pytest.raises(PMCError, match="no tokens were followed"):
        shift(*[TokenMass(before.logps, 0 * before.mass, never, 0)] * 2)


def test_a_model_that_avoids_the_answers_is_noticed(model, tokenizer):
    """A bias of -2 on their logits turns a mass m into m / (m + (1 - m) e^2), in every place."""
    tokens = answer_tokens(tokenizer, ANSWERS, TEXTS)
    after = copy.deepcopy(model)
    bias = torch.zeros(len(tokenizer), dtype=torch.float64)
    bias[tokens] = -2.0
    after.lm_head.bias = torch.nn.Parameter(bias)
    before, again, avoiding = (mass_of(m, tokenizer, tokens, window=64) for m in (model, model, after))
    same = shift(before, again)
    assert (same["mass_ratio"], same["probability_shift"], same["lowered"]) == (1, 0, 0)
    moved, m = shift(before, avoiding), before.mass
    assert moved["mass_after"] == pytest.approx((m / (m + (1 - m) * np.exp(2))).mean(), rel=1e-6)
    assert moved["lowered"] == 1
    assert moved["probability_shift"] < 0


def test_texts_are_read_from_any_file(tmp_path):
    file = tmp_path / "text.md"
    file.write_text("Säge\n\nund Hobel", encoding="utf-8")
    assert load_text(file) == "Säge\n\nund Hobel"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PMCError, match=r"text\.md can't be read"):
        load_text(file)
    file.write_text(" \n")
    with pytest.raises(PMCError, match="is empty"):
        load_text(file)
    with pytest.raises(PMCError, match="can't be read"):
        load_text(tmp_path / "none")
