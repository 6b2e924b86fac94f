"""How much longer rollouts and training steps take beside a program that keeps one of the cores busy.

    python -m benchmarks.busy_core [--rounds 7] [--json benchmarks/results/busy_core.json]

Each round runs every contestant alone, and again beside a loop that is bound to the last core, at equal priority. A
laptop or a shared server is like that. With two cores half of the work's threads then share theirs. The model is the untouched
one of the demo, whose samples share little.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from examples.demo_model import TOFU, base_model
from pmc_fast.bench.contests import Workload, rollouts, training_step
from pmc_fast.bench.measure import ROUNDS, Contestant, summarize, time_round
from pmc_fast.config import BenchConfig
from pmc_fast.data import load_rows
from pmc_fast.models import loading

from . import harness

RESULT = harness.RESULTS / "busy_core.json"
QUESTIONS, SAMPLES, LONGEST = 4, 5, 100
LOOP = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"  # not longer than what it is beside


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep the last of this process's cores busy."""
    last = max(os.sched_getaffinity(0))
    loop = subprocess.Popen([sys.executable, "-c", LOOP], preexec_fn=lambda: os.sched_setaffinity(0, {last}))
    try:
        yield
    finally:
        loop.kill()
        loop.wait()


def contestants(
    model: Path | str, *, batch_size: int = QUESTIONS, num_samples: int = SAMPLES
) -> dict[str, Contestant]:
    """Return rollouts and training steps of ours and of their baselines, each run once."""
    config = BenchConfig(
        model=str(model), batch_size=batch_size, num_samples=num_samples, max_length=LONGEST, prompt_format="tags"
    )
    loaded = loading.load_model(config.model, device=torch.device("cpu"), dtype="float32", param_dtype="auto")
    forget = load_rows(str(TOFU / "forget20.jsonl"))[:batch_size]
    retain = load_rows(str(TOFU / "retain60.jsonl"), answers=True)[:batch_size]
    work = Workload(loaded, loading.load_tokenizer(config.model), config, forget, retain, print)
    made: dict[str, Contestant] = {}
    for kind, contest in (("rollout", rollouts(work)), ("step", training_step(work))):
        for (_, way), name in zip(contest.ways.items(), ("ours", "theirs"), strict=True):
            made[f"{kind}, {name}"] = way.run
            way.output()  # and what is made on the first call
            way.run()
    return made


def measure(made: dict[str, Contestant], rounds: int) -> dict[str, dict[str, Any]]:
    """Return each contestant's seconds alone and beside the loop, round by round."""
    alone, beside = [], []
    for number in range(rounds):
        alone.append(time_round(made, number))
        with busy_core():
            beside.append(time_round(made, number))
        factors = {name: round(beside[-1][name] / alone[-1][name], 2) for name in made}
        print(f"round {number + 1}: {factors}", flush=True)
    quiet, busy = summarize(alone, {}), summarize(beside, {})
    return {
        name: {
            "alone": quiet[name],
            "busy": busy[name],
            "factors": sorted(b[name] / a[name] for a, b in zip(alone, beside, strict=True)),
        }
        for name in made
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the table of the documentation."""
    lines = ["| | alone | one core busy | times as long, median (range) |", "|---|---:|---:|---:|"]
    for name, of in results.items():
        f = of["factors"]
        lines.append(
            f"| {name} | {of['alone']['median_s']:.2f} s | {of['busy']['median_s']:.2f} s | {statistics.median(f):.2f} ({f[0]:.2f} - {f[-1]:.2f}) |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", default="", help="contestants whose name contains this")
    parser.add_argument("--json", type=Path, default=RESULT)
    o = parser.parse_args(arguments)
    made = {name: run for name, run in contestants(base_model()).items() if o.only in name}
    with harness.alone():
        results = measure(made, o.rounds)
    facts = {"questions": QUESTIONS, "samples": SAMPLES, "max_length": LONGEST, "loop": LOOP, "rounds": o.rounds}
    harness.write(o.json, "busy_core", [{"name": n} | of for n, of in results.items()], facts=facts)
    print(table(results))


if __name__ == "__main__":
    main()
