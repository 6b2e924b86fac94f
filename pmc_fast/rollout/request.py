"""The arguments of a rollout, checked before work starts."""

import hashlib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..errors import PMCError
from ..models.context import known_tokens

UNLIMITED = 2**31 - 1
MAX_ROWS = {"cpu": 512, "cuda": 2048}  # of a step: bounds activations; matrix products gain nothing from more


@dataclass(slots=True)
class Request:
    """Checked arguments."""

    prompts: list[list[int]]
    num_samples: int
    streams: list[int]
    max_new: list[int]
    stop_ids: list[int]
    max_rows: int
    pool_tokens: int
    drafts: list[list[list[int]]]
    positions: list[list[int]]  # of a prompt's tokens; empty: 0, 1, ...
    logit_bias: list[dict[int, float]]  # of a prompt's answers; empty: none has any

    @classmethod
    def checked(
        cls,
        model: Any,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        *,
        max_new_tokens: int | Sequence[int] | None = None,
        max_length: int | None = None,
        stream_ids: Sequence[int] | torch.Tensor | None = None,
        stop_ids: Sequence[int] = (),
        max_rows: int | None = None,
        pool_tokens: int | None = None,
        drafts: Sequence[Sequence[Sequence[int]]] | None = None,
        positions: Sequence[Sequence[int] | None] | None = None,
        logit_bias: Sequence[Mapping[int, float]] | None = None,
    ) -> "Request":
        """Check arguments of `RolloutEngine.__call__`."""
        num_samples = whole("num_samples", num_samples)
        if num_samples < 1:
            raise PMCError(f"num_samples is {num_samples}: it must be at least 1")
        if (max_new_tokens is None) == (max_length is None):
            raise PMCError("rollout needs max_new_tokens or max_length, and not both")
        if max_rows is not None and max_rows < 1:
            raise PMCError(f"max_rows is {max_rows}: it must be at least 1")
        if isinstance(stop_ids, int):
            raise PMCError(f"stop_ids is {stop_ids}: give a list")
        embeddings = model.get_input_embeddings().weight
        lists = _prompts(prompts, embeddings.shape[0])
        max_rows = None if max_rows is None else whole("max_rows", max_rows)
        max_new = _max_new(max_new_tokens, max_length, lists)
        streams = [_stream_of(p) for p in lists] if stream_ids is None else [int(s) for s in stream_ids]
        if len(streams) != len(lists):
            raise PMCError(f"{len(streams)} stream_ids for {len(lists)} prompts: give one each")
        drafted = _drafts(drafts, len(lists), embeddings.shape[0])
        slots = UNLIMITED if pool_tokens is None else whole("pool_tokens", pool_tokens)
        for i, (prompt, new) in enumerate(zip(lists, max_new, strict=True)):
            if len(prompt) + new - 1 > slots:
                raise PMCError(
                    f"prompt {i} and one answer may need {len(prompt) + new - 1} pool tokens but pool_tokens is "
                    f"{slots}: raise it, or lower the length"
                )
        rows = MAX_ROWS[embeddings.device.type] if max_rows is None else max_rows
        places = _positions(positions, lists)
        biases = _biases(logit_bias, len(lists), known_tokens(model))
        stops = [int(s) for s in stop_ids]
        return cls(lists, num_samples, streams, max_new, stops, rows, slots, drafted, places, biases)

    def limit(self, pool_tokens: int) -> None:
        """Bound the pool, but to no less than one answer needs."""
        least = max((len(prompt) + new for prompt, new in zip(self.prompts, self.max_new, strict=True)), default=1)
        self.pool_tokens = min(self.pool_tokens, max(pool_tokens, least))

    def longest(self) -> tuple[int, str]:
        """Return the most tokens that a prompt and its answer may take, masked ones included, and which prompt it is."""
        begins = [
            own[-1] + 1 if own else len(prompt) for prompt, own in zip(self.prompts, self.positions, strict=True)
        ]
        lengths = [begin + new for begin, new in zip(begins, self.max_new, strict=True)]
        most = max(lengths, default=0)
        return most, f"prompt {lengths.index(most)} and its answer" if lengths else ""


