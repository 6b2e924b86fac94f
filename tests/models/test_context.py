"""Tolerances of comparisons with the model's own forward pass."""

import pytest
import torch

from pmc_fast.errors import PMCError
from pmc_fast.models.context import TOLERANCES, plain_logps, require_same_logps, tolerance
from tests.families import FAMILIES, build


def test_the_coarsest_dtype_decides():
    assert tolerance(torch.float32, torch.bfloat16) is TOLERANCES[torch.bfloat16]
    assert tolerance(torch.float64, torch.float32) is TOLERANCES[torch.float32]
    assert tolerance(torch.float16, torch.bfloat16, torch.float64) is TOLERANCES[torch.bfloat16]
    assert tolerance(torch.float8_e4m3fn) is TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_passes_and_another_computation_does_not(dtype):
    model = build(FAMILIES["llama"](), torch.float64)
    ids = torch.randint(3, 60, (4, 30), generator=torch.Generator().manual_seed(0))
    exact = plain_logps(model, ids)
    off = (plain_logps(model.to(dtype), ids) - exact).abs().mean().item()
    require_same_logps(model, "rounding does", off, dtype)
    model.model.layers[0].self_attn.scaling *= 0.5
    off = (plain_logps(model, ids) - exact).abs().mean().item()
    with pytest.raises(PMCError, match=r"LlamaForCausalLM: half the scale does not compute what the model computes"):
        require_same_logps(model, "half the scale does", off, torch.float32)
    with pytest.raises(PMCError, match="off by nan"):
        require_same_logps(model, "a damaged model does", float("nan"), dtype)
