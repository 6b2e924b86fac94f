"""Leakage on cases small enough to do by hand, and prompts that force an answer's beginning, token by token."""

import itertools
import json
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmc_fast.config import EvaluateConfig, PMCConfig
from pmc_fast.data import Encoder, Row, load_rows
from pmc_fast.errors import PMCError
from pmc_fast.evaluation import (
    EvalSet,
    bootstrap_interval,
    known_forgotten,
    leak_at_k,
    leakage,
    sampling_attack,
    summarize,
    worst_of_k,
)
from pmc_fast.rollout import RolloutEngine, Rollouts

ROWS = [Row("Who?", "Ann Lee wrote red books"), Row("Where?", "in Rome")]
SETS = [EvalSet("forget", "forget", ROWS)]
PREFILL = "The answer is: "


class Script:
    """An engine that says what it is told to, and keeps what it was asked."""

    def __init__(self, tokenizer, *answers):
        self.tokenizer, self.answers, self.asked = tokenizer, answers, []

    def __call__(self, prompts, **how):
        self.asked.append((prompts, how))
        tokens = [[self.tokenizer(text)["input_ids"] for text in self.answers[q]] for q in range(len(prompts))]
        counters = {"rows": 4, "sampled_tokens": 16, "prefill_tokens": 9, "steps": 3, "graph_replays": 0}
        return Rollouts(tokens, [], [], [], counters)


def encoder_of(tokenizer, prompt_format="tags", **change):
    return Encoder(tokenizer, PMCConfig(prompt_format=prompt_format, **change))


@given(st.data())
def test_leak_at_k_is_the_exact_fraction(data):
    n = data.draw(st.integers(1, 300))
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    assert leak_at_k(n, c, k) == float(1 - Fraction(comb(n - c, k), comb(n, k)))


def test_leak_at_k_counts_choices():
    for n, c in [(5, 2), (6, 1), (4, 0), (4, 4)]:
        for k in range(1, n + 1):
            choices = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert leak_at_k(n, c, k) == sum(map(any, choices)) / len(choices)


def test_leak_at_k_of_ten_thousand_samples():
    assert leak_at_k(10_000, 1, 5_000) == 0.5
    assert leak_at_k(10_000, 1, 1) == 1e-4
    assert leak_at_k(10_000, 5_001, 5_000) == 1
    assert leak_at_k(10_000, 0, 10_000) == 0
    for n, c, k in [(5, 6, 1), (5, -1, 1), (5, 1, 0), (5, 1, 6)]:
        with pytest.raises(PMCError, match=f"{c} leaks and k {k} do not fit n {n}"):
            leak_at_k(n, c, k)


def test_worst_of_k_is_the_mean_over_all_choices():
    scores = np.random.default_rng(0).random((3, 6))
    for k in range(1, 7):
        expected = [np.mean([max(choice) for choice in itertools.combinations(row, k)]) for row in scores]
        np.testing.assert_allclose(worst_of_k(scores, k), expected, rtol=1e-13)
    leaks = np.array([[1.0] * 7 + [0.0] * 9_993])
    for k in (1, 100, 9_000, 10_000):
        np.testing.assert_allclose(worst_of_k(leaks, k), leak_at_k(10_000, 7, k), rtol=1e-10)
    with pytest.raises(PMCError, match="k is 7 but there are 6 samples"):
        worst_of_k(scores, 7)


def test_bootstrap_by_hand():
    """Means of two draws from 0 and 1 are 0, 1/2 and 1 with chances 1/4, 1/2 and 1/4."""
    values = np.array([0.0, 1.0])
    assert bootstrap_interval(values, level=0.4) == (0.5, 0.5)
    assert bootstrap_interval(values, level=0.95) == (0.0, 1.0)
    assert bootstrap_interval(np.array([0.3]), level=0.5) == (0.3, 0.3)
    assert bootstrap_interval(values, seed=1, resamples=5) != bootstrap_interval(values, seed=2, resamples=5)
    for bad in ({"values": np.zeros((2, 2))}, {"values": []}, {"level": 1.0}, {"resamples": 0}):
        with pytest.raises(PMCError, match="bootstrap_interval"):
            bootstrap_interval(**{"values": values} | bad)


def test_bootstrap_draws_one_resample_after_the_other():
    """Whatever it computes at once, its numbers are those of a loop over resamples."""
    values, rng = np.random.default_rng(1).random(7), np.random.default_rng(3)
    means = [np.mean(values[rng.integers(0, 7, 7)]) for _ in range(50)]
    expected = np.quantile(means, [0.1, 0.9])
    assert bootstrap_interval(values, level=0.8, resamples=50, seed=3) == pytest.approx(tuple(expected), rel=1e-14)


