"""Normalisers of rows of hidden @ head.T, the logits never in memory; Triton.

A program takes BLOCK_M rows and one of `splits` parts of the vocabulary: tile products, with a running
maximum and sum of each row in registers. Parts are put together in torch. Traffic: the head once for
each tile of rows, 2 M V D FLOPs. For log-probs without gradients: with gradients the logits are needed
again, and `nll_rows` keeps them.
"""

import torch
import triton
import triton.language as tl

from .nll_rows import _to_z


@triton.jit
def row_logsumexp_kernel(
    hidden_ptr,  # [rows, width]
    head_ptr,  # [vocab, width]
    bias_ptr,  # [vocab] or unused
    top_ptr,  # [splits, rows]
    sum_ptr,  # [splits, rows]
    rows,
    vocab,
    width,
    hidden_stride,
    head_stride,
    part,  # columns of a split, a multiple of BLOCK_V
    inverse_temperature,
    softcap,
    logit_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    split = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    depth = tl.arange(0, BLOCK_D)
    hidden_rows = hidden_ptr + row[:, None].to(tl.int64) * hidden_stride
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for v in range(split * part, min(vocab, (split + 1) * part), BLOCK_V):
        column = v + tl.arange(0, BLOCK_V)
        head_rows = head_ptr + column[None, :].to(tl.int64) * head_stride
        x = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for k in range(0, width, BLOCK_D):
            inside = k + depth < width
            h = tl.load(hidden_rows + (k + depth)[None, :], mask=(row < rows)[:, None] & inside[None, :], other=0.0)
            w = tl.load(head_rows + (k + depth)[:, None], mask=(column < vocab)[None, :] & inside[:, None], other=0.0)
            x = tl.dot(h, w, x, input_precision="ieee")
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + column, mask=column < vocab, other=0.0).to(tl.float32)[None, :]
        z = _to_z(x, bias, logit_scale, inverse_temperature, softcap, HAS_SOFTCAP)
        z = tl.where((column < vocab)[None, :], z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(z - safe[:, None]), axis=1)
        top = higher
    tl.store(top_ptr + split * rows + row, top, mask=row < rows)
    tl.store(sum_ptr + split * rows + row, total, mask=row < rows)


# element bytes -> what is shipped; the tests compile each for every chip
CONFIGS = {
    2: {"BLOCK_M": 128, "BLOCK_V": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 4},
    4: {"BLOCK_M": 64, "BLOCK_V": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 3},
}


def row_logsumexp(
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    splits: int = 16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logsumexp of every row's transformed logits, in two parts.

    Parameters
    ----------
    hidden : Tensor [R, D]
    head : Tensor [V, D]
        Both of one type, float32, bfloat16 or float16, last dimension contiguous.
    bias : Tensor [V], optional
    temperature, softcap, logit_scale : float
        As in `pmc_fast.ops.weighted_nll`; softcap 0 is none.
    splits : int
        Parts of the vocabulary, so that few rows fill the chip.

    Returns
    -------
    top, log_sum : float32 Tensor [R]
        The largest, and what logsumexp has beyond it: added up, a large one would swallow the other.
    """
    rows, width = hidden.shape
    vocab = head.shape[0]
    config = CONFIGS[hidden.element_size()]
    blocks = triton.cdiv(vocab, config["BLOCK_V"])
    part = triton.cdiv(blocks, splits) * config["BLOCK_V"]
    splits = triton.cdiv(vocab, part)
    top = torch.empty(splits, rows, dtype=torch.float32, device=hidden.device)
    total = torch.empty_like(top)
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        row_logsumexp_kernel[(triton.cdiv(rows, config["BLOCK_M"]), splits)](
            hidden,
            head,
            hidden if bias is None else bias,
            top,
            total,
            rows,
            vocab,
            width,
            hidden.stride(0),
            head.stride(0),
            part,
            1.0 / temperature,
            softcap,
            logit_scale,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap != 0,
            **config,
        )
    row_top = top.amax(0)
    return row_top, (total * (top - row_top).exp()).sum(0).log()
