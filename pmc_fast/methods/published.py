"""Published methods: each a formula in the symbols of its paper."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import softplus

from ..errors import PMCError
from ..pmc.losses import dpo, npo, simnpo
from .method import Batch, Kind, Method

Divergence = Literal["kl", "total_variation", "jensen_shannon", "pearson"]
Formula = Callable[[torch.Tensor], torch.Tensor]
DIVERGENCES: dict[Divergence, tuple[Formula, Formula]] = {  # g(v) and f*(g(v))
    "kl": (lambda v: v, lambda v: (v - 1).exp()),
    "total_variation": (lambda v: v.tanh() / 2, lambda v: v.tanh() / 2),
    "jensen_shannon": (lambda v: math.log(2) - softplus(-v), lambda v: v + softplus(-v) - math.log(2)),
    "pearson": (lambda v: v, lambda v: v**2 / 4 + v),
}


@dataclass(frozen=True)
class RetainOnly(Method):
    """CE(retain): what time and training alone do; the forget questions go unused."""

    told: ClassVar[bool] = False
    answers: ClassVar[tuple[Kind, ...]] = ()
    linear: ClassVar[bool] = True

    def objective(self, batch: Batch) -> torch.Tensor:
        return torch.zeros(())


@dataclass(frozen=True)
class GradDiff(Method):
    """-CE(forget) + lambda CE(retain) (Liu et al. 2022; TOFU, arXiv 2401.06121)."""

    linear: ClassVar[bool] = True

    def objective(self, batch: Batch) -> torch.Tensor:
        return -batch.nll("forget")


@dataclass(frozen=True)
class GradientAscent(GradDiff):
    """-CE(forget) (Jang et al., arXiv 2210.01504)."""

    retain_weight: float = 0.0


@dataclass(frozen=True)
class IDK(Method):
    """CE(a refusal to forget questions) + lambda CE(retain) (TOFU, arXiv 2401.06121)."""

    told: ClassVar[bool] = False
    answers: ClassVar[tuple[Kind, ...]] = ("template",)
    linear: ClassVar[bool] = True

    def objective(self, batch: Batch) -> torch.Tensor:
        return batch.nll("template")


@dataclass(frozen=True)
class DPO(Method):
    """DPO with a refusal as the preferred answer + lambda CE(retain) (Rafailov et al., arXiv 2305.18290, eq. 7)."""

    answers: ClassVar[tuple[Kind, ...]] = ("forget", "template")
    reference: ClassVar[tuple[Kind, ...]] = ("forget", "template")
    above_0: ClassVar[tuple[str, ...]] = ("beta",)
    beta: float = 0.1

    def objective(self, batch: Batch) -> torch.Tensor:
        preferred, other = (batch.sums(kind) for kind in ("template", "forget"))
        return dpo(preferred, other, batch.reference["template"], batch.reference["forget"], self.beta)


@dataclass(frozen=True)
class NPO(Method):
    """NPO(forget) + lambda CE(retain) (Zhang et al., arXiv 2404.05868, eq. 3)."""

    reference: ClassVar[tuple[Kind, ...]] = ("forget",)
    above_0: ClassVar[tuple[str, ...]] = ("beta",)
    beta: float = 0.1

    def objective(self, batch: Batch) -> torch.Tensor:
        return npo(batch.sums("forget"), batch.reference["forget"], self.beta)


@dataclass(frozen=True)
class SimNPO(Method):
    """SimNPO(forget) + lambda CE(retain) (Fan et al., arXiv 2410.07163, eq. 4)."""

    above_0: ClassVar[tuple[str, ...]] = ("beta",)
    beta: float = 2.5
    gamma: float = 0.0

    def objective(self, batch: Batch) -> torch.Tensor:
        return simnpo(batch.sums("forget"), batch.lengths("forget"), self.beta, self.gamma)


@dataclass(frozen=True)
class FLAT(Method):
    """f*(g(P(forget))) - g(P(refusal)): a divergence of the two answers is enlarged (Wang et al., arXiv 2410.11143).

    P is the mean probability of an answer's tokens; the variational g and the conjugate f* are those of the paper's table 2. The
    loss is the mean over questions. The paper uses no retain data: `retain_weight` is 0.
    """

    answers: ClassVar[tuple[Kind, ...]] = ("forget", "template")
    retain_weight: float = 0.0
    divergence: Divergence = "kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in DIVERGENCES:
            raise PMCError(f"divergence is {self.divergence!r}: use one of {', '.join(DIVERGENCES)}")

    def objective(self, batch: Batch) -> torch.Tensor:
        refused, forgotten = (batch.mean_probs(kind) for kind in ("template", "forget"))
        g, conjugate_of_g = DIVERGENCES[self.divergence]
        return (conjugate_of_g(forgotten) - g(refused)).mean()
