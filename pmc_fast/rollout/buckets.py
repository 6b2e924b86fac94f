"""Steps of a few sizes: what a CUDA graph was captured for must fit every step that it replays.

What a step launches depends on its numbers of rows and of questions alone (`csrc/decode_attention.cu`: thread
blocks of rows, in which the number of questions is an argument; lengths are read on the device). So decode steps
are padded to a few numbers of both. Padding is a change of the plan's arrays and knows no device.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Arrays = dict[str, np.ndarray]

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
BLOCKS = tuple(4**n for n in range(1, 7))  # few: an empty one costs a row's search for its own next to nothing
INDEX = ("slots", "prefix_len", "cu_suffix", "suffix", "cu_rows", "cu_prefix", "prefix")
DRAWS = ("cu_draws", "streams", "samples", "draw_positions")
ENTRIES = "entries"


@dataclass(frozen=True, slots=True)
class Bucket:
    """A size that steps are padded to."""

    rows: int
    blocks: int  # questions, and one more for the padded rows


def bucket_of(plan: Mapping[str, np.ndarray], max_rows: int) -> Bucket | None:
    """Return the smallest bucket that a step fits.

    Parameters
    ----------
    plan : mapping of str to ndarray
        What RolloutTrie.plan returns.
    max_rows : int
        A bucket has no more rows, as no step has.

    Returns
    -------
    Bucket or None
        None for a step that reads prompts, or that has more rows than the largest bucket.
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

    Padded rows are one more question without a prompt. Each writes a slot of its own and sees that alone, so
    real rows see what they saw. Nothing is drawn from padded rows.

    Parameters
    ----------
    plan : mapping of str to ndarray
        A step whose `bucket_of` is `bucket`.
    bucket : Bucket
    scratch : int
        The first of bucket.rows - R slots that no history uses.

    Returns
    -------
    dict of str to ndarray
        The plan's arrays. `entries` takes the place of `suffix` and `prefix`: one array of varying length, at
        which both begin (cu_prefix counts from there), so that what lies before it never moves.
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
