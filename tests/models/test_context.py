"""Tolerances of comparisons with the model's own forward pass."""

import pytest
import torch

from pmc_fast.errors import PMCError
from pmc_fast.models.context import TOLERANCES, plain_logps, require_same_logps, tolerance
from pmc_fast.models.packed_forward import PackedPass
from pmc_fast.rollout import RolloutEngine
from tests.families import FAMILIES, build


def test_the_coarsest_dtype_decides():
    assert tolerance(torch.float32, torch.bfloat16) is TOLERANCES[torch.bfloat16]
    assert tolerance(torch.float64, torch.float32) is TOLERANCES[torch.float32]
    assert tolerance(torch.float16, torch.bfloat16, torch.float64) is TOLERANCES[torch.bfloat16]
    assert tolerance(torch.float8_e4m3fn) is TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize(
    ("precision", "cpu", "cuda"), [("highest",) * 3, ("high", "tf32", "tf32"), ("medium", "bf16", "tf32")]
)
def test_float32_is_as_coarse_as_torch_lets_its_products_be(precision, cpu, cuda):
    before, coarse = torch.get_float32_matmul_precision(), {"tf32": torch.float16, "bf16": torch.bfloat16}
    torch.set_float32_matmul_precision(precision)
    try:
        for device, rounded in (("cpu", cpu), ("cuda", cuda)):
            made = tolerance(torch.float32, products_on=torch.device(device))
            assert made is TOLERANCES[coarse.get(rounded, torch.float32)]
            assert tolerance(torch.float64, products_on=torch.device(device)) is TOLERANCES[torch.float64]
        assert tolerance(torch.float32) is TOLERANCES[torch.float32]
        model = build(FAMILIES["llama"](), torch.float32)  # with few digits the checks pass, where they are few
        RolloutEngine(model).check()
        PackedPass(model).check()
    finally:
        torch.set_float32_matmul_precision(before)


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
