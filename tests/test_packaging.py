"""The installed package: where kernels/ lands, what it must not shadow, what imports without it all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SEES_KERNELS = """
import importlib, sys
import transformers
from transformers import LlamaForCausalLM  # most of what may ask for the package
from transformers.utils import is_kernels_available
print(is_kernels_available())
try:
    found = importlib.import_module("kernels")
except ImportError:
    found = None
print(getattr(found, "__file__", None))
import pmc_fast.kernels
print(list(pmc_fast.kernels.__path__)[0])
"""


def python(code, *, path=(), cwd=ROOT, arguments=()):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, *(arguments or ["-c", code])], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@pytest.mark.parametrize("cwd", [ROOT, Path("/")])
def test_no_package_called_kernels_appears(cwd):
    available, found, ours = python(SEES_KERNELS, cwd=cwd)
    assert available == "False"
    assert found == "None"  # nothing, or a bare folder without code of its own
    assert Path(ours).resolve() == ROOT / "kernels" or "site-packages" in ours


def test_a_real_kernels_package_is_seen_from_the_root(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("__version__ = '0.99.0'")
    info = tmp_path / "kernels-0.99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.99.0\n")
    _, found, _ = python(SEES_KERNELS, path=[tmp_path])
    assert found == str(tmp_path / "kernels/__init__.py")
    python("", path=[tmp_path], arguments=["-m", "benchmarks.report", "--help"])


def test_benchmarks_run_from_the_root():
    assert any("usage" in line.lower() for line in python("", arguments=["-m", "benchmarks.report", "--help"]))


def test_help_and_import_load_neither_torch_nor_transformers():
    heavy = "import sys; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'heavy'"
    python(f"import pmc_fast; {heavy}")
    python(f"import pmc_fast.cli; {heavy}")


def test_a_missing_module_is_named_when_it_is_needed():
    code = (
        "import sys; sys.modules['pmc_fast._cpu'] = None\n"
        "import pmc_fast.reward as r\n"
        "try:\n    r.rouge_l_recall(['a'], [['a']])\n"
        "except ValueError as e:\n    print(e)"
    )
    (line,) = python(code)
    assert "C++ module is missing" in line
    assert "g++" in line


def test_without_a_compiler_the_build_names_gxx(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"CXX": "no-such-compiler"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "install g++" in done.stderr.strip().splitlines()[-1]


def test_with_the_cuda_module_wanted_and_no_nvcc_the_build_fails_and_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"PMC_FAST_CUDA": "1", "NVCC": "no-such-compiler"}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "nvcc not found" in done.stderr.strip().splitlines()[-1]


def test_the_cuda_module_is_not_loaded_before_it_is_needed():
    python("import sys, pmc_fast.ops; assert 'pmc_fast._cuda' not in sys.modules")
