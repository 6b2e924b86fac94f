"""Linear layers on weights of 8 bits: float8_e4m3fn with one float32 scale for each row of weights and of inputs.

On CUDA from sm_89 on torch's product of such rows is used, which reads half of bfloat16's bytes. On the CPU the same
numbers are multiplied in float32, so that the arithmetic can be tested: that is slower than a layer of float32.
"""

import torch

from ..errors import PMCError
from . import native
from .checks import under_autocast
from .dispatch import resolve_backend

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
SMALLEST = 1e-12  # largest number of a row that is scaled by itself
MULTIPLE = 16  # of a layer's sizes: what CUDA's product needs
# of a sum of positive products, relative to it: both factors are rounded to 4 bits, and small ones to a fixed grid
FP8_ERROR = (1 + 2**-4) ** 2 - 1 + 0.01


def why_no_fp8(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a device has no product of 8-bit rows for a model that computes in `dtype`, if so."""
    if device.type == "cpu":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}, and 8-bit products need sm_89 or later"
    if dtype != torch.bfloat16:
        return f"the model computes in {dtype}, and CUDA's 8-bit products in bfloat16"
    return None


def fp8_rows(x: torch.Tensor, *, backend: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row, scaled so that its largest number becomes 448, to float8_e4m3fn.

    Parameters
    ----------
    x : Tensor [R, D]
        float32, bfloat16, float16 or float64.
    backend : {"reference", "cpu", "cuda"}, optional

    Returns
    -------
    float8_e4m3fn Tensor [R, D], float32 Tensor [R]
        Row i of x is nearly row i of the first times number i of the second. A row with NaN or infinity has NaN.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise PMCError(f"fp8_rows: x is {x.dtype} {tuple(x.shape)}: need floating [R, D]")
    if resolve_backend(backend, x.device) == "cuda" and x.dtype != torch.float64:
        x = x if x.stride(1) == 1 else x.contiguous()
        y, scale = x.new_empty(x.shape, dtype=FP8), x.new_empty(len(x), dtype=torch.float32)
        native.triton_kernels("fp8_rows").fp8_rows(x, y, scale)
        return y, scale
    wide = x.float()
    most = wide.abs().amax(1, keepdim=True).clamp_min(SMALLEST)
    return (wide * (LARGEST / most)).to(FP8), (most / LARGEST)[:, 0]


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute x @ (weight * scale[:, None]).T + bias without gradients, of rows of x that are rounded as `fp8_rows` does.

    Parameters
    ----------
    x : Tensor [..., D]
        On CUDA bfloat16, or cast to it by autocast.
    weight : float8_e4m3fn Tensor [V, D]
        D and V multiples of 16.
    scale : float32 Tensor [V]
    bias : Tensor [V], optional
        Of the result's dtype.

    Returns
    -------
    Tensor [..., V]
        In x's dtype, or autocast's; products are added up in float32.
    """
    if weight.dim() != 2 or weight.dtype != FP8 or any(n % MULTIPLE for n in weight.shape):
        raise PMCError(
            f"fp8_linear: weight is {weight.dtype} {tuple(weight.shape)}: need {FP8} [V, D], multiples of {MULTIPLE}"
        )
    if x.shape[-1:] != weight.shape[1:] or scale.shape != weight.shape[:1] or scale.dtype != torch.float32:
        raise PMCError(
            f"fp8_linear: x is {tuple(x.shape)} and scale {scale.dtype} {tuple(scale.shape)} for a weight of "
            f"{tuple(weight.shape)}: need [..., D] and float32 [V]"
        )
    [cast] = under_autocast(x)
    rows, scales = fp8_rows(cast.flatten(0, -2))
    if x.is_cuda:
        y = torch._scaled_mm(
            rows, weight.T, scale_a=scales[:, None], scale_b=scale[None], bias=bias, out_dtype=torch.bfloat16
        )
    else:
        with torch.autocast("cpu", enabled=False):
            y = (rows.float() @ weight.float().T) * scales[:, None] * scale
            y = (y if bias is None else y + bias).to(cast.dtype)
    return y.unflatten(0, x.shape[:-1])
