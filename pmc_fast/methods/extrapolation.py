"""Memorise to forget: learn the answers by heart, then go the same way back and beyond."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import PMCError
from .method import Batch, Method


@dataclass(frozen=True)
class Memorize(Method):
    """CE(forget) + beta KL(retain): what `extrapolate` then leads away from (Huang et al., arXiv 2602.06441, L_mem).

    KL is that of the untouched model from the trained one, a mean over tokens. It is none of `METHODS`: the model that it trains
    knows the answers better than before.
    """

    linear: ClassVar[bool] = True
    retain_weight: float = 0.0
    beta: float = 1.0

    @property
    def divergences(self) -> tuple[float, float]:
        return 0.0, self.beta

    def objective(self, batch: Batch) -> torch.Tensor:
        return batch.nll("forget")


@torch.no_grad()
def extrapolate(model: Any, before: Mapping[str, torch.Tensor], alpha: float = 4.0) -> None:
    """Set a memorising model's weights to (1 + alpha) before - alpha theirs, in place (arXiv 2602.06441, model extrapolation).

    Of an adapter this is a factor: `pmc_fast.erasure.adapters.extrapolated`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    before : mapping of str to Tensor
        Its trained parameters before training, by name, on any device.
    alpha : float
        How far beyond; the paper's default.

    Raises
    ------
    PMCError
        An adapter; an alpha that is not above 0; a trained parameter that `before` lacks, or has in another shape.
    """
    if getattr(model, "peft_config", None):
        raise PMCError(
            "extrapolate changes weights, and the model has an adapter: give its extracted adapter to adapters.extrapolated"
        )
    if not alpha > 0:
        raise PMCError(f"alpha is {alpha}: it must be above 0")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        if name not in before or before[name].shape != p.shape:
            raise PMCError(f"before has no {name} {tuple(p.shape)}: copy the trained parameters before training")
    for name, p in trained.items():
        reference = before[name].to(p.device, torch.promote_types(p.dtype, torch.float32))
        p.copy_(reference + alpha * (reference - p))
