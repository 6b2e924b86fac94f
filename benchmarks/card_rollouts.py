"""Rollouts on a card: their speed, beside transformers' own, and the kernels of a rollout and of a pass by their time."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

from pmc_fast.models.joined_weights import join_weights
from pmc_fast.models.packed_forward import PackedPass
from pmc_fast.rollout import RolloutEngine, inputs
from pmc_fast.rollout import engine as rollout_engine

from .card import SAMPLES, Probe, spread
from .peer_engines import Task
from .peers import PEERS, compare


def rollout(probe: Probe) -> None:
    """Measure rollouts of 1, 8 and 16 questions with 20 samples each: seconds, steps, tokens/s, padding.

    Of 1 and 8 also with q, k, v and gate, up computed apart, and with weights of 8 bits.
    """
    model = probe.model(probe.low).eval()
    kinds = [(1, ", apart"), (8, ", apart"), (1, ""), (8, ""), (16, ""), (1, ", fp8"), (8, ", fp8")]
    for questions, kind in kinds:
        if not kind:
            join_weights(model)
        engine = RolloutEngine(model)
        how: dict[str, Any] = {"num_samples": SAMPLES, "temperature": 0.9, "top_p": 0.95, "seed": 1}
        how["rollout_dtype"] = "fp8" if "fp8" in kind else "auto"
        call = lambda e=engine, q=questions, how=how: e(probe.prompts(q), max_new_tokens=probe.new_tokens, **how)  # noqa: E731
        counters = call().counters
        measured = probe.wall(call, 3 if probe.tiny else probe.rounds, 2)
        seconds = measured["ms"] / 1e3
        probe.say(
            "rollout", f"{SAMPLES * questions} rows{kind}", **measured, steps=counters["steps"],
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
    pads: dict[str, Any] = {} if probe.on_gpu else {"pad_steps": True}
    modes: dict[str, tuple[dict[str, Any], Any]] = {
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
    """Measure other ways to draw the same samples, interleaved: transformers' own, and vLLM where it is installed."""
    model = probe.model(probe.low).eval()
    task = Task(model, probe.prompts(8), SAMPLES, probe.new_tokens, (), 0, 0.9, 50, 0.95)
    names = [name for name in PEERS if name != "llama.cpp"]  # it is built for the CPU
    # not judged: with random weights in bfloat16 rounding decides which tokens top_k keeps
    found = compare(task, names, 2 if probe.tiny else probe.rounds, judged=False)
    for name, way in found["contestants"].items():
        syncs = {"sync": spread([1e3 * s for s in way["syncs_s"]])} if way["syncs_s"] else {}
        probe.say("peers", name, **spread([1e3 * s for s in way["rounds_s"]]), tokens_s=way["tokens_per_s"], **syncs)
    for name, why in found["facts"]["refused"].items():
        probe.say("peers", f"{name}: not measured", why=why)
