"""A tensor times a scalar tensor; Triton.

One program per BLOCK numbers. Traffic per number of b bytes: b read, b written (another type's result: its own
bytes). The product is computed in float32 and rounded once. Tested against torch's product.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def scaled_kernel(x_ptr, factor_ptr, y_ptr, size, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    # int64: a head's gradient may hold more than 2^31 numbers
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < size).to(tl.float32)
    tl.store(y_ptr + index, (x * factor).to(y_ptr.dtype.element_ty), mask=index < size)


CONFIGS = {"default": {"BLOCK": 4096, "num_warps": 8}}  # the tests compile it for every chip


def scaled(x: torch.Tensor, factor: torch.Tensor, y: torch.Tensor) -> None:
    """Launch the kernel.

    Parameters
    ----------
    x : float32, bfloat16 or float16 Tensor
        Contiguous.
    factor : float32 or float64 Tensor []
    y : float32, bfloat16 or float16 Tensor
        Contiguous, as large as x; written.
    """
    size = x.numel()
    if size:
        with torch.cuda.device_of(x):  # Triton launches on the current device
            scaled_kernel[(triton.cdiv(size, CONFIGS["default"]["BLOCK"]),)](x, factor, y, size, **CONFIGS["default"])
