"""Packing: sequences laid end to end without padding, for one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from ..errors import PMCError
from ..utils.labels import IGNORED
from .encoding import Encoded


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens begin to end of a pack: each sees the segment's prefix and, of the segment, what precedes it."""

    begin: int
    end: int
    prefix_begin: int = 0
    prefix_end: int = 0

    @property
    def length(self) -> int:
        return self.end - self.begin

    @property
    def prefix(self) -> int:
        return self.prefix_end - self.prefix_begin


class Segments(tuple[Segment, ...]):
    """The segments of a pack in order: together they cover it. What varlen kernels need is derived once."""

    @cached_property
    def lengths(self) -> list[int]:
        return [s.length for s in self]

    @cached_property
    def shared(self) -> bool:
        """Whether any segment has a prefix."""
        return any(s.prefix for s in self)

    @cached_property
    def longest(self) -> tuple[int, int]:
        """The most queries and the most keys of a segment."""
        return max(self.lengths), max(s.length + s.prefix for s in self)

    def cu_seqlens(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return int32 [S + 1] offsets of queries and of keys; brought to a device once, for every layer asks."""
        if device not in self._offsets:
            keys = [s.length + s.prefix for s in self]
            both = [list(accumulate(n, initial=0)) for n in (self.lengths, keys)]
            q, k = torch.tensor(both, dtype=torch.int32).to(device, non_blocking=True)
            self._offsets[device] = q, k
        return self._offsets[device]

    def keys(self, device: torch.device) -> torch.Tensor:
        """Return the tokens that are keys, segment by segment, its prefix first: int64 [K]."""
        if device not in self._keys:
            ranges = [torch.arange(a, b) for s in self for a, b in ((s.prefix_begin, s.prefix_end), (s.begin, s.end))]
            self._keys[device] = torch.cat(ranges).to(device, non_blocking=True)
        return self._keys[device]

    def mask(self, number: int, window: int | None, device: torch.device) -> torch.Tensor:
        """Return which keys, its prefix first, each query of a segment sees: bool [length, prefix + length]."""
        s = self[number]
        at = s.length, s.prefix, window, device
        if at not in self._masks:
            mask = torch.ones(s.length, s.prefix + s.length, dtype=torch.bool, device=device).tril(s.prefix)
            self._masks[at] = mask if window is None else mask.triu(s.prefix - window + 1)
        return self._masks[at]

    @cached_property
    def _masks(self) -> dict[tuple[int, int, int | None, torch.device], torch.Tensor]:
        return {}

    @cached_property
    def _offsets(self) -> dict[torch.device, tuple[torch.Tensor, torch.Tensor]]:
        return {}

    @cached_property
    def _keys(self) -> dict[torch.device, torch.Tensor]:
        return {}


@dataclass(frozen=True)
class Pack:
    """Sequences for one forward pass, and what it predicts.

    Positions restart with every sequence, at 0 or as it says. The last token of a sequence predicts nothing and is left out.
    """

    input_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    segments: Segments
    hidden_rows: torch.Tensor  # int64 [R], ascending: tokens that predict a target
    targets: torch.Tensor  # int64 [M], sequence by sequence
    rows: torch.Tensor  # int64 [M]: which of hidden_rows predicts each target
    cu_targets: torch.Tensor  # int64 [S + 1]: where each sequence's targets begin and end
    sequences: list[int] = field(default_factory=list)  # [S]: their numbers in the order they were given

    def to(self, device: torch.device) -> "Pack":
        """Return the pack with its tensors on `device`."""
        moved: dict[str, Any] = {
            n: t.to(device, non_blocking=True) for n, t in vars(self).items() if isinstance(t, torch.Tensor)
        }
        return replace(self, **moved)

    def __len__(self) -> int:
        return len(self.input_ids)


def num_targets(sequence: Encoded) -> int:
    """Return how many tokens of a sequence are predicted: the first never is."""
    return sum(label != IGNORED for label in sequence.labels[1:])


def pack(groups: Sequence[Sequence[Encoded]], max_tokens: int, *, share_from: int = 0) -> list[Pack]:
    """Lay groups of sequences end to end.

    Parameters
    ----------
    groups : sequence of sequences of Encoded
        The sequences of a group share the computation of the tokens that they begin with, up to their first
        label: the answers to one question. Sequences that train no token are left out.
    max_tokens : int
        Of a pack; a longer group has a pack of its own.
    share_from : int
        Where each group is one sequence and all begin with at least so many equal tokens, such as a chat template's
        system turn, a pack computes these once. 0: never.

    Returns
    -------
    list of Pack
        In the order given; `Pack.sequences` numbers the sequences of all groups from 0.
    """
    if max_tokens < 1:
        raise PMCError(f"max_tokens is {max_tokens}: it must be at least 1")
    if share_from and all(len(group) == 1 for group in groups):
        groups = _with_common_prefix([s for [s] in groups], max_tokens, share_from)
    packs, builder = [], _Builder()
    number = 0
    for group in groups:
        numbered = [(number + i, s) for i, s in enumerate(group) if num_targets(s)]
        number += len(group)
        if not numbered:
            continue
        shared = _shared_length([s for _, s in numbered])
        size = shared + sum(_used(s) - shared for _, s in numbered)
        if builder.ids and len(builder.ids) + size > max_tokens:
            packs.append(builder.build())
            builder = _Builder()
        builder.add(numbered, shared)
    if builder.ids:
        packs.append(builder.build())
    return packs


def _with_common_prefix(sequences: Sequence[Encoded], max_tokens: int, share_from: int) -> list[list[Encoded]]:
    """Return sequences in groups that fill a pack each, or each alone where what all begin with is short."""
    shared = _shared_length([s for s in sequences if num_targets(s)])
    if shared < share_from:
        return [[s] for s in sequences]
    groups: list[list[Encoded]] = []
    room = 0
    for s in sequences:
        size = _used(s) - shared if num_targets(s) else 0
        if not groups or size > room:
            groups.append([])
            room = max_tokens - shared
        groups[-1].append(s)
        room -= size
    return groups


class _Builder:
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.segments: list[Segment] = []
        self.predictors: list[int] = []
        self.targets: list[int] = []
        self.ends: list[int] = [0]
        self.sequences: list[int] = []

    def add(self, group: Sequence[tuple[int, Encoded]], shared: int) -> None:
        prefix = (0, 0)
        if shared:
            prefix = (len(self.ids), len(self.ids) + shared)
            self._append(group[0][1], slice(0, shared), (0, 0))
        for number, s in group:
            own = len(self.ids) - shared  # token t of the sequence, once past the prefix, stands at own + t
            self._append(s, slice(shared, _used(s)), prefix)
            for t in range(1, _used(s) + 1):
                if s.labels[t] != IGNORED:
                    self.predictors.append(prefix[0] + t - 1 if t - 1 < shared else own + t - 1)
                    self.targets.append(s.labels[t])
            self.ends.append(len(self.targets))
            self.sequences.append(number)

    def _append(self, s: Encoded, at: slice, prefix: tuple[int, int]) -> None:
        ids = s.input_ids[at]
        if ids:
            self.segments.append(Segment(len(self.ids), len(self.ids) + len(ids), *prefix))
            self.positions += _positions(s)[at]
            self.ids += ids

    def build(self) -> Pack:
        hidden_rows, rows = torch.tensor(self.predictors).unique(return_inverse=True)
        return Pack(
            torch.tensor(self.ids),
            torch.tensor(self.positions),
            Segments(self.segments),
            hidden_rows,
            torch.tensor(self.targets),
            rows,
            torch.tensor(self.ends),
            self.sequences,
        )


def _positions(s: Encoded) -> Sequence[int]:
    return range(len(s.input_ids)) if s.positions is None else s.positions


def _used(s: Encoded) -> int:
    """Return how many tokens a pass needs: up to the one that predicts the last target."""
    return max(t for t, label in enumerate(s.labels) if label != IGNORED)


def _shared_length(group: Sequence[Encoded]) -> int:
    """Return how many tokens a group's sequences begin with alike, none of them a target; 0 for one alone."""
    if len(group) < 2:
        return 0
    limit = min(s.prompt_length for s in group)
    columns = zip(*(zip(s.input_ids[:limit], _positions(s), strict=False) for s in group), strict=True)
    return next((t for t, column in enumerate(columns) if len(set(column)) > 1), limit)


def unpad(batch: Any) -> list[Encoded]:
    """Take a padded batch apart.

    Parameters
    ----------
    batch : mapping
        int ``input_ids``, ``attention_mask`` (optional, int or bool) and ``labels`` (-100: not trained), all
        [B, T], padded on either side.

    Returns
    -------
    list of Encoded
        What a padded pass computes of each row. A token that is masked inside it (a mask made by comparing with
        the pad token hides each eos of a chat prompt, where pad is eos) is seen by nobody there but counts in the
        positions of those that follow: it is left out and leaves a gap in `Encoded.positions`. One that is
        trained, or predicts what is trained, stays, for all to see: what a model computes in a masked place
        depends on its attention implementation.

    Notes
    -----
    Positions count from the first token that is seen. A sliding window reaches over the tokens that are left: further
    than in the padded pass, where a sequence is longer than the window.
    """
    for name in ("input_ids", "labels"):
        if getattr(batch.get(name), "ndim", 0) != 2:
            raise PMCError(f"a padded batch needs {name}, a tensor [B, T]: collate gives one")
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    mask = batch.get("attention_mask")
    masks = [[1] * len(row) for row in ids] if mask is None else mask.tolist()
    return [unpadded(*row) for row in zip(ids, labels, masks, strict=True)]


def unpadded(ids: list[int], labels: list[int], seen: list[int]) -> Encoded:
    """Return one row of a padded batch as `unpad` does."""
    # the end comes from the labels: a mask made where pad is eos would hide a trained eos
    end = max((t for t, x in enumerate(labels) if x != IGNORED), default=-1) + 1
    begin = next((t for t, x in enumerate(seen) if x), 0)
    kept = [t for t in range(begin, end) if seen[t] or any(x != IGNORED for x in labels[t : t + 2])]
    positions = None if kept == list(range(begin, end)) else [t - begin for t in kept]
    return Encoded([ids[t] for t in kept], [labels[t] for t in kept], positions)
