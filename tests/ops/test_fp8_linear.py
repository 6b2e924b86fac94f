"""8-bit rows and products of them: rounding against its definition, products against float64 and torch's own."""

import pytest
import torch

from pmc_fast.errors import PMCError
from pmc_fast.ops import fp8_linear as op
from pmc_fast.ops.fp8_linear import FP8, fp8_linear, fp8_rows, why_no_fp8

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
VALUES = torch.arange(256, dtype=torch.uint8).view(FP8).double()
FINITE = VALUES[VALUES.isfinite()].unique()


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_rows_are_rounded_to_the_nearest_number(backend, dtype):
    """Triton's kernel, too: without a GPU by its interpreter, which loses the carry where 1.9... is rounded to 2."""
    for x in (randn(5, 96, dtype=dtype), randn(3, 2, 70, dtype=dtype)[:, 1], randn(48, 3, dtype=dtype).T):
        y, scale = fp8_rows(x, backend=backend)
        assert (y.dtype, scale.dtype, y.shape, scale.shape) == (FP8, torch.float32, x.shape, x.shape[:1])
        torch.testing.assert_close(scale.double() * 448, x.abs().amax(1).double(), rtol=1e-6, atol=0)
        exact = x.double().cpu() / scale.double().cpu()[:, None]
        away, which = (exact[..., None] - FINITE).abs().min(-1)
        good = (exact - y.double().cpu()).abs() <= away + 1e-5 * exact.abs()
        if backend == "cuda" and not GPU:
            carried = FINITE[which].abs().frexp().mantissa == 0.5
            assert carried.double().mean() < 0.2
            good |= carried
        assert good.all()


@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_rows_of_zeros_and_of_no_number(backend):
    x = torch.zeros(4, 32, device=DEVICE)
    x[1, 3], x[2, 5], x[3, 0] = torch.nan, torch.inf, -2.0
    y, scale = fp8_rows(x, backend=backend)
    made = y.float() * scale[:, None]
    assert made[0].eq(0).all()
    assert made[1].isnan().any() or (backend == "cuda" and not GPU)  # of which Triton's interpreter makes numbers
    assert not made[2].isfinite().all()
    assert made[3].tolist() == [-2.0] + 31 * [0.0]
    assert fp8_rows(x[:0], backend=backend)[0].shape == (0, 32)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16] if GPU else [torch.float32, torch.bfloat16, torch.float64])
def test_product(dtype, bias):
    x, (weight, scale) = randn(2, 3, 64, dtype=dtype), fp8_rows(randn(48, 64, seed=1))
    b = randn(48, dtype=dtype, seed=2) if bias else None
    y = fp8_linear(x, weight, scale, b)
    rows, scales = fp8_rows(x.flatten(0, 1))
    exact = (rows.double() * scales[:, None]) @ (weight.double() * scale[:, None]).T + (b.double() if bias else 0)
    assert (y.dtype, y.shape) == (dtype, (2, 3, 48))
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(y.flatten(0, 1).double(), exact, rtol=2 * eps, atol=100 * eps)
    near = (x.double().flatten(0, 1) @ randn(48, 64, seed=1).double().T + (b.double() if bias else 0) - exact).norm()
    assert 0 < near < 0.1 * exact.norm()  # the original product, to some 4 in 100


def test_the_call_of_torchs_product_on_the_cpu():
    """What CUDA is asked for, asked of the CPU, where torch serves it."""
    x, (weight, scale) = randn(5, 64).cpu(), fp8_rows(randn(48, 64, seed=1).cpu())
    rows, scales = fp8_rows(x)
    how = {"scale_a": scales[:, None], "scale_b": scale[None], "bias": None, "out_dtype": torch.bfloat16}
    try:
        theirs = torch._scaled_mm(rows, weight.T, **how)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch {torch.__version__}: {error}")
    torch.testing.assert_close(theirs.float(), fp8_linear(x, weight, scale), rtol=2**-7, atol=0.02)


def test_under_autocast_the_result_is_its_types():
    x, (weight, scale) = randn(3, 32), fp8_rows(randn(16, 32))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert fp8_linear(x, weight, scale).dtype == torch.bfloat16


def test_refusals(monkeypatch):
    x, (weight, scale) = randn(3, 32), fp8_rows(randn(16, 32))
    for bad in [
        (x, weight.float(), scale),
        (x, weight[:9], scale[:9]),
        (x[:, :9], weight, scale),
        (x, weight, scale[:3]),
    ]:
        with pytest.raises(PMCError, match="fp8_linear: "):
            fp8_linear(*bad)
    with pytest.raises(PMCError, match="fp8_rows: "):
        fp8_rows(x[0])
    card = torch.device("cuda")
    assert why_no_fp8(torch.device("cpu"), torch.float32) is None
    for version, dtype, words in [
        ((8, 6), torch.bfloat16, "A card is sm_86, and 8-bit products need sm_89 or later"),
        ((9, 0), torch.float32, "the model computes in torch.float32"),
        ((8, 9), torch.bfloat16, None),
    ]:
        monkeypatch.setattr(op.torch.cuda, "get_device_capability", lambda device, v=version: v)
        monkeypatch.setattr(op.torch.cuda, "get_device_name", lambda device: "A card")
        why = why_no_fp8(card, dtype)
        assert why is None if words is None else words in why
