"""Inputs of CUDA graphs: arrays copied to the device at once, to the same addresses every time."""

from collections.abc import Mapping

import numpy as np
import torch

ALIGNED = 16  # bytes: Triton compiles another variant for addresses that are not


def round_up(n: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is at least n."""
    return -(-n // unit) * unit


class StaticInputs:
    """A buffer on the host and its copy on the device, with arrays one after the other.

    Arrays of the same lengths get the same addresses again, unless the buffer had to grow.

    Parameters
    ----------
    device : torch.device
    room : int
        Bytes to begin with.
    """

    def __init__(self, device: torch.device, room: int) -> None:
        self._to = device
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._reserve(room)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer on the device."""
        return self._device.nbytes

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Copy arrays and return them as tensors on the device, which share the buffer."""
        places, end = {}, 0
        for name, array in arrays.items():
            begin = round_up(end, ALIGNED)
            end = begin + array.nbytes
            places[name] = (begin, end)
        host = self.reserved(end)
        for name, (begin, stop) in places.items():
            host[begin:stop] = np.ascontiguousarray(arrays[name]).view(np.uint8)
        self.upload(end)
        return {name: self.view(*place, arrays[name].itemsize) for name, place in places.items()}

    def reserved(self, end: int) -> np.ndarray:
        """Return the host's buffer, of at least `end` bytes, to be written: the last copy has been made."""
        if self._copied is not None:
            # The last copy, which waits for the kernels before it, may not have read the host's buffer yet: a step
            # that draws nothing (a part of a long prompt) gives the caller nothing to wait for.
            self._copied.synchronize()
        if end > len(self._bytes):
            self._reserve(max(end, 2 * len(self._bytes)))
        return self._bytes

    def upload(self, end: int) -> None:
        """Copy the first `end` bytes to the device."""
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._to))

    def view(self, begin: int, stop: int, itemsize: int) -> torch.Tensor:
        """Return a part of the device's buffer as int64 or int32."""
        return self._device[begin:stop].view(torch.int64 if itemsize == 8 else torch.int32)

    def _reserve(self, room: int) -> None:
        # pinned: from other memory CUDA copies in two steps, and the host waits for the first
        room = round_up(room, ALIGNED)
        self._host = torch.empty(room, dtype=torch.uint8, pin_memory=self._to.type == "cuda")
        self._bytes = self._host.numpy()
        self._device = torch.empty(room, dtype=torch.uint8, device=self._to)
