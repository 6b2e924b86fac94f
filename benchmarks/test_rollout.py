"""Rollouts against Hugging Face generate: SmolLM2-135M float32, 8 questions x 20 samples, max_length 200.

Three regimes: the demo's model, which knows the facts (samples share long histories), at two temperatures,
and the model it was made from, which does not (histories all differ). Then greedy answers to 200 questions.
`pmc_fast, drafts` packs the questions' greedy answers into the prefill, as PMC does after its first step.

Needs the demo's models: `make demo DEMO=--short` makes them.
"""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import harness
from benchmarks.settings import SEED, Setting  # noqa: F401 - SEED: the harness writes it down
from examples.demo_model import base_model, finetuned_model
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
    generate = lambda size: setting.generate_greedily(setting.prompts, size)  # noqa: E731
    ours = setting.rollout(num_samples=1, temperature=0)
    same = [
        ids[: len(tokens)] == tokens for ids, [tokens] in zip(generate(32), ours.tokens, strict=True)
    ]  # fmt: skip
    contestants = {"pmc_fast": lambda: setting.rollout(num_samples=1, temperature=0)}
    contestants |= {f"generate, batches of {n}": (lambda n=n: generate(n)) for n in (16, 32, 64, 140)}
    contest("greedy, 140 questions", contestants, rounds=2, warmup=0, memory=False,
            counters=ours.counters, identical=sum(same), questions=len(same))  # fmt: skip
