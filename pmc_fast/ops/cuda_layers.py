"""Layers of a model on CUDA, with gradients where they are needed: each way one launch, computed in float32."""

from typing import Any

import torch

from ..errors import PMCError
from .checks import once, without_autocast
from .dispatch import resolve_backend
from .nll_cuda import triton_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 8192  # of a norm: a program holds a row in registers


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """Compute x * rsqrt(mean(x ** 2) + eps) * (weight + offset) over the last dimension.

    Parameters
    ----------
    x : float32, bfloat16 or float16 Tensor [..., D]
        D from 1 to 8192.
    weight : float32, bfloat16 or float16 Tensor [D]
    eps : float
    offset : float
        1 for families that store the weight less 1.

    Returns
    -------
    Tensor [..., D]
        With offset 0 as Llama's: rounded to x's type before it is multiplied with the weight, in the type of that
        product. Else as Gemma's: rounded once, to x's type. Differentiable once.
    """
    _check("rms_norm", x, weight)
    if weight.dim() != 1 or x.shape[-1:] != weight.shape or not 1 <= weight.shape[0] <= MAX_WIDTH:
        raise PMCError(
            f"rms_norm: x is {tuple(x.shape)} and weight {tuple(weight.shape)}: last dimensions must agree, "
            f"and be from 1 to {MAX_WIDTH}"
        )
    if _graded(x, weight):
        return _RmsNorm.apply(x, weight, eps, offset)
    return _normed(x.contiguous(), weight.contiguous(), None, eps, offset)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute silu(gate) * up.

    Parameters
    ----------
    gate, up : float32, bfloat16 or float16 Tensor
        Of one shape and type.

    Returns
    -------
    Tensor
        Differentiable once.
    """
    _check("silu_mul", gate, up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise PMCError(
            f"silu_mul: gate is {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)}: they must agree"
        )
    if _graded(gate, up):
        return _SiluMul.apply(gate, up)
    return _gated(gate.contiguous(), up.contiguous())


def rotary_pair(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn pairs of halves in both: x * cos + (-x[D/2:], x[:D/2]) * sin.

    Parameters
    ----------
    q, k : float32, bfloat16 or float16 Tensor [1, heads, R, D]
        Of one type, each with its own number of heads; D even.
    cos, sin : float32, bfloat16 or float16 Tensor [1, R, D]
        Of one type, without gradients.

    Returns
    -------
    q, k : Tensor [1, heads, R, D]
        Laid out as [R, heads, D], in the type of q * cos; differentiable once, in q and k.
    """
    _check("rotary_pair", q, k, cos, sin)
    good = q.dim() == 4 and q.shape[0] == 1 and q.shape[3] % 2 == 0 and q.dtype == k.dtype and cos.dtype == sin.dtype
    if not good or k.shape != (1, k.shape[1], *q.shape[2:]) or not cos.shape == sin.shape == (1, *q.shape[2:]):
        raise PMCError(
            f"rotary_pair: q is {tuple(q.shape)}, k {tuple(k.shape)} and cos {tuple(cos.shape)}: "
            "need [1, H, R, D] twice, of one type, and [1, R, D]"
        )
    if _graded(cos, sin):
        raise PMCError("rotary_pair: cos and sin must not need gradients")
    if _graded(q, k):
        return _RotaryPair.apply(q, k, cos, sin)
    return _turned(q, k, cos.contiguous(), sin.contiguous(), torch.promote_types(q.dtype, cos.dtype), back=False)


def _check(op: str, *tensors: torch.Tensor) -> None:
    for t in tensors:
        if t.dtype not in DTYPES or t.device != tensors[0].device:
            raise PMCError(
                f"{op}: a tensor is {t.dtype} on {t.device}: need float32, bfloat16 or float16, on one GPU"
            )
    resolve_backend("cuda", tensors[0].device)  # refuses other devices


def _graded(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _normed(
    x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor | None, eps: float, offset: float
) -> torch.Tensor:
    dtype = x.dtype if offset else torch.promote_types(x.dtype, weight.dtype)
    y = torch.empty_like(x, dtype=dtype)
    triton_kernels("layers").rms_norm(x, weight, y, rstd, eps, offset)
    return y


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(gate)
    triton_kernels("layers").silu_mul(gate, up, y)
    return y


def _turned(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, *, back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    made = [x.new_empty(1, x.shape[2], x.shape[1], x.shape[3], dtype=dtype) for x in (q, k)]
    triton_kernels("layers").rotary_pair(q, k, cos, sin, *made, back)
    return made[0].transpose(1, 2), made[1].transpose(1, 2)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        rstd = x.new_empty(x.numel() // weight.shape[0], dtype=torch.float32)
        ctx.offset = offset
        ctx.save_for_backward(x, weight, rstd)
        return _normed(x, weight, rstd, eps, offset)

    @staticmethod
    @once
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        need = ctx.needs_input_grad[:2]
        dx, dweight = triton_kernels("layers").rms_norm_backward(dy.contiguous(), x, weight, rstd, ctx.offset, need)
        return dx, dweight, None, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @once
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        grads = [
            torch.empty_like(t) if need else None for t, need in zip((gate, up), ctx.needs_input_grad, strict=True)
        ]
        triton_kernels("layers").silu_mul_backward(dy.contiguous(), gate, up, *grads)
        return tuple(grads)


class _RotaryPair(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.dtype = q.dtype
        ctx.save_for_backward(cos, sin)
        return _turned(q, k, cos, sin, torch.promote_types(q.dtype, cos.dtype), back=False)

    @staticmethod
    @once
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return *_turned(dq, dk, cos, sin, ctx.dtype, back=True), None, None
