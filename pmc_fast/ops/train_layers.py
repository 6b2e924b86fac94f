"""Layers of a float32 model with gradients, for many rows on the CPU: each way one pass, or one matrix product.

Backward keeps the inputs, which the model holds anyway, and of an RMS norm one number a row.
"""

import math
from typing import Any

import torch

from ..errors import PMCError
from . import native
from .checks import check_float32_cpu, once, without_autocast
from .gemm import gemm


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute x @ weight.T + bias; backward computes only the gradients that are needed.

    Parameters
    ----------
    x : float32 Tensor [..., D]
        On a CPU with AVX-512 (`gemm_serves`).
    weight : float32 Tensor [V, D]
    bias : float32 Tensor [V], optional

    Returns
    -------
    Tensor [..., V]
        Differentiable once.
    """
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise PMCError(f"linear: x is {tuple(x.shape)} and weight {tuple(weight.shape)}: last dimensions must agree")
    return _Linear.apply(x, weight, bias)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """Compute x * rsqrt(mean(x ** 2) + eps) * (weight + offset) over the last dimension.

    Parameters
    ----------
    x : float32 Tensor [..., D]
        On the CPU.
    weight : float32 Tensor [D]
    eps : float
    offset : float
        1 for families that store the weight less 1.

    Returns
    -------
    Tensor [..., D]
        Differentiable once.
    """
    check_float32_cpu("rms_norm", x, weight)
    if weight.dim() != 1 or x.shape[-1:] != weight.shape:
        raise PMCError(
            f"rms_norm: x is {tuple(x.shape)} and weight {tuple(weight.shape)}: last dimensions must agree"
        )
    return _RmsNorm.apply(x, weight, eps, offset)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute silu(gate) * up.

    Parameters
    ----------
    gate, up : float32 Tensor
        Of one shape, on the CPU.

    Returns
    -------
    Tensor
        Differentiable once.
    """
    check_float32_cpu("silu_mul", gate, up)
    if gate.shape != up.shape:
        raise PMCError(f"silu_mul: gate is {tuple(gate.shape)} and up {tuple(up.shape)}: they must agree")
    return _SiluMul.apply(gate, up)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs of halves: x * cos + (-x[D/2:], x[:D/2]) * sin.

    Parameters
    ----------
    x : float32 Tensor [1, heads, R, D]
        On the CPU; D even.
    cos, sin : float32 Tensor [1, R, D]
        Without gradients.

    Returns
    -------
    Tensor [1, heads, R, D]
        Laid out as [R, heads, D]; differentiable once, in x.
    """
    check_float32_cpu("rotary", x, cos, sin)
    if x.dim() != 4 or x.shape[0] != 1 or x.shape[3] % 2 or not cos.shape == sin.shape == (1, *x.shape[2:]):
        raise PMCError(f"rotary: x is {tuple(x.shape)} and cos {tuple(cos.shape)}: need [1, H, R, D] and [1, R, D]")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise PMCError("rotary: cos and sin must not need gradients")
    return _Rotary.apply(x, cos, sin)


class _Linear(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        need_x, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        return gemm(_rows(x), weight.T, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = _rows(dy)
        dx = gemm(rows, weight).view(*dy.shape[:-1], weight.shape[1]) if need_x else None
        dweight = gemm(rows.T, _rows(x)) if need_weight else None
        return dx, dweight, rows.sum(0) if need_bias else None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, size = torch.empty_like(x), weight.shape[0]
        rstd = x.new_empty(x.numel() // max(1, size)) if any(ctx.needs_input_grad) else None
        native.cpu().rms_norm_f32(
            x.data_ptr(),
            weight.data_ptr(),
            y.data_ptr(),
            _address(rstd),
            x.numel() // max(1, size),
            size,
            eps,
            offset,
            *_how(),
        )
        ctx.offset = offset
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        dy = dy.contiguous()
        dx, dweight = _wanted(ctx, x, weight)
        size = weight.shape[0]
        native.cpu().rms_norm_backward_f32(
            dy.data_ptr(), x.data_ptr(), weight.data_ptr(), rstd.data_ptr(), _address(dx), _address(dweight),
            x.numel() // max(1, size), size, ctx.offset, *_how(),
        )  # fmt: skip
        return dx, dweight, None, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        native.cpu().silu_mul_f32(gate.data_ptr(), up.data_ptr(), y.data_ptr(), y.numel(), *_how())
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        dy = dy.contiguous()
        dgate, dup = _wanted(ctx, gate, up)
        native.cpu().silu_mul_backward_f32(
            dy.data_ptr(), gate.data_ptr(), up.data_ptr(), _address(dgate), _address(dup), dy.numel(), *_how()
        )
        return dgate, dup


class _Rotary(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, back=False)

    @staticmethod
    @once
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, sin, back=True), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    x = x if x.stride(3) == 1 else x.contiguous()
    _, heads, rows, dim = x.shape
    y = x.new_empty(1, rows, heads, dim)
    native.cpu().rotary_f32(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), rows, heads, dim, x.stride(2), x.stride(1),
        back, *_how(),
    )  # fmt: skip
    return y.transpose(1, 2)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # -1 would not do where nothing is in a row


def _wanted(ctx: Any, *inputs: torch.Tensor) -> list[torch.Tensor | None]:
    """Return room for the gradients of the first inputs that need them."""
    return [torch.empty_like(t) if need else None for t, need in zip(inputs, ctx.needs_input_grad, strict=False)]


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _how() -> tuple[int, int]:
    return native.isa(), torch.get_num_threads()