def whole(name: str, number: Any) -> int:
    """Return a number of Python's, numpy's or torch's as int; refuse fractions."""
    try:
        return operator.index(number)
    except TypeError as error:
        raise PMCError(f"{name} is {number!r}: it must be a whole number") from error


def _prompts(prompts: Sequence[Sequence[int]], vocab: int) -> list[list[int]]:
    lists = [[whole(f"a token of prompt {i}", t) for t in prompt] for i, prompt in enumerate(prompts)]
    for i, prompt in enumerate(lists):
        if not prompt:
            raise PMCError(f"prompt {i} has no tokens: give it at least one")
        if not (min(prompt) >= 0 and max(prompt) < vocab):
            raise PMCError(f"prompt {i} has token {max(prompt)} or {min(prompt)}: the model embeds {vocab}")
    return lists


def _max_new(
    max_new_tokens: int | Sequence[int] | None, max_length: int | None, prompts: list[list[int]]
) -> list[int]:
    if max_new_tokens is None:
        [longest] = _lengths("max_length", [max_length])
        return [max(0, longest - len(prompt)) for prompt in prompts]
    if not isinstance(max_new_tokens, Sequence):
        return _lengths("max_new_tokens", [max_new_tokens]) * len(prompts)
    if len(max_new_tokens) != len(prompts):
        raise PMCError(f"{len(max_new_tokens)} max_new_tokens for {len(prompts)} prompts: give one, or one each")
    return _lengths("max_new_tokens", max_new_tokens)


def _lengths(name: str, lengths: Sequence[Any]) -> list[int]:
    found = [whole(name, n) for n in lengths]
    if negative := [n for n in found if n < 0]:
        raise PMCError(f"{name} is {negative[0]}: it must be 0 or more")
    return found


def _drafts(drafts: Sequence[Sequence[Sequence[int]]] | None, count: int, vocab: int) -> list[list[list[int]]]:
    if drafts is None:
        return [[] for _ in range(count)]
    found = [[[int(t) for t in draft] for draft in own] for own in drafts]
    if len(found) != count:
        raise PMCError(f"drafts for {len(found)} of {count} prompts: give a list each")
    for i, own in enumerate(found):
        if unknown := [t for draft in own for t in draft if not 0 <= t < vocab]:
            raise PMCError(f"a draft of prompt {i} has token {unknown[0]}: the model embeds {vocab}")
    return found


def _positions(positions: Sequence[Sequence[int] | None] | None, prompts: list[list[int]]) -> list[list[int]]:
    places = [[] if p is None else [int(n) for n in p] for p in positions or [None] * len(prompts)]
    if len(places) != len(prompts):
        raise PMCError(f"positions for {len(places)} of {len(prompts)} prompts: give each its own, or None")
    for i, (prompt, own) in enumerate(zip(prompts, places, strict=True)):
        if own and (len(own) != len(prompt) or own[0] < 0 or any(a >= b for a, b in pairwise(own))):
            raise PMCError(f"positions of prompt {i} must ascend from 0 or more, one for each token")
    return places


def _biases(biases: Sequence[Mapping[int, float]] | None, count: int, vocab: int) -> list[dict[int, float]]:
    found = [{whole("a token of logit_bias", t): float(x) for t, x in own.items()} for own in biases or ()]
    if biases is not None and len(found) != count:
        raise PMCError(f"logit_bias for {len(found)} of {count} prompts: give each its own, which may be empty")
    for i, own in enumerate(found):
        if unknown := [t for t in own if not 0 <= t < vocab]:
            raise PMCError(f"logit_bias of prompt {i} has token {unknown[0]}: the model predicts {vocab}")
        if wrong := [x for x in own.values() if not math.isfinite(x)]:
            raise PMCError(f"logit_bias of prompt {i} has {wrong[0]}: it must be finite")
    return found if any(found) else []


def _stream_of(prompt: list[int]) -> int:
    digest = hashlib.blake2b(np.array(prompt, dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
