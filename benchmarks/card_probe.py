"""Where the milliseconds and the gigabytes go on one card: a line per number, printed and written as it is found.

    python -m benchmarks.card_probe fit trainer head pass step profile peers --shape 3b [--quick] [--json FILE]

Needs no model files and no network: weights and tokens are random. Without a GPU it runs on the CPU, with `--shape tiny`
in seconds, to test itself. What each block measures stands in its docstring; `card.sh` runs them in order of use.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from pmc_fast import PMCArguments, PMCConfig, PMCTrainer
from pmc_fast.data import Encoded
from pmc_fast.data.packing import Pack, pack
from pmc_fast.models.context import autocast
from pmc_fast.models.packed_forward import PackedPass
from pmc_fast.ops import weighted_nll
from pmc_fast.ops.scaled import scaled
from pmc_fast.rollout import RolloutEngine
from pmc_fast.trainer.master_weights import MasterWeights

from . import harness
from .gpu_runs import LLAMA_3B, SMOLLM2

TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {"3b": LLAMA_3B, "135m": SMOLLM2, "tiny": TINY}
SYSTEM, QUESTION, ANSWER = 37, 23, 37  # tokens of a sequence: a chat template's system turn, TOFU's means
SAMPLES = 20
ROUNDS, QUICK_ROUNDS = 11, 7


class Probe:
    """One card, one shape; results by name.

    Parameters
    ----------
    shape : str
        A key of SHAPES.
    quick : bool
        Fewer rounds and lengths.
    path : Path, optional
        A JSON that is written anew after every number.
    """

    def __init__(self, shape: str, quick: bool = False, path: Path | None = None) -> None:
        self.shape, self.name, self.quick, self.path = SHAPES[shape], shape, quick, path
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
        spread = [round(min(whole), 3), round(max(whole), 3)]
        return {"ms": statistics.median(whole), "range": spread, "host_ms": statistics.median(host)}

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
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            self.say(block, f"{name}: OUT OF MEMORY", why=str(error)[:120], **self.memory())

    # --- what is measured

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


def fit(probe: Probe) -> None:
    """Measure three optimizer steps of the published run, 16 questions each: peak memory and seconds of their parts."""
    for dtype in (torch.bfloat16, torch.float32) if probe.on_gpu else (torch.float32,):
        probe.free()
        name = str(dtype).removeprefix("torch.")
        with probe.unless_out_of_memory("fit", name):
            _steps(probe, name, dtype)


def _steps(probe: Probe, name: str, dtype: torch.dtype) -> None:
    low = torch.bfloat16 if dtype == torch.float32 else None
    model = probe.model(dtype)
    optimizer = probe.optimizer(model, masters=low is None)
    packed, engine = PackedPass(model, cuda_graphs=True), RolloutEngine(model, autocast_dtype=low)
    how: dict[str, Any] = {"num_samples": SAMPLES, "temperature": 0.9, "max_new_tokens": probe.new_tokens}
    for step in range(3):
        times = [time.perf_counter()]
        engine(probe.prompts(16), seed=step, **how)
        probe.sync()
        times.append(time.perf_counter())
        model.train()
        for _ in range(2):
            made, scale = probe.packs()["apart"]
            with autocast(probe.device, low):
                loss, _ = packed(made, scale)
            loss.backward()
        probe.sync()
        times.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        probe.sync()
        times.append(time.perf_counter())
        rollout, passes, update = (b - a for a, b in itertools.pairwise(times))
        seconds = {"rollout_s": rollout, "passes_s": passes, "optimizer_s": update}
        probe.say("fit", f"{name}, step {step}", **seconds, **probe.memory())


def trainer(probe: Probe) -> None:
    """Compare PMCTrainer under bf16 autocast with and without CUDA graphs: the losses of Llama, GPT-2 and LoRA runs."""
    width = 64 if probe.tiny else 256
    ids = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    llama = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=width // 4, **ids,
    )  # fmt: skip
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    gpt2 = transformers.GPT2Config(n_embd=width, n_layer=4, n_head=4, n_positions=256, **ids, **drops)
    for name, config in {"llama": llama, "gpt2": gpt2, "llama, LoRA": llama}.items():
        curves = {}
        for graphs in (True, False):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(probe.device)
            model.generation_config = transformers.GenerationConfig(eos_token_id=2, pad_token_id=0)
            if "LoRA" in name:
                import peft

                model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
            start = time.perf_counter()
            history = _train(probe, model, graphs)
            curves[graphs] = np.array([[h["collapse_loss"], h["retain_loss"]] for h in history])
            seconds = time.perf_counter() - start
            probe.say("trainer", f"{name}, graphs {graphs}", s=seconds, steps=len(history))
        apart = np.abs(curves[True] - curves[False])
        half = len(apart) // 2
        probe.say(
            "trainer", f"{name}: losses apart", first=float(apart[:half].mean()), last=float(apart[half:].mean())
        )


def _train(probe: Probe, model: Any, graphs: bool) -> list[dict[str, Any]]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", "Question:", "Answer:", "?", *(f"w{i}" for i in range(500))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    g = np.random.default_rng(0)

    def text(length: int) -> str:
        return " ".join(f"w{i}" for i in g.integers(0, 500, size=length).tolist())

    forget = [text(8) for _ in range(16)]
    retain = [{"question": text(8), "answer": text(12)} for _ in range(16)]
    with tempfile.TemporaryDirectory() as directory:
        arguments = PMCArguments(
            output_dir=directory, num_train_epochs=1 if probe.tiny else 6, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, learning_rate=3e-3, bf16=True, use_cpu=not probe.on_gpu, report_to="none",
            disable_tqdm=True,
        )  # fmt: skip
        config = PMCConfig(
            num_samples=2 if probe.tiny else 8, max_length=48, prompt_format="tags", cuda_graphs=graphs
        )
        run = PMCTrainer(model, arguments, forget, retain, config, tokenizer)
        run.remove_callback(transformers.PrinterCallback)
        run.train()
    return [h for h in run.state.log_history if "retain_loss" in h]


def head(probe: Probe) -> None:
    """Measure weighted_nll forward and backward, its products alone, and the row kernel at other sizes."""
    for count in (40,) if probe.tiny else (400, 1600, 3000):
        _head(probe, count)
        probe.free()


def _head(probe: Probe, count: int) -> None:
    vocab, width = probe.shape["vocab_size"], probe.shape["hidden_size"]
    hidden = torch.randn(count, width, device=probe.device).to(probe.low).requires_grad_()
    weight = (torch.randn(vocab, width, device=probe.device) * width**-0.5).to(probe.low)
    targets = torch.randint(vocab, (count,), device=probe.device)
    rows = torch.arange(count, device=probe.device)
    scale = torch.full((count,), 1 / count, device=probe.device)

    def once() -> None:
        hidden.grad = weight.grad = None
        weighted_nll(hidden, weight, targets, scale, rows)[0].backward()

    for trained in (True, False):
        weight.requires_grad_(trained)
        measured = probe.wall(once)
        tflops = (6 if trained else 4) * count * width * vocab / measured["ms"] / 1e9
        probe.say("head", f"M {count}, {'trained' if trained else 'frozen'}", **measured, tflops=tflops)
    h, w = hidden.detach(), weight.detach()
    logits = torch.empty(count, vocab, device=probe.device, dtype=probe.low)
    one = torch.ones((), device=probe.device)
    parts: dict[str, Callable[[], Any]] = {
        "logits": lambda: torch.mm(h, w.T, out=logits),
        "d_hidden": lambda: logits @ w,
        "d_head": lambda: logits.T @ h,
        "scaled": lambda: scaled(w, one),
    }
    probe.say("head", f"M {count}, parts (ms)", **{name: probe.card_ms(call) for name, call in parts.items()})
    if probe.on_gpu:
        _row_kernel(probe, h, w, targets, scale, logits)


def _row_kernel(
    probe: Probe,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    from pmc_fast.kernels import nll_rows

    count = len(targets)
    offsets, logps = torch.arange(count + 1, device="cuda"), torch.zeros(count, device="cuda")
    kept = dict(nll_rows.CONFIGS["default"])
    try:
        for block, warps in ((2048, 8), (4096, 16), (8192, 16), (8192, 32), (16384, 32)):
            nll_rows.CONFIGS["default"] = {"BLOCK_V": block, "num_warps": warps}
            torch.mm(hidden, weight.T, out=logits)
            call = lambda: nll_rows.nll_rows(logits, offsets, targets, scale, logps, None, 1.0, 0.0, 1.0, True)  # noqa: E731
            probe.say("head", f"M {count}, row kernel, block {block}, warps {warps}", ms=probe.card_ms(call))
    finally:
        nll_rows.CONFIGS["default"] = kept


def training_pass(probe: Probe) -> None:
    """Measure a packed forward and backward of 8 + 8 sequences with and without CUDA graphs, and the optimizer's step."""
    modes = {"bfloat16 parameters": None, "float32 under autocast": torch.bfloat16}
    for mode, low in modes.items():
        probe.free()
        with probe.unless_out_of_memory("pass", mode):
            _passes(probe, mode, low)


