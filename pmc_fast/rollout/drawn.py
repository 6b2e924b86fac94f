"""Draws that stay on the device for the next step, and are copied to the host without waiting for them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..ops.sample_nucleus import Draws
from .inputs import Bucket


class Outputs:
    """The memory of one bucket's draws: tokens, log-probs and masses one after the other, so that one copy has all.

    Parameters
    ----------
    bucket : Bucket
    device : torch.device
    """

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        self.sizes = [bucket.draws, bucket.draws, bucket.logits]
        self.memory = torch.zeros(sum(self.sizes), dtype=torch.int64, device=device)
        tokens, logps, mass = self.memory.split(self.sizes)
        self.draws = Draws(tokens, logps.view(torch.float64), mass.view(torch.float64))


@dataclass(frozen=True, slots=True)
class Pending:
    """A step's draws, which may not have been computed yet."""

    tokens: torch.Tensor  # int64 [D], on the device; overwritten by the next step of the same bucket
    host: torch.Tensor  # where all of them are copied to
    sizes: list[int]
    real: tuple[int, int]  # logits and draws that are not padded
    copied: Any = None  # the event of the copy, on CUDA

    def read(self) -> list[np.ndarray]:
        """Wait for the draws; return tokens [D], log-probs [D] and nucleus masses [L], without padded ones.

        They are overwritten two steps later.
        """
        if self.copied is not None:
            self.copied.synchronize()  # the only time that the host waits for the device
        logits, draws = self.real
        tokens, logps, mass = (part.numpy() for part in self.host.split(self.sizes))
        return [tokens[:draws], logps.view(np.float64)[:draws], mass.view(np.float64)[:logits]]


class Landing:
    """Copies draws to the host. Two steps may be on their way at once.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._buffers = [torch.empty(0, dtype=torch.int64)] * 2
        self._events = [torch.cuda.Event() for _ in range(2)] if self._cuda else [None, None]

    def __call__(self, outputs: Outputs, real: tuple[int, int]) -> Pending:
        """Start to copy draws, before the device computes what is asked of it next."""
        self._buffers.reverse()
        self._events.reverse()
        size = len(outputs.memory)
        if len(self._buffers[0]) < size:
            self._buffers[0] = torch.empty(2 * size, dtype=torch.int64, pin_memory=self._cuda)
        host, event = self._buffers[0][:size], self._events[0]
        host.copy_(outputs.memory, non_blocking=True)
        if event is not None:
            event.record(torch.cuda.current_stream(outputs.memory.device))
        return Pending(outputs.draws.tokens, host, outputs.sizes, real, event)
