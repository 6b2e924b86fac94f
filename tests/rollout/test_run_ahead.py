"""Steps that are started before the draws of the one before them are read: the samples are those of the waiting loop."""

import numpy as np
import pytest
import torch

from pmc_fast.errors import NotFiniteError
from pmc_fast.rollout import RolloutEngine
from tests.families import FAMILIES, HOW, PROMPTS, build
from tests.rollout.test_rollout_graphs import agreement, needs_gpu, taped

PLAIN = HOW | {"ngram_drafts": False}  # which would keep steps of so few rows from running ahead
MANY_STOPS = {"stop_ids": list(range(0, 61, 4)), "num_samples": 12}
CHANGES = [
    {"temperature": 0.0},
    {"temperature": 0.0, "num_samples": 1},
    {"temperature": 1.5, "top_k": 0, "top_p": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"top_k": 0, "top_p": 0.6},
    {"drafts": [[[4, 5, 6]], [], [[9, 4, 4, 7]], []]},
    {"ngram_drafts": True, "num_samples": 30},
    {"pool_tokens": 60},
    {"pool_tokens": 130, "num_samples": 9},
    {"max_rows": 7},
    {"max_rows": 1},
    {"trie": False},
    {"max_new_tokens": 2},
    {"max_new_tokens": 1},
    {"max_new_tokens": None, "max_length": 12},
    {"stop_ids": []},
    MANY_STOPS,
    MANY_STOPS | {"pool_tokens": 90, "max_rows": 30},
]
# greedy samples share a row to their end; rows take turns to their end; two tokens are the prompts' step and the last
NEVER = [{"temperature": 0.0}, {"max_rows": 1}, {"max_new_tokens": 1}, {"max_new_tokens": 2}]


def assert_same(ours, theirs):
    assert ours.tokens == theirs.tokens
    assert ours.finish_reason == theirs.finish_reason
    for a, b in ((ours.logps, theirs.logps), (ours.nucleus_mass, theirs.nucleus_mass)):
        for x, y in zip([x for s in a for x in s], [y for s in b for y in s], strict=True):
            np.testing.assert_array_equal(x, y)


def compare(model, how):
    """Return the counters of a rollout that runs ahead, which is that of the waiting loop, also as graphs."""
    waiting = RolloutEngine(model, pad_steps=True, run_ahead=False)(PROMPTS, **how)
    apart = RolloutEngine(model, pad_steps=True, graph_draws=False)(PROMPTS, **how)
    ahead = RolloutEngine(model, pad_steps=True)(PROMPTS, **how)
    graphs = taped(model)
    for ours in (apart, ahead, *(graphs(PROMPTS, **how) for _ in range(3))):
        assert_same(ours, waiting)
    assert apart.counters["ahead_steps"] == waiting.counters["ahead_steps"] == 0
    assert waiting.counters["ended_rows"] == apart.counters["ended_rows"] == 0
    return ahead.counters


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_every_family_are_those_of_the_waiting_loop(family):
    counters = compare(build(FAMILIES[family]()), PLAIN)
    assert counters["ahead_steps"] > 0


@pytest.fixture(scope="module")
def llama():
    return build(FAMILIES["llama"]())


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_whatever_the_settings(llama, change):
    counters = compare(llama, PLAIN | change)
    assert (counters["ahead_steps"] > 0) == (change not in NEVER)


def test_a_row_that_ends_is_computed_once_more_and_its_slots_serve_again(llama):
    how = PLAIN | MANY_STOPS
    waiting = RolloutEngine(llama, pad_steps=True, run_ahead=False)(PROMPTS, **how).counters
    ahead = RolloutEngine(llama, pad_steps=True)(PROMPTS, **how).counters
    assert ahead["ended_rows"] > 0
    assert ahead["rows"] == waiting["rows"] + ahead["ended_rows"]
    assert ahead["sampled_tokens"] == waiting["sampled_tokens"]


def test_without_padding_no_step_runs_ahead(llama):
    counters = RolloutEngine(llama)(PROMPTS, **PLAIN).counters
    assert counters["ahead_steps"] == counters["padded_rows"] == 0


@pytest.mark.parametrize("make", [lambda m: RolloutEngine(m, pad_steps=True), taped], ids=["padded", "captured"])
def test_broken_logits_are_named(make):
    model = build(FAMILIES["llama"]())
    engine = make(model)
    for _ in range(2):
        engine(PROMPTS, **PLAIN)
    with torch.no_grad():
        model.model.embed_tokens.weight[7:] = torch.nan  # of tokens that are drawn: prompts have 7 and 8, too
    prompts = [[5, 4, 3, 6]]
    with pytest.raises(NotFiniteError, match="logits are NaN"):
        engine(prompts, **PLAIN)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_samples_are_those_of_the_waiting_loop(dtype):
    model = build(FAMILIES["llama"](), dtype).to("cuda")
    how = PLAIN | {"num_samples": 40}
    engines = [RolloutEngine(model, **on) for on in ({}, {"run_ahead": False}, {"graph_draws": False})]
    for _ in range(3):
        ahead, waiting, apart = (engine(PROMPTS, **how) for engine in engines)
        bound = 0.99 if dtype == torch.float32 else 0.9
        assert agreement(ahead.tokens, waiting.tokens) >= bound
        assert agreement(apart.tokens, waiting.tokens) >= bound
    assert ahead.counters["ahead_steps"] > 0 < ahead.counters["graph_replays"]
    assert waiting.counters["ahead_steps"] == apart.counters["ahead_steps"] == 0
