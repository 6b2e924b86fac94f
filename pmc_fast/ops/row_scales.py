"""Weights of sequences to scales of targets, and log-probs of targets to sequences."""

from typing import Literal

import torch

from ..errors import PMCError
from ..utils.labels import IGNORED

Reduction = Literal["token_mean", "sequence_mean", "sum"]


def row_scales(
    weights: torch.Tensor,
    cu_seqlens: torch.Tensor,
    targets: torch.Tensor,
    *,
    reduction: Reduction = "token_mean",
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fold weights and a reduction into one scale per target, for `weighted_nll`.

    Parameters
    ----------
    weights : Tensor [S]
        Weight of each sequence: a reward weight, lambda, or -1 for gradient ascent.
    cu_seqlens : int64 Tensor [S + 1]
        Where each sequence's targets begin and end; from 0 to M.
    targets : int64 Tensor [M]
        -100 is not counted and gets scale 0.
    reduction : {"token_mean", "sequence_mean", "sum"}
        Mean over a group's tokens; mean over a group's sequences of the mean over their tokens;
        or the sum. A sequence without a counted token is not part of a mean.
    groups : int64 Tensor [S], optional
        The group of each sequence, from 0: means are taken inside a group (collapse, retain, each
        micro-batch) and the groups' losses add up. All one group by default.

    Returns
    -------
    Tensor [M]
        float32, or weights' dtype if that is wider. With all weights 1, sum of scale * -logp is what torch's cross_entropy
        with its default reduction returns (``token_mean``), summed over the groups.
    """
    sequences = weights.shape[0]
    if cu_seqlens.shape != (sequences + 1,) or (groups is not None and groups.shape != (sequences,)):
        raise PMCError(
            f"weights {tuple(weights.shape)} need cu_seqlens ({sequences + 1},) and groups ({sequences},): got "
            f"{tuple(cu_seqlens.shape)} and {None if groups is None else tuple(groups.shape)}"
        )
    counted = targets != IGNORED
    owner = _owner(cu_seqlens, targets)
    # counts are whole numbers: bfloat16 could not count past 256
    lengths = torch.zeros_like(cu_seqlens[1:]).index_add_(0, owner, counted.to(cu_seqlens.dtype))
    if groups is None:
        groups = torch.zeros_like(lengths)
    # a group's index is below S, so S slots hold every group without asking the device for the largest
    per_group = torch.zeros_like(lengths)
    scale = weights.to(torch.promote_types(weights.dtype, torch.float32))
    if reduction == "token_mean":
        scale = scale / per_group.index_add(0, groups, lengths)[groups].clamp(min=1)
    elif reduction == "sequence_mean":
        used = (lengths > 0).to(lengths.dtype)
        scale = scale / per_group.index_add(0, groups, used)[groups].clamp(min=1) / lengths.clamp(min=1)
    elif reduction != "sum":
        raise PMCError(f"reduction is {reduction!r}: use token_mean, sequence_mean or sum")
    return scale[owner] * counted


def sequence_logps(logps: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sum log-probs [M] over each sequence: [S]; differentiable, deterministic. Ignored targets have log-prob 0."""
    return torch.segment_reduce(logps, "sum", offsets=cu_seqlens, initial=0, unsafe=True)


def _owner(cu_seqlens: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Return the sequence that each of M items lies in, without a host sync: int64 [M]."""
    positions = torch.arange(items.shape[0], device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)
