"""What every suite measures with: one at a time on a machine, results in benchmarks/results/SUITE.json.

A suite is a pytest file that asks for the `contest` fixture (conftest.py beside this file):

    def test_something(contest):
        contest("something", {"ours": f, "theirs": g}, rounds=15)

Rounds, peak memory and the schema are those of `pmc-fast bench`: `pmc_fast.bench`. `python -m benchmarks.report` prints
results.
"""

import fcntl
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


def write(
    path: Path, suite: str, results: list[dict[str, Any]], seed: int = 0, facts: Mapping[str, Any] | None = None
) -> Path:
    """Write a suite's results and return the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(files.dumps(files.document(suite, results, seed, facts)) + "\n", encoding="utf-8")
    return path
