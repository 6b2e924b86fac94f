"""Builds the CUDA module for a wheel of its own, with the parent folder's setup.py: nvcc, or an error."""

import importlib.util
import os
from pathlib import Path

from setuptools import setup

os.environ["PMC_FAST_CUDA"] = "1"  # read when the parent's file is loaded
spec = importlib.util.spec_from_file_location("pmc_fast_setup", Path(__file__).resolve().parent.parent / "setup.py")
assert spec is not None
assert spec.loader is not None
parent = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parent)

setup(ext_modules=[parent.cuda_module(parent.CUDA[1], "../")], cmdclass={"build_ext": parent.BuildExt})
