"""The C++ for the CPU, built with AddressSanitizer and UndefinedBehaviorSanitizer, under the fuzzing of tests.fuzz.

python -m pytest tests/ops/test_sanitizers.py
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
CXX = os.environ.get("CXX", "g++").split()[0]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-pthread", "-fno-omit-frame-pointer", *SANITIZE]
EXAMPLES = 100  # of each function


def library(name: str) -> Path | None:
    """Return a run-time library of the compiler, if it has it."""
    found = subprocess.run(
        [CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return Path(found).resolve() if os.path.isabs(found) else None


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The module, and how to run Python with it."""
    if shutil.which(CXX) is None or library("libasan.so") is None:
        pytest.skip(f"{CXX} has no libasan: apt-get install g++ brings it")
    made = tmp_path_factory.mktemp("sanitized")
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def compiled(source: Path) -> Path:
        target = made / f"{source.stem}.o"
        command = [CXX, *FLAGS, *includes, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return target

    sources = sorted(set((ROOT / "csrc").glob("*.cpp")) - {ROOT / "csrc/bindings_cuda.cpp"})
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sorted(sources, key=lambda p: -p.stat().st_size)))
    module = made / "_cpu.so"
    subprocess.run([CXX, "-shared", "-pthread", *SANITIZE, *objects, "-ldl", "-o", module], check=True)
    # Python itself is not instrumented: the library must be there before it, and its leaks are none of ours
    environment = os.environ | {
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=made, env=environment, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip

    return module, run


def test_fuzzed_under_sanitizers(sanitized):
    module, run = sanitized
    done = run("-m", "tests.fuzz", "--module", module, "--examples", EXAMPLES)
    assert done.returncode == 0, done.stderr[-6000:]
    print(done.stdout)
    assert "refused calls" in done.stdout


@pytest.mark.parametrize(("isa", "size"), [(0, 1025), (1, 1025)])
def test_sanitizers_see_one_number_too_many(sanitized, isa, size):
    module, run = sanitized
    code = (
        f"import numpy as np\nfrom tests import fuzz\nmodule = fuzz.use({str(module)!r})\n"
        "a = [np.ones(1024, np.float32) for _ in range(3)]\n"
        f"module.silu_mul_f32(*(x.ctypes.data for x in a), {size}, min({isa}, module.best_isa()), 1)"
    )
    done = run("-c", code)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
