"""Times decode_attention alone on a GPU, as a rollout step calls it: one call a layer, each layer with its own pool.

    python -m benchmarks.decode_attention_gpu

8 questions of 20 samples, a prompt of 30 tokens, bfloat16. All layers are one CUDA graph, which leaves the host out;
the pools of all layers together do not fit the card's cache, as in a real step. GB/s counts each key and value that
must come from memory once: a question's prompt, a row's suffix.
"""

import itertools
import statistics
import sys

import torch

from pmc_fast.ops.decode_attention import StepIndex, decode_attention

MODELS = {"SmolLM2-135M": (30, 9, 3, 64), "Llama-3.2-3B": (28, 24, 8, 128)}  # layers, heads, kv heads, dim
QUESTIONS, SAMPLES, PROMPT = 8, 20, 30
SUFFIXES = (8, 32, 100, 170)


def step_index(suffix: int) -> StepIndex:
    """Return the index of a step: each row's suffix ends in its own slot, and slots lie in no order."""
    rows, prompts = QUESTIONS * SAMPLES, QUESTIONS * PROMPT
    slots = torch.randperm(rows * suffix + prompts, generator=torch.Generator().manual_seed(0))
    own, prefix = slots[: rows * suffix], slots[rows * suffix :]
    ends = (torch.arange(n + 1) * size for n, size in ((rows, suffix), (QUESTIONS, SAMPLES), (QUESTIONS, PROMPT)))
    cu_suffix, cu_rows, cu_prefix = ends
    prefix_len = torch.full((rows,), PROMPT)
    arrays = (own[cu_suffix[1:] - 1], prefix_len, cu_suffix, own, cu_rows, cu_prefix, prefix)
    return StepIndex(*(a.to(torch.int32) for a in arrays))


def tensors(model: str, suffix: int, device: torch.device) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Return q, k, v and the pools of each layer."""
    layers, heads, kv_heads, dim = MODELS[model]
    rows, slots = QUESTIONS * SAMPLES, QUESTIONS * (SAMPLES * suffix + PROMPT)
    make = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)  # noqa: E731
    inputs = [make(rows, n, dim) for n in (heads, kv_heads, kv_heads)]
    return inputs, [[make(slots, kv_heads, dim) for _ in range(2)] for _ in range(layers)]


def microseconds(model: str, suffix: int) -> float:
    """Return the median over replays of a layer's part of a step."""
    index = step_index(suffix).to(torch.device("cuda"))
    (q, k, v), pools = tensors(model, suffix, torch.device("cuda"))

    def step() -> None:
        for k_pool, v_pool in pools:
            decode_attention(q, k, v, k_pool, v_pool, index, scale=MODELS[model][3] ** -0.5)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(31)]
    for event in events:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return 1e3 * statistics.median(times) / len(pools)


def main() -> int:
    """Print the table."""
    if not torch.cuda.is_available():
        print("benchmarks.decode_attention_gpu: torch sees no CUDA device", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}\n{'model':14} {'suffix':>6} {'us a layer':>10} {'MB':>7} {'GB/s':>6}")
    for model, (_, _, kv_heads, dim) in MODELS.items():
        for suffix in SUFFIXES:
            us = microseconds(model, suffix)
            size = 2 * 2 * kv_heads * dim * QUESTIONS * (SAMPLES * suffix + PROMPT)
            print(f"{model:14} {suffix:6} {us:10.1f} {size / 1e6:7.1f} {size / us / 1e3:6.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
