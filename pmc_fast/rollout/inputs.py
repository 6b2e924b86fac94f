"""A step's arrays on the device, copied at once; decode steps are padded to a few sizes, as CUDA graphs need them.

What a step launches depends on its numbers of rows and of questions alone (`csrc/decode_attention.cu`: thread blocks
are launched for rows, the number of questions is an argument, lengths are read on the device). So decode steps are
padded to a few numbers of both. Arrays of one bucket are always copied to the same addresses.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..cuda_graphs.static_inputs import StaticInputs
from ..ops.decode_attention import StepIndex

Arrays = dict[str, np.ndarray]

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
BLOCKS = tuple(4**n for n in range(1, 7))  # few: an empty one costs a row's search for its own next to nothing
INDEX = ("slots", "prefix_len", "cu_suffix", "suffix", "cu_rows", "cu_prefix", "prefix")
DRAWS = ("cu_draws", "streams", "samples", "draw_positions")
ENTRIES = "entries"
ROOM = 1 << 14  # bytes of the smallest buffer
ENTRIES_PER_ROW = 256  # that a bucket's buffer has room for at first: longer histories move it


@dataclass(frozen=True, slots=True)
class Bucket:
    """A size that decode steps are padded to."""

    rows: int
    blocks: int  # questions, and one more for the padded rows


def bucket_of(plan: Mapping[str, np.ndarray], max_rows: int) -> Bucket | None:
    """Return the smallest bucket that a step fits.

    Parameters
    ----------
    plan : mapping of str to ndarray
        What RolloutTrie.plan returns.
    max_rows : int
        Of any step, and so of a bucket.

    Returns
    -------
    Bucket or None
        None for a step that reads prompts or has more rows than the largest bucket.
    """
    rows, blocks = len(plan["tokens"]), len(plan["cu_rows"])  # one for padded rows is in cu_rows' length already
    decodes = len(plan["logit_rows"]) == rows and bool((np.diff(plan["cu_suffix"]) > 0).all())
    if not decodes or rows > ROWS[-1]:
        return None
    wide = min(ROWS[bisect_left(ROWS, rows)], max_rows)
    sizes = (*(b for b in BLOCKS if b <= wide), wide + 1)  # every question has a row
    return Bucket(wide, sizes[bisect_left(sizes, blocks)])


def pad(plan: Mapping[str, np.ndarray], bucket: Bucket, scratch: int) -> Arrays:
    """Pad a decode step to a bucket.

    Padded rows form one more question, without a prompt. Each writes and sees a slot of its own alone, so real rows
    are not affected. No tokens are drawn from padded rows.

    Parameters
    ----------
    plan : mapping of str to ndarray
        A step whose `bucket_of` is `bucket`.
    bucket : Bucket
    scratch : int
        The first of bucket.rows - R unused slots.

    Returns
    -------
    dict of str to ndarray
        The plan's arrays. `entries` replaces `suffix` and `prefix`: they share one array of varying length, in which
        `cu_prefix` counts too, so that the arrays before it have fixed addresses.
    """
    real = len(plan["tokens"])
    padded = bucket.rows - real
    slots = np.arange(scratch, scratch + padded, dtype=np.int32)
    nothing = np.zeros(padded, dtype=np.int64)
    suffixes = len(plan["suffix"])
    prefixes = suffixes + padded  # where they begin
    empty = bucket.blocks - len(plan["cu_rows"])  # blocks behind that of the padded rows
    ends = np.ones(empty + 1, dtype=np.int32)
    longer = {
        "tokens": nothing,
        "positions": nothing,
        "logit_rows": np.arange(real, bucket.rows),
        "slots": slots,
        "prefix_len": nothing.astype(np.int32),
        "cu_suffix": np.arange(suffixes + 1, prefixes + 1, dtype=np.int32),
        "cu_rows": ends * bucket.rows,
        "cu_prefix": ends * len(plan["prefix"]),
    }
    out = {name: np.concatenate([plan[name], more]) for name, more in longer.items()}
    out["cu_prefix"] += prefixes
    out[ENTRIES] = np.concatenate([plan["suffix"], slots, plan["prefix"]])
    return out | {name: plan[name] for name in DRAWS}


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A step on the device."""

    tokens: torch.Tensor  # int64 [R]
    positions: torch.Tensor  # int64 [R]
    logit_rows: torch.Tensor  # int64 [L], rows whose logits are wanted
    index: StepIndex
    span: int  # slots that the pool must have
    draws: tuple[torch.Tensor, ...]  # arguments of `sample_nucleus`, for the rows that are not padded
    bucket: Bucket | None = None  # to which it was padded


class StepInputs:
    """Copies the arrays of plans to the device.

    Parameters
    ----------
    device : torch.device
    pads : bool
        Pad decode steps to buckets.
    """

    def __init__(self, device: torch.device, *, pads: bool) -> None:
        self.device, self.pads = device, pads
        self._buffers: dict[Bucket | None, StaticInputs] = {}

    def __call__(self, plan: Mapping[str, np.ndarray], span: int, max_rows: int) -> StepTensors:
        """Copy a plan to the device.

        Parameters
        ----------
        plan : mapping of str to ndarray
            What RolloutTrie.plan returns.
        span : int
            Slots of the pool that histories use; padded rows use the next ones.
        max_rows : int
            Rows of the largest step.

        Returns
        -------
        StepTensors
            On CUDA, and for padded steps, overwritten by the next step of the same bucket.
        """
        bucket = bucket_of(plan, max_rows) if self.pads else None
        if bucket is None and self.device.type == "cpu":
            return _tensors({name: torch.from_numpy(array) for name, array in plan.items()}, span)
        if bucket is None:
            return _tensors(self._buffer(None, ROOM)(plan), span)
        span_padded = span + bucket.rows - len(plan["tokens"])
        room = 4 * bucket.rows * ENTRIES_PER_ROW + ROOM
        t = self._buffer(bucket, room)(pad(plan, bucket, span))
        return _tensors(t | {"suffix": t[ENTRIES], "prefix": t[ENTRIES]}, span_padded, bucket)

    def _buffer(self, bucket: Bucket | None, room: int) -> StaticInputs:
        if bucket not in self._buffers:
            self._buffers[bucket] = StaticInputs(self.device, room)
        return self._buffers[bucket]


def _tensors(t: Mapping[str, torch.Tensor], span: int, bucket: Bucket | None = None) -> StepTensors:
    index, draws = StepIndex(*(t[name] for name in INDEX)), tuple(t[name] for name in DRAWS)
    return StepTensors(t["tokens"], t["positions"], t["logit_rows"], index, span, draws, bucket)
