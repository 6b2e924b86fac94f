"""One card and one shape of a model with random weights: what the blocks of `card_probe` measure with."""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from pmc_fast.bench import measure
from pmc_fast.data import Encoded
from pmc_fast.data.packing import Pack, pack
from pmc_fast.errors import PMCError
from pmc_fast.models.context import out_of_memory
from pmc_fast.trainer.master_weights import MasterWeights

from . import harness
from .gpu_runs import LLAMA_3B, SMOLLM2

TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA_8B = LLAMA_3B | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "tie_word_embeddings": False,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {"3b": LLAMA_3B, "8b": LLAMA_8B, "135m": SMOLLM2, "tiny": TINY}
SYSTEM, QUESTION, ANSWER = 37, 23, 37  # tokens of a sequence: a chat template's system turn, TOFU's means
SAMPLES = 20
ROUNDS, QUICK_ROUNDS = 11, measure.ROUNDS


def spread(milliseconds: Sequence[float]) -> dict[str, Any]:
    """Return the median of rounds, the smallest and the largest, and how many there were."""
    smallest, largest = round(min(milliseconds), 3), round(max(milliseconds), 3)
    return {"ms": statistics.median(milliseconds), "range": [smallest, largest], "rounds": len(milliseconds)}


class Probe:
    """One card, one shape; results by name.

    Parameters
    ----------
    shape : str
        A key of SHAPES.
    quick : bool
        Fewer rounds and lengths, never under 7 rounds on a card.
    path : Path, optional
        A JSON that is written anew after every number.
    epochs : int
        Of the block `run`.
    """

    def __init__(self, shape: str, quick: bool = False, path: Path | None = None, epochs: int = 30) -> None:
        self.shape, self.name, self.quick, self.path, self.epochs = SHAPES[shape], shape, quick, path, epochs
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.on_gpu else "cpu")
        self.low = torch.bfloat16 if self.on_gpu else torch.float32
        self.rounds = QUICK_ROUNDS if quick else ROUNDS
        self.tiny = shape == "tiny"
        self.results: list[dict[str, Any]] = []

    # --- measuring

    def say(self, block: str, name: str, **numbers: Any) -> None:
        """Print one line, and write all that was found so far."""
        self.results.append({"name": f"{block}: {name}", **numbers})
        shown = "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
        print(f"{block:8} {name:52} {shown}", flush=True)
        if self.path:
            card = torch.cuda.get_device_name() if self.on_gpu else "cpu"
            harness.write(self.path, "card", self.results, facts={"card": card, "shape": self.name})

    def sync(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def wall(self, call: Callable[[], Any], rounds: int = 0, warm_up: int = 3) -> dict[str, Any]:
        """Return milliseconds from call to result (median and range), and until the call returns to the host."""
        for _ in range(warm_up):
            call()
        whole, host = [], []
        for _ in range(rounds or self.rounds):
            self.sync()
            start = time.perf_counter()
            call()
            returned = time.perf_counter()
            self.sync()
            whole.append(1e3 * (time.perf_counter() - start))
            host.append(1e3 * (returned - start))
        return spread(whole) | {"host_ms": statistics.median(host)}

    def card_ms(self, call: Callable[[], Any]) -> float:
        """Return milliseconds on the card alone: calls back to back between two events."""
        call()
        self.sync()
        if not self.on_gpu:
            return float(self.wall(call, warm_up=0)["ms"])
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self.rounds):
            call()
        end.record()
        self.sync()
        return begin.elapsed_time(end) / self.rounds

    def memory(self) -> dict[str, float]:
        """Return gigabytes allocated now, at the peak, and reserved."""
        if not self.on_gpu:
            return {}
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
        return {"gb": torch.cuda.memory_allocated() / 1e9, "peak_gb": peak / 1e9, "reserved_gb": reserved / 1e9}

    def free(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def unless_out_of_memory(self, block: str, name: str) -> Iterator[None]:
        """Say that a mode has run out of memory, or that pmc_fast refused it; the other modes run."""
        try:
            yield
        except (torch.OutOfMemoryError, PMCError) as error:  # a trainer's PMCError comes from the device's
            short = any(e is not None and out_of_memory(e) for e in (error, error.__cause__))
            what = "OUT OF MEMORY" if short else f"FAILED: {type(error).__name__}"
            self.say(block, f"{name}: {what}", why=str(error)[:300], **self.memory())

    # --- what is measured

    def modes(self) -> dict[str, tuple[torch.dtype, torch.dtype | None]]:
        """Return the parameters' dtype and autocast's: masters come with bfloat16 parameters."""
        if not self.on_gpu:
            return {"float32": (torch.float32, None)}
        return {
            "bfloat16 parameters, float32 masters": (torch.bfloat16, None),
            "float32 under autocast": (torch.float32, torch.bfloat16),
        }

    def model(self, dtype: torch.dtype) -> Any:
        with torch.random.fork_rng(), torch.device(self.device):
            torch.manual_seed(0)
            config = transformers.LlamaConfig(**self.shape)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.generation_config = transformers.GenerationConfig()
        return model

    def prompts(self, count: int) -> list[list[int]]:
        g = np.random.default_rng(0)
        return [g.integers(3, self.shape["vocab_size"], SYSTEM + QUESTION).tolist() for _ in range(count)]

    @property
    def new_tokens(self) -> int:
        return 6 if self.tiny else 130

    def packs(self) -> dict[str, tuple[Pack, torch.Tensor]]:
        """Return the packs of 8 + 8 sequences: apart, sharing their system prompt, and two micro-batches in one."""
        g, vocab = np.random.default_rng(0), self.shape["vocab_size"]
        system = g.integers(3, vocab, SYSTEM).tolist()
        sequences = []
        for _ in range(16):
            question, answer = (g.integers(3, vocab, n).tolist() for n in (QUESTION, ANSWER))
            labels = [-100] * (SYSTEM + QUESTION) + answer
            sequences.append(Encoded(system + question + answer, labels))
        groups = {"apart": [[s] for s in sequences], "one system prompt": [sequences]}
        groups["two micro-batches"] = [[s] for s in sequences * 2]
        made = {}
        for name, of in groups.items():
            (packed,) = pack(of, 8192)
            made[name] = packed, torch.full((len(packed.targets),), 1 / len(packed.targets))
        return made

    def optimizer(self, model: Any, *, masters: bool) -> Any:
        adam = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        return MasterWeights(adam) if masters else adam
