"""Linear layers and RMS norms without gradients, for the few rows of a decode step on the CPU."""

import torch

from ..errors import PMCError
from . import native
from .checks import check_float32_cpu
from .gemm import gemm_serves


def fast_linear_serves(weight: torch.Tensor) -> bool:
    """Return whether `linear` beats torch's for this weight: float32 on a CPU with AVX-512."""
    return weight.is_contiguous() and gemm_serves(weight)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute x @ weight.T + bias, reading each weight once from where the model holds it.

    Parameters
    ----------
    x : float32 Tensor [..., D]
    weight : float32 Tensor [V, D]
        One that `fast_linear_serves`.
    bias : float32 Tensor [V], optional

    Returns
    -------
    Tensor [..., V]
        Not differentiable.
    """
    check_float32_cpu("linear", x, weight, bias)
    rows = x if x.is_contiguous() else x.contiguous()
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise PMCError(f"linear: x is {tuple(x.shape)} and weight {tuple(weight.shape)}: last dimensions must agree")
    outer, inner = weight.shape
    if not weight.is_contiguous() or (bias is not None and (bias.shape != (outer,) or not bias.is_contiguous())):
        raise PMCError(f"linear: weight and bias must be contiguous, and the bias [{outer}]")
    y = x.new_empty(*x.shape[:-1], outer)
    native.cpu().linear_f32(
        rows.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        y.numel() // outer if outer else 0,
        inner,
        outer,
        torch.get_num_threads(),
    )
    return y


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
        Not differentiable.
    """
    check_float32_cpu("rms_norm", x, weight)
    if weight.dim() != 1 or x.shape[-1:] != weight.shape:
        raise PMCError(
            f"rms_norm: x is {tuple(x.shape)} and weight {tuple(weight.shape)}: last dimensions must agree"
        )
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    module = native.cpu()
    size = weight.shape[0]
    module.rms_norm_f32(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), 0, x.numel() // max(1, size), size, eps, offset,
        native.isa(), torch.get_num_threads(),
    )  # fmt: skip
    return y


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute silu(gate) * up.

    Parameters
    ----------
    gate, up : float32 Tensor
        Of one shape, on the CPU.

    Returns
    -------
    Tensor
        Not differentiable.
    """
    check_float32_cpu("silu_mul", gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    if gate.shape != up.shape:
        raise PMCError(f"silu_mul: gate is {tuple(gate.shape)} and up {tuple(up.shape)}: they must agree")
    y = torch.empty_like(gate)
    module = native.cpu()
    module.silu_mul_f32(
        gate.data_ptr(), up.data_ptr(), y.data_ptr(), y.numel(), native.isa(), torch.get_num_threads()
    )
    return y


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs of halves: x * cos + (-x[D/2:], x[:D/2]) * sin.

    Parameters
    ----------
    x : float32 Tensor [1, heads, R, D]
        On the CPU, any strides but the last's; D even.
    cos, sin : float32 Tensor [1, R, D]

    Returns
    -------
    Tensor [1, heads, R, D]
        Laid out as [R, heads, D]; not differentiable.
    """
    check_float32_cpu("rotary", x, cos, sin)
    good = x.dim() == 4 and x.shape[0] == 1 and x.shape[3] % 2 == 0 and x.stride(3) == 1
    if not good or not cos.shape == sin.shape == (1, *x.shape[2:]):
        raise PMCError(f"rotary: x is {tuple(x.shape)} and cos {tuple(cos.shape)}: need [1, H, R, D] and [1, R, D]")
    _, heads, rows, dim = x.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    y = x.new_empty(1, rows, heads, dim)
    module = native.cpu()
    module.rotary_f32(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), rows, heads, dim, x.stride(2), x.stride(1),
        False, native.isa(), torch.get_num_threads(),
    )  # fmt: skip
    return y.transpose(1, 2)
