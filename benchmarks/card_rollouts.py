"""Rollouts on a card: their speed, beside transformers' own, and the kernels of a rollout and of a pass by their time."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import transformers

from pmc_fast.models.packed_forward import PackedPass
from pmc_fast.rollout import RolloutEngine, inputs
from pmc_fast.rollout import engine as rollout_engine

from .card import SAMPLES, Probe


def rollout(probe: Probe) -> None:
    """Measure rollouts of 8 and 16 questions with 20 samples each: seconds, steps, tokens/s, padding."""
    model = probe.model(probe.low).eval()
    for questions in (8, 16):
        engine = RolloutEngine(model)
        how: dict[str, Any] = {"num_samples": SAMPLES, "temperature": 0.9, "top_p": 0.95, "seed": 1}
        call = lambda e=engine, q=questions, how=how: e(probe.prompts(q), max_new_tokens=probe.new_tokens, **how)  # noqa: E731
        counters = call().counters
        measured = probe.wall(call, 3 if probe.tiny else probe.rounds, 2)
        seconds = measured["ms"] / 1e3
        probe.say(
            "rollout", f"{SAMPLES * questions} rows", **measured, steps=counters["steps"],
            ms_a_step=measured["ms"] / counters["steps"], tokens_s=counters["sampled_tokens"] / seconds,
            padded_rows=counters["padded_rows"], **probe.memory(),
        )  # fmt: skip
        probe.free()


NGRAM_ROWS = (64, 128, 192)
WARPS = (8, 16)  # of the sampler's selection


def decode(probe: Probe) -> None:
    """Measure what only a card can decide of a decode step, as shipped and with one thing changed at a time.

    Steps that run ahead or wait, draws in the graph or apart, row buckets without 160 and 320, rows up to which n-gram
    drafts are looked up (random weights repeat nothing: this is what drafts cost), warps of the sampler's selection.
    """
    model = probe.model(probe.low).eval()
    pads = {} if probe.on_gpu else {"pad_steps": True}
    modes: dict[str, tuple[dict[str, bool], Any]] = {
        "unchanged": ({}, nullcontext),
        "waits for draws": ({"run_ahead": False}, nullcontext),
        "waits, draws apart": ({"graph_draws": False}, nullcontext),
        "no buckets of 160 and 320": ({}, _without_buckets(160, 320)),
        **{f"n-gram drafts to {rows} rows": ({}, _ngram_rows(rows)) for rows in NGRAM_ROWS},
        **{f"{warps} warps": ({}, _warps(warps)) for warps in (WARPS if probe.on_gpu else ())},
    }
    for questions in (8,) if probe.tiny else (8, 16):
        for name, (on, changed) in modes.items():
            with changed():
                engine = RolloutEngine(model, **pads, **on)
                how: dict[str, Any] = {"num_samples": SAMPLES, "temperature": 0.9, "top_p": 0.95, "seed": 1}
                call = functools.partial(engine, probe.prompts(questions), max_new_tokens=probe.new_tokens, **how)
                measured = probe.wall(call, 2 if probe.tiny else probe.rounds, 1 if probe.tiny else 3)
                counters = call().counters
            shown = {
                name: counters[name] for name in ("steps", "ahead_steps", "padded_rows", "draft_rows", "ended_rows")
            }
            ms = measured["ms"] / counters["steps"]
            probe.say("decode", f"{SAMPLES * questions} rows, {name}", **measured, ms_a_step=ms, **shown)
            del engine, call
            probe.free()


def _without_buckets(*sizes: int) -> Callable[[], Any]:
    return lambda: mock.patch.object(inputs, "ROWS", tuple(n for n in inputs.ROWS if n not in sizes))


def _ngram_rows(rows: int) -> Callable[[], Any]:
    return lambda: mock.patch.dict(rollout_engine.NGRAM_ROWS, cpu=rows, cuda=rows)


def _warps(warps: int) -> Callable[[], Any]:
    @contextmanager
    def changed() -> Iterator[None]:
        from pmc_fast.kernels import sampling

        with mock.patch.dict(sampling.CONFIGS, select=sampling.CONFIGS["select"] | {"num_warps": warps}):
            yield

    return changed


def profile(probe: Probe) -> None:
    """Print the kernels of one pass and one rollout by their time on the card."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if probe.on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    model = probe.model(probe.low)
    packed, engine = PackedPass(model), RolloutEngine(model)
    made, scale = probe.packs()["apart"]
    how: dict[str, Any] = {"num_samples": SAMPLES, "temperature": 0.9, "top_p": 0.95, "seed": 1}
    new = 3 if probe.tiny else 24
    calls: dict[str, Callable[[], Any]] = {
        "pass": lambda: packed(made, scale)[0].backward(),
        "rollout": lambda: engine(probe.prompts(8), max_new_tokens=new, **how),
    }
    for name, call in calls.items():
        for _ in range(3):
            call()
        with torch.profiler.profile(activities=activities) as found:
            call()
            probe.sync()
        by = "self_device_time_total" if probe.on_gpu else "self_cpu_time_total"
        averages = found.key_averages()
        print(averages.table(sort_by=by, row_limit=25, max_name_column_width=70), flush=True)
        top = sorted(averages, key=lambda e: -getattr(e, by))[:25]
        probe.say("profile", name, kernels={e.key[:90]: round(getattr(e, by) / 1e3, 3) for e in top})


def peers(probe: Probe) -> None:
    """Measure transformers' own ways to sample the same rows: dynamic cache, static cache, continuous batching."""
    model = probe.model(probe.low).eval()
    prompts = probe.prompts(8)
    ids = torch.tensor(prompts, device=probe.device).repeat_interleave(SAMPLES, 0)
    how: dict[str, Any] = {
        "do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 0.95, "max_new_tokens": probe.new_tokens,
        "eos_token_id": -1, "pad_token_id": 0,
    }  # fmt: skip
    settings = transformers.GenerationConfig(**how)
    static = transformers.GenerationConfig(**how, cache_implementation="static")
    mask = torch.ones_like(ids)
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: model.generate(ids, attention_mask=mask, generation_config=settings),
        "generate, static cache": lambda: model.generate(ids, attention_mask=mask, generation_config=static),
        "generate_batch": lambda: model.generate_batch(ids.tolist(), generation_config=settings),
    }
    with torch.no_grad():
        for name, call in calls.items():
            try:
                measured = probe.wall(call, 3, 1)
            except Exception as error:  # a peer that does not run here is named, and the rest goes on
                probe.say("peers", f"{name}: {type(error).__name__}", why=str(error)[:160].replace("\n", " "))
                continue
            probe.say("peers", name, **measured, tokens_s=len(ids) * probe.new_tokens / measured["ms"] * 1e3)
