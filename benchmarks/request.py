"""An erasure request from the command line: unlearned, recorded, verified, and how long that took.

    python -m benchmarks.request                  # 3 seeds, some minutes each on two cores
    python -m benchmarks.request --warm           # the same request to `pmc-fast serve`, from its arrival to its answer

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
from pmc_fast.erasure.spool import Spool
from pmc_fast.report.environment import commit

from . import harness
from .settings import TOFU

RESULTS = {False: harness.RESULTS / "request.json", True: harness.RESULTS / "request_warm.json"}  # warm
FORGET, RETAIN = f"{TOFU}/forget20.jsonl", f"{TOFU}/retain60.jsonl"
SAMPLES = 10  # of each question, in the attack
MAX_LENGTH = 80  # tokens; none of these questions takes more than 76 with its answer

PATHS = ("model", "stack", "forget", "paraphrased")  # settings that are of one machine


def command(*arguments: str) -> float:
    """Run pmc-fast and return its seconds; CalledProcessError if it fails or misses a gate."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pmc_fast", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def answer(seed: int, more: list[str]) -> dict[str, Any]:
    """Answer the request in a fresh stack; return its times and metrics."""
    with tempfile.TemporaryDirectory() as directory, harness.alone():
        stack = f"{directory}/stack"
        unlearned = command(
            "unlearn", "--lora", "--stack", stack, "--forget", FORGET, "--paraphrased", FORGET, *settings(seed), *more
        )
        verified = command(
            "verify", "--stack", stack, "--requests", FORGET, "--json", f"{directory}/verify.json",
            "--attack-samples", str(SAMPLES),
        )  # fmt: skip
        record = json.loads(Path(stack, "0001", "record.json").read_text(encoding="utf-8"))
        check = json.loads(Path(directory, "verify.json").read_text(encoding="utf-8"))
    return {
        "seed": seed, "seconds": unlearned + verified, "unlearn_s": unlearned, "verify_s": verified,
        "stage_seconds": record["stage_seconds"], "steps": record["steps"], "stopped": record["stopped"],
        "verify_stage_seconds": check["stage_seconds"], **evidence(record, check),
    }  # fmt: skip


def settings(seed: int) -> list[str]:
    """Return the options that a command and a worker have in common."""
    return [
        "--preset", "request", "--model", str(finetuned_model()), "--retain", RETAIN, "--seed", str(seed),
        "--max-length", str(MAX_LENGTH), "--skip-known-forgotten",
    ]  # fmt: skip


def evidence(record: dict[str, Any], check: dict[str, Any]) -> dict[str, Any]:
    """Return what a request's record and verification say of it."""
    return {
        "adapter": record["files"]["adapter_model.safetensors"], "metrics": record["metrics"],
        "verified": check["requests"]["0001"], "samples": SAMPLES,
        "settings": {k: v for k, v in record["settings"].items() if k not in PATHS}, "commit": commit(),
    }  # fmt: skip


def answer_warm(seed: int, more: list[str]) -> dict[str, Any]:
    """Send the request to a worker that waits, with an empty stack; return the parts of its time, and its metrics."""
    rows = [json.loads(line) for line in Path(FORGET).read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as directory, harness.alone():
        spool, log = Spool(f"{directory}/spool"), Path(directory, "log")
        words = ["serve", "--stack", f"{directory}/stack", "--spool", str(spool.directory), *settings(seed), *more]
        begin = time.perf_counter()
        with log.open("w") as output:
            worker = subprocess.Popen(
                [sys.executable, "-m", "pmc_fast", *words, "--verify-samples", str(SAMPLES)],
                stderr=output,
                stdout=output,
            )
        try:
            while "waiting for requests" not in log.read_text(encoding="utf-8"):
                require(worker.poll() is None, log)
                time.sleep(0.05)
            started = time.perf_counter() - begin
            begin = time.perf_counter()
            spool.submit("request", {"forget": rows, "paraphrased": rows})
            while (result := spool.result("request")) is None:
                require(worker.poll() is None and spool.state("request").get("state") != "failed", log)  # type: ignore[union-attr]
                time.sleep(0.05)
            seconds = time.perf_counter() - begin
        finally:
            worker.terminate()
            worker.wait()
        record, check = (
            json.loads((spool.place("done", "request") / name).read_text(encoding="utf-8"))
            for name in ("record.json", "verification.json")
        )
    return {
        "seed": seed, "seconds": seconds, "start_s": started, "parts": result["seconds"], "steps": record["steps"],
        "stopped": record["stopped"], **evidence(record, check),
    }  # fmt: skip


def require(good: bool, log: Path) -> None:
    """End with a worker's last lines unless all is well."""
    if not good:
        raise SystemExit("\n".join(log.read_text(encoding="utf-8").splitlines()[-5:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--warm", action="store_true", help="send the request to a worker that waits")
    parser.add_argument("--json", type=Path)
    given, more = parser.parse_known_args()
    results: list[dict[str, Any]] = []
    path = given.json or RESULTS[given.warm]
    if given.warm:
        for seed in given.seeds:
            results.append(answer_warm(seed, more))
            r = results[-1]
            print(
                f"seed {seed}: {r['seconds']:.0f} s (worker ready in {r['start_s']:.0f}), {r['steps']} steps",
                flush=True,
            )
            print({name: round(s, 1) for name, s in r["parts"].items()}, flush=True)
            harness.write(path, "request_warm", results)
        return
    for seed in given.seeds:
        results.append(answer(seed, more))
        r, after = results[-1], results[-1]["metrics"]["after"]
        leak = r["verified"]["sampling"]
        print(
            f"seed {seed}: {r['seconds']:.0f} s (unlearn {r['unlearn_s']:.0f}, verify {r['verify_s']:.0f}), "
            f"{r['steps']} steps, quality {after['unlearn_quality']:.1f}, retain "
            f"{after['sets']['retain']['rouge_l_recall']:.3f}, {after['sets']['forget']['says_nothing']:.0%} say nothing, "
            f"worst of {SAMPLES} {leak['worst']['value']:.3f}",
            flush=True,
        )
        print({name: round(s, 1) for name, s in r["stage_seconds"].items()}, flush=True)
        harness.write(path, "request", results)


if __name__ == "__main__":
    main()
