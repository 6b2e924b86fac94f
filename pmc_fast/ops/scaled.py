"""A tensor times a scalar tensor on its device, rounded once."""

import torch

from ..errors import PMCError
from .checks import without_autocast
from .dispatch import resolve_backend
from .native import triton_kernels


def scaled(
    x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """Return x * factor, computed in max(float32, x's dtype) and rounded once, without a host sync.

    Parameters
    ----------
    x : Tensor
        float32, bfloat16, float16 or float64.
    factor : float32 or float64 Tensor []
        On x's device.
    dtype : torch.dtype, optional
        Of the result; by default x's.
    backend : {"reference", "cpu", "cuda"}, optional
        By default the device's own. On the CPU, and in float64, it is torch's product.

    Returns
    -------
    Tensor
        Of x's shape, contiguous. Not differentiable.
    """
    if factor.dim() != 0 or factor.device != x.device:
        raise PMCError(
            f"scaled: factor is {tuple(factor.shape)} on {factor.device}: need one number on x's device, {x.device}"
        )
    return scaled_op(x, factor, dtype or x.dtype, resolve_backend(backend, x.device))


@torch.library.custom_op("pmc_fast::scaled", mutates_args=())
@without_autocast
def scaled_op(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, backend: str) -> torch.Tensor:
    """Compute it: a custom op, so that torch.compile can trace a backward that calls it."""
    x = x.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    if backend != "cuda" or torch.float64 in (x.dtype, dtype):
        # as a vector the factor keeps its type: the product is rounded once
        wide = factor.to(torch.promote_types(x.dtype, torch.float32)).reshape(1)
        torch.mul(x.view(-1), wide, out=y.view(-1))
        return y
    triton_kernels("scaled").scaled(x, factor, y)
    return y


@scaled_op.register_fake
def _(x, factor, dtype, backend):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
