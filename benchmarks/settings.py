"""What suites share: a model with our way and Hugging Face's to get answers from it, and with a training step's parts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from pmc_fast import PMC
from pmc_fast.bench.measure import optimizer_step
from pmc_fast.config import PMCConfig
from pmc_fast.data import (
    Encoded,
    Encoder,
    collate,
    load_rows,
)
from pmc_fast.reference import Reference, answer_length
from pmc_fast.rollout import RolloutEngine

TOFU = "examples/tofu"
SAMPLES, MAX_LENGTH, TOP_P, SEED = 20, 200, 0.95, 1


def _load(path: Path | str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


class Setting:
    """A model (of `path`, or another with its tokenizer), the first prompts of some of the demo's files, and both ways."""

    def __init__(self, path: Path | str, files: Sequence[str], count: int, *, model: Any = None) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.model = (_load(path) if model is None else model).eval()
        self.encoder = Encoder(self.tokenizer, PMCConfig(prompt_format="tags"))
        rows = [row for file in files for row in load_rows(f"{TOFU}/{file}.jsonl")]
        self.prompts = [self.encoder.prompt(row.question) for row in rows[:count]]
        self.engine = RolloutEngine(self.model)

    def rollout(self, engine: RolloutEngine | None = None, **change: Any) -> Any:
        how: dict[str, Any] = {"num_samples": SAMPLES, "top_p": TOP_P, "max_length": MAX_LENGTH, "stop_ids": self.encoder.stops,
               "seed": SEED} | change  # fmt: skip
        return (engine or self.engine)(self.prompts, **how)

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], copies: int, **how: Any) -> list[list[int]]:
        batch = collate([Encoded(ids, ids) for ids in prompts], self.encoder.pad, side="left")
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        out = self.model.generate(
            batch["input_ids"].repeat_interleave(copies, 0),
            attention_mask=batch["attention_mask"].repeat_interleave(copies, 0),
            generation_config=transformers.GenerationConfig(),
            pad_token_id=self.encoder.pad, eos_token_id=self.encoder.stops, **how,
        )  # fmt: skip
        return out[:, batch["input_ids"].shape[1] :].tolist()

    def generate_greedily(self, prompts: Sequence[list[int]], size: int, *, by_length: bool = False) -> Any:
        """Answer prompts in batches of `size`, in the order of their lengths or as they come."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) if by_length else i)
        said: dict[int, list[int]] = {}
        for i in range(0, len(order), size):
            batch = order[i : i + size]
            made = self.generate([prompts[j] for j in batch], 1, do_sample=False, max_length=MAX_LENGTH)
            said |= dict(zip(batch, made, strict=True))
        return [said[i] for i in range(len(prompts))]

    def samples(self, temperature: float) -> list[list[int]]:
        """Sample as the published code does."""
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return self.generate(
                self.prompts, SAMPLES, do_sample=True, temperature=temperature, top_k=50, top_p=TOP_P,
                max_length=MAX_LENGTH,
            )  # fmt: skip

    def tokens(self, generated: list[list[int]]) -> int:
        return sum(answer_length(ids, self.encoder.stops) for ids in generated)


class StepSetting:
    """A model and a sampled step of the demo's questions: what is left is to train on it.

    Where not `sampled`, the step's answers are the true ones: what a model of random weights says need not be text.
    """

    def __init__(
        self, path: Path | str, count: int, *, model: Any = None, sampled: bool = True, **settings: Any
    ) -> None:
        self.count = count
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.model = _load(path) if model is None else model
        self.forget = load_rows(f"{TOFU}/forget20.jsonl")[:count]
        self.retain = load_rows(f"{TOFU}/retain60.jsonl", answers=True)[:count]
        own: dict[str, Any] = {
            "num_samples": SAMPLES,
            "temperature": 1.25,
            "prompt_format": "tags",
            "retain_weight": 1.25,
        }
        self.config = PMCConfig(**own | settings)
        self.pmc = PMC(self.model, self.tokenizer, self.config, [row.question for row in self.forget])
        if sampled:
            self.pmc.prepare()
        else:
            self.pmc.initial_answers = [row.answer or "" for row in self.forget]
            for i, answer in enumerate(self.pmc.initial_answers):
                self.pmc.store.offer(i, [[answer, 1.0]], 0.0)
        self.step = self.pmc.sample(range(count))
        self.kept = self.pmc.encode_retain(self.retain)
        self.model.train()

    def published(self) -> Reference:
        """Return the reference with the same answers in its store."""
        questions, truths = [r.question for r in self.forget], [r.answer or "" for r in self.forget]
        reference = Reference(self.model, self.tokenizer, self.config, questions, tracked_answers=truths)
        for i in range(self.count):
            [[answer, _]] = self.pmc.store.answer(i)
            reference.sampled_data[i] = {"answer": answer, "score": self.pmc.store.score(i)}
        return reference


def with_optimizer(model: Any, backward: Any, **how: Any) -> Any:
    """Return a step: backward, AdamW at rate 0, gradients cleared."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return optimizer_step(backward, torch.optim.AdamW(trained, lr=0.0, **how))
