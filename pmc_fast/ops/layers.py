"""A model's layers in one pass over memory each, with gradients where they are needed: C++ or Triton.

Backward keeps the inputs, which the model holds anyway, and of an RMS norm one number a row. float32 models on the
CPU are served, and on CUDA float32, bfloat16 and float16, computed in float32. `backend` overrides the device's own.
"""

import math
from typing import Any

import torch

from ..errors import PMCError
from . import native
from .checks import no_double_backward, without_autocast
from .dispatch import resolve_backend

DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
# of which `linear` is faster than torch's: benchmarks/results/linear.json
FEW_ROWS = {"generic": range(0), "avx2": range(1, 25), "avx512": range(3, 33)}
MAX_WIDTH = 8192  # of an RMS norm on CUDA: a program holds a row in registers


def fast_linear_serves(*tensors: torch.Tensor) -> bool:
    """Return whether `linear` serves these weights: contiguous, float32, on a CPU with AVX2 or AVX-512."""
    plain = all(t.is_contiguous() and t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    return plain and bool(few_rows())


def few_rows() -> range:
    """Return the numbers of rows that `linear` computes itself on this machine."""
    return FEW_ROWS[native.ISAS[native.isa()]]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute x @ weight.T + bias without gradients: `few_rows` by reading each weight once, others by torch.

    Parameters
    ----------
    x : float32 Tensor [..., D]
    weight : float32 Tensor [V, D]
    bias : float32 Tensor [V], optional
        Like the weight one that `fast_linear_serves`.

    Returns
    -------
    Tensor [..., V]
    """
    weights = [weight] if bias is None else [weight, bias]
    if x.dtype != torch.float32 or x.device.type != "cpu" or not fast_linear_serves(*weights):
        raise PMCError("linear: need float32 tensors, weight and bias contiguous, on a CPU with AVX2 or AVX-512")
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or any(b.shape != weight.shape[:1] for b in weights[1:]):
        raise PMCError(
            f"linear: x is {tuple(x.shape)}, weight {tuple(weight.shape)} and bias "
            f"{None if bias is None else tuple(bias.shape)}: need [..., D], [V, D] and [V]"
        )
    if _needs_grad(x, *weights):
        raise PMCError("linear: has no gradients: use it under torch.no_grad()")
    rows = math.prod(x.shape[:-1])
    if rows not in few_rows():
        return torch.nn.functional.linear(x, weight, bias)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    native.cpu().linear_f32(*map(_address, (x, weight, bias, y)), rows, *weight.shape[::-1], *_how())
    return y


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0, *, backend: str | None = None
) -> torch.Tensor:
    """Compute x * rsqrt(mean(x ** 2) + eps) * (weight + offset) over the last dimension.

    Parameters
    ----------
    x : Tensor [..., D]
        On CUDA, D is from 1 to 8192.
    weight : Tensor [D]
    eps : float
    offset : float
        1 for model families that store the weight minus 1.
    backend : {"cpu", "cuda"}, optional

    Returns
    -------
    Tensor [..., D]
        With offset 0 as Llama's: rounded to x's type, then multiplied by the weight, in the type of that product.
        Else as Gemma's: rounded once, to x's type. Differentiable once.
    """
    chosen = _check("rms_norm", backend, x, weight)
    good = weight.dim() == 1 and x.shape[-1:] == weight.shape
    if not good or (chosen == "cuda" and not 1 <= weight.shape[0] <= MAX_WIDTH):
        raise PMCError(
            f"rms_norm: x is {tuple(x.shape)} and weight {tuple(weight.shape)}: last dimensions must agree, "
            f"and on CUDA be from 1 to {MAX_WIDTH}"
        )
    if _needs_grad(x, weight):
        return _RmsNorm.apply(x, weight, eps, offset, chosen)
    return _rms_norm(x.contiguous(), weight.contiguous(), None, eps, offset, chosen)


def silu_mul(gate: torch.Tensor, up: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """Compute silu(gate) * up, of one shape and type; differentiable once.

    Parameters
    ----------
    gate, up : Tensor
    backend : {"cpu", "cuda"}, optional
    """
    chosen = _check("silu_mul", backend, gate, up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise PMCError(
            f"silu_mul: gate is {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)}: they must agree"
        )
    if _needs_grad(gate, up):
        return _SiluMul.apply(gate, up, chosen)
    return _silu_mul(gate, up, chosen)


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys: x * cos + (-x[D/2:], x[:D/2]) * sin.

    Parameters
    ----------
    q, k : Tensor [1, heads, R, D]
        Of one type, each with its own number of heads; D even.
    cos, sin : Tensor [1, R, D]
        Of one type, without gradients.
    backend : {"cpu", "cuda"}, optional

    Returns
    -------
    q, k : Tensor [1, heads, R, D]
        Laid out as [R, heads, D], in the type of q * cos; differentiable once, in q and k.
    """
    chosen = _check("rotary", backend, q, k, cos, sin)
    good = q.dim() == 4 and q.shape[0] == 1 and q.shape[3] % 2 == 0 and q.dtype == k.dtype and cos.dtype == sin.dtype
    good = good and k.dim() == 4 and k.shape == (1, k.shape[1], *q.shape[2:])
    if not good or not cos.shape == sin.shape == (1, *q.shape[2:]):
        raise PMCError(
            f"rotary: q is {tuple(q.shape)}, k {tuple(k.shape)} and cos {tuple(cos.shape)}: "
            "need [1, H, R, D] twice, of one type, and [1, R, D]"
        )
    if _needs_grad(cos, sin):
        raise PMCError("rotary: cos and sin must not need gradients")
    if _needs_grad(q, k):
        return _Rotary.apply(q, k, cos, sin, chosen)
    return _rotary(q, k, cos.contiguous(), sin.contiguous(), torch.promote_types(q.dtype, cos.dtype), chosen)


def _check(op: str, backend: str | None, *tensors: torch.Tensor) -> str:
    """Return the backend that serves these tensors."""
    chosen = resolve_backend(backend, tensors[0].device)
    if chosen == "reference":
        raise PMCError(f"{op}: there is no backend 'reference': use cpu, cuda or the model's own layer")
    for t in tensors:
        if t.dtype not in DTYPES[chosen] or t.device != tensors[0].device:
            served = " or ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[chosen])
            raise PMCError(
                f"{op}: a tensor is {t.dtype} on {t.device}: backend {chosen!r} needs {served}, on one device"
            )
    return chosen


def _needs_grad(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _kernels(backend: str) -> Any:
    return native.triton_kernels("layers") if backend == "cuda" else _Cpu


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor | None, eps: float, offset: float, backend: str
) -> torch.Tensor:
    same = offset != 0 or x.dtype == weight.dtype
    y = torch.empty_like(x, dtype=x.dtype if same else torch.promote_types(x.dtype, weight.dtype))
    _kernels(backend).rms_norm(x, weight, y, rstd, eps, offset)
    return y


def _silu_mul(gate: torch.Tensor, up: torch.Tensor, backend: str) -> torch.Tensor:
    y = gate.new_empty(gate.shape)
    if backend == "cpu":
        _Cpu.silu_mul(gate.contiguous(), up.contiguous(), y)
    elif y.numel():  # rows are views where they may be parts of longer ones
        gate, up = (torch.atleast_2d(t).flatten(0, -2) for t in (gate, up))
        gate, up = (t if t.stride(1) == 1 else t.contiguous() for t in (gate, up))
        _kernels(backend).silu_mul(gate, up, y.view(gate.shape))
    return y


def _rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, backend: str,
    backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    out = [x.new_empty(1, x.shape[2], x.shape[1], x.shape[3], dtype=dtype) for x in (q, k)]
    _kernels(backend).rotary(q, k, cos, sin, *out, backward)
    return out[0].transpose(1, 2), out[1].transpose(1, 2)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, backend: str
    ) -> torch.Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        rstd = x.new_empty(x.numel() // max(1, weight.shape[0]), dtype=torch.float32)
        ctx.offset, ctx.backend = offset, backend
        ctx.save_for_backward(x, weight, rstd)
        return _rms_norm(x, weight, rstd, eps, offset, backend)

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        need = ctx.needs_input_grad[:2]
        grads = _kernels(ctx.backend).rms_norm_backward(dy.contiguous(), *ctx.saved_tensors, ctx.offset, need)
        return *grads, None, None, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, backend: str) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.backend = backend
        ctx.save_for_backward(gate, up)
        return _silu_mul(gate, up, backend)

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        grads = [torch.empty_like(gate) if need else None for need in ctx.needs_input_grad[:2]]
        _kernels(ctx.backend).silu_mul_backward(dy.contiguous(), gate, up, *grads)
        return *grads, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backend: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.dtype, ctx.backend = q.dtype, backend
        ctx.save_for_backward(cos, sin)
        return _rotary(q, k, cos, sin, torch.promote_types(q.dtype, cos.dtype), backend)

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return *_rotary(dq, dk, cos, sin, ctx.dtype, ctx.backend, backward=True), None, None, None


