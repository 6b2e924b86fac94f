"""Linear layers and RMS norms without gradients, for the few rows of a decode step on the CPU."""

import torch

from .. import native

AVX512 = 2  # csrc/simd.h


def fast_linear_serves(weight: torch.Tensor) -> bool:
    """Return whether `linear` beats torch's for this weight: float32 on a CPU with AVX-512."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and native.cpu().best_isa() >= AVX512
    )


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
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    y = torch.empty(*x.shape[:-1], weight.shape[0])
    native.cpu().linear_f32(
        rows.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        rows.shape[0],
        weight.shape[1],
        weight.shape[0],
        rows.stride(0),
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
    x = x.contiguous()
    y = torch.empty_like(x)
    module = native.cpu()
    size = weight.shape[0]
    module.rms_norm_f32(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // size, size, eps, offset,
        module.best_isa(), torch.get_num_threads(),
    )  # fmt: skip
    return y
