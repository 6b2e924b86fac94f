"""Rollouts against Hugging Face generate: SmolLM2-135M float32, 8 questions x 20 samples, max_length 200.

Three regimes: the demo's model, which knows the facts (samples share long histories), at two temperatures,
and the model it was made from, which does not (histories all differ). Then greedy answers to 200 questions.
`pmc_fast, drafts` packs the questions' greedy answers into the prefill, as PMC does after its first step.

Needs the demo's models: `make demo DEMO=--short` makes them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from benchmarks import harness
from examples.demo_model import base_model, finetuned_model
from pmc_fast.config import PMCConfig
from pmc_fast.data import Encoded, Encoder, collate, load_rows
from pmc_fast.rollout import RolloutEngine

TOFU = "examples/tofu"
SAMPLES, MAX_LENGTH, TOP_P, SEED = 20, 200, 0.95, 1


class Setting:
    """A model with the two ways to sample from it."""

    def __init__(self, path: Any, files: list[str], count: int) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.encoder = Encoder(self.tokenizer, PMCConfig(prompt_format="tags"))
        rows = [row for file in files for row in load_rows(f"{TOFU}/{file}.jsonl")]
        self.prompts = [self.encoder.prompt(row.question) for row in rows[:count]]
        self.engine = RolloutEngine(self.model)

    def rollout(self, engine: RolloutEngine | None = None, **change: Any) -> Any:
        how = {"num_samples": SAMPLES, "top_p": TOP_P, "max_length": MAX_LENGTH, "stop_ids": self.encoder.stops,
               "seed": SEED} | change  # fmt: skip
        return (engine or self.engine)(self.prompts, **how)

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], copies: int, **how: Any) -> list[list[int]]:
        batch = collate([Encoded(ids, ids) for ids in prompts], self.encoder.pad, side="left")
        out = self.model.generate(
            batch["input_ids"].repeat_interleave(copies, 0),
            attention_mask=batch["attention_mask"].repeat_interleave(copies, 0),
            generation_config=transformers.GenerationConfig(),
            pad_token_id=self.encoder.pad, eos_token_id=self.encoder.stops, **how,
        )  # fmt: skip
        return out[:, batch["input_ids"].shape[1] :].tolist()

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


@pytest.fixture(scope="module")
def knows() -> Setting:
    return Setting(finetuned_model(), ["forget20"], 8)


@pytest.fixture(scope="module")
def base() -> Setting:
    return Setting(base_model(), ["forget20"], 8)


def compare(contest: Callable[..., Any], setting: Setting, name: str, temperature: float, rounds: int) -> None:
    greedy = setting.rollout(num_samples=1, temperature=0)
    drafts = greedy.tokens
    ways = {
        "pmc_fast": {},
        "pmc_fast, drafts": {"drafts": drafts},
        "pmc_fast, no guesses": {"guesses": False},
    }
    counters = {n: setting.rollout(temperature=temperature, **way).counters for n, way in ways.items()}
    theirs: list[list[int]] = []

    def generate() -> None:
        theirs[:] = setting.samples(temperature)

    peaks = {
        "pmc_fast": harness.peak_bytes(lambda: setting.rollout(RolloutEngine(setting.model), temperature=temperature))
    }
    contestants = {
        n: (lambda way=way: setting.rollout(temperature=temperature, **way)) for n, way in ways.items()
    } | {"generate": generate}  # fmt: skip
    result = contest(name, contestants, rounds=rounds, warmup=0, memory=False)
    peaks["generate"] = harness.peak_bytes(generate)
    result["facts"].update(
        counters=counters, generate_tokens=setting.tokens(theirs), peak_bytes_of_a_first_call=peaks,
        rows_per_sampled_token={n: c["rows"] / c["sampled_tokens"] for n, c in counters.items()},
    )  # fmt: skip


def test_knows_the_facts(contest, knows):
    compare(contest, knows, "knows the facts, T 0.9", 0.9, rounds=3)


def test_knows_the_facts_hot(contest, knows):
    compare(contest, knows, "knows the facts, T 1.25", 1.25, rounds=3)


def test_does_not_know_the_facts(contest, base):
    compare(contest, base, "does not know the facts, T 0.9", 0.9, rounds=2)


def test_greedy(contest):
    """Token-identical to generate, whose best batch size is found first."""
    setting = Setting(finetuned_model(), ["forget20", "retain60", "real_authors30", "world_facts30"], 140)
    how = {"do_sample": False, "max_length": MAX_LENGTH}

    def generate(size: int) -> list[list[int]]:
        out: list[list[int]] = []
        for i in range(0, len(setting.prompts), size):
            out += setting.generate(setting.prompts[i : i + size], 1, **how)
        return out

    ours = setting.rollout(num_samples=1, temperature=0)
    same = [
        ids[: len(tokens)] == tokens for ids, [tokens] in zip(generate(32), ours.tokens, strict=True)
    ]  # fmt: skip
    contestants = {"pmc_fast": lambda: setting.rollout(num_samples=1, temperature=0)}
    contestants |= {f"generate, batches of {n}": (lambda n=n: generate(n)) for n in (16, 32, 64, 140)}
    contest("greedy, 140 questions", contestants, rounds=2, warmup=0, memory=False,
            counters=ours.counters, identical=sum(same), questions=len(same))  # fmt: skip
