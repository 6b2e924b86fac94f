"""A step of AdamW with float32 masters, gradients and weights in low precision; Triton.

One launch steps many tensors: a table on the device holds their addresses, program (p, t) takes every P-th block of tensor
t. Traffic per number: gradient 2 read, master and both moments 12 read and 12 written, weight 2 written: 28 bytes.
Tested against torch's optimizer.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def step_block(
    row, block, size, beta1, beta2, rest1, rest2, shrink, decay, step_size, root_correction2, eps,
    LOW: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    grad_ptr = tl.multiple_of(tl.load(row).to(tl.pointer_type(LOW)), 16)
    master_ptr = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.float32)), 16)
    mean_ptr = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float32)), 16)
    square_ptr = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.float32)), 16)
    weight_ptr = tl.multiple_of(tl.load(row + 4).to(tl.pointer_type(LOW)), 16)
    # int64, as sizes are: an embedding may hold more than 2^31 numbers
    index = block * BLOCK + tl.arange(0, BLOCK)
    mask = None if FULL else index < size  # with a mask numbers are read one by one
    master = tl.load(master_ptr + index, mask=mask)
    grad = tl.load(grad_ptr + index, mask=mask).to(tl.float32) + decay * master
    mean = beta1 * tl.load(mean_ptr + index, mask=mask) + rest1 * grad
    square = beta2 * tl.load(square_ptr + index, mask=mask) + rest2 * grad * grad
    master = master - shrink * master - step_size * mean / (tl.sqrt_rn(square) / root_correction2 + eps)
    tl.store(mean_ptr + index, mean, mask=mask)
    tl.store(square_ptr + index, square, mask=mask)
    tl.store(master_ptr + index, master, mask=mask)
    tl.store(weight_ptr + index, master.to(LOW), mask=mask)


@triton.jit
def adamw_kernel(
    table_ptr, beta1, beta2, rest1, rest2, shrink, decay, step_size, root_correction2, eps,
    LOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = table_ptr + tl.program_id(1) * 6
    size = tl.load(row + 5)
    full = size // BLOCK
    for block in range(tl.program_id(0), full, tl.num_programs(0)):
        step_block(
            row, block, size, beta1, beta2, rest1, rest2, shrink, decay, step_size, root_correction2, eps, LOW, BLOCK, True
        )  # fmt: skip
    if full * BLOCK < size and tl.program_id(0) == full % tl.num_programs(0):
        step_block(
            row, full, size, beta1, beta2, rest1, rest2, shrink, decay, step_size, root_correction2, eps, LOW, BLOCK, False
        )  # fmt: skip


CONFIGS = {"default": {"BLOCK": 1024, "num_warps": 8}}  # the tests compile it for every chip
PROGRAMS = 2048  # for a tensor: some waves of the largest chip
LOW = {"bf16": tl.bfloat16, "fp16": tl.float16}


def adamw(
    table: torch.Tensor, longest: int, low: torch.dtype, beta1: float, beta2: float, shrink: float, decay: float,
    step_size: float, root_correction2: float, eps: float,
) -> None:  # fmt: skip
    """Launch the kernel.

    Parameters
    ----------
    table : int64 Tensor [T, 6]
        On the device. Of each tensor the addresses of gradient, master, both moments and weight, multiples of 16, and its
        size.
    longest : int
        The largest size.
    low : torch.dtype
        Of gradients and weights.
    beta1, beta2, eps : float
    shrink, decay : float
        The part that a master loses (AdamW), and its part in the gradient (Adam).
    step_size, root_correction2 : float
        lr / (1 - beta1^n) and sqrt(1 - beta2^n) in step n.
    """
    grid = (min(PROGRAMS, triton.cdiv(longest, CONFIGS["default"]["BLOCK"])), len(table))
    with torch.cuda.device_of(table):  # Triton launches on the current device
        adamw_kernel[grid](
            table, beta1, beta2, 1 - beta1, 1 - beta2, shrink, decay, step_size, root_correction2, eps,
            LOW=LOW["bf16" if low == torch.bfloat16 else "fp16"], **CONFIGS["default"],
        )  # fmt: skip
