"""Builds the C++ module, and the CUDA one where nvcc is; everything else about the package stands in pyproject.toml.

cuda_wheel/setup.py loads this file for a wheel of the CUDA module alone.

PMC_FAST_CUDA=1 fails if the CUDA module cannot be built, 0 leaves it out; unset, it is built if it can be.
CXX and NVCC name other compilers, PMC_FAST_CHIPS other chips (90: for an H100 alone, in a third of the time).
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path
from typing import NoReturn

import pybind11
from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.modified import newer_group

CUDA = ("pmc_fast._cuda", "pmc_fast_cuda._cuda")  # in the package itself, and in a wheel of its own
CUDA_ONLY = "csrc/bindings_cuda.cpp"
# A100, RTX 40 and L4, H100, B200, RTX 50; later chips compile the last one's PTX when they first load it
CHIPS = tuple(int(chip) for chip in os.environ.get("PMC_FAST_CHIPS", "80,89,90,100,120").split(","))
NO_NVCC = "nvcc not found: install the CUDA toolkit, or set CUDA_HOME or NVCC"
ROCM = "nvcc not found, but ROCm's hipcc: ROCm is not supported (inline PTX, nvcc)"
WANTED = os.environ.get("PMC_FAST_CUDA", "")


def find_nvcc() -> str | None:
    if "NVCC" in os.environ:
        return shutil.which(os.environ["NVCC"])
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which(home / "bin/nvcc") or shutil.which("nvcc")


def why_no_nvcc() -> str:
    home = Path(os.environ.get("ROCM_HOME", "/opt/rocm"))
    return ROCM if shutil.which("hipcc") or shutil.which(home / "bin/hipcc") else NO_NVCC


def nvcc_command(nvcc: str, sources: list[str], target: str) -> list[str]:
    """Return the whole build in one command; nvcc links its runtime statically, so any torch will do."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    chips = [chip for chip in CHIPS if f"compute_{chip}" in known]  # an older toolkit knows fewer
    if not chips:
        raise ValueError(f"{nvcc} knows none of sm_{', sm_'.join(map(str, CHIPS))}")
    # PTX of the last chip serves later ones, that of sm_100 what lies between
    codes = {c: f"[sm_{c},compute_{c}]" if c in (100, chips[-1]) else f"sm_{c}" for c in chips}
    return [
        nvcc, "-shared", "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-Wall,-Wextra,-fvisibility=hidden", "--threads", "0",
        *(["-ccbin", os.environ["CXX"].split()[0]] if "CXX" in os.environ else []),
        *(f"-gencode=arch=compute_{chip},code={code}" for chip, code in codes.items()),
        f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", *sources, "-o", target,
    ]  # fmt: skip


class BuildExt(build_ext):
    def run(self) -> None:
        compiler = os.environ.get("CXX", "g++").split()[0]
        if sys.platform != "win32" and not shutil.which(compiler):
            raise SystemExit(
                f"pmc_fast: no C++ compiler ({compiler} not found): install g++ "
                "(apt-get install g++) or set CXX, then run pip again"
            )
        if WANTED == "1" and find_nvcc() is None:  # before the minute that the rest takes
            self._fail(why_no_nvcc())
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if ext.name not in CUDA:
            super().build_extension(ext)
            return
        why = self._build_cuda(ext)
        print(f"pmc_fast: CUDA module {f'not built: {why}' if why else 'built'}")
        if why and WANTED == "1":
            self._fail(why)

    def _fail(self, why: str) -> NoReturn:
        raise SystemExit(f"pmc_fast: PMC_FAST_CUDA=1, but the CUDA module was not built: {why}")

    def _build_cuda(self, ext: Extension) -> str | None:
        """Return why it was not built, if so."""
        target = Path(self.get_ext_fullpath(ext.name))
        nvcc = find_nvcc()
        if WANTED == "0" or nvcc is None:
            target.unlink(missing_ok=True)  # of an earlier build
            return "PMC_FAST_CUDA=0" if WANTED == "0" else why_no_nvcc()
        if not self.force and not newer_group([*ext.sources, *ext.depends, "setup.py"], str(target)):
            return None
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(nvcc_command(nvcc, ext.sources, str(target)), check=True)
        except (OSError, ValueError) as error:
            return str(error)
        except subprocess.CalledProcessError as error:
            target.unlink(missing_ok=True)
            return f"{nvcc} failed with exit code {error.returncode}; its words stand above"
        return None


def cpu_module() -> Extension:
    return Pybind11Extension(
        "pmc_fast._cpu",
        sorted(set(glob("csrc/*.cpp")) - {CUDA_ONLY}),
        depends=glob("csrc/*.h"),
        cxx_std=17,
        extra_compile_args=["-O3", "-Wall", "-Wextra", "-pthread"],
        extra_link_args=["-pthread", "-ldl"],
    )


def cuda_module(name: str, root: str = "") -> Extension:
    return Extension(  # listed even if it is left out: sdists take their files from here
        name,
        [*sorted(glob(f"{root}csrc/*.cu")), root + CUDA_ONLY],
        depends=glob(f"{root}csrc/*.h"),
        optional=WANTED != "1",  # setuptools does not miss its file then
    )


if __name__ == "__main__":
    setup(ext_modules=[cpu_module(), cuda_module(CUDA[0])], cmdclass={"build_ext": BuildExt})
