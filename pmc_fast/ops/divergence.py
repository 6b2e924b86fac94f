"""The divergence of a head's distributions from another's, without holding the logits of all rows."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .nll_reference import transform_logits
from .weighted_nll import WORKSPACE

HELD = 6  # float32 values a row and token of the vocabulary, of which autograd keeps some until a chunk's backward


def divergence(
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    row_scale: torch.Tensor,
    *,
    options: Mapping[str, Any] | None = None,
    teacher_options: Mapping[str, Any] | None = None,
    workspace: int = WORKSPACE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sum of row_scale * KL(teacher || student), over the whole vocabulary, in nats, and each row's.

    Parameters
    ----------
    hidden, head : Tensor [M, D] and [V, D]
        The student's.
    teacher_hidden, teacher_head : Tensor [M, E] and [V, E]
        Not differentiated.
    row_scale : Tensor [M]
    options, teacher_options : mapping, optional
        `bias`, `softcap` and `logit_scale`, as `weighted_nll` takes them.
    workspace : int
        Bytes of logits held at once. Where all rows fit, they are held until backward (6 M D V FLOPs of the student's head, 2 M E V
        of the teacher's); else backward computes them again, chunk by chunk (8 M D V, 4 M E V).

    Returns
    -------
    total : Tensor []
        In max(float32, hidden's dtype); differentiable in hidden, head and bias.
    rows : Tensor [M]
        KL(teacher || student), not differentiable.
    """
    how, teacher_how = (
        {"bias": None, "softcap": None, "logit_scale": 1.0, **(given or {})} for given in (options, teacher_options)
    )
    rows = max(1, workspace // (HELD * 4 * len(head)))
    total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    parts = (hidden.split(rows), teacher_hidden.split(rows), row_scale.split(rows))
    again = functools.partial(checkpoint, _chunk, use_reentrant=False, preserve_rng_state=False)
    chunk = _chunk if rows >= len(hidden) else again
    found = []
    for h, t, scale in zip(*parts, strict=True):
        value, each = chunk(h, head, t, teacher_head, scale, how, teacher_how)
        total = total + value
        found.append(each)
    return total, torch.cat(found)


def _chunk(
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    scale: torch.Tensor,
    how: dict[str, Any],
    teacher_how: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        teacher = _log_probs(teacher_hidden, teacher_head, **teacher_how)
    student = _log_probs(hidden, head, **how)
    each = (teacher.exp() * (teacher - student)).sum(1)
    return (scale.to(student.dtype) * each).sum(), each.detach()


def _log_probs(
    hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, logit_scale: float
) -> torch.Tensor:
    products = hidden @ head.T
    products = products.to(torch.promote_types(products.dtype, torch.float32))
    return transform_logits(products, bias, 1.0, softcap, logit_scale).log_softmax(1)
