"""Unlearning with and without `--skip-known-forgotten`: 20 facts that the demo's model was taught, 20 it never saw.

How many of each kind are left out at several thresholds comes first: one rollout of all 40 questions, judged by their
truths. Then whole runs of the command's job, evaluations left out of their time: the clock is the sum of the stages
that differ (looking for known ones, initial answers, unlearning). Both are evaluated on all 40 questions, kind by kind, on
paraphrases of the taught ones and on the pairs to keep.

    python -m pytest benchmarks/test_skip.py                                     # about half an hour on two cores
    SKIP_EPOCHS=0.2 SKIP_QUESTIONS=2 SKIP_SAMPLES=2 python -m pytest benchmarks/test_skip.py     # a trial

SKIP_THRESHOLD is the run's `--skip-threshold`, 0.4 here. The command's default, 0, leaves out none of these questions:
whole sentences share "the" or "is" with their truths. Needs the demo's models: `make demo DEMO=--short` makes them.
"""

import dataclasses
import json
import os
import time

import numpy as np
import pytest

from benchmarks.settings import TOFU
from examples.demo_model import finetuned_model
from pmc_fast.config import UnlearnConfig
from pmc_fast.data import Encoder, load_rows
from pmc_fast.evaluation import known_forgotten, sampling_attack
from pmc_fast.jobs import unlearn
from pmc_fast.models.loading import load_model, load_tokenizer, resolve_device
from pmc_fast.rollout import RolloutEngine

EPOCHS = float(os.environ.get("SKIP_EPOCHS", 12))
QUESTIONS = int(os.environ.get("SKIP_QUESTIONS", 20))  # of each kind
SAMPLES = int(os.environ.get("SKIP_SAMPLES", 10))
THRESHOLD = float(os.environ.get("SKIP_THRESHOLD", 0.4))
THRESHOLDS = (0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5)
STAGES = ("looking for what is known to be forgotten", "initial answers", "unlearning")
SEED = 0


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> UnlearnConfig:
    directory = tmp_path_factory.mktemp("skip")
    rows = [r for f in ("forget20", "untaught20") for r in load_rows(f"{TOFU}/{f}.jsonl", answers=True)[:QUESTIONS]]
    lines = [json.dumps({"question": r.question, "answer": r.answer}) + "\n" for r in rows]
    (directory / "both.jsonl").write_text("".join(lines))
    values = {
        "model": str(finetuned_model()), "forget": str(directory / "both.jsonl"), "retain": f"{TOFU}/retain60.jsonl",
        "paraphrased": f"{TOFU}/forget20.jsonl", "num_samples": SAMPLES, "num_epochs": EPOCHS, "seed": SEED,
        "skip_threshold": THRESHOLD, "output": str(directory / "out"),
    }  # fmt: skip
    return UnlearnConfig.merge("small", values)


def test_what_is_left_out(contest, config):
    loaded = load_model(config.model, device=resolve_device("auto"))
    engine = RolloutEngine(loaded.model, autocast_dtype=loaded.autocast_dtype)
    encoder = Encoder(load_tokenizer(config.model), config)
    rows = load_rows(config.forget, answers=True)
    how = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p, "seed": SEED}
    found = []

    def attack():
        found[:] = [sampling_attack(engine, encoder, rows, num_samples=SAMPLES, **how)]

    result = contest(
        f"judging {len(rows)} questions x {SAMPLES} samples", {"pmc_fast": attack}, rounds=1, warmup=0, memory=False
    )
    scores = found[0].scores
    left_out = {}
    for threshold in THRESHOLDS:
        known = known_forgotten(scores, threshold)
        left_out[str(threshold)] = {
            "taught": sum(i < QUESTIONS for i in known), "untaught": sum(i >= QUESTIONS for i in known)
        }  # fmt: skip
    worst = scores.max(1)
    result["facts"].update(
        left_out=left_out, questions_of_each=QUESTIONS,
        worst={"taught": np.sort(worst[:QUESTIONS]).round(3).tolist(), "untaught": np.sort(worst[QUESTIONS:]).round(3).tolist()},
    )  # fmt: skip


def test_runs(contest, config, tmp_path):
    made, kinds = {}, {}

    def run(name: str, **change) -> None:
        output = tmp_path / f"{name}.{time.time_ns()}"
        made[name] = unlearn.unlearn(dataclasses.replace(config, output=str(output), **change))
        rows = [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]
        recalls = [r["rouge_l_recall"] for r in rows if (r["model"], r["set"]) == ("after", "forget")]
        kinds[name] = {"taught": np.mean(recalls[:QUESTIONS]), "untaught": np.mean(recalls[QUESTIONS:])}

    contestants = {
        "without": lambda: run("without"),
        "skip_known_forgotten": lambda: run("skip_known_forgotten", skip_known_forgotten=True),
    }
    result = contest(f"unlearning {2 * QUESTIONS} questions", contestants, rounds=1, warmup=0, memory=False)
    facts = {
        name: {
            "seconds": sum(of["stage_seconds"].get(stage, 0.0) for stage in STAGES),
            "steps": len(of["history"]),
            "left_out": len(of["known_forgotten"]["rows"]) if "known_forgotten" in of else 0,
            "forget_recall": kinds[name],
            "recalls": {k: s["rouge_l_recall"] for k, s in of["after"]["sets"].items()},
            "degenerate": {k: s["degenerate"] for k, s in of["after"]["sets"].items()},
        }
        for name, of in made.items()
    }
    result["facts"].update(threshold=THRESHOLD, epochs=EPOCHS, runs=facts)
