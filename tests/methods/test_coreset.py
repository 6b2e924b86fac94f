"""UPCORE: hidden states against transformers' own, the outliers that are planted, and what is refused."""

import sys

import pytest
import torch
from sklearn.ensemble import IsolationForest

from pmc_fast.config import PMCConfig
from pmc_fast.data import Row
from pmc_fast.errors import PMCError
from pmc_fast.methods import upcore
from pmc_fast.methods.coreset import last_states

CONFIG = PMCConfig(prompt_format="tags")
ALIKE = [Row(f"What is the capital of country {i}?", None) for i in range(18)]
ODD = [Row("zzz 9 9 9 !!!! Привет", None), Row("def f(x): return x ** 2", None)]


def test_states_are_those_at_the_end_of_the_prompt(tiny, tokenizer):
    rows = ALIKE[:3]
    states = last_states(tiny.train(), tokenizer, CONFIG, rows)
    assert tiny.training
    with torch.no_grad():
        for row, state in zip(rows, states, strict=True):
            ids = tokenizer(f"Question: {row.question}\n", return_tensors="pt", add_special_tokens=False).input_ids
            hidden = tiny.eval()(ids, output_hidden_states=True).hidden_states
            torch.testing.assert_close(state, hidden[-2][0, -1])


def test_outliers_are_left_out(tiny, tokenizer):
    rows = [*ALIKE[:9], ODD[0], *ALIKE[9:], ODD[1]]
    kept = upcore(tiny, tokenizer, CONFIG, rows, pruned=0.1)
    forest, states = IsolationForest(contamination=0.1, random_state=42), last_states(tiny, tokenizer, CONFIG, rows)
    inside = forest.fit_predict(states.numpy()) > 0
    assert kept == [i for i in range(20) if inside[i]]
    assert len(kept) == 18
    assert kept == [i for i in range(20) if i not in (9, 19)]
    scores = IsolationForest(random_state=42).fit(states.numpy()).score_samples(states.numpy())
    assert upcore(tiny, tokenizer, CONFIG, rows, pruned=0.999) == [int(scores.argmax())]  # one is always kept


def test_bad_input_is_refused(tiny, tokenizer):
    with pytest.raises(PMCError, match=r"pruned is 1\.0: it must be above 0 and below 1"):
        upcore(tiny, tokenizer, CONFIG, ALIKE, pruned=1.0)
    with pytest.raises(PMCError, match="forget has 1 questions: outliers need at least 2"):
        upcore(tiny, tokenizer, CONFIG, ALIKE[:1])
    with torch.no_grad():
        tiny.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(PMCError, match="forget, row 1: its hidden state is not finite"):
        upcore(tiny, tokenizer, CONFIG, ALIKE)


def test_without_scikit_learn_the_extra_is_named(tiny, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(PMCError, match=r"upcore needs scikit-learn: pip install 'pmc_fast\[filters\]'"):
        upcore(tiny, tokenizer, CONFIG, ALIKE)