class _Cpu:
    """csrc/layers.cpp behind the signatures of kernels/layers.py."""

    @staticmethod
    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, rstd: torch.Tensor | None, eps: float, offset: float
    ) -> None:
        native.cpu().rms_norm_f32(*map(_address, (x, weight, y, rstd)), *_sizes(x, weight), eps, offset, *_how())

    @staticmethod
    def rms_norm_backward(
        dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, offset: float, need: tuple[bool, bool]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
        dx, dweight = (torch.empty_like(t) if needed else None for t, needed in zip((x, weight), need, strict=True))
        addresses = map(_address, (dy, x, weight, rstd, dx, dweight))
        native.cpu().rms_norm_backward_f32(*addresses, *_sizes(x, weight), offset, *_how())
        return dx, dweight

    @staticmethod
    def silu_mul(gate: torch.Tensor, up: torch.Tensor, y: torch.Tensor) -> None:
        native.cpu().silu_mul_f32(*map(_address, (gate, up, y)), y.numel(), *_how())

    @staticmethod
    def silu_mul_backward(*tensors: torch.Tensor | None) -> None:
        native.cpu().silu_mul_backward_f32(*map(_address, tensors), tensors[0].numel(), *_how())  # type: ignore[union-attr]

    @staticmethod
    def rotary(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, q_out: torch.Tensor, k_out: torch.Tensor,
        backward: bool,
    ) -> None:  # fmt: skip
        for x, out in ((q, q_out), (k, k_out)):
            _, heads, rows, width = x.shape
            native.cpu().rotary_f32(
                *map(_address, (x, cos, sin, out)), rows, heads, width, x.stride(2), x.stride(1), backward, *_how()
            )


def _sizes(x: torch.Tensor, weight: torch.Tensor) -> tuple[int, int]:
    return x.numel() // max(1, weight.shape[0]), weight.shape[0]


def _address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _how() -> tuple[int, int]:
    return native.isa(), torch.get_num_threads()