def test_bootstrap_covers_a_known_mean():
    """Of 300 intervals at 90 %, 270 are expected to hold it; three standard deviations are 16, small samples cost some."""
    rng = np.random.default_rng(0)
    inside = 0
    for i in range(300):
        low, high = bootstrap_interval(rng.normal(2.0, 1.0, 60), level=0.9, resamples=300, seed=i)
        inside += low <= 2.0 <= high
    assert 250 <= inside <= 290


@pytest.mark.parametrize("prompt_format", ["tags", "chat"])
@pytest.mark.parametrize(("prefill", "words"), [(PREFILL, 0), ("", 3), (PREFILL, 2), ("", 0)])
def test_forced_beginnings_are_the_tokenizers_own(tokenizer, prompt_format, prefill, words):
    """Prompt and draft together are the encoding of the whole text, cut where the forced words end."""
    encoder = encoder_of(tokenizer, prompt_format)
    rows = load_rows("examples/tofu/forget20.jsonl", answers=True)
    engine = Script(tokenizer, *[["x"]] * len(rows))
    sampling_attack(engine, encoder, rows, num_samples=1, prefill=prefill, first_words=words)
    [(prompts, how)] = engine.asked
    for row, prompt, [draft] in zip(rows, prompts, how["drafts"], strict=True):
        whole = encoder.pair(row.question, prefill + row.answer).input_ids
        whole = whole[: len(whole) - whole[::-1].index(tokenizer.eos_token_id)]  # chat ends with a line break
        assert prompt + draft == whole
        forced = prefill + " ".join(row.answer.split()[:words])
        text = tokenizer.decode(prompt)
        if forced:
            tag = "Answer: " if prompt_format == "tags" else "assistant\n"
            assert text.endswith(tag + forced.rstrip())
        else:
            assert prompt == encoder.prompt(row.question)


def test_accidents_keep_their_second_bos(tokenizer):
    plain, accidents = encoder_of(tokenizer, "chat"), encoder_of(tokenizer, "chat", accidents=True)
    question = ROWS[0].question
    begun = accidents.prompt(question, PREFILL)
    assert begun[: len(accidents.prompt(question))] == accidents.prompt(question)
    assert tokenizer.decode(begun).endswith("assistant\nThe answer is:")
    assert plain.prompt(question, PREFILL)[-4:] == begun[-4:]


def test_a_token_across_the_boundary_is_left_to_the_model():
    class Pairs:
        """Its tokens are pairs of characters."""

        max_length, stops = 20, [0]

        def prompt(self, question, start=""):
            text = question + start
            return [text[i : i + 2] for i in range(0, len(text), 2)]

        def answers(self, tokens, questions):
            return ["".join(t) for t in tokens]

    def engine(prompts, *, drafts, **how):
        asked.append((prompts, drafts))
        return Rollouts([[["c ", "de"]]], [], [], [], {})

    asked = []
    result = sampling_attack(engine, Pairs(), [Row("qq", "abc de")], num_samples=1, first_words=1)
    assert asked == [([["qq", "ab"]], [[["c ", "de", 0]]])]
    assert result.scores.tolist() == [[1.0]]


def test_attack_by_hand(tokenizer):
    said = [["Ann Lee", "Answer: Ann Lee wrote red books", "no", ""], ["Rome", "Paris", "in Rome it is", "Oslo"]]
    engine = Script(tokenizer, *said)
    result = sampling_attack(engine, encoder_of(tokenizer), ROWS, num_samples=4, threshold=0.4, seed=7, top_k=5)
    assert result.scores.tolist() == [[0.4, 1, 0, 0], [0.5, 0, 1, 0]]
    assert (result.worst.tolist(), result.leaking.tolist()) == ([1, 1], [2, 2])
    assert result.mean.tolist() == [0.35, 0.375]
    how = engine.asked[0][1]
    assert {n: how[n] for n in ("num_samples", "temperature", "top_p", "top_k", "seed", "max_length")} == {
        "num_samples": 4, "temperature": 1.0, "top_p": 1.0, "top_k": 5, "seed": 7, "max_length": 200,
    }  # fmt: skip


def test_given_words_do_not_count_as_leaked(tokenizer):
    """Of "Ann Lee wrote red books" two words are given: the model repeats them, or says one of the other three."""
    engine = Script(tokenizer, ["Ann Lee", "Ann Lee wrote"])
    rows = [
        Row("Who?", "Ann Lee wrote red books"),
        Row("Where?", "in Rome"),
        Row("Which?", "No. 7 !"),
        Row("?", "書"),
    ]
    result = sampling_attack(engine, encoder_of(tokenizer), rows, num_samples=2, first_words=2)
    assert result.scores.tolist() == [[0, pytest.approx(1 / 3)]]
    assert (result.rows, result.left_out) == ([0], 3)


