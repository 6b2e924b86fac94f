"""BestStore against the published code's traces and against a plain dictionary."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmc_fast.config import PMCConfig
from pmc_fast.errors import PMCError
from pmc_fast.pmc.reward import rouge_l_recall
from pmc_fast.pmc.selection import argmin
from pmc_fast.pmc.store import BestStore
from pmc_fast.reference import Reference


def test_golden_traces(golden):
    for trace in golden("store_traces"):
        store = BestStore(len(trace["initial"]))
        for visit in trace["visits"]:
            asked = store.pending(visit["batch"])
            assert asked == visit["asked"]
            if asked:
                initial = [trace["initial"][i] for i in asked]
                scores = rouge_l_recall(initial, visit["candidates"], trace["min_len"])
                for row, (i, pick) in enumerate(zip(asked, argmin(scores), strict=True)):
                    store.offer(i, visit["candidates"][row][pick], scores[row, pick])
            expected = visit["best"]
            for i in range(len(store)):
                if str(i) in expected:
                    assert store.answer(i) == expected[str(i)]["answer"]
                    assert store.score(i) == expected[str(i)]["score"]
                else:
                    assert store.visits(i) == 0


def test_reference_follows_golden_traces(golden, tiny, tokenizer):
    for trace in golden("store_traces"):
        config = PMCConfig(num_samples=trace["num_samples"], min_len=trace["min_len"], prompt_format="tags")
        reference = Reference(tiny, tokenizer, config, trace["questions"])
        reference.initial_answers = trace["initial"]
        for visit in trace["visits"]:
            drawn = iter([visit["candidates"]])
            reference.sample_answers = lambda questions, drawn=drawn: next(drawn)
            answers = reference.sample(visit["batch"])
            assert {str(i): e for i, e in reference.sampled_data.items()} == visit["best"]
            assert answers == [visit["best"][str(i)]["answer"] for i in visit["batch"]]


@given(st.lists(st.tuples(st.integers(0, 4), st.text(max_size=5), st.sampled_from([0.0, 0.25, 0.5, 1.0]))))
def test_behaves_as_a_dictionary(offers):
    store, plain, visits, uses = BestStore(5), {}, [0] * 5, [0] * 5
    for index, answer, score in offers:
        better = index not in plain or score <= plain[index][1]
        assert store.offer(index, answer, score) is better
        if better:
            plain[index] = (answer, score)
        visits[index] += 1
        for i in range(5):
            assert store.visits(i) == visits[i]
            if i in plain:
                assert (store.answer(i), store.score(i)) == plain[i]
        assert store.pending(range(5)) == [i for i in range(5) if i not in plain or plain[i][1] > 0]
        assert index not in store.due(range(5))
        assert store.use(index) == plain[index][0]
        uses[index] += 1
        assert all(store.uses(i) == uses[i] for i in plain)
        assert store.due(range(5)) == store.pending(range(5))
    store.offer(1, "a", 0.5)
    assert store.due([1, 2]) == store.pending([2])
    copy = BestStore(5)
    copy.load_state_dict(json.loads(json.dumps(store.state_dict())))
    assert copy.state_dict() == store.state_dict()


def test_refusals():
    store = BestStore(2)
    with pytest.raises(PMCError, match="num_questions is 0"):
        BestStore(0)
    with pytest.raises(KeyError, match="question 1 has no answer"):
        store.answer(1)
    with pytest.raises(IndexError, match="question -1"):
        store.pending([-1])
    with pytest.raises(KeyError, match="question 1 has no answer"):
        store.use(1)
    for score in (float("nan"), 1.5, -0.1):
        with pytest.raises(PMCError, match="within 0 and 1"):
            store.offer(0, "a", score)
    with pytest.raises(PMCError, match="store of 3 questions"):
        store.load_state_dict(BestStore(3).state_dict())
