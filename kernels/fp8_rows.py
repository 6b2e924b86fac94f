"""Rows in float8_e4m3fn with one scale each, so that the largest number of a row is float8's largest; Triton.

One program per row, which it holds in registers. Traffic per number of b bytes: b read, 1 written, and 4 bytes a row. No
host sync, no atomics. Tested against the nearest numbers of float8 in `tests/ops/test_fp8_linear.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)  # of float8_e4m3fn
SMALLEST = tl.constexpr(1e-12)  # largest number of a row that is scaled by itself


@triton.jit
def fp8_rows_kernel(
    x_ptr,  # [rows, width], strided
    y_ptr,  # float8_e4m3fn [rows, width]
    scale_ptr,  # float32 [rows]
    width,
    x_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + column, mask=column < width, other=0.0).to(tl.float32)
    most = tl.maximum(tl.max(tl.abs(x), axis=0), SMALLEST)
    y = (x * (LARGEST / most)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * width + column, y, mask=column < width)
    tl.store(scale_ptr + row, most / LARGEST)


def config(width: int) -> dict[str, Any]:
    """Return the tile: a whole row, at most 32 numbers a thread."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def fp8_rows(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> None:
    """Launch the kernel.

    Parameters
    ----------
    x : float32, bfloat16 or float16 Tensor [R, D]
        Last dimension contiguous.
    y : float8_e4m3fn Tensor [R, D]
        Contiguous; written.
    scale : float32 Tensor [R]
        Written: what each row of y is to be multiplied by.
    """
    rows, width = x.shape
    if rows and width:
        with torch.cuda.device_of(x):
            fp8_rows_kernel[(rows,)](x, y, scale, width, x.stride(0), **config(width))
