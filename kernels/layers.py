"""RMS norm, rotary embedding and silu(gate) * up, one launch each for forward and backward; Triton.

Numbers are read once and written once, computed in float32. Traffic per number of b bytes: RMS norm 2 b, backward 3 b
and 4 bytes per program for its part of d(weight); rotary (q and k at once) 2 b, backward 2 b (cosines and sines are
read once for up to 2048 pairs); silu_mul 3 b, backward 5 b. The parts of d(weight) are added up after the launch: no
atomics, and an order of sums that depends on shapes alone. No host sync; grids depend on shapes alone.

Tested against torch in `tests/ops/test_cuda_layers.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl

PARTS = 256  # at most this many programs compute parts of d(weight)
# numbers of a tile at most, or one row of a norm if that is longer
CONFIGS = {"norm": 1024, "rotary": 2048, "silu_mul": 1024}


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x_ptr,  # [rows, width]
    weight_ptr,
    y_ptr,
    rstd_ptr,  # [rows] or unused
    rows,
    width,
    eps,
    offset,
    ROUND: tl.constexpr,
    RSTD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    inside = (row < rows) & (column < width)
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32) + offset
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / width + eps)
    normalised = x * rstd
    if ROUND:
        normalised = normalised.to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row * width + column, (normalised * weight).to(y_ptr.dtype.element_ty), mask=inside)
    if RSTD:
        tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    dy_ptr,  # [rows, width]
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,  # [rows, width] or unused
    parts_ptr,  # [programs, width] or unused: each program's part of d(weight)
    rows,
    width,
    offset,
    ROUND: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32) + offset
    d_weight = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    for begin in range(program * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = begin + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
        inside = (row < rows) & (column < width)
        at = row * width + column
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        normalised = x * rstd
        if NEED_X:
            slope = dy * weight
            mean = tl.sum(slope * normalised, axis=1, keep_dims=True) / width
            dx = (slope - normalised * mean) * rstd
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if NEED_WEIGHT:
            if ROUND:
                normalised = normalised.to(x_ptr.dtype.element_ty).to(tl.float32)
            d_weight += dy * normalised
    if NEED_WEIGHT:
        total = tl.sum(d_weight, axis=0, keep_dims=True)
        tl.store(parts_ptr + program.to(tl.int64) * width + column, total, mask=column < width)


@triton.jit
def _rotate(
    x_ptr, y_ptr, head, heads, half, row_stride, head_stride, cos_1, cos_2, sin_1, sin_2, BLOCK_HALF: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < heads) & (pair < half)
    x_ptr += row * row_stride + head.to(tl.int64) * head_stride + pair
    y_ptr += (row * heads + head) * 2 * half + pair
    x_1 = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    x_2 = tl.load(x_ptr + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr, (x_1 * cos_1 - x_2 * sin_1).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + half, (x_2 * cos_2 + x_1 * sin_2).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["q_heads", "k_heads"])
def rotary_kernel(
    q_ptr,  # [rows, q_heads, 2 * half], strided
    k_ptr,  # [rows, k_heads, 2 * half], strided
    cos_ptr,  # [rows, 2 * half]
    sin_ptr,
    q_out_ptr,  # [rows, q_heads, 2 * half]
    k_out_ptr,  # [rows, k_heads, 2 * half]
    q_heads,
    k_heads,
    half,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    BACKWARD: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    row = tl.program_id(0).to(tl.int64)
    cos_ptr += row * 2 * half + pair
    sin_ptr += row * 2 * half + pair
    cos_1 = tl.load(cos_ptr, mask=pair < half, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_ptr + half, mask=pair < half, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin_ptr, mask=pair < half, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_ptr + half, mask=pair < half, other=0.0).to(tl.float32)
    if BACKWARD:
        sin_1, sin_2 = -sin_2, -sin_1
    block = tl.program_id(1)  # q's heads, then k's
    q_blocks = tl.cdiv(q_heads, BLOCK_HEADS)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    if block < q_blocks:
        head += block * BLOCK_HEADS
        _rotate(
            q_ptr, q_out_ptr, head, q_heads, half, q_row_stride, q_head_stride,
            cos_1, cos_2, sin_1, sin_2, BLOCK_HALF,
        )  # fmt: skip
    else:
        head += (block - q_blocks) * BLOCK_HEADS
        _rotate(
            k_ptr, k_out_ptr, head, k_heads, half, k_row_stride, k_head_stride,
            cos_1, cos_2, sin_1, sin_2, BLOCK_HALF,
        )  # fmt: skip


@triton.jit(do_not_specialize=["blocks"])
def silu_mul_kernel(
    gate_ptr,  # [rows, width], strided
    up_ptr,  # [rows, width], strided
    y_ptr,  # [rows, width]
    width,
    blocks,  # of a row
    gate_stride,
    up_stride,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + at, mask=at < width, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + at, mask=at < width, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + at, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=at < width)


@triton.jit
def silu_mul_backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    d_gate_ptr,  # or unused
    d_up_ptr,  # or unused
    size,
    NEED_GATE: tl.constexpr,
    NEED_UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    if NEED_GATE:
        up = tl.load(up_ptr + at, mask=at < size, other=0.0).to(tl.float32)
        d_gate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(d_gate_ptr + at, d_gate.to(d_gate_ptr.dtype.element_ty), mask=at < size)
    if NEED_UP:
        tl.store(d_up_ptr + at, (dy * gate * sigmoid).to(d_up_ptr.dtype.element_ty), mask=at < size)


def norm_config(width: int) -> dict[str, Any]:
    """Return the tile of a norm: whole rows, as many as fit, at most 16 numbers a thread."""
    block = triton.next_power_of_2(width)
    rows = max(1, CONFIGS["norm"] // block)
    return {"BLOCK_ROWS": rows, "BLOCK_WIDTH": block, "num_warps": min(16, max(4, rows * block // 512))}


def rotary_config(heads: int, half: int) -> dict[str, Any]:
    """Return the tile of a rotary embedding: one row's heads of q or of k, as many as fit."""
    block = triton.next_power_of_2(half)
    at_once = min(triton.next_power_of_2(heads), max(1, CONFIGS["rotary"] // block))
    return {"BLOCK_HEADS": at_once, "BLOCK_HALF": block, "num_warps": 4}


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, rstd: torch.Tensor | None, eps: float, offset: float
) -> None:
    """Launch the kernel.

    Parameters
    ----------
    x, y : float32, bfloat16 or float16 Tensor [..., D]
        Contiguous; y is written.
    weight : Tensor [D]
        Contiguous.
    rstd : float32 Tensor, optional
        One number a row, written: 1 over the root that x was divided by.
    eps : float
    offset : float
        What is added to the weight. Where it is 0, x is rounded to its type before it is multiplied with the weight.
    """
    width, config = weight.shape[0], norm_config(weight.shape[0])
    rows = x.numel() // width
    if rows:
        with torch.cuda.device_of(x):  # Triton launches on the current device
            rms_norm_kernel[(triton.cdiv(rows, config["BLOCK_ROWS"]),)](
                x, weight, y, x if rstd is None else rstd, rows, width, eps, offset,
                ROUND=offset == 0, RSTD=rstd is not None, **config,
            )  # fmt: skip


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
    need: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Launch the kernel; return d(x) and d(weight), where needed, in their types.

    Parameters
    ----------
    dy, x : Tensor [..., D]
        Contiguous.
    weight, rstd, offset
        Of the forward pass.
    need : tuple of bool
    """
    width, config = weight.shape[0], norm_config(weight.shape[0])
    rows = x.numel() // width
    programs = triton.cdiv(rows, config["BLOCK_ROWS"])
    need_x, need_weight = need
    dx = torch.empty_like(x) if need_x else None
    parts = None
    if need_weight:
        programs = min(programs, PARTS)
        parts = x.new_empty(programs, width, dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(x):
            rms_norm_backward_kernel[(programs,)](
                dy, x, weight, rstd, x if dx is None else dx, rstd if parts is None else parts, rows, width, offset,
                ROUND=offset == 0, NEED_X=need_x, NEED_WEIGHT=need_weight, **config,
            )  # fmt: skip
    return dx, None if parts is None else parts.sum(0).to(weight.dtype)


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    backward: bool,
) -> None:
    """Launch the kernel.

    Parameters
    ----------
    q, k : float32, bfloat16 or float16 Tensor [1, heads, R, D]
        Last dimension contiguous; D even. Each has heads of its own number.
    cos, sin : Tensor [1, R, D]
        Contiguous.
    q_out, k_out : Tensor [1, R, heads, D]
        Contiguous; written.
    backward : bool
        Rotate back, as the gradient needs.
    """
    _, heads, rows, width = q.shape
    if q_out.numel() + k_out.numel():
        config = rotary_config(max(heads, k.shape[1]), width // 2)
        blocks = sum(triton.cdiv(n, config["BLOCK_HEADS"]) for n in (heads, k.shape[1]))
        with torch.cuda.device_of(q):
            rotary_kernel[(rows, blocks)](
                q, k, cos, sin, q_out, k_out, heads, k.shape[1], width // 2,
                q.stride(2), q.stride(1), k.stride(2), k.stride(1), BACKWARD=backward, **config,
            )  # fmt: skip


def silu_mul(gate: torch.Tensor, up: torch.Tensor, y: torch.Tensor) -> None:
    """Launch the kernel.

    Parameters
    ----------
    gate, up : float32, bfloat16 or float16 Tensor [R, D]
        Last dimension contiguous: parts of the rows of one product, say.
    y : Tensor [R, D]
        Contiguous; written.
    """
    if gate.is_contiguous() and up.is_contiguous():  # one long row
        gate, up, y = (t.view(1, -1) for t in (gate, up, y))
    (rows, width), block = y.shape, CONFIGS["silu_mul"]
    blocks = triton.cdiv(width, block)
    if rows * blocks:
        with torch.cuda.device_of(y):
            silu_mul_kernel[(rows * blocks,)](
                gate, up, y, width, blocks, gate.stride(0), up.stride(0), BLOCK=block, num_warps=4
            )


def silu_mul_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, d_gate: torch.Tensor | None, d_up: torch.Tensor | None
) -> None:
    """Launch the kernel: contiguous tensors of one size; the last two, where wanted, are written."""
    size, block = dy.numel(), CONFIGS["silu_mul"]
    if size:
        with torch.cuda.device_of(dy):
            silu_mul_backward_kernel[(triton.cdiv(size, block),)](
                dy, gate, up, dy if d_gate is None else d_gate, dy if d_up is None else d_up, size,
                NEED_GATE=d_gate is not None, NEED_UP=d_up is not None, BLOCK=block, num_warps=4,
            )  # fmt: skip
