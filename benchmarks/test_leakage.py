"""The 100-sample attack on the demo's 20 forget questions against Hugging Face generate.

The model knows the facts; or has forgotten them, where LEAKAGE_FORGOT names such a model's directory (`make demo` leaves
one in demo_output). Both sample from the plain distribution (T 1, no top_k, no top_p) and score every sample.
generate takes a question, 100 rows, at a time. LEAKAGE_QUESTIONS, LEAKAGE_SAMPLES and LEAKAGE_ROUNDS make a trial
smaller.

Needs the demo's models: `make demo DEMO=--short` makes them.
"""

import os

import pytest
import torch

from benchmarks.settings import MAX_LENGTH, SEED, TOFU, Setting
from examples.demo_model import finetuned_model
from pmc_fast.config import EvaluateConfig
from pmc_fast.data import load_rows
from pmc_fast.evaluation import (
    AttackResult,
    sampling_attack,
    summarize,
)
from pmc_fast.pmc.reward import rouge_l_recall

QUESTIONS = int(os.environ.get("LEAKAGE_QUESTIONS", 0))  # 0: 20, with --short 2
SAMPLES = int(os.environ.get("LEAKAGE_SAMPLES", 100))
ROUNDS = int(os.environ.get("LEAKAGE_ROUNDS", 2))
FORGOT = os.environ.get("LEAKAGE_FORGOT", "")


def setting_of(path, short: bool) -> Setting:
    setting = Setting(path, ["forget20"], QUESTIONS or (2 if short else 20))
    setting.rollout(num_samples=1, temperature=0)  # the engine's check on first use, its buffers
    return setting


@pytest.fixture(scope="module")
def knows(short) -> Setting:
    return setting_of(finetuned_model(), short)


@pytest.mark.parametrize(("attack", "prefill"), [("sampling", ""), ("prefill", EvaluateConfig.attack_prefill)])
def test_leakage(contest, knows, attack, prefill):
    against_generate(contest, knows, attack, prefill)


@pytest.mark.skipif(not FORGOT, reason="LEAKAGE_FORGOT=DIR: a model that has forgotten")
def test_after_unlearning(contest, short):
    against_generate(contest, setting_of(FORGOT, short), "after unlearning: sampling", "")


def against_generate(contest, setting: Setting, name: str, prefill: str) -> None:
    rows = load_rows(f"{TOFU}/forget20.jsonl", answers=True)[: len(setting.prompts)]
    prompts = [setting.encoder.prompt(row.question, prefill) for row in rows]
    ours: list[AttackResult] = []
    theirs: dict[str, float] = {}

    def pmc_fast() -> None:
        how = {"num_samples": SAMPLES, "prefill": prefill, "seed": SEED}
        ours[:] = [sampling_attack(setting.engine, setting.encoder, rows, **how)]

    def generate() -> None:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_length": MAX_LENGTH}
            tokens = [setting.generate([prompt], SAMPLES, **how) for prompt in prompts]
        scores = rouge_l_recall([row.answer for row in rows], [setting.encoder.answers(t) for t in tokens])
        theirs.update(
            tokens=sum(map(setting.tokens, tokens)), worst=float(scores.max(1).mean()), mean=float(scores.mean())
        )

    result = contest(
        f"{name}, {len(rows)} questions x {SAMPLES} samples",
        {"pmc_fast": pmc_fast, "generate": generate},
        rounds=ROUNDS, warmup=0, memory=False,
    )  # fmt: skip
    summary = summarize(ours[0])
    result["facts"].update(
        {name: summary[name] for name in ("rows", "sampled_tokens", "steps", "rows_per_sampled_token")},
        worst=summary["worst"]["value"], mean=summary["mean"]["value"], generate=theirs,
    )  # fmt: skip
