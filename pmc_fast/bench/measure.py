"""Contestants in interleaved rounds: seconds, peak memory, medians.

Each round runs every contestant once, in a rotating order, so that a slow minute of the machine hits all of them.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..utils.malloc import trim

ROUNDS = 7  # at least, where a table shows a median
Contestant = Callable[[], Any]


def time_round(
    contestants: Mapping[str, Contestant], number: int, device: torch.device | None = None
) -> dict[str, float]:
    """Run every contestant once and return its seconds; round `number` begins with another one.

    Parameters
    ----------
    contestants : mapping of str to callable
    number : int
    device : torch.device, optional
        What they compute on, by default a GPU if there is one: its queue is waited for.
    """
    names, cuda = list(contestants), _cuda(device)
    seconds = {}
    for i in range(len(names)):
        name = names[(i + number) % len(names)]
        if cuda:
            torch.cuda.synchronize(cuda)
        start = time.perf_counter()
        contestants[name]()
        if cuda:
            torch.cuda.synchronize(cuda)
        seconds[name] = time.perf_counter() - start
    return seconds


def peak_bytes(contestant: Contestant, device: torch.device | None = None) -> int | None:
    """Return how far one call raises the memory of this process, or of the GPU; None where it can't be read.

    `device` as of `time_round`.
    """
    gc.collect()
    if cuda := _cuda(device):
        torch.cuda.reset_peak_memory_stats(cuda)
        before = torch.cuda.memory_allocated(cuda)
        contestant()
        torch.cuda.synchronize(cuda)
        return torch.cuda.max_memory_allocated(cuda) - before
    try:
        trim()  # what earlier calls freed would hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # Linux: peak := now
        before = _status("VmRSS")
    except OSError:
        contestant()  # a caller that counts on the call gets it
        return None
    contestant()
    return max(0, _status("VmHWM") - before)


def _cuda(device: torch.device | None) -> torch.device | None:
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    return device if device.type == "cuda" else None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def summarize(rounds: Sequence[Mapping[str, float]], peaks: Mapping[str, int | None]) -> dict[str, Any]:
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


def optimizer_step(backward: Contestant, optimizer: torch.optim.Optimizer) -> Contestant:
    """Return a training step: backward, the optimizer, gradients cleared, also after an error."""

    def step() -> None:
        try:
            backward()
            optimizer.step()
        finally:
            optimizer.zero_grad()

    return step
