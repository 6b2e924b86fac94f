"""Work in several threads beside a program that takes a core: when the caller works alone, and that results are the same."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pmc_fast.ops import layers

ROOT = Path(__file__).resolve().parents[2]
MS = 1_000_000
START = 1_000 * MS


class Clocked:
    """A Crowding and a clock: a region of `own` ms waits for `wait` ms more."""

    def __init__(self, library):
        self.library, self.now = library, START
        self.made = ctypes.c_void_p(library.crowding())

    def region(self, own, wait, threads=2):
        start, own_end = self.now, self.now + int(own * MS)
        self.now = own_end + int(wait * MS)
        self.library.note(self.made, start, own_end, self.now, threads)

    def alone_for(self):
        """Return for how many ms the caller works alone, and let them pass."""
        start = self.now
        while self.library.alone(self.made, self.now):
            self.now += MS // 4
        return (self.now - start) / MS


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("crowding") / "crowding.so"
    subprocess.run(["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}",
                    str(ROOT / "tests/crowding.cpp"), "-o", str(target)], check=True)  # fmt: skip
    made = ctypes.CDLL(str(target))
    made.crowding.restype, made.alone.restype = ctypes.c_void_p, ctypes.c_bool
    made.alone.argtypes = [ctypes.c_void_p, ctypes.c_longlong]
    made.note.argtypes = [ctypes.c_void_p, *[ctypes.c_longlong] * 3, ctypes.c_int]
    return made


@pytest.fixture
def clocked(library):
    made = Clocked(library)
    yield made
    library.release(made.made)


def test_regions_that_end_together_stay_parallel(clocked):
    for _ in range(100):
        clocked.region(own=0.2, wait=0.1)
        assert clocked.alone_for() == 0
    clocked.region(own=20, wait=15)  # long, but the work of the other thread
    assert clocked.alone_for() == 0


def test_each_wait_for_a_lost_core_doubles_the_time_alone(clocked):
    pauses = []
    for _ in range(9):
        clocked.region(own=0.2, wait=3)
        pauses.append(clocked.alone_for())
        clocked.now += MS
    assert pauses == [4, 8, 16, 32, 64, 128, 256, 256, 256]
    clocked.now += 60 * MS  # calm: what comes then is a first one
    clocked.region(own=0.2, wait=3)
    assert clocked.alone_for() == 4


def test_many_threads_wait_as_long_as_all_of_the_work_alone(clocked):
    clocked.region(own=1, wait=6, threads=8)
    assert clocked.alone_for() == 0
    clocked.region(own=1, wait=8, threads=8)
    assert clocked.alone_for() == 4


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="binds a program to a core")
def test_results_are_the_same_beside_a_busy_core():
    """Regions of two threads and those of the caller alone compute the same bits: linear, SiLU and its gradient, norms."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 1021, generator=generator)
    weight = torch.randn(2043, 1021, generator=generator)
    gate, up = torch.randn(2, 211, 1021, generator=generator)

    def compute():
        made = [layers.silu_mul(gate, up), layers.rms_norm(gate, up[0], 1e-5)]
        if layers.fast_linear_serves(weight):
            made.append(layers.linear(x, weight))
        return made

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    core = max(os.sched_getaffinity(0))
    loop = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"]
    try:
        expected = compute()
        with subprocess.Popen(loop) as busy:
            try:
                for _ in range(200):
                    for ours, same in zip(compute(), expected, strict=True):
                        assert torch.equal(ours, same)
            finally:
                busy.kill()
        torch.set_num_threads(1)
        for ours, same in zip(compute(), expected, strict=True):
            assert torch.equal(ours, same)
    finally:
        torch.set_num_threads(threads)
