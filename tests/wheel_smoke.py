"""An installed package by itself, not the checkout's: `python tests/wheel_smoke.py`, with the Python that has it."""

import sys
from pathlib import Path

import torch

import pmc_fast
import pmc_fast.kernels
from pmc_fast.ops import native, weighted_nll
from pmc_fast.pmc.reward import rouge_l_recall

for module in (pmc_fast, native.cpu()):
    assert Path(str(module.__file__)).is_relative_to(sys.prefix), f"{module.__file__} is not of this environment"
assert rouge_l_recall(["a cat sat"], [["the cat sat"]]) == 2 / 3

torch.manual_seed(0)
hidden, head = torch.randn(7, 33), torch.randn(129, 33)
targets, scale = torch.randint(129, (7,)), torch.rand(7)
loss, logps = weighted_nll(hidden, head, targets, scale)
expected = torch.log_softmax(hidden.double() @ head.double().T, -1)[torch.arange(7), targets]
torch.testing.assert_close(logps.double(), expected, atol=1e-4, rtol=1e-5)
torch.testing.assert_close(loss.double(), -(scale * expected).sum(), atol=1e-4, rtol=1e-5)
print(f"pmc_fast {pmc_fast.__version__} of this environment computes with {native.ISAS[native.isa()]} instructions")
