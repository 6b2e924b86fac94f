"""EUL: away from the untouched model on the answers to be forgotten, and with it on those to keep."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import PMCError
from .method import Batch, Method


@dataclass(frozen=True)
class EUL(Method):
    """alpha KL(retain) - (1 - alpha) KL(forget) + lambda CE(retain) - gamma CE(forget) (Chen and Yang, arXiv 2310.20150, eq. 2-5).

    KL is that of the untouched model from the trained one, a mean over tokens; defaults are the paper's, section 4.4. The paper
    trains an adapter alone, and alternates epochs of retain and forget data; here both are in each step. Its language model loss
    is that of masked words, which causal models don't have. The KL of forget data has no bound: watch it.
    """

    linear: ClassVar[bool] = True
    alpha: float = 0.8
    gamma: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha > 1:  # then the answers to be forgotten would be kept
            raise PMCError(f"EUL: alpha is {self.alpha!r}: it must be between 0 and 1")

    @property
    def divergences(self) -> tuple[float, float]:
        return self.alpha - 1, self.alpha

    def objective(self, batch: Batch) -> torch.Tensor:
        return -self.gamma * batch.nll("forget")
