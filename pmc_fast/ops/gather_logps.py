"""Log-probs of targets through a language model's head, differentiable, without holding its logits."""

import torch

from ..errors import PMCError
from .checks import check_inputs, check_ranges, no_double_backward, under_autocast, without_autocast
from .dispatch import resolve_backend
from .nll_reference import gather_logps_reference
from .weighted_nll import WORKSPACE, head_gradient, weighted_nll_op


def gather_logps(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
    workspace: int = WORKSPACE,
) -> torch.Tensor:
    """Return the targets' log-probs, for losses whose weights depend on them (NPO, SimNPO, DPO).

    Parameters are those of `weighted_nll`, without `row_scale`.

    Returns
    -------
    Tensor [M]
        In max(float32, hidden's dtype); 0 where the target is -100. Differentiable, once, in hidden,
        head and bias: backward computes the logits a second time (8 M D V FLOPs in all). Where the
        weights are known before the forward pass, `weighted_nll` needs 6.

    Raises
    ------
    PMCError
        As `weighted_nll`.

    Notes
    -----
    On CUDA without `rows` there is one host sync in the forward and one in the backward pass.
    """
    hidden, head = under_autocast(hidden, head)
    check_inputs("gather_logps", hidden, head, targets, rows, bias, softcap, temperature)
    chosen = resolve_backend(backend, hidden.device)
    if chosen == "cuda" and hidden.dtype == torch.float64:
        raise PMCError("gather_logps: the cuda backend has no float64: use backend='reference'")
    if chosen == "reference":
        check_ranges("gather_logps", targets, rows, head.shape[0], hidden.shape[0])
        how = {"bias": bias, "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
        return gather_logps_reference(hidden, head, targets, rows, **how)  # type: ignore[arg-type]
    return gather_logps_op(
        hidden, head, bias, targets, rows, temperature, softcap or 0.0, logit_scale, workspace, chosen
    )


@torch.library.custom_op("pmc_fast::gather_logps", mutates_args=())
@without_autocast
def gather_logps_op(
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    rows: torch.Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    workspace: int,
    backend: str,
) -> torch.Tensor:
    """Compute logps alone."""
    none = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    how = (temperature, softcap, logit_scale)
    return weighted_nll_op(hidden, head, bias, targets, none, rows, *how, False, False, False, workspace, backend)[1]


@gather_logps_op.register_fake
def _(hidden, head, bias, targets, rows, *settings):  # type: ignore[no-untyped-def]
    return hidden.new_empty(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    hidden, head, bias, targets, rows, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, head, bias, targets, rows)


@no_double_backward
def _backward(ctx, g_logps):  # type: ignore[no-untyped-def]
    if g_logps is None:
        return (None,) * 10
    hidden, head, bias, targets, rows = ctx.saved_tensors
    *how, workspace, backend = ctx.settings
    need = [bool(n) for n in ctx.needs_input_grad[:3]]
    # d(sum of g * logps) is the weighted loss whose scales are -g
    made = weighted_nll_op(hidden, head, bias, targets, -g_logps, rows, *how, *need, workspace, backend)
    grads = [g.to(t.dtype) if n else None for g, t, n in zip(made[2:5], ctx.saved_tensors, need, strict=False)]
    if need[1]:
        grads[1] = head_gradient(made[3:], torch.ones_like(made[0]), head.dtype)
    return (*grads, *[None] * 7)


gather_logps_op.register_autograd(_backward, setup_context=_setup_context)
