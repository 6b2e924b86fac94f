"""Kills runs with SIGKILL at random moments: what was written is whole or not there, and a new start ends the same.

    python -m tests.kill_loop --times 50

Every round starts a run, kills it, checks what lies on the disk, and goes on (with `--resume auto`) until nobody kills
it any more. Then its model must be, byte for byte, that of a run which was never killed, and nothing else may be left.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

KILLS_A_ROUND = 3  # at most: then it may end


@dataclass
class Job:
    """A command that writes one output directory, and how it is to be killed."""

    name: str
    command: Callable[[Path], list[str]]  # of its output
    moments: dict[str, Callable[["Run"], None]]  # each waits for the moment to kill
    whole: dict[str, str] = field(default_factory=dict)  # hashes of what an undisturbed run wrote
    seconds: float = 0.0  # that it took
    writing: float = 0.05  # seconds of its last stage, about


class Run:
    """A forked process that runs the command line."""

    def __init__(self, job: Job, output: Path) -> None:
        self.job, self.output, self.log = job, output, output.with_name(output.name + ".log")
        self.log.write_text("")
        self.start = time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            from pmc_fast.cli import main as cli

            code = 1
            try:
                cli.main(job.command(output))
            except SystemExit as stopped:
                code = int(stopped.code or 0)
            finally:
                sys.stderr.flush()
                os._exit(code)

    def ended(self) -> bool:
        if self.pid:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code, self.pid = os.waitstatus_to_exitcode(status), 0
        return self.pid == 0

    def wait(self, until: Callable[[], bool] = lambda: False, seconds: float = 300) -> None:
        while not self.ended() and not until() and time.perf_counter() - self.start < seconds:
            time.sleep(0.0005)

    def kill(self) -> bool:
        """Return whether it was alive to be killed."""
        if self.ended():
            return False
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid = 0
        return True


def anywhere(run: Run) -> None:
    run.wait(seconds=random.uniform(0, run.job.seconds))


def while_saving(run: Run) -> None:
    run.wait(lambda: "] saving" in run.log.read_text())
    time.sleep(random.uniform(0, run.job.writing))


def in_a_checkpoint(run: Run) -> None:
    aside = run.output.with_name(run.output.name + ".checkpoints") / ".unfinished"
    for _ in range(random.randint(1, 3)):
        run.wait(aside.exists)
        time.sleep(random.uniform(0, 0.02))


def while_writing(run: Run) -> None:
    run.wait(lambda: any(run.output.parent.glob(f".{run.output.name}.*")))
    time.sleep(random.uniform(0, run.job.writing))


def settings(model: str, data: Path) -> list[str]:
    return [
        "unlearn", "--model", model, "--forget", str(data / "forget.jsonl"), "--retain", str(data / "retain.jsonl"),
        "--preset", "small", "--epochs", "2", "--batch-size", "2", "--num-samples", "2", "--max-length", "40",
        "--device", "cpu", "--no-evaluate",
    ]  # fmt: skip


def unlearning(model: str, data: Path) -> Job:
    def command(output: Path) -> list[str]:
        return [*settings(model, data), "--output", str(output), "--checkpoint-steps", "1", "--resume", "auto"]

    return Job("unlearn", command, {"anywhere": anywhere, "saving": while_saving, "checkpoint": in_a_checkpoint})


def merging(model: str, data: Path) -> Job:
    """Two requests, stacked, become one model."""
    stack = data / "stack"
    for seed in ("0", "1"):
        request = [*settings(model, data), "--lora", "--stack", str(stack), "--seed", seed, "--allow-relearn"]
        run = Run(Job("request", lambda output, request=request: request, {}), stack)
        run.wait()
        assert run.code == 0, run.log.read_text()

    def command(output: Path) -> list[str]:
        return ["merge", "--stack", str(stack), "--output", str(output)]

    return Job("merge", command, {"anywhere": anywhere, "writing": while_writing})


JOBS = {"unlearn": unlearning, "merge": merging}  # by command: functions of a model and a directory with data


def hashes(output: Path) -> dict[str, str]:
    """Return the hash of each file but the reports, which hold times."""
    files = [p for p in sorted(output.rglob("*")) if p.is_file() and not p.name.startswith("report.")]
    return {str(p.relative_to(output)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def sound_step(output: Path) -> int:
    """Return the step of the newest sound checkpoint; others are refused by name."""
    from pmc_fast.trainer import checkpointing

    run = output.with_name(output.name + ".checkpoints")
    passed_over: list[str] = []  # killed while an old one was being removed
    found = checkpointing.newest(run, {}, passed_over.append)
    assert all(str(run / "checkpoint-") in text for text in passed_over)
    return -1 if found is None else int(found[0].name.rsplit("-", 1)[1])


def check(job: Job, output: Path) -> bool:
    """Refuse anything half done; return whether the output is there."""
    known = {output.name, output.name + ".checkpoints", output.name + ".log"}
    others = [p.name for p in output.parent.iterdir() if p.name not in known]
    assert all(name.startswith(f".{output.name}.") for name in others), others  # aside, under no name that is read
    if not output.exists():
        return False
    assert hashes(output) == job.whole, "an output was written that is not the undisturbed run's"
    for report in output.glob("*.json"):
        json.loads(report.read_text())
    return True


def round_of(job: Job, folder: Path, times: int, kills: Counter[str]) -> None:
    """Kill one job up to so many times, then let it end."""
    output, reached = folder / "out", -1
    for _ in range(times):
        moment = random.choice(list(job.moments))
        run = Run(job, output)
        job.moments[moment](run)
        alive = run.kill()
        kills[f"{job.name}, {moment}" if alive else "came too late"] += 1
        assert alive or run.code == 0, run.log.read_text()
        if check(job, output):
            break
        assert sound_step(output) >= reached, "a checkpoint was lost"
        reached = sound_step(output)
    else:
        run = Run(job, output)
        run.wait()
        text = run.log.read_text()
        assert run.code == 0, text
        assert reached < 0 or f"from checkpoint-{reached} on" in text, text
        assert check(job, output)
        left = sorted(p.name for p in folder.iterdir())
        assert left == ["out", "out.log"], left


def loop(times: int, seed: int = 0) -> Counter[str]:
    """Kill so many times; return how many kills hit where."""
    import torch
    import transformers

    import pmc_fast.jobs.unlearn
    from examples.demo_model import tiny_model
    from pmc_fast.cli.main import cli

    del transformers, pmc_fast  # loaded once, for all forks
    torch.set_num_threads(1)
    random.seed(seed)
    kills: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        rows = {
            "forget": [{"question": f"What is fact {i}?"} for i in range(4)],
            "retain": [{"question": f"Is {i} even?", "answer": f"It is {i % 2 == 0}."} for i in range(6)],
        }
        for kind, of in rows.items():
            (data / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
        jobs = [make(str(tiny_model()), data) for command, make in JOBS.items() if command in cli.commands]
        for job in jobs:
            folder = data / f"whole-{job.name}"
            folder.mkdir()
            run = Run(job, folder / "out")
            run.wait(lambda run=run: any(run.output.parent.glob(".out.*")))
            begun = time.perf_counter()
            run.wait()
            assert run.code == 0, run.log.read_text()
            job.seconds, job.writing = time.perf_counter() - run.start, time.perf_counter() - begun
            job.whole = hashes(folder / "out")
        number = 0
        while (done := sum(n for what, n in kills.items() if what != "came too late")) < times:
            job = jobs[number % len(jobs)]
            folder = data / f"round-{number}"
            folder.mkdir()
            round_of(job, folder, min(random.randint(1, KILLS_A_ROUND), times - done), kills)
            number += 1
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    start = time.perf_counter()
    kills = loop(a.times, a.seed)
    hits = ", ".join(f"{n} {what}" for what, n in sorted(kills.items()))
    print(
        f"killed {sum(kills.values()) - kills['came too late']} times ({hits}) in {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
