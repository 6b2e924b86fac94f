"""One step of AdamW, or Adam: float32 masters and moments, gradients and weights in low precision."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import PMCError
from .dispatch import resolve_backend
from .native import triton_kernels

LOW = (torch.bfloat16, torch.float16)
ALIGNED = 16  # bytes: what Triton reads at once


def replaces_torchs(device: str, fused: bool | None) -> bool:
    """Return whether `adamw` steps in place of torch's Adam: on CUDA, and on the CPU where that is the fused one."""
    return device == "cuda" or (device == "cpu" and bool(fused))


@dataclass(frozen=True, slots=True)
class Settings:
    """What torch.optim.AdamW is given, and the step to take, counted from 1."""

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool  # AdamW; else Adam, whose decay is part of the gradient


def adamw(
    grads: Sequence[torch.Tensor],
    masters: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    *,
    settings: Settings,
    backend: str | None = None,
) -> None:
    """Step masters and moments in place, and write the masters, rounded, to the weights.

    Parameters
    ----------
    grads : sequence of bfloat16 or float16 Tensor
        Their storage is only read.
    masters, exp_avgs, exp_avg_sqs : sequence of float32 Tensor
    weights : sequence of bfloat16 or float16 Tensor
        All five have the same shapes, are contiguous and on one device.
    settings : Settings
    backend : {"reference", "cpu", "cuda"}, optional
        By default the device's own. "cpu" is torch's fused kernel, tensor by tensor.

    Notes
    -----
    Not a custom op: nothing compiles or differentiates an optimizer's step, and the checks of a list of a thousand tensors
    would take longer than all else that the host does.
    """
    if not grads:
        return
    device = masters[0].device
    lists = {"grads": grads, "masters": masters, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "weights": weights}
    if len({len(tensors) for tensors in lists.values()}) > 1:
        raise PMCError("adamw: " + ", ".join(f"{len(t)} {name}" for name, t in lists.items()) + ": need equally many")
    backend = resolve_backend(backend, device)
    for name, tensors in lists.items():
        allowed = LOW if name in ("grads", "weights") else (torch.float32,)
        for tensor, master in zip(tensors, masters, strict=True):
            if tensor.dtype not in allowed or tensor.device != device or tensor.shape != master.shape:
                raise PMCError(
                    f"adamw: {name} has {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, its master is "
                    f"{tuple(master.shape)} on {device}: need that shape and device, and {' or '.join(map(str, allowed))}"
                )
            if not tensor.is_contiguous():
                raise PMCError(f"adamw: {name} has a tensor that is not contiguous: {tuple(tensor.shape)}")
    with torch.no_grad():
        if backend == "cuda":
            _cuda(grads, masters, exp_avgs, exp_avg_sqs, weights, settings)
            return
        step = _torchs if backend == "cpu" else _reference
        for grad, master, exp_avg, exp_avg_sq, weight in zip(*lists.values(), strict=True):
            step(grad.float(), master, exp_avg, exp_avg_sq, settings)
            weight.copy_(master)


def _reference(
    grad: torch.Tensor, master: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, s: Settings
) -> None:
    beta1, beta2 = s.betas
    if s.decoupled:
        master.mul_(1 - s.lr * s.weight_decay)
    else:
        grad = grad.add(master, alpha=s.weight_decay)
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step_size, root = _corrections(s)
    master.addcdiv_(exp_avg, exp_avg_sq.sqrt().div_(root).add_(s.eps), value=-step_size)


def _corrections(s: Settings) -> tuple[float, float]:
    """Return the size of a step and the root of the second moment's correction for its start at 0."""
    beta1, beta2 = s.betas
    return s.lr / (1 - beta1**s.step), math.sqrt(1 - beta2**s.step)


def _torchs(
    grad: torch.Tensor, master: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, s: Settings
) -> None:
    fused = torch._fused_adamw_ if s.decoupled else torch._fused_adam_
    fused(
        [master], [grad], [exp_avg], [exp_avg_sq], [], [torch.tensor(float(s.step))], lr=s.lr, beta1=s.betas[0],
        beta2=s.betas[1], weight_decay=s.weight_decay, eps=s.eps, amsgrad=False, maximize=False,
    )  # fmt: skip


def _cuda(
    grads: Sequence[torch.Tensor],
    masters: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    s: Settings,
) -> None:
    kernels = triton_kernels("adamw")
    step_size, root = _corrections(s)
    shrink, decay = (s.lr * s.weight_decay, 0.0) if s.decoupled else (0.0, s.weight_decay)
    copies = []  # of gradients at odd addresses, until the kernel is queued
    for low in LOW:
        rows = []
        for grad, master, exp_avg, exp_avg_sq, weight in zip(
            grads, masters, exp_avgs, exp_avg_sqs, weights, strict=True
        ):
            if weight.dtype != low or not weight.numel():
                continue
            if grad.dtype != low or grad.data_ptr() % ALIGNED:
                copies.append(grad := grad.to(low, copy=True))
            tensors = (grad, master, exp_avg, exp_avg_sq, weight)
            rows.append([*(t.data_ptr() for t in tensors), weight.numel()])
        if not rows:
            continue
        if any(address % ALIGNED for row in rows for address in row[:5]):
            raise PMCError(f"adamw: the cuda backend needs tensors at multiples of {ALIGNED} bytes")
        table = torch.tensor(rows, dtype=torch.int64)
        device = masters[0].device
        if device.type == "cuda":  # from pinned memory the host does not wait for the copy
            table = table.pin_memory().to(device, non_blocking=True)
        longest = max(row[5] for row in rows)
        kernels.adamw(table, longest, low, *s.betas, shrink, decay, step_size, root, s.eps)
    # autograd must learn that the weights that it may have saved are others now
    torch.autograd.graph.increment_version([*masters, *exp_avgs, *exp_avg_sqs, *weights])
