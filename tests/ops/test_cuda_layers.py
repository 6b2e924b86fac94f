"""Triton's layers against torch's in float64, judged by torch's own error in the same type."""

import functools

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pmc_fast.errors import PMCError
from pmc_fast.ops import layers
from pmc_fast.ops.layers import MAX_WIDTH

rms_norm, silu_mul, rotary = (
    functools.partial(f, backend="cuda") for f in (layers.rms_norm, layers.silu_mul, layers.rotary)
)
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"  # there Triton's interpreter, which cuts bfloat16 where it should round
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
NEED = pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)], ids=["both", "first", "second"])
EACH = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def torch_rms_norm(x, weight, eps, offset=0.0):
    """Compute as Llama's (without offset) or Gemma's layer does."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) * torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + eps)
    return (y * (weight.to(wide) + offset)).to(x.dtype) if offset else weight * y.to(x.dtype)


def torch_silu_mul(gate, up):
    return torch.nn.functional.silu(gate) * up


def torch_rotary(q, k, cos, sin):
    half = q.shape[-1] // 2
    return [x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None] for x in (q, k)]


def forward_backward(function, inputs, dy, *rest, wide=False):
    """Return the result, or both, and the gradients of the inputs that need them."""
    leaves = [t.detach().to(torch.float64 if wide else t.dtype).requires_grad_(t.requires_grad) for t in inputs]
    y = function(*leaves, *rest)
    made, slopes = ([y], [dy]) if isinstance(y, torch.Tensor) else (list(y), list(dy))
    wanted = [t for t in leaves if t.requires_grad]
    pairs = [(a, b.to(a.dtype)) for a, b in zip(made, slopes, strict=True) if a.requires_grad]
    grads = torch.autograd.grad([a for a, _ in pairs], wanted, [b for _, b in pairs]) if wanted else []
    return [*(a.detach() for a in made), *grads]


def compare(ours, torchs, inputs, dy, *rest):
    exact = forward_backward(torchs, inputs, dy, *rest, wide=True)
    plain = forward_backward(torchs, inputs, dy, *rest)
    mine = forward_backward(ours, inputs, dy, *rest)
    for a, b, e in zip(mine, plain, exact, strict=True):
        assert a.shape == e.shape
        assert a.dtype == b.dtype
        if not a.numel():
            continue
        a, b, unit = a.double(), b.double(), torch.finfo(a.dtype).eps
        assert (a - e).abs().max() <= 3 * (b - e).abs().max() + unit / 2 * e.abs().max()
        assert (a - e).abs().mean() <= 2 * (b - e).abs().mean() + unit / 4 * e.abs().mean()


def randn(*shape, dtype=torch.float32, seed=0, grad=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.requires_grad_(grad)


@EACH
@pytest.mark.parametrize("offset", [0.0, 1.0])
@NEED
@pytest.mark.parametrize(
    "shape", [(1, 5, 576), (1, 300, 64), (2, 33, 7), (3, 1, 129), (1, 2, 1), (1, 2, 3072), (0, 7)]
)
def test_rms_norm(shape, need, offset, dtype):
    inputs = [randn(*shape, dtype=dtype, grad=need[0]), randn(shape[-1], dtype=dtype, seed=1, grad=need[1])]
    compare(rms_norm, torch_rms_norm, inputs, randn(*shape, seed=2), 1e-5, offset)


@NEED
@pytest.mark.parametrize("half", [torch.float16, *([torch.bfloat16] if GPU else [])], ids=str)
def test_rms_norm_of_two_types_has_the_type_of_torchs(half, need):
    for x, weight in ((half, torch.float32), (torch.float32, half)):
        inputs = [randn(3, 40, dtype=x, grad=need[0]), randn(40, dtype=weight, seed=1, grad=need[1])]
        for offset in (0.0, 1.0):
            compare(rms_norm, torch_rms_norm, inputs, randn(3, 40, seed=2), 1e-5, offset)


@EACH
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
def test_a_models_own_norm_differs_by_one_rounding_at_most(kind, dtype):
    layer = kind(576, 1e-6).to(DEVICE, dtype)
    layer.weight.data.normal_(generator=torch.Generator(DEVICE).manual_seed(0))
    x = randn(20, 576, dtype=dtype) * 3
    with torch.no_grad():
        expected = layer(x).double()
        ours = rms_norm(x, layer.weight, 1e-6, float(kind is Gemma3RMSNorm)).double()
    # in float32 the sums' order counts too; else a normalised number may be rounded to its other side, once
    allowed = 8 if dtype == torch.float32 else 1 if kind is Gemma3RMSNorm else 2
    assert ((ours - expected).abs() <= allowed * torch.finfo(dtype).eps * expected.abs()).all()
    if dtype != torch.float32:
        assert (ours != expected).double().mean() < 0.01


def test_parts_of_the_weights_gradient_add_up_over_many_rows():
    rows = 70_000 if GPU else 3000  # more than programs
    inputs = [randn(rows, 96, grad=True), randn(96, seed=1, grad=True)]
    compare(rms_norm, torch_rms_norm, inputs, randn(rows, 96, seed=2), 1e-5)
    again = [forward_backward(rms_norm, inputs, randn(rows, 96, seed=2), 1e-5)[2] for _ in range(2)]
    assert torch.equal(*again)


@EACH
@NEED
@pytest.mark.parametrize("shape", [(1, 5, 1536), (1, 7), (3, 1, 2049), (1,), (2, 0, 5)])
def test_silu_mul(shape, need, dtype):
    inputs = [(randn(*shape, dtype=dtype) * 4).requires_grad_(need[0])]
    inputs += [randn(*shape, dtype=dtype, seed=1, grad=need[1])]
    compare(silu_mul, torch_silu_mul, inputs, randn(*shape, seed=2))


@EACH
def test_silu_mul_reads_parts_of_rows(dtype):
    """As of one product that gives both: without a copy."""
    both = randn(1, 3, 2 * 1100, dtype=dtype)
    for gate, up in (both.split(1100, -1), both[0].split(1100, -1), (both[..., 0::2], both[..., 1::2])):
        y = silu_mul(gate, up)
        assert y.is_contiguous()
        assert torch.equal(y, silu_mul(gate.contiguous(), up.contiguous()))


def test_silu_mul_far_out():
    gate = torch.tensor([-300.0, -90.0, 0.0, 90.0, 300.0], device=DEVICE)
    up = torch.full((5,), 2.0, device=DEVICE)
    compare(silu_mul, torch_silu_mul, [gate.requires_grad_(), up.requires_grad_()], torch.ones(5, device=DEVICE))


@EACH
@NEED
@pytest.mark.parametrize("shape", [(9, 3, 5, 64), (3, 5, 1, 6), (1, 1, 7, 2), (40, 2, 2, 128), (2, 2, 0, 8)])
@pytest.mark.parametrize("layout", ["rows", "heads", "part"])
def test_rotary(shape, layout, need, dtype):
    q_heads, k_heads, rows, dim = shape
    q, k = (
        {
            "rows": lambda n, seed: randn(1, rows, n, dim, dtype=dtype, seed=seed).transpose(1, 2),  # as models have it
            "heads": lambda n, seed: randn(1, n, rows, dim, dtype=dtype, seed=seed),
            "part": lambda n, seed: randn(1, rows, n, dim + 3, dtype=dtype, seed=seed).transpose(1, 2)[..., 1 : dim + 1],
        }[layout](n, seed).requires_grad_(needed)
        for n, seed, needed in ((q_heads, 0, need[0]), (k_heads, 1, need[1]))
    )  # fmt: skip
    # halves of their own: no model has them, and an operation on halves must not mix them up
    cos, sin = randn(1, rows, dim, dtype=dtype, seed=2), randn(1, rows, dim, dtype=dtype, seed=3)
    compare(rotary, torch_rotary, [q, k, cos, sin], [randn(*x.shape, seed=4) for x in (q, k)])
    assert all(x.transpose(1, 2).is_contiguous() for x in rotary(q, k, cos, sin))


def test_rotary_of_two_types_has_the_type_of_torchs():
    q, k = (randn(1, n, 5, 8, dtype=torch.float16, grad=True) for n in (3, 1))
    cos, sin = randn(1, 5, 8, seed=1), randn(1, 5, 8, seed=2)
    compare(rotary, torch_rotary, [q, k, cos, sin], [randn(*x.shape, seed=3) for x in (q, k)])


def test_one_of_a_pair_may_go_unused():
    q, k = (randn(1, n, 5, 8, grad=True) for n in (3, 1))
    cos, sin = randn(1, 5, 8, seed=1), randn(1, 5, 8, seed=2)
    for i, x in enumerate((q, k)):
        ours, theirs = (
            torch.autograd.grad(f(q, k, cos, sin)[i].sum(), x)[0] for f in (rotary, torch_rotary)
        )  # fmt: skip
        torch.testing.assert_close(ours, theirs)


def test_dy_of_any_strides():
    x, weight = randn(1, 3, 8, grad=True), randn(8, seed=1, grad=True)
    for dy in (randn(8, 3).T[None], torch.ones(1, 1, 1, device=DEVICE).expand(1, 3, 8)):
        compare(rms_norm, torch_rms_norm, [x, weight], dy, 1e-6)
        compare(silu_mul, torch_silu_mul, [x, randn(1, 3, 8, seed=4, grad=True)], dy)
        pair = [x[None], x[None], randn(1, 3, 8, seed=5), randn(1, 3, 8, seed=6)]
        compare(rotary, torch_rotary, pair, [dy[None]] * 2)


def test_what_needs_no_gradient_keeps_nothing():
    x, weight = randn(1, 2, 4, 8, grad=True), randn(8, seed=1, grad=True)
    cos = randn(1, 4, 8)
    with torch.no_grad():
        for y in (rms_norm(x, weight, 1e-6), silu_mul(x, x), *rotary(x, x, cos, cos)):
            assert y.grad_fn is None
    assert not rms_norm(x.detach(), weight.detach(), 1e-6).requires_grad


def test_second_derivatives_are_refused():
    x, weight, cos = randn(1, 2, 4, 8, grad=True), randn(8, seed=1, grad=True), randn(1, 4, 8)
    for y in (rms_norm(x, weight, 1e-6), silu_mul(x, x), *rotary(x, x, cos, cos)):
        with pytest.raises(PMCError, match="second derivatives"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


def test_what_does_not_fit_is_refused():
    x, cos = randn(1, 2, 4, 8), randn(1, 4, 8)
    for call, message in [
        (lambda: rms_norm(x, randn(7), 1e-6), "last dimensions"),
        (lambda: rms_norm(randn(1, MAX_WIDTH + 1), randn(MAX_WIDTH + 1), 1e-6), "last dimensions"),
        (lambda: rms_norm(x.double(), randn(8), 1e-6), "float64"),
        (lambda: silu_mul(x, x.half()), "must agree"),
        (lambda: silu_mul(x, x[..., 1:]), "must agree"),
        (lambda: rotary(x[..., 1:], x[..., 1:], cos[..., 1:], cos[..., 1:]), "need"),
        (lambda: rotary(x, x, cos[:, 1:], cos[:, 1:]), "need"),
        (lambda: rotary(x, x[:, :, 1:], cos, cos), "need"),
        (lambda: rotary(x, x.half(), cos, cos), "need"),
        (lambda: rotary(x, x, cos, cos.half()), "need"),
        (lambda: rotary(x, x, cos.clone().requires_grad_(), cos), "must not need gradients"),
    ]:
        with pytest.raises(PMCError, match=message):
            call()


@pytest.mark.skipif(not GPU, reason="captures a CUDA graph")
def test_a_cuda_graph_may_hold_them():
    x, weight = randn(1, 3, 5, 64, dtype=torch.bfloat16), randn(64, dtype=torch.bfloat16)
    cos = randn(1, 5, 64, dtype=torch.bfloat16)

    def compute():
        y = rms_norm(x, weight, 1e-6)
        return silu_mul(*rotary(y, x, cos, cos))

    expected = compute()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = compute()
    graph.replay()
    assert torch.equal(y, expected)
