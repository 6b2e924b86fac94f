"""Evaluating the demo's model: greedy answers to 160 questions, scored; our engine against Hugging Face generate.

20 forget questions, the same in other words, 60 kept pairs and 60 of general knowledge. generate is given batch sizes
that a user would choose, with prompts as they come and sorted by length: the best of these is the baseline. Then
likelihoods, as TOFU's metrics need them: seven candidate answers a question, in one pass against padded batches.

Needs the demo's models: `make demo DEMO=--short` makes them.
"""

import random

import pytest
import torch

from benchmarks.settings import TOFU, Setting
from examples.demo_model import finetuned_model
from pmc_fast.config import UnlearnConfig
from pmc_fast.data import Row, collate, load_rows
from pmc_fast.evaluation import (
    encode_candidates,
    evaluate,
    greedy_answers,
    load_sets,
    mean_nlls,
)
from pmc_fast.models.packed_forward import PackedPass
from pmc_fast.utils.labels import IGNORED

SIZES = (16, 64)
CANDIDATES = 7  # of a TOFU question: the answer, its paraphrase, five wrong ones


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting(finetuned_model(), ["forget20"], 1)


def demo_sets():
    values = {"paraphrased": f"{TOFU}/forget20.jsonl",
              "general": [f"{TOFU}/real_authors30.jsonl", f"{TOFU}/world_facts30.jsonl"]}  # fmt: skip
    forget = load_rows(f"{TOFU}/forget20.jsonl", answers=True)
    return load_sets(UnlearnConfig(**values), forget, load_rows(f"{TOFU}/retain60.jsonl", answers=True))


def test_evaluation(contest, setting, short):
    sets, encoder = demo_sets(), setting.encoder
    setting.rollout(num_samples=1, temperature=0)  # the engine's check on first use
    made = {}

    def ours(questions):
        return greedy_answers(setting.engine, encoder, questions)

    def theirs(questions, size, by_length):
        prompts = [encoder.prompt(q) for q in questions]
        return encoder.answers(setting.generate_greedily(prompts, size, by_length=by_length))

    def all_sets(name, answer):
        made[name] = evaluate(answer, sets)

    def set_by_set():
        return [evaluate(ours, [s]) for s in sets]

    contestants = {"pmc_fast": lambda: all_sets("pmc_fast", ours), "pmc_fast, set by set": set_by_set}
    for size in SIZES[1:] if short else SIZES:  # batches of 16 are the slower ones
        for by_length in (False, True):
            name = f"generate, batches of {size}{', by length' if by_length else ''}"
            contestants[name] = lambda name=name, size=size, by_length=by_length: all_sets(
                name, lambda questions: theirs(questions, size, by_length)
            )
    result = contest("evaluation, 160 questions", contestants, rounds=2, warmup=0, memory=False)
    result["facts"].update(
        questions=sum(len(s.rows) for s in sets),
        recalls={
            name: {k: s["rouge_l_recall"] for k, s in made[name]["sets"].items()}
            for name in ("pmc_fast", "generate, batches of 64, by length")
        },
    )


def candidates(rows: list[Row]) -> list[tuple[str, list[str]]]:
    """Give each question its own answer and six of the others'."""
    draw = random.Random(0)
    return [
        (r.question, [r.answer or "", *(o.answer or "" for o in draw.sample(rows, CANDIDATES - 1))]) for r in rows
    ]


@torch.no_grad()
def padded_nlls(setting: Setting, groups, size: int) -> list[float]:
    """Score the answers as TOFU's code does: padded batches, logits of every token."""
    flat = [s for group in groups for s in group]
    nlls: list[float] = []
    for i in range(0, len(flat), size):
        batch = collate(flat[i : i + size], setting.encoder.pad)
        logits = setting.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        nlls += (losses.sum(1) / (labels != IGNORED).sum(1)).tolist()
    return nlls


def test_likelihoods(contest, setting):
    rows = load_rows(f"{TOFU}/forget20.jsonl", answers=True)
    groups = encode_candidates(setting.encoder, TOFU, candidates(rows))
    packed = PackedPass(setting.model)
    ours = [nll for of in mean_nlls(packed, groups) for nll in of]
    error = max(abs(a - b) for a, b in zip(ours, padded_nlls(setting, groups, 32), strict=True))
    contestants = {"pmc_fast": lambda: mean_nlls(packed, groups)}
    contestants |= {f"padded batches of {n}": (lambda n=n: padded_nlls(setting, groups, n)) for n in SIZES}
    contest("likelihoods, 20 questions x 7 answers", contestants, rounds=5, warmup=1, largest_error=error)
