"""Rows of logits to log-probs of their targets and, in place, to d(logits); Triton.

One program a multiprocessor walks the rows, one after the other, with two passes over each: the first computes the
running maximum and sum, the second (with gradients) overwrites it with d(logits). So few rows are in work at once that
the second pass reads them from L2. Traffic per row of V logits of b bytes: V b read, V b written, and V b read from L2.
Deterministic: no atomics, a fixed order of sums, each row's own. Ignored targets are left out by the caller. Tested
against `pmc_fast.ops.nll_reference`.
"""

import functools

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
def _log1p(x):
    # of x >= 0; up to 1 as 2 artanh(x / (2 + x)), whose series has the last bits of what a logarithm near 1 loses
    small = tl.minimum(x, 1.0)
    s = small / (2.0 + small)
    q = s * s
    series = 1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13 + q * (1.0 / 15)))
    series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * series)))
    return tl.where(x <= 1.0, 2.0 * s * series, tl.log(1.0 + x))


@triton.jit(do_not_specialize=["rows"])  # it changes with every step
def nll_rows_kernel(
    logits_ptr,  # [rows, vocab], rows `stride` apart; in and out
    stride,
    rows,
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
    columns = tl.arange(0, BLOCK_V)
    slope = logit_scale * inverse_temperature
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):  # int64, as offsets are
        begin = tl.load(cu_targets_ptr + row).to(tl.int32)
        end = tl.load(cu_targets_ptr + row + 1).to(tl.int32)
        row_ptr = logits_ptr + row * stride

        # Targets' logits are read before the second pass overwrites them, and kept, transformed, in logps: the
        # reductions of the first pass are barriers between this loop and everything that follows.
        scale_sum = 0.0
        best = float("-inf")  # the largest of them, and its token
        peak = -1
        for m in range(begin, end):
            target = tl.load(targets_ptr + m)
            inside = (target >= 0) & (target < vocab)
            x = tl.load(row_ptr + target, mask=inside, other=0.0)
            bias = 0.0
            if HAS_BIAS:
                bias = tl.load(bias_ptr + target, mask=inside, other=0.0).to(tl.float32)
            z = _to_z(x, bias, logit_scale, inverse_temperature, softcap, HAS_SOFTCAP)
            tl.store(logps_ptr + m, tl.where(inside, z, float("nan")))
            scale_sum += tl.where(inside, tl.load(row_scale_ptr + m), 0.0)
            better = inside & (z > best)
            best = tl.where(better, z, best)
            peak = tl.where(better, target.to(tl.int32), peak)

        # Lane-wise running maximum and sum: one reduction at the end instead of one per block. Of all tokens but
        # `peak`: where that has nearly all mass, 1 - p and log p come from the others' sum, which would be rounded
        # away beside it.
        top = tl.full((BLOCK_V,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_V,), tl.float32)
        for v in range(0, vocab, BLOCK_V):
            mask = v + columns < vocab
            x = tl.load(row_ptr + v + columns, mask=mask, other=0.0)
            bias = 0.0
            if HAS_BIAS:
                bias = tl.load(bias_ptr + v + columns, mask=mask, other=0.0).to(tl.float32)
            z = _to_z(x, bias, logit_scale, inverse_temperature, softcap, HAS_SOFTCAP)
            z = tl.where(mask & (v + columns != peak), z, float("-inf"))
            # NaN must win: a maximum that drops it would hide a broken row
            higher = tl.maximum(top, z, propagate_nan=tl.PropagateNan.ALL)
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - safe) + tl.exp(z - safe)
            top = higher
        others_top = tl.max(top, axis=0)
        row_top = tl.maximum(others_top, best, propagate_nan=tl.PropagateNan.ALL)
        # lanes that saw nothing hold -inf and 0
        lanes = tl.where(top == float("-inf"), 0.0, total * tl.exp(top - row_top))
        rest = tl.sum(lanes, axis=0)
        row_sum = tl.where(peak < 0, rest, rest + tl.exp(best - row_top))

        if GRAD:
            factor = tl.where(begin == end, 0.0, scale_sum / row_sum * slope)
            for v in range(0, vocab, BLOCK_V):
                mask = v + columns < vocab
                x = tl.load(row_ptr + v + columns, mask=mask, other=0.0)
                bias = 0.0
                if HAS_BIAS:
                    bias = tl.load(bias_ptr + v + columns, mask=mask, other=0.0).to(tl.float32)
                z = _to_z(x, bias, logit_scale, inverse_temperature, softcap, HAS_SOFTCAP)
                gradient = factor * tl.exp(z - row_top)
                if HAS_SOFTCAP:
                    t = z / (softcap * inverse_temperature)
                    gradient *= 1.0 - t * t
                gradient = tl.where(begin == end, 0.0, gradient)  # a row that predicts nothing, NaN or not
                tl.store(row_ptr + v + columns, gradient.to(logits_ptr.dtype.element_ty), mask=mask)

        # never row_top + log_sum: where logits share a large offset, that would be all that is left
        log_sum = tl.where(best == row_top, _log1p(rest), tl.log(row_sum)) + (row_top - row_top)  # NaN if not finite
        tl.debug_barrier()  # one thread's logps and gradients are another's here
        for m in range(begin, end):
            z = tl.load(logps_ptr + m)
            target = tl.load(targets_ptr + m)
            inside = (target >= 0) & (target < vocab)
            if GRAD:
                own = 0.0  # scales of this token, and of the row's other targets, which are few
                others = 0.0
                for n in range(begin, end):
                    token = tl.load(targets_ptr + n)
                    scale = tl.where((token >= 0) & (token < vocab), tl.load(row_scale_ptr + n), 0.0)
                    own += tl.where(token == target, scale, 0.0)
                    others += tl.where(token == target, 0.0, scale)
                e = tl.exp(z - row_top)
                gradient = (others * e - own * tl.where(target == peak, rest, row_sum - e)) / row_sum * slope
                if HAS_SOFTCAP:
                    t = z / (softcap * inverse_temperature)
                    gradient *= 1.0 - t * t
                tl.store(row_ptr + target, gradient.to(logits_ptr.dtype.element_ty), mask=inside)
            tl.debug_barrier()
            tl.store(logps_ptr + m, (z - row_top) - log_sum)


# constexprs and options of what is shipped, without and with a softcap; the tests compile each for every chip. 32 warps
# of 64 registers fill a multiprocessor; a softcap needs more. programs: a multiprocessor, or 0 for one a row
CONFIGS = {
    "plain": {"BLOCK_V": 8192, "num_warps": 32, "maxnreg": 64, "programs": 1},
    "softcap": {"BLOCK_V": 4096, "num_warps": 16, "maxnreg": 128, "programs": 1},
}


@functools.cache
def processors(device: torch.device) -> int:
    """Return a card's multiprocessors; for Triton's interpreter a few, so that programs have several rows there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


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
    config = CONFIGS["softcap" if softcap else "plain"]
    rows, vocab = logits.shape
    each = config["programs"]
    programs = min(rows, each * processors(logits.device)) if each else rows
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        nll_rows_kernel[(programs,)](
            logits, logits.stride(0), rows, vocab, logits if bias is None else bias, cu_targets, targets, row_scale,
            logps, 1.0 / temperature, softcap, logit_scale, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap != 0,
            GRAD=grad, BLOCK_V=min(config["BLOCK_V"], triton.next_power_of_2(vocab)), num_warps=config["num_warps"],
            maxnreg=config["maxnreg"],
        )  # fmt: skip
