"""rouge_l_recall against the rouge_score package: 16 questions x 20 candidates of 40 words."""

import numpy as np
import pytest

from examples.demo_model import TOFU
from pmc_fast.data import load_rows
from pmc_fast.pmc import reward
from pmc_fast.reference import rouge_score_recall
from pmc_fast.utils import words

WORDS = 40


@pytest.fixture(scope="module")
def texts():
    """Texts of TOFU's own words, in the proportions in which it uses them."""
    rows = load_rows(TOFU / "forget20.jsonl") + load_rows(TOFU / "retain60.jsonl")
    known = np.array(" ".join(f"{r.question} {r.answer}" for r in rows).split())
    rng = np.random.default_rng(0)
    draw = lambda: " ".join(rng.choice(known, WORDS))  # noqa: E731
    return [draw() for _ in range(16)], [[draw() for _ in range(20)] for _ in range(16)]


def forget_texts():
    words.rouge_units.cache_clear()


def test_reward(contest, texts):
    """Warm: words were seen before, texts are new in every round, as in training."""

    def warm():
        forget_texts()
        return reward.rouge_l_recall(*texts)

    def cold():
        forget_texts()
        words._stem.cache_clear()
        return reward.rouge_l_recall(*texts)

    np.testing.assert_array_equal(warm(), rouge_score_recall(*texts))
    contest(
        "320 candidates x 40 words",
        {"rouge_score": lambda: rouge_score_recall(*texts), "pmc_fast, new words": cold, "pmc_fast": warm},
        rounds=15,
    )
