"""A model with the two ways to get answers from it: our engine, and Hugging Face generate as users call it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from pmc_fast.config import PMCConfig
from pmc_fast.data import Encoded, Encoder, collate, load_rows
from pmc_fast.rollout import RolloutEngine

TOFU = "examples/tofu"
SAMPLES, MAX_LENGTH, TOP_P, SEED = 20, 200, 0.95, 1


class Setting:
    """A model, the first prompts of some of the demo's files, and both ways."""

    def __init__(self, path: Path | str, files: Sequence[str], count: int) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
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
        stops = self.encoder.stops
        return sum(next((i + 1 for i, t in enumerate(ids) if t in stops), len(ids)) for ids in generated)
