"""A step's arrays on the device, copied at once; steps are padded to a few sizes, as CUDA graphs need them.

What a step launches depends on its numbers of rows, questions, logits and draws alone (`csrc/decode_attention.cu`:
thread blocks are launched for rows, the number of questions is an argument, lengths are read on the device). So steps
are padded to a few numbers of each (`csrc/step_plan.cpp`). Arrays of one bucket are always copied to the same
addresses.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..cuda_graphs.static_inputs import StaticInputs
from ..ops import native
from ..ops.decode_attention import StepIndex

# 160 and 320: 8 and 16 questions, each with the published 20 samples
ROWS = (
    1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048,
)  # fmt: skip
PROMPT_ROWS = (
    1024  # of a padded step that reads prompts: larger ones keep a GPU busy longer than launching them takes
)
BLOCKS = tuple(4**n for n in range(1, 7))  # few: an empty one costs a row's search for its own next to nothing
INDEX = ("slots", "prefix_len", "cu_suffix", "suffix", "cu_rows", "cu_prefix", "prefix")
DRAWS = ("cu_draws", "streams", "samples", "draw_positions")
ARRAYS = ("tokens", "positions", "logit_rows", *INDEX, *DRAWS)
ENTRIES = "entries"  # of a padded step: suffixes, then prefixes
ROOM = 1 << 14  # bytes of the smallest buffer
ENTRIES_PER_ROW = 256  # that a bucket's buffer has room for at first: longer histories move it


@dataclass(frozen=True, slots=True)
class Bucket:
    """A size that steps are padded to."""

    rows: int
    blocks: int  # questions, and one more for the padded rows
    logits: int
    draws: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """All of them, in the order of csrc/step_plan.h."""
        return self.rows, self.blocks, self.logits, self.draws


def bucket_of(plan: Any, max_rows: int) -> Bucket | None:
    """Return the smallest bucket that a step fits.

    Parameters
    ----------
    plan : StepPlan
        What RolloutTrie.plan returns.
    max_rows : int
        Of any step, and so of a bucket.

    Returns
    -------
    Bucket or None
        None for a step with more rows than the largest bucket of its kind.
    """
    decodes = plan.logits == plan.rows
    if plan.rows > (ROWS[-1] if decodes else PROMPT_ROWS):
        return None
    rows = min(ROWS[bisect_left(ROWS, plan.rows)], max_rows)
    sizes = (*(b for b in BLOCKS if b <= rows), rows + 1)  # every question has a row
    blocks = sizes[bisect_left(sizes, plan.blocks + 1)]
    # each prompt has one row with logits; a power of 4, so that sizes come again
    logits = rows if decodes else min(_power_of_4(plan.logits), rows)
    # a row has one draw, or as long as samples agree some have many: more of them cost little
    draws = logits if plan.draws <= logits else _power_of_4(plan.draws)
    return Bucket(rows, blocks, logits, draws)


def _power_of_4(n: int) -> int:
    """Return the smallest power of 4 that is at least n."""
    return int(4 ** -(-max(n - 1, 0).bit_length() // 2))


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A step on the device."""

    tokens: torch.Tensor  # int64 [R]
    positions: torch.Tensor  # int64 [R]
    logit_rows: torch.Tensor  # int64 [L], rows whose logits are wanted
    index: StepIndex
    span: int  # slots that the pool must have
    draws: tuple[torch.Tensor, ...]  # arguments of `sample_nucleus`
    sources: torch.Tensor | None = None  # int64 [R]: of a padded step, the draw before that a row's token may be
    bucket: Bucket | None = None  # to which it was padded
    real: tuple[int, int] = (0, 0)  # logits and draws that are not padded

    def real_draws(self) -> tuple[torch.Tensor, ...]:
        """Return arguments of `sample_nucleus` for the logits that are not padded."""
        logits, draws = self.real
        ends, *keys = self.draws
        # the last of the logits may have padded draws as well
        return ends[: logits + 1].clamp(max=draws), *(key[:draws] for key in keys)


class StepInputs:
    """Copies the arrays of plans to the device.

    Parameters
    ----------
    device : torch.device
    pads : bool
        Pad steps to buckets.
    """

    def __init__(self, device: torch.device, *, pads: bool) -> None:
        self.device, self.pads = device, pads
        self._buffer = StaticInputs(device, ROOM)  # of steps that are not padded
        self._padded: dict[Bucket, PaddedInputs] = {}

    def __call__(self, plan: Any, span: int, max_rows: int) -> StepTensors:
        """Copy a plan to the device.

        Parameters
        ----------
        plan : StepPlan
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
        if bucket is not None:
            if bucket not in self._padded:
                self._padded[bucket] = PaddedInputs(bucket, self.device)
            return self._padded[bucket](plan, span)
        if self.device.type == "cpu":
            t = {name: torch.from_numpy(plan[name]) for name in ARRAYS}
        else:
            t = self._buffer({name: plan[name] for name in ARRAYS})
        index, draws = StepIndex(*(t[name] for name in INDEX)), tuple(t[name] for name in DRAWS)
        real = plan.logits, plan.draws
        return StepTensors(t["tokens"], t["positions"], t["logit_rows"], index, span, draws, real=real)


class PaddedInputs:
    """The memory of steps that are padded to one bucket.

    Parameters
    ----------
    bucket : Bucket
    device : torch.device
    """

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        self._bucket = bucket
        self._layout = native.cpu().step_layout(*bucket.sizes)
        self._memory = StaticInputs(device, 4 * bucket.rows * ENTRIES_PER_ROW + ROOM)
        self._tensors: StepTensors | None = None
        self._room = 0  # bytes of the memory that the tensors share

    def __call__(self, plan: Any, span: int) -> StepTensors:
        """Copy a plan to the device, padded; the same tensors every time, unless the memory had to grow."""
        end = plan.padded_bytes(*self._bucket.sizes)
        host = self._memory.reserved(end)
        plan.pad(*self._bucket.sizes, span, host)
        self._memory.upload(end)
        if self._tensors is None or self._room != len(host):
            self._tensors, self._room = self._views(len(host)), len(host)
        padded = self._bucket.rows - plan.rows
        return replace(self._tensors, span=span + padded, real=(plan.logits, plan.draws))

    def _views(self, room: int) -> StepTensors:
        t = {
            name: self._memory.view(begin, begin + count * size if name != ENTRIES else room, size)
            for name, (begin, count, size) in self._layout.items()
        }
        t |= {"suffix": t[ENTRIES], "prefix": t[ENTRIES]}
        index, draws = StepIndex(*(t[name] for name in INDEX)), tuple(t[name] for name in DRAWS)
        return StepTensors(
            t["tokens"], t["positions"], t["logit_rows"], index, 0, draws, sources=t["sources"], bucket=self._bucket
        )
