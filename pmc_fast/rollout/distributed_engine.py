"""One rollout, divided among the processes of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..distributed import Ranks
from .engine import RolloutEngine, Rollouts

PEAKS = ("peak_slots", "pool_bytes", "copy_bytes")  # the largest counts; other counters add up


def add_counters(total: dict[str, float], counted: Mapping[str, float]) -> None:
    """Add a rollout's counters to those of others, of this process or another."""
    for name, n in counted.items():
        total[name] = max(total.get(name, 0), n) if name in PEAKS else total.get(name, 0) + n


class SharedEngine:
    """An engine that all processes call with the same prompts. Each samples its share; all get all tokens.

    A prompt's samples do not depend on the number of processes. With several, `Rollouts` has tokens and counters but
    no log-probs.
    """

    def __init__(self, engine: RolloutEngine, ranks: Ranks) -> None:
        self.engine, self.ranks = engine, ranks

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        drafts: Sequence[Sequence[Sequence[int]]] | None = None,
        positions: Sequence[list[int] | None] | None = None,
        stream_ids: Sequence[int] | None = None,
        logit_bias: Sequence[Mapping[int, float]] | None = None,
        max_new_tokens: int | Sequence[int] | None = None,
        **how: Any,
    ) -> Rollouts:
        each = {"drafts": drafts, "positions": positions, "stream_ids": stream_ids, "logit_bias": logit_bias}
        if isinstance(max_new_tokens, Sequence):
            each["max_new_tokens"] = max_new_tokens
        elif max_new_tokens is not None:
            how["max_new_tokens"] = max_new_tokens
        given: dict[str, Any] = {name: of for name, of in each.items() if of is not None}
        if self.ranks.size == 1:
            return self.engine(prompts, **given, **how)
        mine = self.ranks.share(range(len(prompts)))
        own: dict[str, Any] = {name: [of[i] for i in mine] for name, of in given.items()}
        made = self.engine([prompts[i] for i in mine], **own, **how)
        found: dict[int, list[list[int]]] = {}
        counters: dict[str, float] = {}
        for tokens, counted in self.ranks.gather((dict(zip(mine, made.tokens, strict=True)), made.counters)):
            found |= tokens
            add_counters(counters, counted)
        whole = {name: int(n) for name, n in counters.items()}
        return Rollouts([found[i] for i in range(len(prompts))], [], [], [], whole)
