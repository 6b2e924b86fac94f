"""The C library's allocator: whether freed memory stays with this process."""

import ctypes
import os

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MOST = 2**31 - 1  # bytes; an int
OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, up to 2 GB, for what is allocated next; return whether it does.

    By default every large tensor is memory that the kernel maps and clears anew: a tenth of the time of a training
    step on the CPU. For programs, which own their process, and not for libraries. Another C library, another allocator
    and settings of the user's own stay as they are.
    """
    if any(name in os.environ for name in OWN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return False
    return all(mallopt(option, MOST) == 1 for option in (MMAP_THRESHOLD, TRIM_THRESHOLD))


def trim() -> None:
    """Return freed memory to the system, where the C library can."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return
