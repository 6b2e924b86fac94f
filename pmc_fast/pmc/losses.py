"""Unlearning losses on one kernel, in the symbols of their papers.

Losses whose weights are known before the forward pass are row scales for `ops.weighted_nll`:

    scale = grad_diff(cu_seqlens, targets, num_forget, lambda_=1.0)
    loss, logps = weighted_nll(hidden, head, targets, scale)

Losses whose weights depend on the log-probs take them from `ops.gather_logps`, summed over each
answer by `ops.sequence_logps`. In all of them the sequences to forget (or to collapse on) come first
and the sequences to retain after them.
"""

import torch
from torch.nn.functional import logsigmoid

from ..ops import row_scales
from ..utils.labels import IGNORED


def pmc(cu_seqlens: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, lambda_: float) -> torch.Tensor:
    """PMC: CE(sampled answers) + lambda CE(retain answers) (arXiv 2507.04219, eq. 5).

    Parameters
    ----------
    cu_seqlens : int64 Tensor [S + 1]
        Where each sequence's targets begin and end.
    targets : int64 Tensor [M]
        Token ids, -100 where nothing is predicted.
    weights : Tensor [C], C <= S
        Of the first C sequences, the sampled answers: 1 for picked answers (the published arg-min),
        or Bradley-Terry's softmax_i((1 - s_i) / tau) for all N answers of each question.
    lambda_ : float
        Weight of the retain loss.

    Returns
    -------
    Tensor [M]
        Scales. The collapse loss is a mean over tokens weighted by their sequences' `weights`: with
        one-hot weights, that of the picked answers alone.
    """
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    lengths = _lengths(cu_seqlens, targets, weights.dtype)
    return row_scales(pmc_weights(lengths, weights, lambda_), cu_seqlens, targets, reduction="sum")


def pmc_weights(
    lengths: torch.Tensor, weights: torch.Tensor, lambda_: float, tokens: tuple[float, float] | None = None
) -> torch.Tensor:
    """PMC's weight of each sequence's tokens, for batches that are computed in pieces.

    Parameters
    ----------
    lengths : Tensor [S]
        Counted targets of each sequence.
    weights : Tensor [C], C <= S
    lambda_ : float
        See `pmc`.
    tokens : (float, float), optional
        What to divide by: the number of collapse tokens, each times its sequence's weight, and of retain tokens.
        By default those of these sequences; given, those of a larger batch that they are a part of.

    Returns
    -------
    Tensor [S]
        For `row_scales(..., reduction="sum")`.
    """
    picked = weights.shape[0]
    if tokens is None:
        collapse_tokens, retain_tokens = (weights * lengths[:picked]).sum(), lengths[picked:].sum()
    else:
        collapse_tokens, retain_tokens = (torch.as_tensor(n, dtype=weights.dtype) for n in tokens)
    collapse = weights / collapse_tokens.clamp(min=torch.finfo(weights.dtype).tiny)
    retain = lambda_ / retain_tokens.to(weights.dtype).clamp(min=1)
    return torch.cat([collapse, retain.expand(len(lengths) - picked)])


def gradient_ascent(cu_seqlens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """GA: -CE(forget answers) (Jang et al., arXiv 2210.01504). Returns scales [M]."""
    return _two_means(cu_seqlens, targets, len(cu_seqlens) - 1, -1.0, 0.0)


def grad_diff(cu_seqlens: torch.Tensor, targets: torch.Tensor, num_forget: int, lambda_: float = 1.0) -> torch.Tensor:
    """GradDiff: -CE(forget) + lambda CE(retain) (Liu et al. 2022; TOFU, arXiv 2401.06121). Scales [M]."""
    return _two_means(cu_seqlens, targets, num_forget, -1.0, lambda_)


def idk(cu_seqlens: torch.Tensor, targets: torch.Tensor, num_forget: int, lambda_: float = 1.0) -> torch.Tensor:
    """IDK: CE("I don't know" for forget questions) + lambda CE(retain) (TOFU, arXiv 2401.06121). Scales [M]."""
    return _two_means(cu_seqlens, targets, num_forget, 1.0, lambda_)


def npo(logps: torch.Tensor, ref_logps: torch.Tensor, beta: float = 0.1) -> torch.Tensor:
    """NPO: -2/beta E[log sigmoid(-beta log(pi / pi_ref))] (Zhang et al., arXiv 2404.05868, eq. 3).

    logps, ref_logps : Tensor [S], sums over each forget answer; ref_logps of the untouched model.
    """
    return -2 / beta * logsigmoid(-beta * (logps - ref_logps)).mean()


def simnpo(logps: torch.Tensor, lengths: torch.Tensor, beta: float = 2.5, gamma: float = 0.0) -> torch.Tensor:
    """SimNPO: -2/beta E[log sigmoid(-beta/|y| log pi - gamma)] (Fan et al., arXiv 2410.07163, eq. 4).

    logps, lengths : Tensor [S], sums over each forget answer and its number of tokens.
    """
    return -2 / beta * logsigmoid(-beta * logps / lengths - gamma).mean()


def dpo(
    logps_w: torch.Tensor,
    logps_l: torch.Tensor,
    ref_logps_w: torch.Tensor,
    ref_logps_l: torch.Tensor,
    beta: float = 0.1,
) -> torch.Tensor:
    """DPO: -E[log sigmoid(beta (log ratio of y_w - log ratio of y_l))] (Rafailov et al., arXiv 2305.18290, eq. 7).

    All Tensor [S], sums over each answer: y_w preferred (a refusal), y_l to forget.
    """
    return -logsigmoid(beta * ((logps_w - ref_logps_w) - (logps_l - ref_logps_l))).mean()


def _two_means(
    cu_seqlens: torch.Tensor, targets: torch.Tensor, first: int, weight: float, lambda_: float
) -> torch.Tensor:
    """weight * CE(first sequences) + lambda * CE(the others), each a mean over its tokens."""
    late = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device) >= first
    weights = torch.where(late, lambda_, weight)
    return row_scales(weights, cu_seqlens, targets, groups=late.long())


def _lengths(cu_seqlens: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the number of counted targets of each sequence: [S]."""
    counted = torch.cat([targets.new_zeros(1), (targets != IGNORED).cumsum(0)])
    return counted[cu_seqlens].diff().to(dtype)
