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
SPARE = 8  # sequences
WASTE = 1.25  # a graph replays packs that fill it to 1 / WASTE, less a unit


@dataclass(frozen=True, slots=True)
class Size:
    """What a graph has room for."""

    tokens: int
    targets: int  # and rows of hidden states
    sequences: int
    longest: int  # tokens of a sequence: kernels are launched for so many

    @classmethod
    def of(cls, pack: Pack) -> "Size":
        """Return a pack's own size."""
        targets = max(len(pack.targets), len(pack.hidden_rows))
        return cls(len(pack), targets, len(pack.segments), pack.segments.longest[0])

    def rounded(self) -> "Size":
        """Return the size to capture for packs like this."""
        longest = max(64, 1 << (self.longest - 1).bit_length())
        return Size(
            round_up(self.tokens, UNIT), round_up(self.targets, UNIT), round_up(self.sequences + SPARE, 16), longest
        )

    def fits(self, room: "Size") -> bool:
        """Return whether a pack of this size can be padded to `room` without much waste."""
        padding = -(-(room.tokens - self.tokens) // room.longest)  # sequences of padding
        return (
            self.tokens <= room.tokens <= WASTE * self.tokens + UNIT
            and self.targets <= room.targets <= WASTE * self.targets + UNIT
            and self.sequences + padding <= room.sequences
            and self.longest <= room.longest
        )


def pad(pack: Pack, row_scale: torch.Tensor, size: Size) -> dict[str, np.ndarray]:
    """Return a pack's arrays, padded to a size.

    Padding tokens are in sequences of their own, so that no real token sees them, and padding targets are ignored:
    they add zeros to gradients.

    Parameters
    ----------
    pack : Pack
    row_scale : Tensor [M]
    size : Size

    Returns
    -------
    dict of str to ndarray
        The pack's tensors but `cu_targets`, `row_scale` in float64, `cu_seqlens` int32 [size.sequences + 1].
    """
    tokens = len(pack)
    ends = np.cumsum([0, *pack.segments.lengths])
    more = np.minimum(tokens + size.longest * np.arange(1, size.sequences + 2 - len(ends)), size.tokens)
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
    padded["cu_seqlens"] = np.concatenate([ends, more]).astype(np.int32)
    return padded


class PaddedSegments:
    """The segments of a padded pack: their offsets are on the device alone."""

    shared = False

    def __init__(self, cu_seqlens: torch.Tensor, longest: int) -> None:
        self._cu_seqlens, self.longest = cu_seqlens, (longest, longest)

    @property
    def lengths(self) -> list[int]:
        """Not known on the host, where attention sequence by sequence would need them."""
        raise CaptureError("its attention goes sequence by sequence")

    def cu_seqlens(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return int32 [S + 1] offsets of queries and of keys."""
        return self._cu_seqlens, self._cu_seqlens
