"""What the host does in series in a decode step of a rollout: plan, pad and copy, advance; milliseconds of its own time at 160 and 320 rows.

    python -m benchmarks.host_steps [--tokens 130] [--rounds 7]

Needs no model and no GPU: draws are dice, and arrays are copied within the host's memory, so that a GPU's copy itself is not in it.
"""

import argparse
import statistics
import time
from collections import defaultdict

import numpy as np
import torch

from pmc_fast.ops import native
from pmc_fast.rollout.inputs import StepInputs

PROMPT, SAMPLES, VOCAB = 60, 20, 50_000


def once(questions: int, tokens: int) -> dict[str, float]:
    """Return milliseconds a step of each part, over the steps of a rollout whose samples all differ."""
    dice = np.random.default_rng(0)
    trie = native.cpu().RolloutTrie(2**31 - 1, [], 0, True)
    for q in range(questions):
        trie.add(dice.integers(0, VOCAB, PROMPT).tolist(), q, list(range(SAMPLES)), tokens, [])
    inputs = StepInputs(torch.device("cpu"), pads=True)
    spent: dict[str, float] = defaultdict(float)
    steps = 0
    while True:
        start = time.thread_time()
        plan = trie.plan(2048, 0)
        planned = time.thread_time()
        if plan is None:
            break
        inputs(plan, trie.span, 2048)
        copied = time.thread_time()
        draws = dice.integers(0, VOCAB, len(plan["samples"])), np.zeros(len(plan["samples"]))
        mass = np.ones(len(plan["logit_rows"]))
        drawn = time.thread_time()
        trie.advance(*draws, mass)
        taken = time.thread_time()
        if len(plan["tokens"]) == SAMPLES * questions:
            steps += 1
            spent["plan"] += planned - start
            spent["pad and copy"] += copied - planned
            spent["advance"] += taken - drawn
    return {name: 1e3 * seconds / steps for name, seconds in spent.items()}


def main() -> None:
    """Print medians of rounds, their smallest and largest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=130)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rounds: dict[str, list[float]] = defaultdict(list)
    torch.set_num_threads(1)
    once(8, 8)
    for _ in range(options.rounds):
        for questions in (8, 16):
            found = once(questions, options.tokens)
            for name, ms in (found | {"all": sum(found.values())}).items():
                rounds[f"{SAMPLES * questions} rows: {name}"].append(ms)
    for name, of in sorted(rounds.items()):
        print(f"{name:28} {statistics.median(of):.3f} ms a step ({min(of):.3f} to {max(of):.3f})")


if __name__ == "__main__":
    main()
