"""Layers on the CPU with gradients, against torch's in float64, judged by torch's own error in float32."""

import pytest
import torch

from pmc_fast.errors import PMCError
from pmc_fast.ops import native
from pmc_fast.ops.layers import rms_norm, silu_mul
from pmc_fast.ops.layers import rotary as rotary_pair


def rotary(x, cos, sin):
    """Rotate queries, with a head of keys that are not used."""
    return rotary_pair(x, x[:, :1].detach(), cos, sin)[0]


def torch_rms_norm(x, weight, eps, offset=0.0):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)


def torch_silu_mul(gate, up):
    return torch.nn.functional.silu(gate) * up


def torch_rotary(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]


def forward_backward(function, inputs, dy, dtype, *rest):
    """Return the result and the gradients of the inputs that need them."""
    leaves = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in inputs]
    y = function(*leaves, *rest)
    wanted = [t for t in leaves if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(dtype))]


def compare(ours, torchs, inputs, dy, *rest):
    exact = forward_backward(torchs, inputs, dy, torch.float64, *rest)
    plain = forward_backward(torchs, inputs, dy, torch.float32, *rest)
    mine = forward_backward(ours, inputs, dy, torch.float32, *rest)
    for a, b, e in zip(mine, plain, exact, strict=True):
        assert a.shape == e.shape
        assert a.dtype == torch.float32
        allowed = 3 * (b - e).abs().max() + 2**-22 * e.abs().max()
        assert (a - e).abs().max() <= allowed
        assert (a - e).abs().mean() <= 2 * (b - e).abs().mean() + 2**-23 * e.abs().mean()


def randn(*shape, seed=0, grad=True):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)], ids=["all", "frozen", "first"])
@pytest.mark.parametrize("shape", [(1, 1, 576), (1, 700, 576), (2, 33, 7), (3, 1, 129), (1, 2, 1)])
def test_rms_norm(shape, need, offset):
    inputs = [randn(*shape, grad=need[0]), randn(shape[-1], seed=1, grad=need[1])]
    compare(rms_norm, torch_rms_norm, inputs, randn(*shape, seed=2), 1e-5, offset)


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 333, 257), (2, 3, 1536)])
def test_silu_mul(shape, need):
    gate = (randn(*shape).detach() * 8).requires_grad_(need[0])
    compare(silu_mul, torch_silu_mul, [gate, randn(*shape, seed=1, grad=need[1])], randn(*shape, seed=2))


def test_silu_mul_far_out():
    gate = torch.tensor([0.0, 1e4, -1e4, -80.0, 80.0, -30.0, -1.2784645]).requires_grad_()  # the last: slope 0
    compare(silu_mul, torch_silu_mul, [gate, randn(7)], randn(7, seed=1))
    gate = torch.tensor([torch.nan], requires_grad=True)
    (slope,) = torch.autograd.grad(silu_mul(gate, torch.ones(1)), gate)
    assert slope.isnan().all()


@pytest.mark.parametrize(("heads", "rows", "dim"), [(9, 5, 64), (1, 1, 2), (3, 333, 96)])
def test_rotary(heads, rows, dim):
    cos, sin = randn(1, rows, dim, seed=1, grad=False), randn(1, rows, dim, seed=2, grad=False)
    x = randn(1, rows, heads, dim)
    inputs, dy = [x.detach().transpose(1, 2).requires_grad_()], randn(1, heads, rows, dim, seed=3)
    exact = forward_backward(torch_rotary, inputs, dy, torch.float64, cos, sin)
    mine = forward_backward(rotary, inputs, dy, torch.float32, cos, sin)
    for a, e in zip(mine, exact, strict=True):
        assert (a - e).abs().max() <= 2**-22 * e.abs().max()
    assert rotary(x.transpose(1, 2), cos, sin).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, 1:4, 0, ::2], lambda t: t[0].transpose(0, 2)[::2, :, :5],
        lambda t: t[0, 0, 0, :5].expand(2, 3, 5), lambda t: t[:1, :1, 0, :5],
    ],
)  # fmt: skip
def test_inputs_and_gradients_of_any_strides(view):
    wide = randn(4, 6, 2, 9)
    shape = view(wide).shape
    norm = randn(5, 2, seed=2)[:, 0].detach()
    for dy in (
        randn(*shape[:-1], 6, seed=3),
        randn(6, *shape[:-1], seed=4).movedim(0, -1),
        torch.ones(()).expand(*shape[:-1], 6),
    ):
        dy = dy.detach()
        narrow = dy[..., :5]
        compare(
            lambda x: rms_norm(view(x), norm, 1e-6), lambda x: torch_rms_norm(view(x), norm.to(x.dtype), 1e-6), [wide],
            narrow,
        )  # fmt: skip
        compare(lambda x: silu_mul(view(x), view(x)), lambda x: torch_silu_mul(view(x), view(x)), [wide], narrow)


