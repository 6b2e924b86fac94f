"""Other ways to draw the samples of a rollout, behind one signature: what `benchmarks.peers` measures beside our engine.

A peer is made for one task and gives, from a seed, its tokens as `[question][sample]`. Those that hold a copy of the weights
take the model's current ones by `sync`; the others read them where they are. What can't run here raises Unavailable.
"""

import importlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from pmc_fast.data import Encoded, collate
from pmc_fast.rollout import RolloutEngine

Answers = list[list[list[int]]]


class Unavailable(Exception):
    """A peer can't be measured here; the message says why."""


@dataclass(frozen=True)
class Task:
    """N samples of each prompt, of at most `new_tokens` tokens each, which `stops` end."""

    model: Any
    prompts: Sequence[list[int]]
    num_samples: int
    new_tokens: int
    stops: tuple[int, ...]
    pad: int
    temperature: float
    top_k: int
    top_p: float

    def generation(self, **more: Any) -> transformers.GenerationConfig:
        """Return the settings of transformers' ways."""
        return transformers.GenerationConfig(
            do_sample=True, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            max_new_tokens=self.new_tokens, num_return_sequences=self.num_samples, pad_token_id=self.pad,
            eos_token_id=list(self.stops) or -1, **more,
        )  # fmt: skip

    def by_question(self, flat: Sequence[Sequence[int]]) -> Answers:
        """Return answers that are listed question after question."""
        n = self.num_samples
        return [[list(ids) for ids in flat[i : i + n]] for i in range(0, len(flat), n)]


class Ours:
    """The engine of this package."""

    def __init__(self, task: Task) -> None:
        self.task, self.engine = task, RolloutEngine(task.model)

    def sample(self, seed: int) -> Answers:
        t = self.task
        return self.engine(
            t.prompts, num_samples=t.num_samples, max_new_tokens=t.new_tokens, stop_ids=t.stops, seed=seed,
            temperature=t.temperature, top_k=t.top_k, top_p=t.top_p,
        ).tokens  # fmt: skip


class Generate:
    """transformers' `generate` with num_return_sequences, prompts padded on the left."""

    def __init__(self, task: Task) -> None:
        self.task, self.settings = task, task.generation()
        batch = collate([Encoded(ids, ids) for ids in task.prompts], task.pad, side="left")
        self.inputs = {name: batch[name].to(task.model.device) for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def sample(self, seed: int) -> Answers:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made = self.task.model.generate(**self.inputs, generation_config=self.settings)
        return self.task.by_question(made[:, self.inputs["input_ids"].shape[1] :].tolist())


class StaticCompiled(Generate):
    """`generate` with a static cache, whose decoding step torch.compile compiles; CUDA graphs on a GPU."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        # generate compiles by itself on accelerators alone, and leaves out modes that need one
        how = transformers.CompileConfig(mode="default" if task.model.device.type == "cpu" else "reduce-overhead")
        how._compile_all_devices = True
        self.settings = task.generation(cache_implementation="static", compile_config=how)
        torch.compiler.reset()


class GenerateBatch:
    """transformers' continuous batching: paged keys and values, requests of one prompt forked after its prefill.

    Without flash attention each row's attention is computed over the whole pool, so that few requests at a time are
    faster; on CUDA the number is transformers' own.
    """

    PAGE = 32  # tokens; transformers' default of 256 would hold each of these answers in a page of its own
    CPU_REQUESTS = 20  # at a time

    def __init__(self, task: Task) -> None:
        if not hasattr(task.model, "generate_batch") or not hasattr(transformers, "ContinuousBatchingConfig"):
            raise Unavailable(
                f"transformers {transformers.__version__} has no generate_batch with a config of its own"
            )
        self.task, how = task, {}
        if task.model.device.type == "cpu":  # by default it takes 60 % of the machine's memory
            longest = max(map(len, task.prompts)) + task.new_tokens
            pages = -(-longest // self.PAGE) + 1
            how = {
                "num_blocks": pages * (self.CPU_REQUESTS + 2), "max_requests_per_batch": self.CPU_REQUESTS,
                "max_batch_tokens": max(256, longest), "page_size": self.PAGE,
            }  # fmt: skip
        self.settings, self.how = task.generation(), how

    def sample(self, seed: int) -> Answers:
        t = self.task
        how = transformers.ContinuousBatchingConfig(seed=seed, **self.how)
        made = t.model.generate_batch(
            [list(p) for p in t.prompts], generation_config=self.settings, continuous_batching_config=how
        )
        tokens = [output.generated_tokens for output in made.values()]
        if len(tokens) != len(t.prompts) * t.num_samples or any(output.error for output in made.values()):
            errors = sorted({str(output.error) for output in made.values() if output.error})
            raise Unavailable(f"generate_batch gave {len(tokens)} answers: {'; '.join(errors) or 'see its log'}")
        return t.by_question(tokens)


class VLLM:
    """vLLM, one request of n samples for each prompt, prefix caching on; `sync` loads the weights as TRL does."""

    MEMORY = 0.4  # of the card: the model that is trained is on it too
    CPU_CACHE = 4 << 30  # bytes

    def __init__(self, task: Task) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, for `sync`
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # this process's threads are the others' too
        try:
            self.vllm = importlib.import_module("vllm")
        except Exception as error:  # absent, or built for other versions of torch or CUDA
            raise Unavailable(f"{type(error).__name__}: {error}") from error
        self.task = task
        self.folder = tempfile.TemporaryDirectory(prefix="vllm_peer_")
        task.model.save_pretrained(self.folder.name)
        on_cpu = task.model.device.type == "cpu"
        how: dict[str, Any] = {"gpu_memory_utilization": self.MEMORY}
        if on_cpu:  # eager: Inductor takes minutes there for a model of 30 layers
            how = {"kv_cache_memory_bytes": self.CPU_CACHE, "enforce_eager": True}
        self.engine = self.vllm.LLM(
            self.folder.name, skip_tokenizer_init=True, enable_prefix_caching=True,
            max_model_len=max(map(len, task.prompts)) + task.new_tokens,
            max_num_seqs=len(task.prompts) * task.num_samples,
            dtype=str(task.model.dtype).removeprefix("torch."), **how,
        )  # fmt: skip

    def sample(self, seed: int) -> Answers:
        t = self.task
        how = self.vllm.SamplingParams(  # a seed of its own would cost each request its fast sampler
            n=t.num_samples, temperature=t.temperature, top_k=t.top_k, top_p=t.top_p, max_tokens=t.new_tokens,
            stop_token_ids=list(t.stops), ignore_eos=True, detokenize=False,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made = self.engine.generate([{"prompt_token_ids": list(p)} for p in t.prompts], how, use_tqdm=False)
        return [[list(one.token_ids) for one in request.outputs] for request in made]

    def sync(self) -> None:
        self.engine.apply_model(lambda model: model.load_weights(self.task.model.named_parameters()))
        self.engine.reset_prefix_cache()  # holds keys and values of the weights before
