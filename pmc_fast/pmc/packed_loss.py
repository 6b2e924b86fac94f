"""The loss of micro-batches, computed pack by pack."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ..config import PMCConfig
from ..data import Encoded
from ..data.packing import Pack, num_targets, pack, unpad
from ..distributed import Ranks
from ..errors import PMCError
from ..models.context import eval_mode, tolerance
from ..models.fsdp import is_sharded
from ..models.packed_forward import PackedPass, causal_lm
from ..models.teacher import SHARDED, Teacher
from ..ops import row_scales
from ..utils.labels import IGNORED
from .batch import Loss, Retain, Step
from .losses import pmc_weights

# tokens that sequences begin with alike from which on a pack computes them once: below, masks cost what is saved
SHARED_PREFIX = 8


class PackedLoss:
    """CE(sampled answers) + lambda CE(retain answers) of one model, or lambda KL(untouched || model); see `PMC.step_losses`.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
    config : PMCConfig
        retain_weight (lambda), retain_loss, normalization, max_tokens and cuda_graphs are read.
    ranks : Ranks
    autocast_dtype : torch.dtype, optional
    """

    def __init__(self, model: Any, config: PMCConfig, ranks: Ranks, autocast_dtype: torch.dtype | None) -> None:
        self.model, self.config, self.ranks = model, config, ranks
        self.limit: int | None = None  # tokens of a pack, below the configuration's, where memory is short
        self.largest = self.max_tokens  # tokens of the last packs
        self.teacher: Teacher | None = None  # the untouched model, which retain_loss "kl" compares with
        self.untouched_logps: list[float] | None = None  # of some initial answers, by which it is known again
        self.packed = PackedPass(causal_lm(model), autocast_dtype=autocast_dtype, cuda_graphs=config.cuda_graphs)

    @property
    def max_tokens(self) -> int:
        """Of a pack."""
        return min(self.config.max_tokens, self.limit or self.config.max_tokens)

    def require_whole(self) -> None:
        """Refuse a sharded model, where the loss compares with the untouched one."""
        if self.compares and is_sharded(self.model):
            raise PMCError(SHARDED)

    def drop_untouched(self) -> None:
        """Let `keep_untouched` take the model as it is then."""
        self.teacher = self.untouched_logps = None

    def keep_untouched(self, sequences: list[Encoded], known: list[float] | None = None) -> None:
        """Let retain_loss "kl" compare with the model as it is now, unless it does already.

        Parameters
        ----------
        sequences : list of Encoded
            Some initial answers.
        known : list of float, optional
            The untouched model's log-probs of their tokens.

        Raises
        ------
        PMCError
            The model is sharded, or its log-probs are not those that are known.
        """
        if not self.compares:
            return
        self.require_whole()
        if self.teacher is not None:
            self._require_same(self.untouched_logps or [], known)
            return
        self.check()
        probe = pack([sequences], len(sequences) * self.config.max_length)[0]
        with torch.no_grad(), eval_mode(self.model):
            logps = self.packed(probe, torch.zeros(len(probe.targets)))[1].double().cpu().tolist()
        self._require_same(logps, known)
        self.teacher = Teacher(self.model, self.packed, probe)
        self.untouched_logps = logps

    def _require_same(self, logps: list[float], known: list[float] | None) -> None:
        if known is None:
            return
        weight = self.model.get_input_embeddings().weight
        allowed = tolerance(self.packed.autocast_dtype or weight.dtype, products_on=weight.device).logps
        apart = torch.tensor(logps) - torch.tensor(known) if len(logps) == len(known) else torch.tensor(math.inf)
        if not (error := float(apart.abs().mean())) <= allowed:
            raise PMCError(
                "retain_loss is 'kl' and these weights are not the untouched model's, of which the state is (log-probs of its "
                f"initial answers are off by {error:.3g}): call load_state_dict before trained weights are loaded"
            )

    @property
    def compares(self) -> bool:
        """Whether the loss compares with the untouched model."""
        return self.config.retain_loss == "kl" and self.config.retain_weight > 0

    def check(self, model: Any = None) -> None:
        """Refuse a model whose log-probs in a packed pass differ from its own forward pass."""
        self.packed.check(model=self.model if model is None else model)

    def __call__(
        self, batches: Sequence[tuple[Step, Retain]], *, model: Any = None, retain_tokens: int | None = None
    ) -> Iterator[Loss]:
        """Yield the loss of each pack of these micro-batches; see `PMC.step_losses` and `PMC.losses`."""
        if not batches:
            raise PMCError("step_losses got no parts: give it all of step.split(size), each with its retain batch")
        self.check(model)
        if self.compares:
            self.require_whole()
            if self.teacher is None:
                raise PMCError("retain_loss is 'kl' and the untouched model is not known: call prepare() first")
        parts = [_Part(part, self._kept(part, retain)) for part, retain in batches]
        packs = pack([g for p in parts for g in p.groups], self.max_tokens, share_from=SHARED_PREFIX)
        self.largest = max(map(len, packs), default=self.largest)
        own_tokens = sum(p.retain_tokens for p in parts) if retain_tokens is None else retain_tokens
        per_rank = self.ranks.gather((len(packs), own_tokens, [bool(p.lengths.any()) for p in parts]))
        counts = [len(theirs) for *_, theirs in per_rank]
        if len(set(counts)) > 1:
            raise PMCError(f"step_losses got {counts} parts on the processes: give each all of its step.split(size)")
        if not all(any(trained) for trained in zip(*(theirs for *_, theirs in per_rank), strict=True)):
            raise PMCError("a micro-batch has no token to train on: all its answers are empty")
        if retain_tokens is None and batches[0][0].parts > len(parts) and self.config.normalization == "step":
            raise PMCError(
                f"normalization is 'step' and the step has {batches[0][0].parts} parts: give step_losses all of them, or "
                "give loss(..., retain_tokens=) the trained tokens of all its retain batches"
            )
        retain_tokens = sum(n for _, n, _ in per_rank)
        zero = torch.zeros(1, dtype=torch.float64)  # of a sequence of padding, the last
        scale = torch.cat([*(self._scale(p.step, p.lengths, p.weights, retain_tokens) for p in parts), zero])
        # what `collapse` and `retain` report: each a mean over its own batch, whatever the weights in the loss are
        means = torch.cat([*(pmc_weights(p.lengths, p.weights, 1.0) for p in parts), zero])
        # and which of them a sequence belongs to
        kinds = torch.cat([*(2 * i + p.is_retain.long() for i, p in enumerate(parts)), zero.long()])
        device = self.model.get_input_embeddings().weight.device
        sums = torch.zeros(2 * len(parts), dtype=torch.float64, device=device)
        teacher = self.teacher if self.compares else None
        sequences = [s for p in parts for group in p.groups for s in group]
        own, count = len(packs), max(n for n, *_ in per_rank)
        if own < count:
            blank = replace(pack([[Encoded([0, 0], [IGNORED, 0])]], 2)[0], sequences=[-1])
            packs += [blank] * (count - own)
        for i, p in enumerate(packs, start=1):
            row_scale, mean = (
                row_scales(w[p.sequences], p.cu_targets, p.targets, reduction="sum") for w in (scale, means)
            )
            kind = kinds[p.sequences].repeat_interleave(p.cu_targets.diff())
            with (
                nullcontext() if i == count else _no_sync(model)
            ):  # DDP decides in forward; none is held across a yield
                if teacher is None:
                    loss, logps = self.packed(p, row_scale, model=model)
                    nlls = -logps.double()
                else:
                    kept = kind % 2  # an answer has its cross-entropy alone, a retain pair its divergence
                    parts_of = row_scale * (1 - kept), row_scale * kept
                    loss, logps, divergences = teacher.loss(p, sequences, *parts_of, model=model)
                    nlls = divergences - logps
            kind = kind.to(device, non_blocking=True)
            # behind the pass in the queue: a copy that waits would keep the host from preparing the next pass
            sums = sums.index_add(0, kind, nlls * mean.double().to(device, non_blocking=True))
            yield Loss(loss, sums[0::2], sums[1::2], _counters(p, real=i <= own))

    def _kept(self, part: Step, retain: Retain) -> list[Encoded]:
        kept = _sequences(retain)
        if not part.indices and self.config.normalization == "micro_batch":
            return []  # retain pairs come with questions, in their group
        return kept

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


class _Part:
    """A micro-batch: its sequences, answers before retain pairs, and how many trained tokens each has."""

    def __init__(self, step: Step, kept: list[Encoded]) -> None:
        self.step = step
        self.groups = [*step.answers, *([s] for s in kept)]
        self.lengths = torch.tensor([num_targets(s) for group in self.groups for s in group], dtype=torch.float64)
        self.weights = torch.tensor([w for ws in step.weights for w in ws], dtype=torch.float64)
        self.is_retain = torch.arange(len(self.lengths)) >= len(self.weights)
        self.retain_tokens = int(self.lengths[self.is_retain].sum())


def _sequences(retain: Retain) -> list[Encoded]:
    kept = unpad(retain) if isinstance(retain, Mapping) else list(retain)
    if other := next((s for s in kept if not isinstance(s, Encoded)), None):
        raise PMCError(
            f"retain holds {type(other).__name__}: give a padded batch, or what encode_retain(rows) returns"
        )
    return kept


def _no_sync(model: Any) -> AbstractContextManager[Any]:
    """Let DDP wait for a later pass with the exchange of gradients; with static_graph it can't wait in the first."""
    waits = isinstance(model, DistributedDataParallel) and not model.static_graph
    return model.no_sync() if waits else nullcontext()


def _counters(p: Pack, *, real: bool) -> dict[str, int]:
    counted = {"tokens": len(p), "targets": len(p.targets), "head_rows": len(p.hidden_rows), "packs": 1}
    return counted if real else dict.fromkeys(counted, 0)
