"""Finds the compiled modules and says what is missing when one is needed."""

import importlib
from types import ModuleType

from .errors import PMCError


def cpu() -> ModuleType:
    """Return the C++ module that every build of pmc_fast carries.

    Raises
    ------
    PMCError
        The package was put in place without being built.
    """
    try:
        return importlib.import_module("pmc_fast._cpu")
    except ImportError as error:
        raise PMCError(
            f"pmc_fast's C++ module is missing ({error}): install g++ and run `pip install .` again"
        ) from error


def cuda() -> ModuleType:
    """Return the CUDA module, which is built where nvcc is found.

    Raises
    ------
    PMCError
        The package was built without nvcc.
    """
    try:
        return importlib.import_module("pmc_fast._cuda")
    except ImportError as error:
        raise PMCError(
            f"pmc_fast's CUDA module is missing ({error}): install the CUDA toolkit and run "
            "`PMC_FAST_CUDA=1 pip install .` again"
        ) from error
