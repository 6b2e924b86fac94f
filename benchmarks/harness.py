"""What every suite measures with: interleaved contestants, medians with spread, peak memory, one schema.

A suite is a pytest file that asks for the `contest` fixture (conftest.py beside this file):

    def test_something(contest):
        contest("something", {"ours": f, "theirs": g}, rounds=15)

Each round runs every contestant once, in a rotating order, so that a slow minute of the machine hits
all of them. Results go to benchmarks/results/SUITE.json; `python -m benchmarks.report` prints them.
"""

import ctypes
import fcntl
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pmc_fast.report.environment import commit, machine, versions

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
ROUNDS = 7  # at least, where a table shows a median
WIDTH, DEPTH = 160, 5  # of a line of results; nesting from which on all stands on one
Contestant = Callable[[], Any]


@contextmanager
def alone() -> Iterator[None]:
    """Hold a lock that other benchmark processes of this machine wait for: timed sections never overlap."""
    with (Path(tempfile.gettempdir()) / "pmc_fast_benchmark.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def time_round(contestants: Mapping[str, Contestant], number: int) -> dict[str, float]:
    """Run every contestant once and return its seconds; round `number` begins with another one."""
    names = list(contestants)
    seconds = {}
    for i in range(len(names)):
        name = names[(i + number) % len(names)]
        start = time.perf_counter()
        contestants[name]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
    return seconds


def peak_bytes(contestant: Contestant) -> int | None:
    """Return how far one call raises this process's (or the GPU's) memory; None where it can't be read."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contestant()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier calls freed would hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # Linux: peak := now
    except OSError:
        return None
    before = _status("VmRSS")
    contestant()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def summarize(rounds: list[dict[str, float]], peaks: Mapping[str, int | None]) -> dict[str, Any]:
    """Return per contestant its median, quartiles and every round's seconds."""
    result = {}
    for name in rounds[0]:
        seconds = [r[name] for r in rounds]
        low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        result[name] = {
            "median_s": median,
            "quartiles_s": [low, high],
            "rounds_s": seconds,
            "peak_bytes": peaks.get(name),
        }
    return result


def document(
    suite: str, results: list[dict[str, Any]], seed: int, facts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the one JSON schema of all suites; `facts` are the suite's own settings."""
    return {
        "schema": SCHEMA,
        "suite": suite,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seed": seed,
        **({"facts": dict(facts)} if facts else {}),
        "results": results,
    }


def write(
    path: Path, suite: str, results: list[dict[str, Any]], seed: int = 0, facts: Mapping[str, Any] | None = None
) -> Path:
    """Write a suite's results and return the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(document(suite, results, seed, facts)) + "\n", encoding="utf-8")
    return path


def dumps(value: Any, indent: str = "") -> str:
    """Return JSON with one line per measurement: what is short stands on one line, floats have six digits."""
    short = json.dumps(_rounded(value), ensure_ascii=False)
    if len(indent) + len(short) <= WIDTH or not isinstance(value, (dict, list)) or len(indent) >= DEPTH:
        return short
    inner = indent + " "
    if isinstance(value, list):
        lines, brackets = [dumps(v, inner) for v in value], "[]"
    else:
        lines, brackets = [f"{json.dumps(k)}: {dumps(v, inner)}" for k, v in value.items()], "{}"
    return brackets[0] + ",".join(f"\n{inner}{line}" for line in lines) + f"\n{indent}{brackets[1]}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value
