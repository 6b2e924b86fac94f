"""Memory of runs on a GPU, by arithmetic: python -m benchmarks.memory prints the table of docs/gpu_status.md."""

from dataclasses import replace
from typing import Any

import torch
import transformers

from pmc_fast.config import RequestConfig
from pmc_fast.erasure.unlearn import attached
from pmc_fast.errors import PMCError
from pmc_fast.jobs.memory import Choice, Memory
from pmc_fast.jobs.memory_limits import Lengths, choose, work_of
from pmc_fast.models.pass_memory import Shape

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8}
SHAPES: dict[str, Any] = {  # Llama 3.2 1B and 3B, Llama 3.1 8B, Mistral Nemo 12B
    "1B": transformers.LlamaConfig(
        **LLAMA, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64,
        tie_word_embeddings=True,
    ),
    "3B": transformers.LlamaConfig(
        **LLAMA, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128,
        tie_word_embeddings=True,
    ),
    "8B": transformers.LlamaConfig(
        **LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, head_dim=128,
        tie_word_embeddings=False,
    ),
    "12B": transformers.MistralConfig(
        vocab_size=131072, hidden_size=5120, intermediate_size=14336, num_hidden_layers=40, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, sliding_window=None, tie_word_embeddings=False,
    ),
}  # fmt: skip
STATE = ("parameters", "float32 masters", "moments of the optimizer", "gradients")
# TOFU's forget10 in the chat format: 400 questions of 65 tokens with answers of 45, 3600 pairs to keep
TOFU = Lengths([65] * 400, [45] * 400, [110] * 3600, [45] * 3600, [400, 400])
REQUEST = Lengths([25] * 20, [45] * 20, [70] * 200, [45] * 200, [20, 200])


def memory_of(name: str, *, lora: bool) -> Memory:
    """Return the plans of a published run over TOFU, or of a request of 20 questions, on a shape."""
    settings: dict[str, Any] = {"lora": True, "stack": "-"} if lora else {}
    config = RequestConfig.merge("request" if lora else "llama", settings)
    lengths = REQUEST if lora else TOFU

    def prepare(model: Any) -> Any:
        return attached(config, model, 1) if lora else model

    low = torch.bfloat16 if lora else None
    shape = Shape(SHAPES[name], torch.bfloat16, prepare)
    return Memory(config, shape, work_of(config, lengths, "cuda"), "cuda", low)


def row(name: str, memory: Memory, *, lora: bool) -> str:
    """Return a line of the table, in GB: what a run always holds, what is expected, at most, and needed at least."""
    asked = Choice.of(memory.config, "cuda")
    eager = replace(asked, cuda_graphs=False)
    state = sum(i.most for i in memory.plan(eager).items if i.name in STATE)
    expected = [memory.plan(choice).peak(expected=True)[0] for choice in (asked, eager)]
    cells = (state, *expected, memory.plan(asked).peak()[0], fewest(memory))
    kind = "LoRA request" if lora else "whole model"
    return f"| {name}, {kind} | " + " | ".join(f"{n / 1e9:.1f}" for n in cells) + " |"


def fewest(memory: Memory) -> int:
    """Return the least memory, in steps of 0.1 GB, in which a run is not refused."""
    low, high = 0, 4000
    while high - low > 1:
        middle = (low + high) // 2
        try:
            choose(memory, middle * 10**8)
            high = middle
        except PMCError:
            low = middle
    return high * 10**8


if __name__ == "__main__":
    for name in SHAPES:
        for lora in (False, True):
            print(row(name, memory_of(name, lora=lora), lora=lora))