def test_rotary_of_any_strides():
    cos, sin = randn(1, 5, 4, seed=1, grad=False), randn(1, 5, 8, seed=2, grad=False)[..., ::2]
    x = randn(1, 4, 3, 5)
    for dy in (torch.ones(()).expand(1, 3, 5, 4), randn(1, 4, 5, 3, seed=3).transpose(1, 3)):
        compare(lambda x: rotary(x.permute(0, 2, 3, 1), cos.to(x.dtype), sin.to(x.dtype)),
                lambda x: torch_rotary(x.permute(0, 2, 3, 1), cos.to(x.dtype), sin.to(x.dtype)), [x], dy)  # fmt: skip


def test_every_instruction_set_and_thread_count_gives_the_same():
    module = native.cpu()
    x, weight, dy = (randn(*s, seed=i, grad=False) for i, s in enumerate([(300, 577), (577,), (300, 577)]))
    exact = forward_backward(torch_rms_norm, [x.requires_grad_(), weight.requires_grad_()], dy, torch.float64, 1e-5)
    rstd = torch.rsqrt(x.detach().double().pow(2).mean(-1) + 1e-5).float()
    for isa in range(module.best_isa() + 1):
        for threads in (1, 2, 5):
            dx, dweight, dgate, dup = (torch.empty_like(t) for t in (x, weight, x, x))
            module.rms_norm_backward_f32(
                dy.data_ptr(), x.data_ptr(), weight.data_ptr(), rstd.data_ptr(), dx.data_ptr(), dweight.data_ptr(),
                300, 577, 0.0, isa, threads,
            )  # fmt: skip
            module.silu_mul_backward_f32(
                dy.data_ptr(), x.data_ptr(), dx.data_ptr(), dgate.data_ptr(), dup.data_ptr(),
                x.numel(), isa, threads,
            )  # fmt: skip
            torch.testing.assert_close(dx.double(), exact[1], atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(dweight.double(), exact[2], atol=2e-5, rtol=1e-5)
            silu = forward_backward(torch_silu_mul, [x, dx.requires_grad_()], dy, torch.float64)
            torch.testing.assert_close(dgate.double(), silu[1], atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(dup.double(), silu[2], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: rms_norm(x, x[0], 1e-6),
        lambda x: silu_mul(x, x), lambda x: rotary(x[None, None], x[None].detach(), x[None].detach()),
    ],
)  # fmt: skip
def test_no_second_derivatives(call):
    x = randn(4, 4)
    with pytest.raises(PMCError, match="second derivatives"):
        torch.autograd.grad(call(x).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: rms_norm(x, x[0].bfloat16(), 1e-6), lambda x: rms_norm(x, x[0, :3], 1e-6),
        lambda x: silu_mul(x, x[:1]), lambda x: silu_mul(x, x.double()), lambda x: rotary(x[None, None], x, x),
        lambda x: rotary(x[None, None], x[None].double(), x[None]),
        lambda x: rotary(x[None, None], x[None].requires_grad_(), x[None]),
    ],
)  # fmt: skip
def test_layers_refuse_what_they_would_misread(call):
    with pytest.raises(PMCError, match=r"(rms_norm|silu_mul|rotary): "):
        call(torch.ones(4, 4))
