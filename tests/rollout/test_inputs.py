"""Padded steps: real rows see, compute and draw what they would without."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmc_fast.cuda_graphs.static_inputs import StaticInputs
from pmc_fast.ops import native
from pmc_fast.ops.decode_attention import StepIndex, decode_attention
from pmc_fast.rollout import RolloutEngine
from pmc_fast.rollout.inputs import (
    ARRAYS,
    ENTRIES,
    INDEX,
    PROMPT_ROWS,
    ROWS,
    Bucket,
    PaddedInputs,
    StepInputs,
    bucket_of,
)
from tests.families import FAMILIES, HOW, PROMPTS, build
from tests.padded import padded


def steps(seed, questions, samples, max_rows, ngram_rows, drafts=True):
    """Plans of a rollout whose draws are dice, each with the slots in use."""
    dice = np.random.default_rng(seed)
    trie = native.cpu().RolloutTrie(capacity=10_000, stops=[5], match=2)
    for q in range(questions):
        prompt = dice.integers(0, 6, dice.integers(1, 7)).tolist()
        draft = [dice.integers(0, 6, 8).tolist()] if drafts else []
        trie.add(prompt, q, list(range(samples)), int(dice.integers(1, 10)), draft)
    while (plan := trie.plan(max_rows, ngram_rows)) is not None:
        yield plan, trie.span
        draws, logits = len(plan["samples"]), len(plan["logit_rows"])
        trie.advance(dice.integers(0, 6, draws), np.zeros(draws), np.ones(logits))


def arrays_of(plan):
    return {name: plan[name] for name in (*ARRAYS, "sources")}


def index_of(plan):
    return StepIndex(*(torch.from_numpy(plan[name]) for name in INDEX))


def seen_of(index):
    rows = index.cu_rows.tolist()
    return [index.visible(r, b).tolist() for b in range(len(rows) - 1) for r in range(rows[b], rows[b + 1])]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), questions=st.integers(1, 6), samples=st.integers(1, 9), max_rows=st.integers(1, 70),
    ngram_rows=st.integers(0, 24),
)  # fmt: skip
def test_real_rows_see_and_compute_the_same(seed, questions, samples, max_rows, ngram_rows):
    g = torch.Generator().manual_seed(seed)
    for plan, span in steps(seed, questions, samples, max_rows, ngram_rows):
        bucket = bucket_of(plan, max_rows)
        assert bucket.logits == bucket.rows or (np.diff(plan["cu_suffix"]) == 0).any()  # or it reads prompts
        real, blocks = plan.rows, plan.blocks
        assert real <= bucket.rows <= max_rows
        assert blocks < bucket.blocks <= bucket.rows + 1
        assert plan.logits <= bucket.logits <= bucket.rows
        assert plan.draws <= bucket.draws <= max(bucket.logits, 4 * plan.draws)
        step = PaddedInputs(bucket, torch.device("cpu"))(plan, span)
        expected = padded(arrays_of(plan), bucket, span)
        found = {name: getattr(step, name) for name in ("tokens", "positions", "logit_rows", "sources")}
        found |= {name: getattr(step.index, name) for name in INDEX if name not in ("suffix", "prefix")}
        found |= dict(zip(("cu_draws", "streams", "samples", "draw_positions"), step.draws, strict=True))
        found[ENTRIES] = step.index.suffix[: len(expected[ENTRIES])]
        for name, tensor in found.items():
            assert tensor.numpy().dtype == expected[name].dtype
            assert tensor.tolist() == expected[name].tolist(), name
        assert set(found) == set(expected)
        assert step.span == span + bucket.rows - real
        for ours, theirs in zip(step.real_draws(), ("cu_draws", "streams", "samples", "draw_positions"), strict=True):
            assert ours.tolist() == plan[theirs].tolist()
        before, after = index_of(plan), step.index
        scratch = list(range(span, span + bucket.rows - real))
        assert seen_of(after) == seen_of(before) + [[slot] for slot in scratch]
        # what no row sees may be anything
        pools = [torch.randn(span + len(scratch), 2, 8, dtype=torch.float64, generator=g) for _ in range(2)]
        unseen = torch.ones(len(pools[0]), dtype=torch.bool)
        unseen[sorted({s for row in seen_of(before) for s in row})] = False
        for pool in pools:
            pool[unseen] = torch.nan
        q = torch.randn(bucket.rows, 6, 8, dtype=torch.float64, generator=g)
        k, v = (torch.randn(bucket.rows, 2, 8, dtype=torch.float64, generator=g) for _ in range(2))
        plain, wide = [p.clone() for p in pools], [p.clone() for p in pools]
        expected = decode_attention(q[:real], k[:real], v[:real], *plain, before, scale=0.3)
        out = decode_attention(q, k, v, *wide, after, scale=0.3)
        assert torch.equal(out[:real], expected)
        assert out.isfinite().all()
        assert all(
            torch.equal(a[:span].nan_to_num(), b[:span].nan_to_num()) for a, b in zip(plain, wide, strict=True)
        )


def test_buckets_are_few_and_the_largest_rows_run_as_they_are():
    def plan(rows, blocks, draws=None, logits=None):
        logits = rows if logits is None else logits
        return SimpleNamespace(rows=rows, blocks=blocks, draws=draws or logits, logits=logits)

    assert bucket_of(plan(3, 2), 2048) == Bucket(4, 4, 4, 4)
    assert bucket_of(plan(4, 4), 2048) == Bucket(4, 5, 4, 4)  # a block for padded rows, also where there are none
    assert bucket_of(plan(5, 2), 7) == Bucket(7, 4, 7, 7)
    assert bucket_of(plan(150, 8), 2048) == Bucket(160, 16, 160, 160)
    assert bucket_of(plan(320, 16, 320), 2048) == Bucket(320, 64, 320, 320)
    assert bucket_of(plan(100, 8, 160), 2048) == Bucket(128, 16, 128, 256)
    assert bucket_of(plan(1, 1, 5), 1) == Bucket(1, 2, 1, 16)
    assert bucket_of(plan(ROWS[-1], 3), 5000) == Bucket(ROWS[-1], 4, ROWS[-1], ROWS[-1])
    assert bucket_of(plan(ROWS[-1] + 1, 3), 5000) is None
    # prompts of 8 questions with 20 samples, and a part of a long prompt
    assert bucket_of(plan(221, 8, 160, logits=8), 2048) == Bucket(256, 16, 16, 256)
    assert bucket_of(plan(300, 1, 0, logits=0), 300) == Bucket(300, 4, 1, 1)
    assert bucket_of(plan(3, 2, 40, logits=2), 2048) == Bucket(4, 4, 4, 64)
    assert bucket_of(plan(PROMPT_ROWS, 8, logits=8), 2048).rows == PROMPT_ROWS
    assert bucket_of(plan(PROMPT_ROWS + 1, 8, logits=8), 2048) is None
    sizes = {bucket_of(plan(rows, min(8, rows)), 2048) for rows in range(1, 161)}
    assert len(sizes) == 13  # of 160
    assert {160, 320} <= set(ROWS)  # 8 and 16 questions of 20 samples are not padded
    assert list(ROWS) == sorted(set(ROWS))


def test_arrays_keep_their_addresses_until_the_buffer_grows():
    inputs = StaticInputs(torch.device("cpu"), 256)
    arrays = {"a": np.arange(3), "b": np.arange(5, dtype=np.int32), "c": np.arange(4, 6)}
    first = inputs(arrays)
    again = inputs({name: array + 7 for name, array in arrays.items()})
    assert all((first[name].data_ptr() - first["a"].data_ptr()) % 16 == 0 for name in arrays)
    for name, array in arrays.items():
        assert again[name].data_ptr() == first[name].data_ptr()
        assert again[name].tolist() == (array + 7).tolist()
    longer = inputs(arrays | {"c": np.arange(400)})
    assert longer["a"].data_ptr() != first["a"].data_ptr()
    assert longer["b"].tolist() == [0, 1, 2, 3, 4]
    assert longer["c"].tolist() == list(range(400))


def test_steps_of_a_bucket_lie_at_the_same_places():
    inputs = StepInputs(torch.device("cpu"), pads=True)
    found = {}
    for plan, span in steps(3, 3, 6, 64, 12):
        step = inputs(plan, span, 64)
        if step.bucket is not None:
            index = [getattr(step.index, name) for name in INDEX]
            tensors = (step.tokens, step.positions, step.logit_rows, step.sources, *index, *step.draws)
            found.setdefault(step.bucket, set()).add(tuple(t.data_ptr() for t in tensors))
            assert step.index.addresses[: len(INDEX)] == tuple(t.data_ptr() for t in index)
            assert step.index.prefix.data_ptr() == step.index.suffix.data_ptr()
    assert len(found) > 1
    assert all(len(where) == 1 for where in found.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "change",
    [{}, {"drafts": [[[4, 5, 6]], [], [[9, 4, 4, 7]], []]}, {"trie": False, "ngram_drafts": False},
     {"max_rows": 7, "pool_tokens": 60}],
    ids=str,
)  # fmt: skip
def test_padding_changes_no_sample(family, change):
    model = build(FAMILIES[family]())
    plain = RolloutEngine(model)(PROMPTS, **HOW, **change)
    padded = RolloutEngine(model, pad_steps=True, run_ahead=False)(PROMPTS, **HOW, **change)
    assert padded.tokens == plain.tokens
    assert padded.finish_reason == plain.finish_reason
    for ours, theirs in ((padded.logps, plain.logps), (padded.nucleus_mass, plain.nucleus_mass)):
        for a, b in zip([x for s in ours for x in s], [x for s in theirs for x in s], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)  # kept in float32
    assert padded.counters["padded_rows"] > 0
    changed = {"padded_rows", "pool_bytes"}
    assert {k: v for k, v in padded.counters.items() if k not in changed} == {
        k: v for k, v in plain.counters.items() if k not in changed
    }
