"""The oracle of weighted_nll and gather_logps: a few lines of torch that hold all logits."""

import torch

from ..utils.labels import IGNORED
from .checks import without_autocast


def transform_logits(
    x: torch.Tensor, bias: torch.Tensor | None, temperature: float, softcap: float | None, logit_scale: float
) -> torch.Tensor:
    """Return softcap((x + bias) * logit_scale) / temperature, x being products with rows of the head."""
    z = (x if bias is None else x + bias.to(x.dtype)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


@without_autocast
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
    z = transform_logits(hidden.to(dtype) @ head.to(dtype).T, bias, temperature, softcap, logit_scale)
    if rows is not None:
        z = z[rows]
    counted = targets != IGNORED
    inside = (targets >= 0) & (targets < head.shape[0])
    token = torch.where(inside, targets, 0)[:, None]
    own = z.gather(1, token)
    # a target that has nearly all mass: from the others' sum, which would be rounded away beside its own 1
    others = (z - own).scatter(1, token, -torch.inf)
    peak = others.amax(1, keepdim=True) <= 0
    sharp = (own - own) - torch.where(peak, others, -torch.inf).exp().sum(1, keepdim=True).log1p()
    picked = torch.where(peak, sharp, torch.log_softmax(z, dim=-1).gather(1, token))[:, 0]
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
