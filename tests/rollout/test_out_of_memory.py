"""A rollout that runs out of memory starts again with less, and draws the same samples."""

import pytest
import torch

from pmc_fast.rollout import RolloutEngine
from pmc_fast.rollout.model_runner import LEAST_SLOTS
from tests.families import FAMILIES, HOW, PROMPTS, build
from tests.rollout.test_rollout_graphs import taped


@pytest.mark.parametrize(
    ("kind", "at"), [(torch.OutOfMemoryError, 0), (torch.OutOfMemoryError, 6), (RuntimeError, 3), (MemoryError, 3)]
)
def test_the_samples_are_those_of_an_undisturbed_rollout(kind, at, monkeypatch, caplog):
    model = build(FAMILIES["llama"]())
    expected = RolloutEngine(model)(PROMPTS, **HOW)
    engine = taped(model)
    for _ in range(2):
        before = engine(PROMPTS, **HOW)
    assert before.counters["graph_replays"] > 0
    calls = []

    def short(compute):
        def run(*inputs):
            calls.append(inputs)
            if len(calls) == at + 1:
                raise kind("CUDA error: out of memory")
            return compute(*inputs)

        return run

    for name in ("logits", "draw"):
        monkeypatch.setattr(engine._step, name, short(getattr(engine._step, name)))
    made = engine(PROMPTS, **HOW)
    assert made.tokens == expected.tokens
    assert made.finish_reason == expected.finish_reason
    assert engine._step.graphs is None
    assert made.counters["graph_replays"] == 0
    assert "a rollout ran out of memory: it starts again without CUDA graphs" in "".join(caplog.messages)
    assert engine.pool_tokens < LEAST_SLOTS <= before.counters["pool_bytes"]
    assert made.counters["pool_bytes"] < before.counters["pool_bytes"]


def test_a_second_failure_and_other_errors_are_raised(monkeypatch):
    engine = RolloutEngine(build(FAMILIES["llama"]()))
    engine(PROMPTS, **HOW)
    for error in (torch.OutOfMemoryError("out of memory"), RuntimeError("shapes differ")):

        def fails(inputs, error=error):
            raise error

        monkeypatch.setattr(engine._step, "logits", fails)
        with pytest.raises(type(error), match=str(error)):
            engine(PROMPTS, **HOW)


def test_a_pool_that_was_never_filled_is_no_limit(monkeypatch):
    """Memory runs out before the first step, with an engine whose memory was released for a training pass."""
    engine = RolloutEngine(build(FAMILIES["llama"]()))
    run, calls = engine._run, []

    def fails_once(*given, **how):
        calls.append(0)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return run(*given, **how)

    engine.check()
    engine._largest_pool = 0
    engine._step.release()
    monkeypatch.setattr(engine, "_run", fails_once)
    made = engine(PROMPTS, **HOW)
    assert engine.pool_tokens is None
    need = made.counters["peak_slots"]
    engine.release()
    calls.clear()
    engine(PROMPTS, **HOW)
    assert need // 2 <= engine.pool_tokens < 2 * need  # half of the largest pool that it has had


def test_the_pool_stays_below_its_limit():
    model = build(FAMILIES["llama"]())
    free = RolloutEngine(model)
    expected = free(PROMPTS, **HOW)
    need = free(PROMPTS, **HOW).counters["peak_slots"]
    limited = RolloutEngine(model, pool_tokens=need // 2)
    made = limited(PROMPTS, **HOW)
    assert made.tokens == expected.tokens
    assert made.counters["peak_slots"] <= need // 2
    longer = limited([[3, 4, 5] * 60], **HOW)  # one answer needs more
    assert longer.counters["peak_slots"] > need // 2
