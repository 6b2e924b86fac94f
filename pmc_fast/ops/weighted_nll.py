"""Weighted negative log-likelihood through a language model's head, without holding its logits."""

from collections.abc import Sequence

import torch

from ..errors import PMCError
from . import nll_chunked
from .checks import check_inputs, check_ranges, no_double_backward, under_autocast, without_autocast
from .dispatch import resolve_backend
from .nll_cpu import Cpu
from .nll_cuda import Cuda
from .nll_reference import weighted_nll_reference
from .products import weight_gradient
from .scaled import scaled

WORKSPACE = 1 << 30


def weighted_nll(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    row_scale: torch.Tensor,
    rows: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
    workspace: int = WORKSPACE,
    head_total: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sum of row_scale * -logp over all targets, and the log-probs.

    One pass computes the loss and d(logits): every weight is known before the forward pass, so
    nothing is recomputed in backward (arXiv 2507.04219, section 4, with rewards folded into
    `row_scale`; gradients in the forward pass as in Liger Kernel's and quack's fused losses).

    Parameters
    ----------
    hidden : Tensor [R, D]
        float32, bfloat16, float16 or (not on cuda) float64.
    head : Tensor [V, D]
        Of hidden's dtype.
    targets : int64 Tensor [M]
        Token ids; -100 is ignored.
    row_scale : Tensor [M]
        Signed weight of each target. Token mean, lambda, reward weights and gradient ascent's minus
        belong here (`row_scales`). Not differentiable.
    rows : int64 Tensor [M], optional
        The hidden row that predicts each target. Several targets may share one row: it is multiplied
        and normalised once. By default target m belongs to row m, and R = M.
    bias : Tensor [V], optional
    temperature, softcap, logit_scale : float
        Logits are softcap(((hidden @ head.T) + bias) * logit_scale) / temperature, softcap(x) being
        softcap * tanh(x / softcap).
    backend : {"reference", "cpu", "cuda"}, optional
        By default the device's own.
    workspace : int
        Bytes of logits held at once, 1 GiB by default; where they are the logits of all rows, they are held until
        backward. The float32 d(head) that several chunks add up in is not counted.
    head_total : Tensor [V, D], optional
        Backward adds d(head) to it, in place, instead of returning it; not with backend "reference".

    Returns
    -------
    loss : Tensor []
        In max(float32, hidden's dtype). Differentiable once, in hidden, head and bias; a gradient that is
        not required is not computed.
    logps : Tensor [M]
        Log-probs of the targets, of the same dtype; not differentiable. 0 where the target is -100;
        computed where the scale is 0.

    Raises
    ------
    PMCError
        Shapes, dtypes, devices or settings that do not fit; on the CPU a target or row out of range.

    Notes
    -----
    On CUDA a target out of range makes its log-prob and the loss NaN, without a host sync; so does a
    hidden row that is not finite, on any device. Without `rows` there is one host sync, to leave out
    the rows that predict nothing; with `rows` there is none and every hidden row is multiplied, so
    pass hidden rows that are in use.
    """
    hidden, head = under_autocast(hidden, head)
    check_inputs("weighted_nll", hidden, head, targets, rows, bias, softcap, temperature)
    if row_scale.shape != targets.shape or row_scale.device != hidden.device:
        raise PMCError(f"weighted_nll: row_scale must be {tuple(targets.shape)} on {hidden.device}")
    if row_scale.requires_grad:
        raise PMCError("weighted_nll: row_scale is no input to differentiate: use gather_logps for such losses")
    chosen = resolve_backend(backend, hidden.device)
    if chosen == "cuda" and hidden.dtype == torch.float64:
        raise PMCError("weighted_nll: the cuda backend has no float64: use backend='reference'")
    if head_total is not None and (chosen == "reference" or head_total.shape != head.shape):
        raise PMCError(f"weighted_nll: head_total must be {tuple(head.shape)}, and the backend cpu or cuda")
    if chosen == "reference":
        check_ranges("weighted_nll", targets, rows, head.shape[0], hidden.shape[0])
        options = {"bias": bias, "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
        return weighted_nll_reference(hidden, head, targets, row_scale, rows, **options)
    grad = torch.is_grad_enabled()
    need = [grad and t is not None and t.requires_grad for t in (hidden, head, bias)]
    how = (temperature, softcap or 0.0, logit_scale)
    made = weighted_nll_op(hidden, head, bias, targets, row_scale, rows, *how, *need, workspace, chosen, head_total)
    return made[0], made[1]


@torch.library.custom_op("pmc_fast::weighted_nll", mutates_args=())
@without_autocast
def weighted_nll_op(
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    row_scale: torch.Tensor,
    rows: torch.Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    need_hidden: bool,
    need_head: bool,
    need_bias: bool,
    workspace: int,
    backend: str,
    head_total: torch.Tensor | None = None,
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    """Compute loss, logps, d(hidden), d(head), d(bias) and what `head_gradient` needs; what is not needed is empty."""
    if backend != "cuda":
        check_ranges("weighted_nll", targets, rows, head.shape[0], hidden.shape[0])
    compact = rows is None or backend == "cpu"  # a host sync: on CUDA only where rows does not promise
    plan = nll_chunked.make_plan(targets, row_scale, rows, hidden.shape[0], compact=compact)
    device = Cuda() if backend == "cuda" else Cpu()
    hidden, head, bias = hidden.detach(), head.detach(), None if bias is None else bias.detach()
    logits, need = nll_chunked.Logits(temperature, softcap, logit_scale), (need_hidden, need_head, need_bias)
    made = nll_chunked.run(device, plan, hidden, head, bias, targets, row_scale, logits, need, workspace)
    return made  # type: ignore[return-value]


@weighted_nll_op.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, head, bias, targets, row_scale, rows, temperature, softcap, logit_scale,
    need_hidden, need_head, need_bias, workspace, backend, head_total=None,
):  # fmt: skip
    wide = torch.promote_types(hidden.dtype, torch.float32)
    narrow = wide if hidden.dtype == torch.float16 else hidden.dtype
    device = Cuda if backend == "cuda" else Cpu
    keep = need_head and device.keeps(hidden, head, workspace)
    kept = device.logits_dtype(hidden) if keep else hidden.dtype
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(targets.shape, dtype=wide),
        hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=narrow),
        head.new_empty(head.shape if need_head and not keep else (0,), dtype=narrow),
        head.new_empty((head.shape[0] if need_bias else 0,), dtype=wide),
        hidden.new_empty((hidden.shape[0], head.shape[0]) if keep else (0,), dtype=kept),
        hidden.new_empty(hidden.shape if keep else (0,), dtype=kept),
        torch.empty((1 if keep else 0,), dtype=torch.int64),
    )


def head_gradient(parts: Sequence[torch.Tensor], factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return d(head) times an upstream gradient, from the last five results of `weighted_nll_op`."""
    d_head, _, *kept = parts
    return d_head_op(*kept, factor, dtype) if kept[0].dim() == 2 else _times(d_head, factor, dtype)


@torch.library.custom_op("pmc_fast::weighted_nll_d_head", mutates_args=())
@without_autocast
def d_head_op(
    d_logits: torch.Tensor, rows: torch.Tensor, active: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Compute d(head) from what was kept: a custom op, since `active` is not known when torch.compile traces it."""
    n = int(active)
    return weight_gradient(d_logits[:n], scaled(rows[:n], factor)).to(dtype)


@d_head_op.register_fake
def _(d_logits, rows, active, factor, dtype):  # type: ignore[no-untyped-def]
    return d_logits.new_empty((d_logits.shape[1], rows.shape[1]), dtype=dtype)


@torch.library.custom_op("pmc_fast::weighted_nll_add_d_head", mutates_args=("total",))
@without_autocast
def add_d_head_op(
    total: torch.Tensor, d_logits: torch.Tensor, rows: torch.Tensor, active: torch.Tensor, factor: torch.Tensor
) -> None:
    """Add d(head) to `total`."""
    n = int(active)
    weight_gradient(d_logits[:n], scaled(rows[:n], factor), total)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.need, ctx.total = inputs[9:12], inputs[14]
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


@no_double_backward
def _backward(ctx, g_loss, *_):  # type: ignore[no-untyped-def]
    d_hidden, *parts = ctx.saved_tensors
    d_head, d_bias, *kept = parts
    need = [n and g_loss is not None for n in ctx.need]
    grads: list[torch.Tensor | None] = [None, None, None]
    if need[0]:
        grads[0] = _times(d_hidden, g_loss, ctx.dtypes[0])
    if need[1] and ctx.total is None:
        grads[1] = head_gradient(parts, g_loss, ctx.dtypes[1])
    elif need[1] and kept[0].dim() == 2:
        add_d_head_op(ctx.total, *kept, g_loss)
    elif need[1]:
        ctx.total.addcmul_(d_head, g_loss.reshape(1))  # as a vector the factor keeps its type
    if need[2]:
        grads[2] = _times(d_bias, g_loss, ctx.dtypes[2])
    return (*grads, *[None] * 12)


def _times(gradient: torch.Tensor, upstream: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # spare the CPU a pass in the usual case (a sync on CUDA, so not there)
    if type(upstream) is torch.Tensor and upstream.device.type == "cpu" and upstream.item() == 1:
        return gradient.to(dtype, copy=_keeps_graph())  # another backward must not hand out the same memory
    return scaled(gradient, upstream, dtype)


def _keeps_graph() -> bool:
    """Return whether the running backward was called with retain_graph, which only a private function of torch tells."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is None or keeps()


weighted_nll_op.register_autograd(_backward, setup_context=_setup_context)
