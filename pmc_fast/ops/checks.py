"""Argument checks, autocast and second derivatives: what ops share."""

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from ..errors import PMCError
from ..utils.labels import IGNORED

P = ParamSpec("P")
R = TypeVar("R")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_inputs(
    op: str,
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    softcap: float | None,
    temperature: float,
) -> None:
    """Refuse shapes, dtypes, devices and settings that the contract does not allow."""
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
        raise PMCError(f"{op}: hidden {tuple(hidden.shape)} and head {tuple(head.shape)} must be [R, D] and [V, D]")
    if hidden.dtype not in FLOATS or head.dtype != hidden.dtype:
        raise PMCError(f"{op}: hidden is {hidden.dtype} and head {head.dtype}: both must be one floating-point type")
    if targets.dim() != 1 or targets.dtype != torch.int64:
        raise PMCError(f"{op}: targets must be int64 [M], not {targets.dtype} {tuple(targets.shape)}")
    if rows is None and targets.shape[0] != hidden.shape[0]:
        raise PMCError(f"{op}: {targets.shape[0]} targets for {hidden.shape[0]} hidden rows: give one each, or rows")
    if rows is not None and (rows.shape != targets.shape or rows.dtype != torch.int64):
        raise PMCError(f"{op}: rows must be int64 {tuple(targets.shape)}, not {rows.dtype} {tuple(rows.shape)}")
    if bias is not None and (bias.shape != head.shape[:1] or not bias.is_floating_point()):
        raise PMCError(f"{op}: bias must be floating [{head.shape[0]}], not {bias.dtype} {tuple(bias.shape)}")
    for name, tensor in (("head", head), ("targets", targets), ("rows", rows), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise PMCError(f"{op}: {name} is on {tensor.device} but hidden on {hidden.device}: move one of them")
    if not temperature > 0:
        raise PMCError(f"{op}: temperature is {temperature}: it must be above 0")
    if softcap is not None and not softcap > 0:
        raise PMCError(f"{op}: softcap is {softcap}: it must be above 0, or None")


def check_ranges(op: str, targets: torch.Tensor, rows: torch.Tensor | None, vocab: int, num_rows: int) -> None:
    """Refuse targets and rows that are out of range, on the CPU alone: on CUDA it would cost a host sync."""
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    outside = (targets != IGNORED) & ((targets < 0) | (targets >= vocab))
    if outside.any():
        at = int(outside.nonzero()[0])
        raise PMCError(f"{op}: target {int(targets[at])} at {at} is outside the head's {vocab} rows (-100: ignored)")
    if rows is not None and not (int(rows.min()) >= 0 and int(rows.max()) < num_rows):
        raise PMCError(f"{op}: rows {int(rows.min())} to {int(rows.max())} do not fit {num_rows} hidden rows")


def under_autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Cast tensors as autocast casts a linear layer's inputs, if it is enabled."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:  # which autocast does not cast
        return list(tensors)
    return [t.to(torch.get_autocast_dtype(kind)) for t in tensors]


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Switch autocast off inside an op, so that it computes in the types it chose."""

    @functools.wraps(function)
    def wrapper(*arguments: P.args, **options: P.kwargs) -> R:
        kinds = {a.device.type for a in arguments if isinstance(a, torch.Tensor)}
        with contextlib.ExitStack() as stack:
            for kind in kinds:
                if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*arguments, **options)

    return wrapper


def no_double_backward(backward: Callable[P, R]) -> Callable[P, R]:
    """Run a backward without autocast, and refuse create_graph=True: its gradients would count as constants there.

    (torch's once_differentiable lets create_graph pass where the incoming gradient is a constant.)
    """
    backward = without_autocast(backward)

    @functools.wraps(backward)
    def wrapper(*arguments: P.args, **options: P.kwargs) -> R:
        if torch.is_grad_enabled():
            raise PMCError("pmc_fast has no second derivatives: call backward or grad without create_graph")
        return backward(*arguments, **options)

    return wrapper
