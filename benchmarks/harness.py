"""What every suite measures with: one at a time on a machine, results in benchmarks/results/SUITE.json.

A suite is a pytest file that asks for the `contest` fixture (conftest.py beside this file):

    def test_something(contest):
        contest("something", {"ours": f, "theirs": g}, rounds=15)

Rounds, peak memory and the schema are those of `pmc-fast bench`: `pmc_fast.bench`. `python -m benchmarks.report` prints
results.
"""

import fcntl
import itertools
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pmc_fast.bench import results as files

RESULTS = Path(__file__).parent / "results"


@contextmanager
def alone() -> Iterator[None]:
    """Hold a lock that other benchmark processes of this machine wait for: timed sections never overlap."""
    with (Path(tempfile.gettempdir()) / "pmc_fast_benchmark.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def taking_turns(seconds: float = 2.0) -> Iterator[None]:
    """Let this process's children change cores, so that each has every core for the same time; on Linux."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores, ended = sorted(os.sched_getaffinity(0)), threading.Event()

    def turn() -> None:
        for number in itertools.count():
            children = sorted(child.pid or 0 for child in multiprocessing.active_children())
            for place, pid in enumerate(children):
                core = cores[(place + number) % len(cores)]
                with suppress(OSError):  # it has ended
                    for task in os.listdir(f"/proc/{pid}/task"):
                        os.sched_setaffinity(int(task), {core})
            if ended.wait(seconds):
                return

    thread = threading.Thread(target=turn, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def write(
    path: Path, suite: str, results: list[dict[str, Any]], seed: int = 0, facts: Mapping[str, Any] | None = None
) -> Path:
    """Write a suite's results and return the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(files.dumps(files.document(suite, results, seed, facts)) + "\n", encoding="utf-8")
    return path
