"""The oracle of weighted_nll and gather_logps: a few lines of torch that hold all logits."""

import torch

from .checks import IGNORED


def gather_logps_reference(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> torch.Tensor:
    """Return logps [M] in max(float32, the inputs' dtype), differentiable by autograd."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.to(dtype) @ head.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logps = torch.log_softmax(z / temperature, dim=-1)
    if rows is not None:
        logps = logps[rows]
    counted = targets != IGNORED
    inside = (targets >= 0) & (targets < head.shape[0])
    picked = logps.gather(1, torch.where(inside, targets, 0)[:, None])[:, 0]
    return torch.where(inside, picked, torch.where(counted, torch.nan, 0.0))


def weighted_nll_reference(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    row_scale: torch.Tensor,
    rows: torch.Tensor | None = None,
    **options: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sum of row_scale * -logps, logps [M]), the former differentiable by autograd."""
    logps = gather_logps_reference(hidden, head, targets, rows, **options)  # type: ignore[arg-type]
    return -(row_scale.to(logps.dtype) * logps).sum(), logps.detach()