def _passes(probe: Probe, mode: str, low: torch.dtype | None) -> None:
    model = probe.model(torch.float32 if low or not probe.on_gpu else torch.bfloat16).train()

    def once(packed: PackedPass, made: Pack, scale: torch.Tensor) -> None:
        model.zero_grad()
        with autocast(probe.device, low):
            loss, _ = packed(made, scale)
        loss.backward()

    for graphs in (True, False):
        packed = PackedPass(model, cuda_graphs=graphs)
        for name, (made, scale) in probe.packs().items():
            measured = probe.wall(functools.partial(once, packed, made, scale))
            probe.say("pass", f"{mode}, graphs {graphs}, {name}", tokens=len(made), **measured, **probe.memory())
        del packed
        probe.free()
    optimizer = probe.optimizer(model, masters=low is None and probe.on_gpu)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    probe.say("pass", f"optimizer, {mode}", **probe.wall(optimizer.step, 7, 2), **probe.memory())


def step(probe: Probe) -> None:
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
            "step", f"rollout, {SAMPLES * questions} rows", **measured, steps=counters["steps"],
            ms_a_step=measured["ms"] / counters["steps"], tokens_s=counters["sampled_tokens"] / seconds,
            padded_rows=counters["padded_rows"], **probe.memory(),
        )  # fmt: skip
        probe.free()


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


BLOCKS: dict[str, Callable[[Probe], None]] = {
    "fit": fit, "trainer": trainer, "head": head, "pass": training_pass, "step": step, "profile": profile, "peers": peers,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the blocks that were asked for; one that fails is named, and the others run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blocks", nargs="+", choices=list(BLOCKS))
    parser.add_argument("--shape", default="3b", choices=list(SHAPES))
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, help="a file of results, written anew after each number")
    options = parser.parse_args(arguments)
    probe = Probe(options.shape, options.quick, options.json)
    where = torch.cuda.get_device_name() if probe.on_gpu else "CPU"
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}, {options.shape}", flush=True)
    failed = 0
    for name in options.blocks:
        start = time.perf_counter()
        try:
            BLOCKS[name](probe)
        except Exception as error:
            failed += 1
            probe.say(name, f"FAILED: {type(error).__name__}", why=str(error)[:300].replace("\n", " "))
        probe.free()
        print(f"-- {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
