"""rouge_l_recall against rouge_score itself and against the published code's scores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmc_fast.errors import PMCError
from pmc_fast.pmc.reward import rouge_l_recall
from pmc_fast.pmc.selection import argmin
from pmc_fast.reference import rouge_score_recall
from pmc_fast.utils import words

# Kelvin sign and dotted I lower-case to ASCII letters; the rest are digits and letters that are not
# ASCII, underscores, marks and separators of every width
ODD = "KİıſßÉ٣¼Ⅷ_'\"-.\t\n\r\x0b\u00a0\u2028\u200b\U0001f600\ud800"
WORDS = [
    "the",
    "author",
    "authors",
    "authored",
    "writing",
    "writes",
    "skies",
    "dying",
    "news",
    "1991",
    "a_b",
    "Ⅷ",
]
texts = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="abAB019_ .'" + ODD, max_size=80),
    st.lists(st.sampled_from(WORDS), max_size=120).map(" ".join),
)


def same(a, b):
    assert a.dtype == b.dtype == np.float64
    np.testing.assert_array_equal(a, b)


def test_golden_scores_and_picks(golden):
    cases = golden("reward_cases")
    for case in cases:
        scores = rouge_l_recall([case["initial"]], [case["candidates"]], case["min_len"])
        same(scores[0], np.array(case["scores"]))
        pick = argmin(scores)[0]
        assert pick == case["pick"]
        assert case["candidates"][pick] == case["picked"]
        assert scores[0, pick] == case["picked_score"]
    assert len(cases) == 87


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(texts, st.lists(texts, min_size=3, max_size=3)), max_size=4), st.integers(0, 6))
def test_equals_rouge_score_bit_for_bit(rows, min_len):
    initial, candidates = [r[0] for r in rows], [r[1] for r in rows]
    ours = rouge_l_recall(initial, candidates, min_len)
    if rows:
        same(ours, rouge_score_recall(initial, candidates, min_len))
    else:
        assert ours.shape == (0, 0)


@pytest.mark.parametrize("words", [1, 63, 64, 65, 127, 128, 129, 600])
def test_lengths_around_machine_words(words):
    rng = np.random.default_rng(words)
    draw = lambda n: " ".join(f"w{i}" for i in rng.integers(0, max(2, words // 3), n))  # noqa: E731
    initial = [draw(words) for _ in range(3)]
    candidates = [[draw(words), draw(words // 2 + 1), text, ""] for text in initial]
    ours = rouge_l_recall(initial, candidates)
    same(ours, rouge_score_recall(initial, candidates))
    assert (ours[:, 2] == 1).all()
    assert (ours[:, 3] == 0).all()


def test_first_of_equal_scores_is_picked():
    assert argmin(np.array([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])).tolist() == [1, 0]


def test_caches_are_bounded():
    assert words._stem.cache_info().maxsize is not None
    assert words.rouge_units.cache_info().maxsize is not None


def test_ragged_candidates_are_refused():
    with pytest.raises(PMCError, match="1 and 2 candidates"):
        rouge_l_recall(["a", "b"], [["a"], ["a", "b"]])
    with pytest.raises(PMCError, match="2 initial answers but 1"):
        rouge_l_recall(["a", "b"], [["a"]])
