"""The loss of a micro-batch, computed pack by pack."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..config import PMCConfig
from ..data import Encoded
from ..data.packing import Pack, num_targets, pack, unpad
from ..distributed import Ranks
from ..errors import PMCError
from ..models.packed_forward import PackedPass, causal_lm
from ..ops import row_scales
from ..utils.labels import IGNORED
from .batch import Loss, Retain, Step
from .losses import pmc_weights

# tokens that sequences begin with alike from which on a pack computes them once: below, masks cost what is saved
SHARED_PREFIX = 8


class PackedLoss:
    """CE(sampled answers) + lambda CE(retain answers) of one model; see `PMC.losses`.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
    config : PMCConfig
        retain_weight (lambda), normalization, max_tokens and cuda_graphs are read.
    ranks : Ranks
    autocast_dtype : torch.dtype, optional
    """

    def __init__(self, model: Any, config: PMCConfig, ranks: Ranks, autocast_dtype: torch.dtype | None) -> None:
        self.model, self.config, self.ranks = model, config, ranks
        self.packed = PackedPass(causal_lm(model), autocast_dtype=autocast_dtype, cuda_graphs=config.cuda_graphs)

    def check(self, model: Any = None) -> None:
        """Refuse a model whose log-probs in a packed pass differ from its own forward pass."""
        self.packed.check(model=self.model if model is None else model)

    def __call__(
        self, part: Step, retain: Retain, *, model: Any = None, retain_tokens: int | None = None
    ) -> Iterator[Loss]:
        """Yield the loss of each pack."""
        self.check(model)
        kept = _sequences(retain)
        if not part.indices and self.config.normalization == "micro_batch":
            kept = []  # retain pairs come with questions, in their group
        collapse = [a for answers in part.answers for a in answers]
        device = self.model.get_input_embeddings().weight.device
        packs = pack([*part.answers, *([s] for s in kept)], self.config.max_tokens, share_from=SHARED_PREFIX)
        own_tokens = sum(map(num_targets, kept)) if retain_tokens is None else retain_tokens
        per_rank = self.ranks.gather((len(packs), own_tokens))
        count = max(n for n, _ in per_rank)
        if not count:
            raise PMCError("a micro-batch has no token to train on: all its answers are empty")
        if retain_tokens is None and part.parts > 1 and self.config.normalization == "step":
            raise PMCError(
                "normalization is 'step' and the step has several parts: give loss(..., retain_tokens=) the trained "
                "tokens of all its retain batches"
            )
        weights = torch.tensor([w for ws in part.weights for w in ws], dtype=torch.float64)
        lengths = torch.tensor([num_targets(s) for s in [*collapse, *kept]], dtype=torch.float64)
        scale = self._scale(part, lengths, weights, sum(n for _, n in per_rank))
        # what `collapse` and `retain` report: each a mean over its own batch, whatever the weights in the loss are
        means = pmc_weights(lengths, weights, 1.0)
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for p in packs:
            row_scale, mean = (
                row_scales(w[p.sequences], p.cu_targets, p.targets, reduction="sum") for w in (scale, means)
            )
            loss, logps = self.packed(p, row_scale, model=model)
            is_retain = torch.tensor(p.sequences) >= len(collapse)
            group = is_retain.repeat_interleave(p.cu_targets.diff()).long().to(device, non_blocking=True)
            # behind the pass in the queue: a copy that waits would keep the host from preparing the next pass
            sums = sums.index_add(0, group, -logps.double() * mean.double().to(device, non_blocking=True))
            yield Loss(loss, sums[0], sums[1], _counters(p))
        for _ in range(count - len(packs)):
            blank = pack([[Encoded([0, 0], [IGNORED, 0])]], 2)[0]
            loss, _ = self.packed(blank, torch.zeros(1), model=model)
            yield Loss(loss, sums[0], sums[1], dict.fromkeys(_counters(blank), 0))

    def _scale(self, part: Step, lengths: torch.Tensor, weights: torch.Tensor, retain_tokens: int) -> torch.Tensor:
        """Return each sequence's weight in the loss: float64 [S].

        Gradients are averaged over the processes: times their number, that is a sum of the groups' means, or a mean
        over all tokens.
        """
        lambda_ = self.config.retain_weight
        if self.config.normalization == "micro_batch":
            scale = pmc_weights(lengths, weights, lambda_) / part.groups
        else:
            scale = pmc_weights(lengths, weights, lambda_, (part.collapse_tokens, retain_tokens))
        return scale * self.ranks.size


def _sequences(retain: Retain) -> list[Encoded]:
    kept = unpad(retain) if isinstance(retain, Mapping) else list(retain)
    if other := next((s for s in kept if not isinstance(s, Encoded)), None):
        raise PMCError(
            f"retain holds {type(other).__name__}: give a padded batch, or what encode_retain(rows) returns"
        )
    return kept


def _counters(p: Pack) -> dict[str, int]:
    return {"tokens": len(p), "targets": len(p.targets), "head_rows": len(p.hidden_rows), "packs": 1}
