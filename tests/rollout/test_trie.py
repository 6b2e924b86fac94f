"""The C++ that plans rollouts, against a model made of arithmetic."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmc_fast.ops import native

VOCAB = 6
STOP = 5


def drawn(prompt, stream, sample, answer, flat):
    """Draw the next token after an answer: most samples agree, some do not."""
    history = hashlib.sha256(repr((prompt, answer)).encode()).digest()
    own = hashlib.sha256(repr((prompt, stream, sample, answer)).encode()).digest()
    return (own[0] if own[1] % 100 < flat else history[0]) % VOCAB


def plain(prompt, stream, sample, max_new, flat):
    answer = []
    while len(answer) < max_new and STOP not in answer:
        answer.append(drawn(prompt, stream, sample, answer, flat))
    return answer


class Machine:
    """Carries out plans with a memory that remembers which history each slot was written for."""

    def __init__(self, trie, questions, flat):
        self.trie, self.questions, self.flat = trie, questions, flat
        self.memory: dict[int, tuple] = {}
        self.stream_of = {stream: prompt for prompt, stream in questions}
        self.rows, self.most = 0, (10**6, 10**6)

    def step(self, plan, ahead=None):
        """Carry out a plan, and with `ahead`, the arguments of plan_ahead, also what can be planned before its draws."""
        drawn = self.compute(plan)
        while ahead is not None and (plan := self.trie.plan_ahead(*ahead)) is not None:
            following = self.compute(plan, drawn[0])
            self.trie.advance(*drawn)
            drawn = following
        self.trie.advance(*drawn)

    def compute(self, plan, before=None):
        """Return the draws of a plan; of one that is planned ahead, those before are its tokens."""
        if before is None:
            assert len(plan["sources"]) == 0
            inputs = plan["tokens"]
        else:
            assert (plan["tokens"] == 0).all()
            inputs = before[plan["sources"]]
        rows = len(inputs)
        seen, histories = [], []
        for block in range(len(plan["cu_rows"]) - 1):
            prefix = plan["prefix"][plan["cu_prefix"][block] : plan["cu_prefix"][block + 1]]
            for r in range(plan["cu_rows"][block], plan["cu_rows"][block + 1]):
                suffix = plan["suffix"][plan["cu_suffix"][r] : plan["cu_suffix"][r + 1]]
                seen.append([*prefix[: plan["prefix_len"][r]].tolist(), *suffix.tolist()])
        assert len(seen) == rows == plan.rows <= self.most[0]
        assert max(self.trie.in_use, self.trie.span) <= self.most[1]
        assert len(set(plan["slots"].tolist())) == rows  # nobody writes where another writes
        # all write before any reads: a row's history is what the slots before its own hold
        order = np.argsort(plan["positions"], kind="stable")
        written = {}
        for r in order:
            assert plan["positions"][r] == len(seen[r]) - 1
            assert plan["slots"][r] == seen[r][-1]
            before = [written.get(s, self.memory.get(s)) for s in seen[r][:-1]]
            history = (*(h[-1] for h in before), int(inputs[r]))
            # each slot that the row sees was written for this row's own history
            assert all(h == history[: i + 1] for i, h in enumerate(before))
            written[int(plan["slots"][r])] = history
        self.memory |= written
        histories = [written[int(s)] for s in plan["slots"]]
        tokens = []
        for i, r in enumerate(plan["logit_rows"]):
            for d in range(plan["cu_draws"][i], plan["cu_draws"][i + 1]):
                stream, sample = int(plan["streams"][d]), int(plan["samples"][d])
                prompt = self.stream_of[stream]
                assert histories[r][: len(prompt)] == tuple(prompt)
                answer = list(histories[r][len(prompt) :])
                assert len(answer) == plan["draw_positions"][d]
                tokens.append(drawn(prompt, stream, sample, answer, self.flat))
        tokens = np.array(tokens, dtype=np.int64)
        self.rows += rows
        return tokens, -1.0 * tokens, np.full(len(plan["logit_rows"]), 0.5)


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_samples_are_those_of_plain_sampling(data):
    """Whatever the pool's size, the rows of a step, drafts and n-gram drafts: the same samples, and no leak."""
    integers = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    stem = [integers(0, VOCAB - 1) for _ in range(integers(0, 5))]
    questions = [
        (stem[: integers(0, 5)] + [integers(0, VOCAB - 1) for _ in range(integers(1, 6))] + [i], 100 + i)
        for i in range(integers(1, 4))
    ]
    samples, flat = integers(1, 7), integers(0, 100)
    max_new = [integers(0, 12) for _ in questions]
    drafts = [
        [[integers(0, VOCAB - 1) for _ in range(integers(0, 10))] for _ in range(integers(0, 2))] for _ in questions
    ]
    needed = max(len(p) + max(0, m - 1) for (p, _), m in zip(questions, max_new, strict=True))
    capacity = data.draw(st.one_of(st.integers(needed, needed + 6), st.just(10_000)))
    share = data.draw(st.booleans())
    trie = native.cpu().RolloutTrie(capacity=capacity, stops=[STOP], match=integers(0, 3), share_prompts=share)
    for (prompt, stream), longest, own in zip(questions, max_new, drafts, strict=True):
        trie.add(prompt, stream, list(range(samples)), longest, own)
    machine = Machine(trie, questions, flat)
    max_rows, ngram_rows = integers(1, 20), integers(0, 24)
    ahead = (max_rows, ngram_rows) if data.draw(st.booleans()) else None
    machine.most = max_rows, capacity
    while (plan := trie.plan(max_rows, ngram_rows)) is not None:
        machine.step(plan, ahead)
    assert trie.in_use == 0
    total = 0
    for q, ((prompt, stream), longest) in enumerate(zip(questions, max_new, strict=True)):
        for s, (tokens, logps, mass, stopped) in enumerate(trie.results(q)):
            expected = plain(prompt, stream, s, longest, flat)
            assert tokens == expected
            assert logps.tolist() == [-t for t in tokens]
            assert mass.tolist() == [0.5] * len(tokens)
            assert stopped == (STOP in expected)
            total += len(tokens)
    counters = trie.counters()
    assert counters["sampled_tokens"] == total
    assert ahead is not None or counters["ahead_steps"] == counters["ended_rows"] == 0
    assert counters["rows"] + counters["prefill_tokens"] == machine.rows


