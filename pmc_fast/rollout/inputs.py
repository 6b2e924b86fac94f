"""Brings a step's arrays to the device: in one copy, and each bucket's always to the same place."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..ops.decode_attention import StepIndex
from .buckets import DRAWS, ENTRIES, INDEX, Bucket, bucket_of, pad

ROOM = 1 << 14  # bytes of the smallest buffer
ALIGNED = 16  # bytes: Triton compiles another variant for addresses that are not
ENTRIES_PER_ROW = 256  # that a bucket's buffer has room for from the start: longer histories move it


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A step on the device."""

    tokens: torch.Tensor  # int64 [R]
    positions: torch.Tensor  # int64 [R]
    logit_rows: torch.Tensor  # int64 [L], rows whose logits are wanted
    index: StepIndex
    span: int  # slots that the pool must have
    draws: tuple[torch.Tensor, ...]  # what `sample_nucleus` takes; of the rows that are not padded
    bucket: Bucket | None = None  # that it was padded to


class StepInputs:
    """Makes StepTensors of plans.

    Parameters
    ----------
    device : torch.device
    pads : bool
        Pad decode steps to buckets.
    """

    def __init__(self, device: torch.device, *, pads: bool) -> None:
        self.device, self._pads = device, pads
        self._uploads: dict[Bucket | None, Upload] = {}

    def __call__(self, plan: Mapping[str, np.ndarray], span: int, max_rows: int) -> StepTensors:
        """Bring a plan to the device.

        Parameters
        ----------
        plan : mapping of str to ndarray
            What RolloutTrie.plan returns.
        span : int
            Slots of the pool that histories use; padded rows get the next ones.
        max_rows : int
            Rows of the largest step.

        Returns
        -------
        StepTensors
            On CUDA and of a padded step they are gone with the next step of the same bucket.
        """
        bucket = bucket_of(plan, max_rows) if self._pads else None
        if bucket is None and self.device.type == "cpu":
            return _tensors({name: torch.from_numpy(array) for name, array in plan.items()}, span)
        if bucket is None:
            return _tensors(self._upload(None, ROOM)(plan), span)
        span_padded = span + bucket.rows - len(plan["tokens"])
        room = 4 * bucket.rows * ENTRIES_PER_ROW + ROOM
        t = self._upload(bucket, room)(pad(plan, bucket, span))
        return _tensors(t | {"suffix": t[ENTRIES], "prefix": t[ENTRIES]}, span_padded, bucket)

    def _upload(self, bucket: Bucket | None, room: int) -> "Upload":
        if bucket not in self._uploads:
            self._uploads[bucket] = Upload(self.device, room)
        return self._uploads[bucket]


class Upload:
    """A buffer on the host and its copy on the device; arrays lie in both one behind the other.

    Arrays of the same lengths lie at the same places again, unless the buffer had to grow.

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

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Copy arrays and return them as tensors on the device, which share the buffer."""
        places, end = {}, 0
        for name, array in arrays.items():
            begin = -(-end // ALIGNED) * ALIGNED
            end = begin + array.nbytes
            places[name] = (begin, end)
        if self._copied is not None:
            # The last copy, which waits for the kernels before it, may not have read the host's buffer yet: a step
            # that draws nothing (a part of a long prompt) gives the caller nothing to wait for.
            self._copied.synchronize()
        if end > len(self._bytes):
            self._reserve(max(end, 2 * len(self._bytes)))
        for name, (begin, stop) in places.items():
            self._bytes[begin:stop] = np.ascontiguousarray(arrays[name]).view(np.uint8)
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._to))
        return {
            name: self._device[begin:stop].view(torch.int64 if arrays[name].itemsize == 8 else torch.int32)
            for name, (begin, stop) in places.items()
        }

    def _reserve(self, room: int) -> None:
        # pinned: from other memory CUDA copies in two steps, and the host waits for the first
        self._host = torch.empty(room, dtype=torch.uint8, pin_memory=self._to.type == "cuda")
        self._bytes = self._host.numpy()
        self._device = torch.empty(room, dtype=torch.uint8, device=self._to)


def _tensors(t: Mapping[str, torch.Tensor], span: int, bucket: Bucket | None = None) -> StepTensors:
    index, draws = StepIndex(*(t[name] for name in INDEX)), tuple(t[name] for name in DRAWS)
    return StepTensors(t["tokens"], t["positions"], t["logit_rows"], index, span, draws, bucket)
