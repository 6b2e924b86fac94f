"""Rows of logits to log-probs of their targets and, in place, to d(logits); Triton.

One program a row, two sweeps over it: the first reads it for the running maximum and sum, the second
(with gradients) reads it again and writes d(logits) over it. Traffic per row of V
logits of b bytes: 2 V b read, V b written. Deterministic: no atomics, a fixed order of sums.

Its oracle is `pmc_fast.ops.nll_reference`; targets that are ignored never reach it.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    # 1 - 2 / (exp(2x) + 1), by the size of x so that exp can't overflow, with its series near 0
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = size * (1.0 + s * (-0.33333333 + s * (0.13333333 - s * 0.05396825)))
    t = tl.where(size < 0.1, near, far)
    return tl.where(x < 0, -t, t)


@triton.jit
def _to_z(x, bias, logit_scale, inverse_temperature, softcap, HAS_SOFTCAP: tl.constexpr):
    x = (x.to(tl.float32) + bias) * logit_scale
    if HAS_SOFTCAP:
        x = softcap * _tanh(x / softcap)
    return x * inverse_temperature


@triton.jit
def nll_rows_kernel(
    logits_ptr,  # [rows, vocab], rows `stride` apart; in and out
    stride,
    vocab,
    bias_ptr,  # [vocab] or unused
    cu_targets_ptr,  # [rows + 1]
    targets_ptr,
    row_scale_ptr,
    logps_ptr,
    inverse_temperature,
    softcap,
    logit_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0)
    begin = tl.load(cu_targets_ptr + row)
    end = tl.load(cu_targets_ptr + row + 1)
    logits_ptr += row.to(tl.int64) * stride
    columns = tl.arange(0, BLOCK_V)

    # Targets' logits are read before the sweeps overwrite them. They wait in logps: the reductions of
    # the first sweep are barriers between this loop and everything that follows.
    scale_sum = 0.0
    for m in range(begin, end):
        target = tl.load(targets_ptr + m)
        inside = (target >= 0) & (target < vocab)
        x = tl.load(logits_ptr + target, mask=inside, other=0.0)
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + target, mask=inside, other=0.0).to(tl.float32)
        z = _to_z(x, bias, logit_scale, inverse_temperature, softcap, HAS_SOFTCAP)
        tl.store(logps_ptr + m, tl.where(inside, z, float("nan")))
        scale_sum += tl.where(inside, tl.load(row_scale_ptr + m), 0.0)

    # lane-wise running maximum and sum: one reduction at the end instead of one a block
    top = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for v in range(0, vocab, BLOCK_V):
        mask = v + columns < vocab
        x = tl.load(logits_ptr + v + columns, mask=mask, other=0.0)
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr + v + columns, mask=mask, other=0.0).to(tl.float32)
        z = _to_z(x, bias, logit_scale, inverse_temperature, softcap, HAS_SOFTCAP)
        z = tl.where(mask, z, float("-inf"))
        # NaN must win: a maximum that drops it would hide a broken row
        higher = tl.maximum(top, z, propagate_nan=tl.PropagateNan.ALL)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.exp(z - safe)
        top = higher
    row_top = tl.max(top, axis=0)
    # lanes that saw nothing hold -inf and 0
    lanes = tl.where(top == float("-inf"), 0.0, total * tl.exp(top - row_top))
    log_sum = row_top + tl.log(tl.sum(lanes, axis=0))

    tl.debug_barrier()  # one thread's logps are another's here
    for m in range(begin, end):
        z = tl.load(logps_ptr + m)
        tl.debug_barrier()
        tl.store(logps_ptr + m, z - log_sum)

    if GRAD:
        for v in range(0, vocab, BLOCK_V):
            mask = v + columns < vocab
            x = tl.load(logits_ptr + v + columns, mask=mask, other=0.0)
            bias = 0.0
            if HAS_BIAS:
                bias = tl.load(bias_ptr + v + columns, mask=mask, other=0.0).to(tl.float32)
            z = _to_z(x, bias, logit_scale, inverse_temperature, softcap, HAS_SOFTCAP)
            gradient = scale_sum * tl.exp(z - log_sum)
            for m in range(begin, end):
                target = tl.load(targets_ptr + m)
                scale = tl.load(row_scale_ptr + m)
                gradient -= tl.where(v + columns == target, scale, 0.0)
            gradient = tl.where(begin == end, 0.0, gradient)  # a row that predicts nothing, NaN or not
            gradient *= logit_scale * inverse_temperature
            if HAS_SOFTCAP:
                t = z / (softcap * inverse_temperature)
                gradient *= 1.0 - t * t
            tl.store(logits_ptr + v + columns, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


# name -> constexprs and num_warps of what is shipped; the tests compile each for every chip
CONFIGS = {"default": {"BLOCK_V": 2048, "num_warps": 8}}


def nll_rows(
    logits: torch.Tensor,
    cu_targets: torch.Tensor,
    targets: torch.Tensor,
    row_scale: torch.Tensor,
    logps: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    grad: bool,
) -> None:
    """Launch the kernel.

    Parameters
    ----------
    logits : float32, bfloat16 or float16 Tensor [rows, V]
        hidden @ head.T; last dimension contiguous. With `grad` it becomes d(loss)/d(logits).
    cu_targets : int64 Tensor [rows + 1]
        Targets cu_targets[r] to cu_targets[r + 1] belong to row r.
    targets : int64 Tensor
        Token ids; one outside [0, V) gets log-prob NaN and no gradient.
    row_scale, logps : float32 Tensor
        As targets; logps is written.
    bias : Tensor [V], optional
    temperature, softcap, logit_scale : float
        softcap 0 is none.
    grad : bool
    """
    config = CONFIGS["default"]
    block = min(config["BLOCK_V"], triton.next_power_of_2(logits.shape[1]))
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        nll_rows_kernel[(logits.shape[0],)](
            logits,
            logits.stride(0),
            logits.shape[1],
            logits if bias is None else bias,
            cu_targets,
            targets,
            row_scale,
            logps,
            1.0 / temperature,
            softcap,
            logit_scale,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap != 0,
            GRAD=grad,
            BLOCK_V=block,
            num_warps=config["num_warps"],
        )
