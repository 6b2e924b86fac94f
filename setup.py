"""Builds the C++ module; everything else about the package stands in pyproject.toml."""

import os
import shutil
import sys
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup


class BuildExt(build_ext):
    def run(self) -> None:
        compiler = os.environ.get("CXX", "g++").split()[0]
        if sys.platform != "win32" and not shutil.which(compiler):
            raise SystemExit(
                f"pmc_fast: no C++ compiler ({compiler} not found): install g++ "
                "(apt-get install g++) or set CXX, then run pip again"
            )
        super().run()


setup(
    ext_modules=[
        Pybind11Extension(
            "pmc_fast._cpu",
            sorted(glob("csrc/*.cpp")),
            depends=glob("csrc/*.h"),
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-pthread"],
            extra_link_args=["-pthread", "-ldl"],
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
