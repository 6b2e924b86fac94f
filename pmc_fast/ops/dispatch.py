"""Chooses the implementation that serves a device."""

from typing import Literal, get_args

import torch

from ..errors import PMCError

Backend = Literal["reference", "cpu", "cuda"]


def why_refused(device: torch.device) -> str | None:
    """Return why pmc_fast does not run on a device, if so; with ROCm torch calls AMD's GPUs cuda."""
    if device.type == "cuda" and torch.version.hip:
        return f"torch {torch.__version__} is built for ROCm, which is not supported (inline PTX, nvcc): use cpu"
    return None if device.type in ("cpu", "cuda") else "pmc_fast runs on cpu and cuda"


def resolve_backend(backend: str | None, device: torch.device) -> Backend:
    """Return the implementation for tensors on `device`; `backend` overrides the choice.

    Raises
    ------
    PMCError
        An unknown backend, or one that can't read this device's memory or run on it.
    """
    if backend is None:
        backend = device.type
        if backend not in ("cpu", "cuda"):
            raise PMCError(f"device {device} has no kernels: move to cpu or cuda, or use backend='reference'")
    if backend == "reference":
        return "reference"
    if backend == "cpu" and device.type == "cpu":
        return "cpu"
    if backend == "cuda" and device.type == "cuda" and (why := why_refused(device)):
        raise PMCError(f"device {device}: {why}, or backend='reference'")
    if backend == "cuda" and (device.type == "cuda" or triton_interprets()):
        return "cuda"
    if backend not in get_args(Backend):
        raise PMCError(f"backend is {backend!r}: use one of {', '.join(get_args(Backend))}")
    raise PMCError(f"backend {backend!r} can't serve tensors on {device}: use reference, cpu or cuda to match")


def triton_interprets() -> bool:
    """Return whether TRITON_INTERPRET=1 runs Triton kernels on the CPU, as the tests do."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)
