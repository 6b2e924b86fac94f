"""Freed memory that stays with the process: fewer pages are mapped, and the user's own settings stand."""

import os
import platform
import subprocess
import sys

import pytest

from pmc_fast.utils.malloc import OWN

COUNT = """
import resource
from pmc_fast.utils.malloc import keep_freed_memory, trim
kept = {keep} and keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
again = min(faults() for _ in range(3))
trim()
print(kept, again, faults())
"""


def count(keep, **env):
    own = {name: value for name, value in os.environ.items() if name not in OWN}
    made = subprocess.run(
        [sys.executable, "-c", COUNT.format(keep=keep)], env=own | env, capture_output=True, text=True, check=True
    )
    kept, again, trimmed = made.stdout.split()
    return kept == "True", int(again), int(trimmed)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again_until_it_is_trimmed():
    pages = (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    kept, again, trimmed = count(keep=True)
    assert kept
    assert again < pages / 16 < pages / 2 < trimmed
    kept, again, _ = count(keep=False)
    assert not kept
    assert again > pages / 2


def test_settings_of_the_user_stand():
    kept, *_ = count(keep=True, MALLOC_TRIM_THRESHOLD_="100000")
    assert not kept
