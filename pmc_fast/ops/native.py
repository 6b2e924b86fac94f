"""Loads the compiled modules and the Triton kernels, or says what is missing."""

import functools
import importlib
import os
from importlib import metadata
from types import ModuleType

import torch

from ..errors import PMCError
from .dispatch import why_refused

ISAS = ("generic", "avx2", "avx512")  # as csrc/simd.h counts them


@functools.cache  # called in every layer of every step
def cpu() -> ModuleType:
    """Return the C++ module that every build of pmc_fast carries.

    Raises
    ------
    PMCError
        The package was not built.
    """
    try:
        return importlib.import_module("pmc_fast._cpu")
    except ImportError as error:
        raise PMCError(
            f"pmc_fast's C++ module is missing ({error}): install g++ and run `pip install .` again"
        ) from error


@functools.cache
def isa() -> int:
    """Return the instruction set that the C++ uses, an index of ISAS: the machine's best, or PMC_FAST_ISA.

    Raises
    ------
    PMCError
        PMC_FAST_ISA is none of ISAS, or this machine does not have it.
    """
    best = cpu().best_isa()
    asked = os.environ.get("PMC_FAST_ISA") or ISAS[best]
    if asked not in ISAS:
        raise PMCError(f"PMC_FAST_ISA is {asked!r}: use one of {', '.join(ISAS)}, or leave it unset")
    if ISAS.index(asked) > best:
        raise PMCError(f"PMC_FAST_ISA is {asked!r}, but this machine has no more than {ISAS[best]}")
    return ISAS.index(asked)


@functools.cache
def cuda() -> ModuleType:
    """Return the CUDA module: the one that was built with the package where nvcc was found, else pmc_fast_cuda's.

    Raises
    ------
    PMCError
        There is neither, torch is not one for CUDA, or pmc_fast_cuda is of another version.
    """
    if why := why_refused(torch.device("cuda")):
        raise PMCError(f"pmc_fast's CUDA module can't be used: {why}")
    try:
        return importlib.import_module("pmc_fast._cuda")
    except ImportError as error:
        missing = error
    try:
        module = importlib.import_module("pmc_fast_cuda._cuda")
    except ImportError as error:
        raise PMCError(
            f"pmc_fast's CUDA module is missing ({missing}; {error}): install the wheel that has it with "
            "`pip install 'pmc_fast[cuda]'`, or the CUDA toolkit, and run `PMC_FAST_CUDA=1 pip install .` again"
        ) from error
    ours, theirs = _version("pmc_fast"), _version("pmc_fast_cuda")
    if ours != theirs:  # addresses and sizes go to it unchecked: it must be of the same source
        raise PMCError(
            f"pmc_fast_cuda is {theirs}, but pmc_fast is {ours}: both must be one version, "
            f"pip install pmc_fast_cuda=={ours}"
        )
    return module


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def triton_kernels(name: str) -> ModuleType:
    """Return a module of pmc_fast.kernels.

    Raises
    ------
    PMCError
        Triton is not installed.
    """
    try:
        return importlib.import_module(f"..kernels.{name}", __package__)
    except ImportError as error:
        raise PMCError(f"the cuda backend needs triton ({error}): pip install 'triton>=3.6'") from error
