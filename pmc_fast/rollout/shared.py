"""One rollout, shared out over the processes of a run."""

from collections.abc import Sequence
from typing import Any

from ..ranks import Ranks
from .engine import RolloutEngine, Rollouts


class SharedEngine:
    """An engine that all processes call together with the same prompts: each samples its share, all get everything.

    Which samples a prompt gets does not depend on their number. On several processes log-probs stay where they were
    computed: `Rollouts` then has tokens and counters alone.
    """

    def __init__(self, engine: RolloutEngine, ranks: Ranks) -> None:
        self.engine, self.ranks = engine, ranks

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        drafts: Sequence[Sequence[Sequence[int]]] | None = None,
        **how: Any,
    ) -> Rollouts:
        if self.ranks.size == 1:
            return self.engine(prompts, drafts=drafts, **how)
        mine = self.ranks.share(range(len(prompts)))
        own = None if drafts is None else [drafts[i] for i in mine]
        made = self.engine([prompts[i] for i in mine], drafts=own, **how)
        found: dict[int, list[list[int]]] = {}
        counters: dict[str, int] = {}
        for tokens, counted in self.ranks.gather((dict(zip(mine, made.tokens, strict=True)), made.counters)):
            found |= tokens
            counters = {name: counters.get(name, 0) + n for name, n in counted.items()}
        return Rollouts([found[i] for i in range(len(prompts))], [], [], [], counters)