def run(trie, questions, flat, max_rows=100, ngram_rows=0, ahead=False):
    machine = Machine(trie, questions, flat)
    while (plan := trie.plan(max_rows, ngram_rows)) is not None:
        machine.step(plan, (max_rows, ngram_rows) if ahead else None)
    return trie.counters()


def test_samples_that_agree_are_one_row():
    question = ([1, 2, 3], 9)
    trie = native.cpu().RolloutTrie(capacity=10_000, stops=[], match=0)
    trie.add(*question, list(range(50)), 10, [])
    counters = run(trie, [question], flat=0)
    assert counters["sampled_tokens"] == 500
    assert counters["rows"] == 9  # the first token comes from the prompt's last row
    assert counters["peak_slots"] == 12


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("max_rows", [100, 3])
def test_prompts_that_begin_alike_are_computed_once(share, max_rows):
    prompts = [[1, 2, 3, 4, 0], [1, 2, 3, 4, 5], [1, 2, 0], [1, 2, 3, 4], [1, 2, 3, 4, 0]]
    questions = [(prompt, 50 + i) for i, prompt in enumerate(prompts)]
    trie = native.cpu().RolloutTrie(capacity=10_000, stops=[STOP], match=0, share_prompts=share)
    for question in questions:
        trie.add(*question, list(range(4)), 6, [])
    counters = run(trie, questions, flat=30, max_rows=max_rows)
    assert trie.in_use == 0
    if max_rows == 100:  # a prompt's last token is computed always: the last two share 3 of 4 and 4 of 5
        assert counters["prefill_tokens"] == (5 + 1 + 1 + 1 + 1 if share else 22)
    for q, question in enumerate(questions):
        assert [r[0] for r in trie.results(q)] == [plain(*question, s, 6, flat=30) for s in range(4)]


def test_prompts_at_other_positions_share_nothing():
    trie = native.cpu().RolloutTrie(capacity=100, stops=[], match=0)
    trie.add([1, 2, 3], 0, [0], 2, [], [0, 1, 2])
    trie.add([1, 2, 3], 1, [0], 2, [], [0, 2, 3])
    assert trie.plan(100, 0)["positions"].tolist() == [0, 1, 2, 2, 3]  # the first token is the same


def test_a_draft_that_comes_true_saves_its_steps():
    question = ([1, 2, 3], 9)
    answer = plain(*question, 0, 12, flat=0)
    trie = native.cpu().RolloutTrie(capacity=10_000, stops=[STOP], match=0)
    trie.add(*question, list(range(5)), 12, [answer])
    counters = run(trie, [question], flat=0)
    assert counters["steps"] == 1
    assert counters["draft_hits"] == counters["draft_rows"] == len(answer) - 1


@pytest.mark.parametrize(("ngram_rows", "steps"), [(0, 40), (12, 12)])
def test_a_sample_that_repeats_itself_or_its_prompt_saves_steps(ngram_rows, steps):
    said = [7, 8, 9, 7, 8, 9] * 6 + [1, 2, 3, 4]
    trie = native.cpu().RolloutTrie(capacity=100, stops=[], match=4)
    trie.add([1, 2, 3, 4], 0, [0], 40, [])
    while (plan := trie.plan(100, ngram_rows)) is not None:
        tokens = np.array([said[i] for i in plan["draw_positions"]])
        trie.advance(tokens, -1.0 * tokens, np.ones(len(plan["logit_rows"])))
    assert trie.results(0)[0][0] == said
    assert trie.counters()["steps"] <= steps
    assert trie.in_use == 0


def chains(ahead, capacity=10_000, max_rows=100):
    """What a rollout of 3 questions with 4 samples counts, all of whose draws differ but for chance."""
    questions = [([i, 1, 2], 50 + i) for i in range(3)]
    trie = native.cpu().RolloutTrie(capacity=capacity, stops=[STOP], match=0)
    for question in questions:
        trie.add(*question, list(range(4)), 30, [])
    return run(trie, questions, 100, max_rows, ahead=ahead)


