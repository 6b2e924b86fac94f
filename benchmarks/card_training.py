"""Optimizer steps by PMCTrainer on a card, of random weights and tokens: time and peak memory by part."""

import contextlib
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers

from pmc_fast import PMCArguments, PMCConfig, PMCTrainer
from pmc_fast.data import Encoded
from pmc_fast.models.packed_forward import PackedPass
from pmc_fast.pmc.reward import rouge_l_recall

from .card import ANSWER, QUESTION, SAMPLES, SYSTEM, Probe, spread

LENGTH = 200  # tokens of a question with its answer, at most: the published max_length
ENDS_AFTER = 50  # tokens of a sampled answer in the mean, about TOFU's
BATCH, ACCUMULATION = 8, 2
WARM_UP = 3  # steps: checks, allocations, captures


class Parts(transformers.TrainerCallback):
    """Times and peaks of a trainer's steps, by part: rollout, forward, backward, optimizer.

    On a card by events, whose times are read at the end of a step. "step" is the host's time from one end to the next,
    in the first step with the initial answers. The host waits for the card between steps, so that nothing is gained by
    numbers that are read a step later: so the last steps, as many as `whole` says, are timed as one, without parts.
    """

    def __init__(self, probe: Probe, whole: int = 0) -> None:
        self.probe, self.whole = probe, whole
        self.whole_ms = 0.0  # of one of the last steps, in the mean
        self.apart = True  # time by part
        self.steps: list[dict[str, float]] = []  # milliseconds
        self.peaks: dict[str, float] = defaultdict(float)  # gigabytes allocated
        self._seen: list[tuple[str, Any, Any]] = []
        self._optimizer = contextlib.ExitStack()
        self._before = 0.0

    def _now(self) -> Any:
        if not self.probe.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.apart:
            yield
            return
        if self.probe.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        begin = self._now()
        yield
        self._seen.append((name, begin, self._now()))
        if self.probe.on_gpu:
            self.peaks[name] = max(self.peaks[name], torch.cuda.max_memory_allocated() / 1e9)

    def of(self, name: str, function: Any) -> Any:
        def timed(*args: Any, **how: Any) -> Any:
            with self.part(name):
                return function(*args, **how)

        return timed

    @contextlib.contextmanager
    def watching(self, trainer: Any) -> Iterator[None]:
        """Time what `trainer` does."""
        trainer.add_callback(self)
        with (
            mock.patch.object(trainer.pmc, "prepare", self.of("initial answers", trainer.pmc.prepare)),
            mock.patch.object(trainer.pmc, "sample", self.of("rollout", trainer.pmc.sample)),
            mock.patch.object(PackedPass, "__call__", self.of("forward", PackedPass.__call__)),
            mock.patch.object(trainer.accelerator, "backward", self.of("backward", trainer.accelerator.backward)),
        ):
            self.probe.sync()
            self._before = time.perf_counter()
            yield

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._optimizer.enter_context(self.part("optimizer"))

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._optimizer.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        left = state.max_steps - state.global_step
        if not self.apart:
            if not left:
                self.probe.sync()
                self.whole_ms = 1e3 * (time.perf_counter() - self._before) / self.whole
            return
        self.probe.sync()
        times: dict[str, float] = defaultdict(float)
        for name, begin, end in self._seen:
            times[name] += begin.elapsed_time(end) if self.probe.on_gpu else 1e3 * (end - begin)
        now = time.perf_counter()
        self.steps.append({"step": 1e3 * (now - self._before)} | times)
        self._before = now
        self._seen.clear()
        self.apart = left > self.whole or not self.whole

    def spread(self, warm_up: int) -> dict[str, dict[str, Any]]:
        """Return each part's milliseconds over the steps after the first few."""
        steps = self.steps[warm_up:]
        return {name: spread([step.get(name, 0.0) for step in steps]) for name in steps[-1]}


class Counted:
    """ROUGE-L recall of at least 0.01, and how many answers it was asked of.

    Answers of random weights have nothing in common with the initial ones: their questions would not be sampled again.
    So every question is, in every epoch, as in the published algorithm.
    """

    def __init__(self) -> None:
        self.answers, self.words = 0, 0

    def __call__(self, initial: Sequence[str], candidates: Sequence[Sequence[str]], min_len: int = 0) -> np.ndarray:
        self.answers += sum(map(len, candidates))
        self.words += sum(len(text.split()) for texts in candidates for text in texts)
        return np.maximum(rouge_l_recall(initial, candidates, min_len), 0.01)


