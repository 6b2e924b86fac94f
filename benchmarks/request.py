"""An erasure request from the command line: unlearned, recorded, verified, and how long that took.

    python -m benchmarks.request                  # 3 seeds, some minutes each on two cores

20 questions on the demo's fine-tuned model, preset "request", the filter of known questions on, with what an answer
needs for evidence: quality and retain recall before and after, the record, then `pmc-fast verify` with a sampling
attack. Seconds are those of the two commands from start to end, Python's own included. The published algorithm's time
for the same questions is end_to_end.json's. Options that are not listed go to `pmc-fast unlearn`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from examples.demo_model import finetuned_model

from . import harness
from .settings import TOFU

RESULT = harness.RESULTS / "request.json"
SAMPLES = 10  # of each question, in the attack
MAX_LENGTH = 80  # tokens; none of these questions takes more than 76 with its answer

PATHS = ("model", "stack")  # settings that are of one machine


def command(*arguments: str) -> float:
    """Run pmc-fast and return its seconds; CalledProcessError if it fails or misses a gate."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pmc_fast", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def answer(seed: int, more: list[str]) -> dict[str, Any]:
    """Answer the request in a fresh stack; return its times and metrics."""
    forget, retain = f"{TOFU}/forget20.jsonl", f"{TOFU}/retain60.jsonl"
    with tempfile.TemporaryDirectory() as directory, harness.alone():
        stack = f"{directory}/stack"
        unlearned = command(
            "unlearn", "--lora", "--preset", "request", "--model", str(finetuned_model()), "--stack", stack,
            "--forget", forget, "--paraphrased", forget, "--retain", retain, "--seed", str(seed),
            "--max-length", str(MAX_LENGTH), "--skip-known-forgotten", *more,
        )  # fmt: skip
        verified = command(
            "verify", "--stack", stack, "--requests", forget, "--json", f"{directory}/verify.json",
            "--attack-samples", str(SAMPLES),
        )  # fmt: skip
        record = json.loads(Path(stack, "0001", "record.json").read_text(encoding="utf-8"))
        check = json.loads(Path(directory, "verify.json").read_text(encoding="utf-8"))
    return {
        "seed": seed, "seconds": unlearned + verified, "unlearn_s": unlearned, "verify_s": verified,
        "stage_seconds": record["stage_seconds"], "steps": record["steps"], "stopped": record["stopped"],
        "metrics": record["metrics"], "verified": check["requests"]["0001"], "samples": SAMPLES,
        "settings": {k: v for k, v in record["settings"].items() if k not in PATHS}, "commit": harness.commit(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=RESULT)
    given, more = parser.parse_known_args()
    results = []
    for seed in given.seeds:
        results.append(answer(seed, more))
        r, after = results[-1], results[-1]["metrics"]["after"]
        leak = r["verified"]["sampling"]
        print(
            f"seed {seed}: {r['seconds']:.0f} s (unlearn {r['unlearn_s']:.0f}, verify {r['verify_s']:.0f}), "
            f"{r['steps']} steps, quality {after['unlearn_quality']:.1f}, retain "
            f"{after['sets']['retain']['rouge_l_recall']:.3f}, {after['sets']['forget']['degenerate']:.0%} under 3 words, "
            f"worst of {SAMPLES} {leak['worst']['value']:.3f}",
            flush=True,
        )
        print({name: round(s, 1) for name, s in r["stage_seconds"].items()}, flush=True)
        harness.write(given.json, "request", results)


if __name__ == "__main__":
    main()
