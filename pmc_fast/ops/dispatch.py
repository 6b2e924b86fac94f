"""The one place that knows which implementation serves which device."""

from typing import Literal

import torch

from ..errors import PMCError

Backend = Literal["reference", "cpu", "cuda", "fused"]


def resolve_backend(backend: str | None, device: torch.device) -> Backend:
    """Return the implementation for tensors on `device`; `backend` overrides the choice.

    Raises
    ------
    PMCError
        An unknown backend, or one that can't read this device's memory.
    """
    if backend is None:
        backend = device.type
        if backend not in ("cpu", "cuda"):
            raise PMCError(f"device {device} has no kernels: move to cpu or cuda, or use backend='reference'")
    if backend == "reference":
        return "reference"
    if backend == "cpu" and device.type == "cpu":
        return "cpu"
    if backend in ("cuda", "fused") and (device.type == "cuda" or triton_interprets()):
        return "cuda" if backend == "cuda" else "fused"
    raise PMCError(f"backend {backend!r} can't serve tensors on {device}: use reference, cpu or cuda to match")


def triton_interprets() -> bool:
    """Return whether TRITON_INTERPRET=1 runs Triton kernels on the CPU, as the tests do."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)