def test_steps_run_ahead_where_no_draw_decides_what_they_are():
    waiting, ahead = chains(False), chains(True)
    assert ahead["sampled_tokens"] == waiting["sampled_tokens"]
    # all but the prompts, the steps in which samples still agree, and those after a sample's last one
    assert ahead["ahead_steps"] > 0.6 * ahead["steps"]
    # a row that a stop token ends is computed once more, and no other
    assert 0 < ahead["ended_rows"] <= 12
    assert ahead["rows"] == waiting["rows"] + ahead["ended_rows"]
    assert ahead["steps"] <= waiting["steps"] + 1
    assert chains(True, max_rows=2)["ahead_steps"] < ahead["ahead_steps"]  # rows that wait
    full = chains(True, capacity=40)
    assert full["preemptions"] > 0
    assert full["peak_slots"] <= 40


def test_a_step_is_not_planned_ahead_of_draws_that_decide():
    def planned(samples, max_new=5, match=0, ngram_rows=0, drafts=(), **how):
        trie = native.cpu().RolloutTrie(**{"capacity": 100, "stops": [STOP], "match": match} | how)
        trie.add([1, 2, 3], 7, list(range(samples)), max_new, list(drafts))
        trie.plan(100, ngram_rows)
        return trie.plan_ahead(100, ngram_rows)

    assert planned(1)["sources"].tolist() == [0]
    assert planned(1)["slots"].tolist() == [3]
    assert planned(2) is None  # two samples may draw two tokens
    assert planned(1, max_new=1) is None  # the sample is over
    assert planned(1, drafts=[[4, 4]]) is None  # a draft may be drawn
    assert planned(1, match=2, ngram_rows=8) is None  # a draft may be looked up by the token that is drawn
    assert planned(1, match=2, ngram_rows=1) is not None
    assert planned(1, max_new=2, capacity=4) is not None
    assert planned(1, max_new=2, capacity=4, drafts=[[4]]) is None


def test_a_full_pool_makes_questions_wait_and_start_again():
    questions = [([i, 1, 2], 50 + i) for i in range(5)]
    trie = native.cpu().RolloutTrie(capacity=14, stops=[], match=0)
    for question in questions:
        trie.add(*question, list(range(6)), 12, [])
    counters = run(trie, questions, flat=60)
    assert counters["preemptions"] > 0
    assert counters["peak_slots"] <= 14


def test_what_can_never_fit_is_refused_at_once():
    trie = native.cpu().RolloutTrie(capacity=10, stops=[], match=0)
    with pytest.raises(ValueError, match="may need 12 slots of 10"):
        trie.add([1, 2, 3], 0, [0], 10, [])
    with pytest.raises(ValueError, match="no tokens"):
        trie.add([], 0, [0], 2, [])


def test_misuse_is_refused():
    trie = native.cpu().RolloutTrie(capacity=100, stops=[], match=0)
    trie.add([1, 2], 0, [0, 1], 3, [])
    with pytest.raises(ValueError, match="max_rows"):
        trie.plan(0, 0)
    assert trie.plan_ahead(10, 0) is None  # of no step
    plan = trie.plan(10, 0)
    with pytest.raises(RuntimeError, match="not been taken"):
        trie.plan(10, 0)
    with pytest.raises(ValueError, match="too small"):
        plan.pad(1, 4, 4, 4, 0, np.zeros(1000, np.uint8))
    with pytest.raises(KeyError):
        plan["entries"]
    with pytest.raises(ValueError, match="what the last plan asked for"):
        trie.advance(np.zeros(3, np.int64), np.zeros(3), np.zeros(1))
    draws = len(plan["samples"])
    trie.advance(np.zeros(draws, np.int64), np.zeros(draws), np.zeros(1))
    with pytest.raises(ValueError, match="what the last plan asked for"):
        trie.advance(np.zeros(1, np.int64), np.zeros(1), np.zeros(1))
    plan = trie.plan(10, 0)
    for bucket in ((1, 1, 2, 2), (1, 2, 0, 1), (1, 2, 1, 1), (0, 2, 2, 2), (2**31, 2, 2, 2)):
        with pytest.raises(ValueError, match=r"too small|must be"):
            plan.pad(*bucket, 0, np.zeros(1000, np.uint8))
    with pytest.raises(ValueError, match="aligned bytes"):
        plan.pad(2, 2, 2, 2, 0, np.zeros(100, np.uint8))
    with pytest.raises(ValueError, match="scratch"):
        plan.pad(2, 2, 2, 2, 2**31 - 1, np.zeros(1000, np.uint8))
    alone = native.cpu().RolloutTrie(capacity=100, stops=[], match=0)
    alone.add([1, 2], 0, [0], 5, [])
    alone.plan(10, 0)
    alone.plan_ahead(10, 0)
    with pytest.raises(RuntimeError, match="planned ahead already"):
        alone.plan_ahead(10, 0)
