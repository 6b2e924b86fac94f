"""Every function of the C++ module under random and hostile arguments; the long form is `python -m tests.fuzz`."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import fuzz


@pytest.mark.parametrize("name", fuzz.PROPERTIES)
def test_bindings_answer_or_refuse(name):
    fuzz.use()
    if name in fuzz.NEED_AVX2 and fuzz.MODULE.best_isa() < 1:
        pytest.skip("needs AVX2")
    fuzz.fuzz(name, 100, derandomize=True)


def test_every_function_is_fuzzed():
    """Against the module itself: what is added to the bindings must be added to the fuzzing."""
    source = Path(fuzz.__file__).read_text(encoding="utf-8")
    kinds = ("_f32", "_f64", "_bf16")
    for name in dir(fuzz.use()):
        stem = next((name.removesuffix(k) for k in kinds if name.endswith(k)), name)
        assert name.startswith("__") or f"MODULE.{stem}" in source or f'"{stem}_{{kind}}"' in source, name


def test_a_read_behind_an_end_is_seen():
    """Else the tests above could not fail: half a row more than there is ends the process."""
    code = (
        "import numpy as np\nfrom tests import fuzz\nmodule = fuzz.use()\n"
        "a = [fuzz.guarded(np.ones(1024, np.float32)) for _ in range(3)]\n"
        "module.silu_mul_f32(*(x.ctypes.data for x in a), 1536, 0, 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert done.returncode < 0