def test_nothing_left_to_find(tokenizer):
    result = sampling_attack(Script(tokenizer), encoder_of(tokenizer), ROWS, num_samples=2, first_words=9)
    assert result.scores.shape == (0, 2)
    assert summarize(result) == {"questions": 0, "left_out": 2, "samples": 2, "criterion": "rouge_l_recall >= 0.5"}


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        ([], {}, "there are no rows"),
        ([ROWS[0], Row("When?")], {}, "row 2 has no answer"),
        (ROWS, {"prefill": "word " * 200}, r"row 1 and what its answer must begin with take \d+ tokens.*200"),
        (ROWS, {"first_words": -1}, "first_words is -1"),
    ],
)
def test_bad_attacks(tokenizer, rows, change, message):
    with pytest.raises(PMCError, match=message):
        sampling_attack(Script(tokenizer), encoder_of(tokenizer), rows, **change)


def test_leakage_sums_up_every_attack(tokenizer):
    engine = Script(tokenizer, ["Ann Lee wrote red books", "no", "", "red books"], ["Rome", "Oslo", "Oslo", "Oslo"])
    settings = EvaluateConfig(attack_samples=4, attack_first_words=1)
    told = []
    sets = [*SETS, EvalSet("forget_paraphrased", "forget", ROWS[:1]), EvalSet("retain", "keep", ROWS)]
    result = leakage(engine, encoder_of(tokenizer), sets, settings, on_attack=lambda *a: told.append(a))
    assert told == [(s, a) for s in ("forget", "forget_paraphrased") for a in ("sampling", "prefill", "first_words")]
    text = json.dumps(result)
    assert "Ann" not in text
    assert "Rome" not in text
    sampling = result["sets"]["forget"]["sampling"]
    assert sampling["worst"]["value"] == 0.75
    assert sampling["leaking_questions"] == 1
    assert sampling["leak_at_k"]["1"]["value"] == 0.25  # 1 of 4 samples, twice: "red books" is 2 of 5 words
    assert sampling["leak_at_k"]["2"]["value"] == 0.5
    assert list(sampling["leak_at_k"]) == ["1", "2", "4"]
    assert sampling["worst_of_k"]["4"]["value"] == 0.75
    low, high = sampling["worst"]["interval"]
    assert 0.5 <= low <= 0.75 <= high <= 1
    assert sampling["degenerate"] == 7 / 8
    assert sampling["per_question"][1] == {"row": 1, "worst": 0.5, "mean": 0.125, "leaking": 1}
    assert (sampling["rows"], sampling["rows_per_sampled_token"]) == (4, 0.25)
    assert result["sets"]["forget_paraphrased"]["prefill"]["questions"] == 1
    shown = leakage(engine, encoder_of(tokenizer), SETS, settings, log_text=True)
    assert list(shown["sets"]) == ["forget"]
    assert shown["sets"]["forget"]["sampling"]["texts"][1] == {
        "question": "Where?", "truth": "in Rome", "worst": "Rome", "rouge_l_recall": 0.5,
    }  # fmt: skip
    only = EvaluateConfig(attack_samples=4, attack_prefill="", attack_first_words=0)
    assert list(leakage(engine, encoder_of(tokenizer), SETS, only)["sets"]["forget"]) == ["sampling"]
    with pytest.raises(PMCError, match="no set is called forget"):
        leakage(engine, encoder_of(tokenizer), [EvalSet("retain", "keep", ROWS)], settings)


def test_attack_on_a_model(tiny, tokenizer):
    """The truth as a draft changes no sample, in float64 exactly."""
    engine, encoder = RolloutEngine(tiny.double()), encoder_of(tokenizer, max_length=24)
    result = sampling_attack(engine, encoder, ROWS, num_samples=3, prefill=PREFILL, seed=4)
    prompts = [encoder.prompt(row.question, PREFILL) for row in ROWS]
    plain = engine(prompts, num_samples=3, temperature=1.0, top_k=0, seed=4, max_length=24, stop_ids=encoder.stops)
    assert result.samples == [encoder.answers(tokens) for tokens in plain.tokens]
    assert result.counters["sampled_tokens"] == plain.counters["sampled_tokens"]
    assert result.seconds > 0


def test_known_forgotten():
    scores = np.array([[0.0, 0.0], [0.0, 0.1], [np.nan, np.nan], [0.0, 0.0]])
    assert known_forgotten(scores) == [0, 3]
    assert known_forgotten(scores, 0.1) == [0, 1, 3]
    assert known_forgotten(np.zeros((0, 2))) == []
    with pytest.raises(PMCError, match="at least one sample"):
        known_forgotten(np.zeros((3, 0)))
