"""The installed package: where kernels/ lands, what it must not shadow, what imports without it all."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
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
    python(f"import pmc_fast.cli.main; {heavy}")


def test_help_of_every_command_is_quick():
    """Without what takes seconds to load: `pmc-fast --help` is click and the settings alone."""
    code = (
        "import sys\nfrom pmc_fast.cli import main as cli\n"
        "for name in ([], *([n] for n in cli.cli.commands)):\n"
        "    try:\n        cli.main([*name, '--help'])\n    except SystemExit as stopped:\n        assert stopped.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert any("unlearn" in line for line in python(code))


def test_import_without_gpu_triton_and_compiled_modules():
    """What is there to be imported is; what is missing is named by the first call that needs it."""
    code = (
        "import sys\n"
        "for name in ('triton', 'flash_attn', 'peft', 'trl', 'datasets', 'jinja2', 'matplotlib', 'pmc_fast._cpu', 'pmc_fast._cuda'):\n"
        "    sys.modules[name] = None\n"
        "import torch\ntorch.cuda.is_available = lambda: False\n"
        "import pmc_fast\n"
        "[getattr(pmc_fast, name) for name in pmc_fast.__all__]\n"
        "import pmc_fast.ops, pmc_fast.rollout, pmc_fast.evaluation, pmc_fast.reference, pmc_fast.jobs.unlearn\n"
        "from pmc_fast.ops import weighted_nll\n"
        "x, w = torch.ones(2, 3), torch.ones(5, 3)\n"
        "print(float(weighted_nll(x, w, torch.tensor([0, 1]), torch.ones(2), backend='reference')[0]))\n"
        "try:\n    weighted_nll(x, w, torch.tensor([0, 1]), torch.ones(2))\nexcept pmc_fast.PMCError as e:\n    print(e)"
    )
    value, line = python(code)
    assert float(value) == pytest.approx(3.2189, abs=1e-3)
    assert "C++ module is missing" in line
    assert "g++" in line


def test_the_front_door_has_the_public_names():
    """In a checkout that is not installed, too, whose version no metadata tell."""
    code = (
        "import sys, importlib.metadata as m, pmc_fast\n"
        "print(pmc_fast.__version__)\n"
        "real = m.version\n"
        "def absent(name):\n    if name == 'pmc_fast':\n        raise m.PackageNotFoundError(name)\n    return real(name)\n"
        "m.version = absent\n"
        "from pmc_fast import *\n"
        "print(sorted(set(dir()) & set(pmc_fast.__all__)) == sorted(pmc_fast.__all__))\n"
        "assert evaluate.__module__ == 'pmc_fast.evaluation.questions'\n"
        "from pmc_fast.report import environment\n"
        "print(pmc_fast.__version__, environment.code()['version'])"
    )
    version, complete, unknown = python(code)
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (complete, unknown) == ("True", "unknown None")


def test_examples_import_from_the_front_door_alone():
    integrations = {"pmc_fast.integrations.trl"}  # of an extra
    for file in (ROOT / "examples").glob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        found = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        found |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not {m for m in found if m.startswith("pmc_fast.")} - integrations, file.name


def test_extras_are_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cli", "dev", "flash", "lora", "reference", "trl"} <= set(project["optional-dependencies"])


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="compares with git's list of files: run it in a checkout")
def test_the_sdist_holds_all_that_git_does(tmp_path):
    """Built from a copy of what git knows, so that what lies about can't stand in for it."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files, links = [], []
    for line in listed.splitlines():
        mode, name = line.split()[0], line.split("\t", 1)[1]
        (links if mode == "120000" else files).append(name)
        target = tmp_path / "copy" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path / "copy", capture_output=True, check=True
    )
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert sorted(set(files) - held) == []
    assert all(any(name.startswith(f"{link}/") or name == link for name in held) for link in links)
    assert "pmc_fast/py.typed" in held
    assert not any(name.endswith((".so", ".pyc")) for name in held)


def test_without_a_compiler_the_build_names_gxx(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"CXX": "no-such-compiler"}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "install g++" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("rocm", "why"),
    [
        (False, "nvcc not found: install the CUDA toolkit, or set CUDA_HOME or NVCC"),
        (True, "nvcc not found, but ROCm's hipcc: ROCm is not supported (inline PTX, nvcc)"),
    ],
)
def test_with_the_cuda_module_wanted_and_no_nvcc_the_build_fails_and_says_so(tmp_path, rocm, why):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/hipcc").touch(mode=0o755 if rocm else 0o644)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"PMC_FAST_CUDA": "1", "NVCC": "no-such-compiler", "ROCM_HOME": str(tmp_path)}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].endswith(why)


def test_the_cuda_module_is_not_loaded_before_it_is_needed():
    python("import sys, pmc_fast.ops; assert 'pmc_fast._cuda' not in sys.modules")
