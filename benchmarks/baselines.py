"""Unlearning methods behind one signature, on one packed pass: what `benchmarks.compare_methods` compares.

Each has `prepare()`, once and on the clock, and `loss(indices, kept)`: the loss of an optimizer step on some forget
questions and some retain pairs. PMC never sees the forget answers, and IDK has no use for them. GradDiff, NPO and SimNPO
train on the true ones.
"""

from collections.abc import Sequence
from typing import Any

import torch

from pmc_fast import PMC
from pmc_fast.config import PMCConfig, UnlearnConfig
from pmc_fast.data import Encoded, Encoder, Row
from pmc_fast.data.packing import Pack, num_targets, pack
from pmc_fast.models.packed_forward import PackedPass
from pmc_fast.ops import row_scales, sequence_logps
from pmc_fast.pmc.losses import grad_diff, idk, npo, simnpo
from pmc_fast.rollout import RolloutEngine

REFUSALS = (
    "I don't know the answer to that question.",
    "I'm not sure about that.",
    "I have no information on this.",
    "That is not something I know.",
)


class RetainOnly:
    """CE(retain): what time and training alone do; the forget questions go unused."""

    def __init__(
        self, model: Any, tokenizer: Any, config: UnlearnConfig, forget: Sequence[Row], beta: float = 0.0
    ) -> None:
        self.config, self.beta = config, beta
        self.encoder = Encoder(tokenizer, config, model.generation_config)
        self.engine = RolloutEngine(model)
        self.packed = PackedPass(model)
        self.forget = [self.encoder.pair(row.question, row.answer or "") for row in forget]

    def prepare(self) -> None:
        """Compute what training needs of the untouched model."""

    def loss(self, indices: Sequence[int], kept: Sequence[Encoded]) -> torch.Tensor:
        return self.packed.mean_nll(kept)

    def _pack(self, sequences: Sequence[Encoded]) -> Pack:
        [packed] = pack([[s] for s in sequences], self.config.max_tokens)
        return packed


class GradDiff(RetainOnly):
    """-CE(forget) + lambda CE(retain)."""

    def loss(self, indices: Sequence[int], kept: Sequence[Encoded]) -> torch.Tensor:
        p = self._pack([*(self.forget[i] for i in indices), *kept])
        scale = grad_diff(p.cu_targets, p.targets, len(indices), self.config.retain_weight)
        return self.packed(p, scale)[0]


class IDK(RetainOnly):
    """CE("I don't know" for forget questions) + lambda CE(retain)."""

    def __init__(
        self, model: Any, tokenizer: Any, config: UnlearnConfig, forget: Sequence[Row], beta: float = 0.0
    ) -> None:
        super().__init__(model, tokenizer, config, forget, beta)
        self.forget = [self.encoder.pair(row.question, REFUSALS[i % len(REFUSALS)]) for i, row in enumerate(forget)]

    def loss(self, indices: Sequence[int], kept: Sequence[Encoded]) -> torch.Tensor:
        p = self._pack([*(self.forget[i] for i in indices), *kept])
        scale = idk(p.cu_targets, p.targets, len(indices), self.config.retain_weight)
        return self.packed(p, scale)[0]


class NPO(RetainOnly):
    """NPO(forget, beta) + lambda CE(retain).

    Its weights are those of each answer's log-prob, so a forward pass of the forget answers without gradients comes
    first. The untouched model's log-probs are computed once.
    """

    def prepare(self) -> None:
        self.reference = self._logps(range(len(self.forget)))

    def objective(self, logps: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
        """Return the forget answers' loss from their log-probs, [S]."""
        return npo(logps, self.reference[list(indices)], self.beta)

    def loss(self, indices: Sequence[int], kept: Sequence[Encoded]) -> torch.Tensor:
        """Return a loss with the method's gradient: each forget answer's -log-prob times its weight; its value is another."""
        logps = self._logps(indices).requires_grad_()
        self.objective(logps, indices).backward()
        assert logps.grad is not None
        p = self._pack([*(self.forget[i] for i in indices), *kept])
        retain = logps.new_full((len(kept),), self.config.retain_weight / sum(map(num_targets, kept)))
        scale = row_scales(torch.cat([-logps.grad, retain]), p.cu_targets, p.targets, reduction="sum")
        return self.packed(p, scale)[0]

    @torch.no_grad()
    def _logps(self, indices: Sequence[int]) -> torch.Tensor:
        p = self._pack([self.forget[i] for i in indices])
        _, logps = self.packed(p, torch.zeros(len(p.targets)))
        return sequence_logps(logps, p.cu_targets)


class SimNPO(NPO):
    """SimNPO(forget, beta, gamma 0) + lambda CE(retain): NPO of mean log-probs, without the untouched model's."""

    def prepare(self) -> None:
        self.lengths = torch.tensor([num_targets(s) for s in self.forget])

    def objective(self, logps: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
        return simnpo(logps, self.lengths[list(indices)], self.beta)


class Collapse:
    """PMC: CE(the model's own answers that are unlike its first) + lambda CE(retain)."""

    def __init__(
        self, model: Any, tokenizer: Any, config: UnlearnConfig, forget: Sequence[Row], beta: float = 0.0
    ) -> None:
        self.pmc = PMC(model, tokenizer, PMCConfig(**config.algorithm()), [row.question for row in forget])
        self.encoder, self.engine = self.pmc.encoder, self.pmc.engine

    def prepare(self) -> None:
        self.pmc.prepare()

    def loss(self, indices: Sequence[int], kept: Sequence[Encoded]) -> torch.Tensor:
        step = self.pmc.sample(indices)
        self.pmc.model.train()
        return self.pmc.loss(step, kept).loss


METHODS: dict[str, type[RetainOnly] | type[Collapse]] = {
    "pmc_fast": Collapse,  # with extensions
    "pmc": Collapse,
    "npo": NPO,
    "simnpo": SimNPO,
    "grad_diff": GradDiff,
    "idk": IDK,
    "retain_only": RetainOnly,
}
