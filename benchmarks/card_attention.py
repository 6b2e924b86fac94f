"""Decode attention alone on a card: both variants of the CUDA kernel as a rollout step calls them, beside a copy.

One call a layer, each layer with its own pool. All layers are one CUDA graph, which leaves the host out; their pools
together do not fit the card's cache, as in a real step.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from pmc_fast.ops import decode_attention as op
from pmc_fast.ops.decode_attention import VARIANTS, StepIndex, decode_attention

from .card import SAMPLES, Probe, spread

QUESTIONS, SUFFIXES, PROMPTS = (8, 16), (50, 100, 170, 300), (60, 300, 1000)
POOLS = 2 << 30  # bytes that the layers' pools take at most, if not fewer than two layers
TILE_ROWS = (1, 2, 3, 4, 5, 8, 16)  # of mma: rows that share a prompt's reads; 0, which is shipped, follows the card


def attention(probe: Probe) -> None:
    """Measure a layer's attention by variant: microseconds, GB/s and percent of a copy's, by rows, prompt and suffix.

    Bytes are those that must come from memory: a question's prompt once, each row's suffix once, keys and values.
    """
    gb_s = _copy(probe)
    for suffix in (3, 40):
        _check(probe, suffix)
    for questions in (2,) if probe.tiny else QUESTIONS:
        for prompt in (20,) if probe.tiny else PROMPTS:
            for suffix in (5,) if probe.tiny else SUFFIXES:
                calls: dict[str, Callable[[], None]] = {
                    f"{name}{' (default)' * (name == op.VARIANT)}": functools.partial(_set, name) for name in VARIANTS
                }
                _compare(probe, (questions, prompt, suffix), calls, gb_s)
    group = probe.shape["num_attention_heads"] // probe.shape["num_key_value_heads"]
    sizes = (2, 20, 5) if probe.tiny else (QUESTIONS[0], PROMPTS[0], SUFFIXES[2])
    calls = {f"mma, {n} rows a tile": functools.partial(_set, "mma", n) for n in TILE_ROWS if n * group <= 16}
    _compare(probe, sizes, calls, gb_s)


def step_index(questions: int, samples: int, prompt: int, suffix: int) -> StepIndex:
    """Return the index of a step: each row's suffix ends in its own slot, and slots lie in no order."""
    rows, prompts = questions * samples, questions * prompt
    slots = torch.randperm(rows * suffix + prompts, generator=torch.Generator().manual_seed(0))
    own, prefix = slots[: rows * suffix], slots[rows * suffix :]
    ends = (torch.arange(n + 1) * size for n, size in ((rows, suffix), (questions, samples), (questions, prompt)))
    cu_suffix, cu_rows, cu_prefix = ends
    prefix_len = torch.full((rows,), prompt)
    arrays = (own[cu_suffix[1:] - 1], prefix_len, cu_suffix, own, cu_rows, cu_prefix, prefix)
    return StepIndex(*(a.to(torch.int32) for a in arrays))


def _set(variant: str, tile_rows: int = 0) -> None:
    op.VARIANT, op.MMA_TILE_ROWS = variant, tile_rows


def _tensors(
    probe: Probe, rows: int, slots: int
) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return q, k and v, and the pools of each layer."""
    heads, kv_heads = probe.shape["num_attention_heads"], probe.shape["num_key_value_heads"]
    dim = probe.shape["head_dim"]
    g = torch.Generator(probe.device).manual_seed(0)
    make = lambda *shape: torch.randn(*shape, device=probe.device, generator=g).to(probe.low)  # noqa: E731
    inputs = [make(rows, n, dim) for n in (heads, kv_heads, kv_heads)]
    size = 2 * slots * kv_heads * dim * inputs[0].element_size()
    layers = min(probe.shape["num_hidden_layers"], max(2, POOLS // size))
    return inputs, [(make(slots, kv_heads, dim), make(slots, kv_heads, dim)) for _ in range(layers)]


def _check(probe: Probe, suffix: int) -> None:
    """Compare both variants with the reference in float64; a wrong one ends the block."""
    index = step_index(2, 3, 37, suffix)
    (q, k, v), [(k_pool, v_pool), *_] = _tensors(probe, 6, 6 * suffix + 2 * 37)
    scale = q.shape[2] ** -0.5
    exact = decode_attention(
        q.double(), k.double(), v.double(), k_pool.double(), v_pool.double(), index.to(probe.device), scale=scale,
        backend="reference",
    )  # fmt: skip
    for variant in VARIANTS:
        out = decode_attention(q, k, v, k_pool, v_pool, index.to(probe.device), scale=scale, variant=variant)
        error = float((out.double() - exact).abs().max() / exact.abs().max())
        probe.say("attention", f"{variant}, error, suffix {suffix}", of_the_largest=error)
        if error > 2**-8:
            raise AssertionError(f"{variant}: an error of {error:.2g} of the largest number")


def _copy(probe: Probe) -> float:
    """Return the GB/s of a copy: what is read and written."""
    source = torch.empty((1 << 10) if probe.tiny else (1 << 30), dtype=torch.uint8, device=probe.device)
    target = torch.empty_like(source)
    ms = probe.card_ms(lambda: target.copy_(source))
    gb_s = 2 * source.nbytes / ms / 1e6
    probe.say("attention", "a copy", ms=ms, gb_s=gb_s)
    return gb_s


def _compare(
    probe: Probe, sizes: tuple[int, int, int], calls: dict[str, Callable[[], None]], copy_gb_s: float
) -> None:
    """Time the same step by several settings in turns."""
    questions, prompt, suffix = sizes
    rows = questions * SAMPLES
    index = step_index(questions, SAMPLES, prompt, suffix).to(probe.device)
    (q, k, v), pools = _tensors(probe, rows, rows * suffix + questions * prompt)
    size = sum(t.nbytes for t in pools[0])  # every slot is a prompt's or a suffix's

    def step() -> None:
        for k_pool, v_pool in pools:
            decode_attention(q, k, v, k_pool, v_pool, index, scale=q.shape[2] ** -0.5)

    shipped = op.VARIANT, op.MMA_TILE_ROWS
    steps: dict[str, Callable[[], Any]] = {}
    try:
        for name, use in calls.items():
            use()
            step()
            steps[name] = step
            if probe.on_gpu:
                probe.sync()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step()
                steps[name] = graph.replay
    finally:
        _set(*shipped)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(probe.rounds + 1):
        first = turn % len(steps)
        for name in [*steps][first:] + [*steps][:first]:
            ms = _milliseconds(probe, steps[name])
            if turn:  # the first warms up
                times[name].append(1e3 * ms / len(pools))
    for name, us in times.items():
        median = statistics.median(us)
        found = spread(us)
        gb_s = size / median / 1e3
        probe.say(
            "attention", f"{rows} rows, prompt {prompt}, suffix {suffix}, {name}", us=median, range=found["range"],
            rounds=found["rounds"], mb=size / 1e6, gb_s=gb_s, percent_of_copy=100 * gb_s / copy_gb_s,
        )  # fmt: skip


def _milliseconds(probe: Probe, call: Callable[[], Any]) -> float:
    if not probe.on_gpu:
        return float(probe.wall(call, rounds=1, warm_up=0)["ms"])
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    probe.sync()
    return begin.elapsed_time(end)
