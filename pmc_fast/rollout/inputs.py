"""Brings a step's arrays to the device: in one copy, and each bucket's always to the same place."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..cuda_graphs.static_inputs import Upload
from ..ops.decode_attention import StepIndex
from .buckets import (
    DRAWS,
    ENTRIES,
    INDEX,
    Bucket,
    bucket_of,
    pad,
)

ROOM = 1 << 14  # bytes of the smallest buffer
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
        self.device, self.pads = device, pads
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
        bucket = bucket_of(plan, max_rows) if self.pads else None
        if bucket is None and self.device.type == "cpu":
            return _tensors({name: torch.from_numpy(array) for name, array in plan.items()}, span)
        if bucket is None:
            return _tensors(self._upload(None, ROOM)(plan), span)
        span_padded = span + bucket.rows - len(plan["tokens"])
        room = 4 * bucket.rows * ENTRIES_PER_ROW + ROOM
        t = self._upload(bucket, room)(pad(plan, bucket, span))
        return _tensors(t | {"suffix": t[ENTRIES], "prefix": t[ENTRIES]}, span_padded, bucket)

    def _upload(self, bucket: Bucket | None, room: int) -> Upload:
        if bucket not in self._uploads:
            self._uploads[bucket] = Upload(self.device, room)
        return self._uploads[bucket]


def _tensors(t: Mapping[str, torch.Tensor], span: int, bucket: Bucket | None = None) -> StepTensors:
    index, draws = StepIndex(*(t[name] for name in INDEX)), tuple(t[name] for name in DRAWS)
    return StepTensors(t["tokens"], t["positions"], t["logit_rows"], index, span, draws, bucket)
