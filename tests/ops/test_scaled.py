"""A tensor times a number of the device, against float64."""

import pytest
import torch

from pmc_fast.errors import PMCError
from pmc_fast.ops import weighted_nll
from pmc_fast.ops.scaled import scaled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.bfloat16, torch.float16)
BACKENDS = ["cuda", *(["cpu"] if DEVICE == "cpu" else [])]  # cuda without a GPU: Triton's interpreter
PAIRS = [*((d, d) for d in (torch.float32, *HALVES)), *((torch.float32, d) for d in HALVES)]


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("dtype", "out"), PAIRS, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (61, 33), (257, 97), (4096,), (3, 4097)], ids=str)
def test_the_product_is_rounded_once(shape, dtype, out, factor_dtype, backend):
    x, factor = numbers(*shape, dtype=dtype), torch.tensor(1 / 3, dtype=factor_dtype, device=DEVICE)
    y = scaled(x, factor, out, backend=backend)
    assert y.shape == x.shape
    assert y.dtype == out
    expected = x.float() * factor.float()
    if backend == DEVICE or out != torch.bfloat16:
        assert torch.equal(y, expected.to(out))
    else:  # Triton's interpreter cuts where it should round
        assert ((y.float() - expected).abs() <= torch.finfo(out).eps * expected.abs()).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_overflow_and_nan(backend):
    x = numbers(33, 12, dtype=torch.float16)
    half = torch.tensor(0.5, device=DEVICE)
    assert torch.equal(scaled(x.T, half, backend=backend), x.T * 0.5)
    assert torch.equal(scaled(x[:, ::3], half, backend=backend), x[:, ::3] * 0.5)
    assert scaled(x.abs() + 1, torch.tensor(1e6, device=DEVICE), backend=backend).isinf().all()
    assert scaled(x, torch.tensor(torch.nan, device=DEVICE), backend=backend).isnan().all()


def test_float64_is_torchs():
    x, factor = numbers(5, 3).double(), torch.tensor(1 / 3, dtype=torch.float64, device=DEVICE)
    assert torch.equal(scaled(x, factor, backend="cuda"), x * factor)


def test_a_factor_is_one_number():
    with pytest.raises(PMCError, match="need one number"):
        scaled(numbers(3), numbers(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: 9 GB of it")
def test_more_numbers_than_int32_counts():
    x = torch.ones(2**31 + 4099, dtype=torch.bfloat16, device="cuda")
    y = scaled(x, torch.tensor(3.0, device="cuda"))
    assert all(bool((part == 3).all()) for part in y.split(2**28))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="what it does to the device's queue: needs a GPU")
def test_backward_of_the_head_waits_for_nothing():
    hidden, head = (numbers(n, 16, dtype=torch.bfloat16).requires_grad_() for n in (8, 50))
    targets, scale = torch.arange(8, device="cuda"), torch.ones(8, device="cuda")
    (weighted_nll(hidden, head, targets, scale, targets)[0] * 0.3).backward()  # compiles
    loss = weighted_nll(hidden, head, targets, scale, targets)[0] * 0.3
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
