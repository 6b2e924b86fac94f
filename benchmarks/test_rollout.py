"""Rollouts against Hugging Face generate: SmolLM2-135M float32, 8 questions x 20 samples, max_length 200.

Three regimes: the demo's model, which knows the facts (samples share long histories), at two temperatures,
and the model it was made from, which does not (histories all differ). Then greedy answers to 140 questions.
`pmc_fast, drafts` packs the questions' greedy answers into the prefill, as PMC does after its first step.

Needs the demo's models: `make demo DEMO=--short` makes them.
"""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.settings import SEED, Setting  # noqa: F401 - SEED: the harness writes it down
from examples.demo_model import base_model, finetuned_model
from pmc_fast.bench import measure
from pmc_fast.rollout import RolloutEngine


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
        "pmc_fast, no guesses": {"ngram_drafts": False},
    }
    made: dict[str, Any] = {}
    peaks = {
        "pmc_fast": measure.peak_bytes(lambda: setting.rollout(RolloutEngine(setting.model), temperature=temperature))
    }

    def ours(way: str) -> None:
        made[way] = setting.rollout(temperature=temperature, **ways[way])

    def generate() -> None:
        made["generate"] = setting.samples(temperature)

    def theirs() -> None:
        if "generate" in peaks:
            generate()
        else:  # of the first call, as ours: reading it costs nothing beside a call of this length
            peaks["generate"] = measure.peak_bytes(generate)

    contestants = {way: (lambda way=way: ours(way)) for way in ways} | {"generate": theirs}
    result = contest(name, contestants, rounds=rounds, warmup=0, memory=False)
    counters = {way: made[way].counters for way in ways}
    result["facts"].update(
        counters=counters, generate_tokens=setting.tokens(made["generate"]), peak_bytes_of_a_first_call=peaks,
        rows_per_sampled_token={n: c["rows"] / c["sampled_tokens"] for n, c in counters.items()},
    )  # fmt: skip


def test_knows_the_facts(contest, knows):
    compare(contest, knows, "knows the facts, T 0.9", 0.9, rounds=3)


def test_knows_the_facts_hot(contest, knows):
    compare(contest, knows, "knows the facts, T 1.25", 1.25, rounds=3)


def test_does_not_know_the_facts(contest, base):
    compare(contest, base, "does not know the facts, T 0.9", 0.9, rounds=2)


def test_greedy(contest, short):
    """Token-identical to generate, whose best batch size is found first."""
    setting = Setting(finetuned_model(), ["forget20", "retain60", "real_authors30", "world_facts30"], 140)
    setting.rollout(num_samples=1, temperature=0)  # the engine's check on first use, its buffers
    made: dict[Any, Any] = {}

    def ours() -> None:
        made["ours"] = setting.rollout(num_samples=1, temperature=0)

    def theirs(size: int) -> None:
        made[size] = setting.generate_greedily(setting.prompts, size)

    sizes = (32, 64) if short else (16, 32, 64, 140)  # the others are slower
    contestants = {"pmc_fast": ours} | {f"generate, batches of {n}": (lambda n=n: theirs(n)) for n in sizes}
    result = contest("greedy, 140 questions", contestants, rounds=2, warmup=0, memory=False)
    same = [ids[: len(tokens)] == tokens for ids, [tokens] in zip(made[32], made["ours"].tokens, strict=True)]
    result["facts"].update(counters=made["ours"].counters, identical=sum(same), questions=len(same))
