"""Triton kernels without a GPU: the fused one in the interpreter, all of them compiled for every chip."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pmc_fast.errors import PMCError
from pmc_fast.ops import gather_logps, weighted_nll

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# tl.dot of bfloat16 is wrong in Triton's interpreter
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]


def inputs(rows, width, vocab, dtype=torch.float32, sharp=1.0):
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(rows, width, generator=g) * sharp, torch.randn(vocab, width, generator=g)
    targets, bias = torch.randint(vocab, (rows,), generator=g), torch.randn(vocab, generator=g)
    return hidden.to(DEVICE, dtype), head.to(DEVICE, dtype), targets.to(DEVICE), bias.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3, 5), (70, 40, 300), (3, 65, 2100)], ids=str)
@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "softcap": 3.0, "logit_scale": 0.5}], ids=str)
def test_fused_log_probs(dtype, shape, how):
    hidden, head, targets, bias = inputs(*shape, dtype)
    for b in (None, bias):
        exact = gather_logps(
            hidden.double(),
            head.double(),
            targets,
            bias=None if b is None else b.double(),
            backend="reference",
            **how,
        )
        ours = gather_logps(hidden, head, targets, bias=b, backend="fused", **how)
        # inputs are exact in both and everything is summed in float32
        torch.testing.assert_close(ours.double(), exact, atol=2e-5, rtol=2e-5)


def test_fused_log_probs_of_shared_rows_ignored_and_broken_targets():
    hidden, head, _, _ = inputs(4, 8, 50)
    rows = torch.tensor([0, 0, 3, 1, 2], device=DEVICE)
    targets = torch.tensor([7, 7, -100, 50, 49], device=DEVICE)
    ours = gather_logps(hidden, head, targets, rows, backend="fused")
    exact = gather_logps(hidden, head, targets.clamp(max=49), rows, backend="reference")
    assert ours[3].isnan()
    torch.testing.assert_close(ours[[0, 1, 2, 4]], exact[[0, 1, 2, 4]], atol=1e-5, rtol=1e-5)
    assert ours[2] == 0
    hidden[2] = torch.nan
    assert gather_logps(hidden, head, targets, rows, backend="fused")[4].isnan()


def test_fused_log_probs_have_no_gradients_and_say_so():
    hidden, head, targets, _ = inputs(4, 8, 50)
    with pytest.raises(PMCError, match="no gradients"):
        gather_logps(hidden.requires_grad_(), head, targets, backend="fused")
    with torch.no_grad():
        gather_logps(hidden, head, targets, backend="fused")
    with pytest.raises(PMCError, match="use cuda"):
        weighted_nll(hidden.detach(), head, targets, torch.ones(4, device=DEVICE), backend="fused")


def test_every_shipped_configuration_compiles_for_every_chip(tmp_path):
    """No spills, shared memory within the chip's limit, wgmma on sm_90: `make kernels-report` fails otherwise."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", "--json", str(tmp_path / "table.json")],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, "\n".join(done.stdout.splitlines()[-10:]) + done.stderr[-2000:]
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {row["chip"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert len(rows) == 3 * (24 + 6 + 12 + 6 + 6 + 12 + 66)
