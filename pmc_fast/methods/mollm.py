"""MOLLM: a bounded loss on the answers to be forgotten, and a direction in which neither loss rises."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .method import Batch, Method


@dataclass(frozen=True)
class MOLLM(Method):
    """UCE(forget) and lambda CE(retain), by the shortest convex combination of their gradients (Pan et al., arXiv 2412.20412).

    The unlearning cross-entropy UCE is the mean over tokens of -log(1 - p / 2): at least 0 and at most log 2, with a gradient that
    vanishes with p where gradient ascent's does not. Its formula is that of the same authors' FedOSD (arXiv 2412.20200). The
    direction is MGDA's for two tasks, in closed form (Sener and Koltun, arXiv 1810.04650, section 3.3).

    The shortest combination is hardly longer than the shorter gradient: where the answers are unlikely from the start, or are
    forgotten, next to nothing is trained, retain pairs included.

    The paper has a third objective, the KL divergence from the untouched model on retain data, and an MGDA of its own in the
    dual space. They are left out.
    """

    apart: ClassVar[bool] = True

    def objective(self, batch: Batch) -> torch.Tensor:
        return -(-batch.logps["forget"].exp() / 2).log1p().mean()

    def mixture(self, forget: float, both: float, retain: float) -> tuple[float, float]:
        length = forget - 2 * both + retain  # of the difference of the two, squared
        share = min(max((retain - both) / length, 0.0), 1.0) if length > 0 else 0.5
        return share, 1 - share