def tokenizer(vocab: int) -> Any:
    """Return a tokenizer of as many words, for the reward, which compares texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", "Question:", "Answer:", "?"]
    words += [f"w{i}" for i in range(vocab - len(words))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@torch.no_grad()
def end_answers(model: Any, prompts: Sequence[Sequence[int]], tokens: int, config: PMCConfig) -> float:
    """Give the head a frozen bias by which answers end after about `tokens` tokens, and return it.

    Random weights spread their probability over all of the vocabulary, so that no sampled answer would end.
    """
    eos, head = model.config.eos_token_id, model.get_output_embeddings()
    ids = torch.tensor([list(prompt) for prompt in prompts], device=head.weight.device)
    head.weight[eos] = 0  # its logit is the bias
    logits = model(input_ids=ids).logits[:, -1].float()
    logits[:, eos] = -math.inf
    others = (logits.topk(config.top_k - 1).values / config.temperature).logsumexp(-1).mean().item()
    bias = config.temperature * (others - math.log(tokens - 1))
    values = torch.zeros(len(head.weight), device=head.weight.device, dtype=head.weight.dtype)
    values[eos] = bias
    head.bias = torch.nn.Parameter(values, requires_grad=False)
    return bias


def trainer_of(
    probe: Probe, model: Any, directory: str, questions: int, *, low: torch.dtype | None = None, graphs: bool = True,
    **arguments: Any,
) -> PMCTrainer:  # fmt: skip
    """Return a trainer of so many questions, token ids that begin with one system prompt, and as many retain pairs."""
    g, vocab = np.random.default_rng(0), probe.shape["vocab_size"]
    system = g.integers(7, vocab, SYSTEM).tolist()
    prompts = [system + g.integers(7, vocab, QUESTION).tolist() for _ in range(questions)]
    answers = [[*g.integers(7, vocab, ANSWER - 1).tolist(), probe.shape["eos_token_id"]] for _ in prompts]
    retain = [
        Encoded(system + question + answer, [-100] * (SYSTEM + QUESTION) + answer)
        for answer in answers
        for question in [g.integers(7, vocab, QUESTION).tolist()]
    ]
    config = PMCConfig(
        num_samples=3 if probe.tiny else SAMPLES, max_length=90 if probe.tiny else LENGTH, cuda_graphs=graphs
    )
    end_answers(model, prompts[:16], ENDS_AFTER, config)
    values: dict[str, Any] = {
        "output_dir": directory, "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATION,
        "bf16": low is not None, "use_cpu": not probe.on_gpu, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    words = tokenizer(vocab)
    trainer = PMCTrainer(model, PMCArguments(**values | arguments), prompts, retain, config, words, reward=Counted())
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def drawn(trainer: PMCTrainer) -> dict[str, float]:
    """Return how many answers were sampled, and their mean length without the end: a word is a token."""
    reward: Any = trainer.pmc.reward
    return {"answers": reward.answers, "mean_tokens": reward.words / max(reward.answers, 1)}


def graphs_of(trainer: PMCTrainer) -> dict[str, Any]:
    """Return how often graphs of training passes were captured and replayed, and how packs were bounded since.

    A step that runs out of memory is made again, and all later ones, without graphs and in packs of at most `pack_limit`
    tokens: then the counts are of no graph. `None`: as the configuration says.
    """
    loss = trainer.pmc._loss
    cache = None if loss.packed.graphs is None else loss.packed.graphs.cache
    captures, replays = (0, 0) if cache is None else (cache.captures, cache.replays)
    return {"graph_captures": captures, "graph_replays": replays, "pack_limit": loss.limit}


def step(probe: Probe) -> None:
    """Measure optimizer steps of 2 x (8 + 8) sequences, rollout included: each part's median and range."""
    dtype, low = next(iter(probe.modes().values()))
    _steps(probe, "step", probe.model(dtype), probe.rounds, low=low)


def memory(probe: Probe) -> None:
    """Measure the peak of each part of a step, in both precisions, and the peak without CUDA graphs."""
    for name, (dtype, low) in probe.modes().items():
        for graphs in (True, False) if probe.on_gpu else (False,):
            probe.free()
            with probe.unless_out_of_memory("memory", f"{name}, graphs {graphs}"):
                _steps(probe, "memory", probe.model(dtype), 2, f"{name}, graphs {graphs}", low=low, graphs=graphs)


def lora(probe: Probe) -> None:
    """Measure optimizer steps of LoRA adapters on all linear layers of a frozen bfloat16 base."""
    import peft

    base = probe.model(torch.bfloat16 if probe.on_gpu else torch.float32)
    low = torch.bfloat16 if probe.on_gpu else None
    model = peft.get_peft_model(base, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    _steps(probe, "lora", model, probe.rounds, low=low)


def _steps(probe: Probe, block: str, model: Any, rounds: int, name: str = "", **how: Any) -> None:
    parts, steps = Parts(probe, rounds), WARM_UP + 2 * rounds
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_of(probe, model, directory, 16 if probe.tiny else 64, max_steps=steps, **how)
        with parts.watching(trainer):
            trainer.train()
    measured = probe.memory()
    if parts.peaks:
        measured["peak_gb"] = max(parts.peaks.values())
    graphs, before = graphs_of(trainer), f"{name}: " if name else ""
    for part, times in parts.spread(WARM_UP).items():
        peak = {"peak_gb": parts.peaks[part]} if part in parts.peaks else {}
        waits = {"waits": "for the card after each step"} if part == "step" else {}
        probe.say(block, f"{before}{part}", **times, **peak, **graphs, **waits)
    probe.say(block, f"{before}steps without a wait", ms=parts.whole_ms, steps=rounds, **graphs)
    probe.say(block, f"{before}all", **drawn(trainer), **measured, **graphs)
