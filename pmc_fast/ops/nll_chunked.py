"""What the CPU and CUDA share of weighted_nll: rows that count, chunks of them, three GEMMs a chunk.

Only a bounded chunk of logits exists at a time. A row kernel turns it into log-probs and, in place,
into d(logits); since every row's scale is known up front, d(hidden) follows at once and nothing is
recomputed: 6 M D V FLOPs, 4 with a frozen head, 2 without gradients. d(head) of several chunks follows
at once, too. Where all rows fit one chunk its d(logits) are kept: backward forms d(head) with the
upstream gradient folded into the hidden rows, so that neither memory nor a pass over [V, D] is spent on it.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from ..utils.labels import IGNORED


@dataclass(frozen=True, slots=True)
class Logits:
    """How logits come from hidden @ head.T: softcap((. + bias) * logit_scale) / temperature."""

    temperature: float
    softcap: float  # 0: none
    logit_scale: float


class Device(Protocol):
    """What each device implements: GEMMs and a row kernel."""

    def chunk_rows(self, rows: int, head: torch.Tensor, workspace: int) -> int:
        """Return how many rows of logits to hold at once."""

    def keeps(self, hidden: torch.Tensor, head: torch.Tensor, workspace: int) -> bool:
        """Return whether d(logits) of all rows are kept for backward, as shapes and dtypes tell."""

    def logits_dtype(self, hidden: torch.Tensor) -> torch.dtype:
        """Return the type of the logits chunk."""

    def logits(self, hidden: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> None:
        """Write hidden @ head.T into out [m, V]."""

    def d_hidden(self, d_logits: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Return d_logits @ head, [m, D]."""

    def d_head(
        self, d_logits: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return d_logits.T @ hidden, [V, D], in `dtype`; added into `total` where there is one."""

    def nll_rows(
        self,
        logits: torch.Tensor,
        cu_targets: torch.Tensor,
        targets: torch.Tensor,
        row_scale: torch.Tensor,
        logps: torch.Tensor,
        bias: torch.Tensor | None,
        how: Logits,
        grad: bool,
    ) -> None:
        """Fill logps of the rows' targets; with `grad` leave d(loss)/d(logits) in logits."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Hidden rows in the order of processing (those with a gradient first), and the targets of each."""

    rows: torch.Tensor | None  # int64 [used]: index into hidden; None: all of them, in order
    used: int
    active: int  # the first `active` of them need a gradient
    order: torch.Tensor  # int64 [M]: targets by row; those that don't count come last
    cu_targets: torch.Tensor  # int64 [used + 1]


def make_plan(
    targets: torch.Tensor, row_scale: torch.Tensor, rows: torch.Tensor | None, num_rows: int, *, compact: bool
) -> Plan:
    """Sort targets by hidden row; with `compact` (one host sync on CUDA) leave out rows without any."""
    counted = targets != IGNORED
    # 0: needs a gradient, 1: log-prob only, 2: nothing
    need = torch.where(counted, (row_scale == 0).long(), 2)
    device = targets.device
    if rows is None:
        owner, state = torch.arange(num_rows, device=device), need
    else:
        owner = rows
        state = torch.full((num_rows,), 2, device=device).scatter_reduce_(0, rows, need, "amin")
    used = active = num_rows
    index = None
    position = torch.arange(num_rows, device=device)
    if compact:
        active, used = torch.stack([(state == 0).sum(), (state < 2).sum()]).tolist()
        if used < num_rows or active not in (0, num_rows):
            work = torch.argsort(state, stable=True)
            position = torch.empty_like(work).scatter_(0, work, position)
            index = work[:used]
    at = torch.where(counted, position[owner], num_rows)
    order = torch.argsort(at, stable=True)
    cu_targets = torch.searchsorted(at[order], torch.arange(used + 1, device=device))
    return Plan(index, used, active, order, cu_targets)


def run(
    device: Device,
    plan: Plan,
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    row_scale: torch.Tensor,
    how: Logits,
    need: tuple[bool, bool, bool],
    workspace: int,
) -> tuple[torch.Tensor, ...]:
    """Return loss, logps, the gradients of hidden, head and bias, and what is kept; what is not needed is empty.

    Gradients are in the inputs' dtype; float16's, and the bias's, are in float32. Kept are d(logits) [R, V], the hidden
    rows [R, D] that d(head) is their product with, and how many rows of both count: int64 [1] on the host.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    need_hidden, need_head, need_bias = need
    vocab = head.shape[0]
    targets = targets[plan.order]
    scale = torch.where(targets == IGNORED, 0, row_scale.to(wide)[plan.order])
    logps = torch.zeros_like(scale)
    boost = _boost(scale, hidden.dtype)
    kernel_scale = scale if boost is None else scale * boost
    rows = hidden if plan.rows is None else hidden[plan.rows]

    # float16 gradients stay float32 until backward has multiplied them: loss scaling would come too late
    narrow = wide if hidden.dtype == torch.float16 else hidden.dtype
    d_rows = hidden.new_zeros(rows.shape if need_hidden else 0, dtype=narrow)
    d_bias = torch.zeros(vocab if need_bias else 0, dtype=wide, device=hidden.device)
    size = device.chunk_rows(plan.used, head, workspace)
    chunks = -(-plan.used // size) if plan.used else 0
    active_chunks = -(-plan.active // size)
    # several chunks add up in float32; a single one is written once in the head's own type
    d_head = None
    d_head_dtype = wide if active_chunks > 1 or boost is not None else head.dtype
    keep = need_head and device.keeps(hidden, head, workspace)
    held = hidden.shape[0] if keep else min(size, plan.used)
    buffer = torch.empty(held, vocab, dtype=device.logits_dtype(hidden), device=hidden.device)
    for c in range(chunks):
        begin, end = c * size, min((c + 1) * size, plan.used)
        logits = buffer[: end - begin]
        device.logits(rows[begin:end], head, logits)
        with_grad = max(0, min(end, plan.active) - begin) if any(need) else 0
        cu_targets = plan.cu_targets[begin : end + 1]
        device.nll_rows(logits, cu_targets, targets, kernel_scale, logps, bias, how, with_grad > 0)
        if with_grad:
            d_logits, part = logits[:with_grad], rows[begin : begin + with_grad]
            if need_hidden:
                d_rows[begin : begin + with_grad] = _unboost(device.d_hidden(d_logits, head), boost)
            if need_head and not keep:
                d_head = device.d_head(d_logits, part, d_head, d_head_dtype)
            if need_bias:
                d_bias += d_logits.sum(0, dtype=wide)
    kept = [hidden.new_empty(0), hidden.new_empty(0), torch.empty(0, dtype=torch.int64)]
    if keep:
        factors = torch.zeros(hidden.shape, dtype=buffer.dtype, device=hidden.device)
        factors[: plan.active] = _unboost(rows[: plan.active].to(buffer.dtype), boost)
        kept = [buffer, factors, torch.tensor([plan.active])]
    del buffer
    loss = -(scale * logps).sum()
    d_hidden = d_rows
    if need_hidden and plan.rows is not None:
        d_hidden = torch.zeros_like(hidden, dtype=narrow).index_copy_(0, plan.rows, d_rows)
    unsorted = torch.empty_like(logps).scatter_(0, plan.order, logps)
    if d_head is None:
        wanted = need_head and not keep
        d_head = torch.zeros_like(head, dtype=narrow) if wanted else head.new_empty(0, dtype=narrow)
    d_head = (d_head if boost is None else d_head.div_(boost)).to(narrow)
    d_bias = _unboost(d_bias, boost)
    return loss, unsorted, d_hidden, d_head, d_bias, *kept


def _boost(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the factor that makes the largest scale 1: in float16 a mean's 1/M would underflow d(logits)."""
    if dtype != torch.float16 or scale.numel() == 0:
        return None
    largest = scale.abs().max()
    return torch.where(largest > 0, 1 / largest, torch.ones_like(largest))


def _unboost(gradient: torch.Tensor, boost: torch.Tensor | None) -> torch.Tensor:
    return gradient if boost is None else gradient.to(boost.dtype) / boost
