"""Packs padded to the sizes of CUDA graphs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.packing import Pack
from ..utils.labels import IGNORED
from .recorder import CaptureError
from .static_inputs import round_up

UNIT = 128  # tokens and targets are padded to multiples of it
SPARE = 8  # segments
WASTE = 1.25  # a graph replays packs that fill it to 1 / WASTE, less a unit


@dataclass(frozen=True, slots=True)
class Size:
    """What a graph has room for."""

    tokens: int
    targets: int  # and rows of hidden states
    segments: int
    longest: int  # tokens of a segment: kernels are launched for so many
    keys: int  # of all segments with their prefixes; 0 where none has one: keys are then the tokens as they lie
    longest_keys: int  # of a segment with its prefix

    @classmethod
    def of(cls, pack: Pack) -> "Size":
        """Return a pack's own size."""
        targets = max(len(pack.targets), len(pack.hidden_rows))
        keys = sum(s.length + s.prefix for s in pack.segments) if pack.segments.shared else 0
        longest, longest_keys = pack.segments.longest
        return cls(len(pack), targets, len(pack.segments), longest, keys, longest_keys)

    def rounded(self) -> "Size":
        """Return the size to capture for packs like this."""
        longest, longest_keys = (max(64, 1 << (n - 1).bit_length()) for n in (self.longest, self.longest_keys))
        tokens, keys = round_up(self.tokens, UNIT), 0
        if self.keys:
            tokens = round_up(self.tokens + 1, UNIT)  # keys of padding need a query of padding
            keys = tokens + round_up(self.keys - self.tokens, UNIT)
            longest_keys = max(longest_keys, 2 * UNIT)  # so that one query is enough
        return Size(
            tokens, round_up(self.targets, UNIT), round_up(self.segments + SPARE, 16), longest, keys, longest_keys
        )

    def fits(self, room: "Size") -> bool:
        """Return whether a pack of this size can be padded to `room` without much waste."""
        tokens, keys = room.tokens - self.tokens, room.keys - self.keys
        padding = self.padding(room)
        return (
            0 <= tokens <= (WASTE - 1) * self.tokens + UNIT
            and self.targets <= room.targets <= WASTE * self.targets + UNIT
            and self.segments + padding <= room.segments
            and self.longest <= room.longest
            and self.longest_keys <= room.longest_keys
            and bool(self.keys) == bool(room.keys)
            # each segment of padding has a query, and at least as many keys
            and padding <= tokens
            and (not self.keys or tokens <= keys <= (WASTE - 1) * self.keys + 2 * UNIT)
        )

    def padding(self, room: "Size") -> int:
        """Return how many segments the padding of a pack of this size takes."""
        tokens, keys = room.tokens - self.tokens, room.keys - self.keys
        # less one, since queries and further keys are each divided evenly
        return max(-(-tokens // room.longest), -(-keys // (room.longest_keys - 1)))


def pad(pack: Pack, row_scale: torch.Tensor, size: Size) -> dict[str, np.ndarray]:
    """Return a pack's arrays, padded to a size.

    Padding tokens are in segments of their own, whose keys are padding tokens, so that no real token sees them or is
    seen by them. Padding targets are ignored: they add zeros to gradients.

    Parameters
    ----------
    pack : Pack
    row_scale : Tensor [M]
    size : Size
        That the pack fits.

    Returns
    -------
    dict of str to ndarray
        The pack's tensors but `cu_targets`, `row_scale` in float64, `cu_queries` int32 [size.segments + 1]; where
        `size` has keys, also `cu_keys`, of the same shape, and `keys` int64 [size.keys].
    """
    fill: Mapping[str, tuple[int, Any]] = {
        "input_ids": (size.tokens, 0),
        "positions": (size.tokens, 0),
        "hidden_rows": (size.targets, size.tokens - 1),
        "targets": (size.targets, IGNORED),
        "rows": (size.targets, size.targets - 1),
    }
    padded = {
        name: np.concatenate([array := getattr(pack, name).numpy(), np.full(n - len(array), value, array.dtype)])
        for name, (n, value) in fill.items()
    }
    scale = row_scale.double().numpy()
    padded["row_scale"] = np.concatenate([scale, np.zeros(size.targets - len(scale))])
    return padded | _pad_segments(pack, size)


def _pad_segments(pack: Pack, size: Size) -> dict[str, np.ndarray]:
    """Return offsets of queries and, where keys are shared, offsets of keys and the tokens that they are."""
    own = Size.of(pack)
    count = own.padding(size)
    queries = size.tokens - own.tokens
    # padding segments divide their queries evenly; the segments behind them are empty
    shares = np.minimum(np.arange(1, size.segments - own.segments + 1), count)
    divided = queries * shares // max(count, 1)
    cu_queries = np.cumsum([0, *pack.segments.lengths])
    made = {"cu_queries": np.concatenate([cu_queries, own.tokens + divided]).astype(np.int32)}
    if size.keys:
        more = size.keys - own.keys
        divided = divided + (more - queries) * shares // max(count, 1)  # each segment at least as many as queries
        cu_keys = np.cumsum([0, *(s.length + s.prefix for s in pack.segments)])
        made["cu_keys"] = np.concatenate([cu_keys, own.keys + divided]).astype(np.int32)
        keys = pack.segments.keys(torch.device("cpu")).numpy()
        made["keys"] = np.concatenate([keys, own.tokens + np.arange(more) % max(queries, 1)])
    return made


class PaddedSegments:
    """The segments of a padded pack: their offsets and keys are on the device alone.

    Parameters
    ----------
    size : Size
    cu_queries : int32 Tensor [S + 1]
    cu_keys : int32 Tensor [S + 1], optional
    keys : int64 Tensor [K], optional
        Both where prefixes are shared; see `Segments`.
    """

    def __init__(
        self,
        size: Size,
        cu_queries: torch.Tensor,
        cu_keys: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
    ) -> None:
        self._cu_seqlens = cu_queries, cu_queries if cu_keys is None else cu_keys
        self._keys, self.shared = keys, keys is not None
        self.longest = size.longest, size.longest_keys

    @property
    def lengths(self) -> list[int]:
        """Not known on the host, where attention sequence by sequence would need them."""
        raise CaptureError("its attention goes sequence by sequence")

    def cu_seqlens(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return int32 [S + 1] offsets of queries and of keys."""
        return self._cu_seqlens

    def keys(self, device: torch.device) -> torch.Tensor:
        """Return the tokens that are keys: int64 [K]."""
        assert self._keys is not None
        return self._keys
