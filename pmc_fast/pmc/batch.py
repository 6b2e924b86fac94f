"""A sampled batch and its loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..data import Encoded
from ..errors import PMCError

Retain = Mapping[str, torch.Tensor] | Sequence[Encoded]


@dataclass(frozen=True, slots=True)
class Step:
    """Questions of an optimizer step, or of one of its micro-batches, with the answers to train on."""

    indices: list[int]
    answers: list[list[Encoded]]  # of each question: one, or all N
    weights: list[list[float]]  # of each answer; a question's sum to 1
    sizes: list[int]  # number of questions of the optimizer step on each process
    parts: int = 1  # micro-batches of the optimizer step on each process
    groups: int = 1  # micro-batches of the optimizer step on all processes that have questions
    collapse_tokens: float = 0.0  # of the optimizer step on all processes, each answer's times its weight
    counters: dict[str, float] = field(default_factory=dict)  # of the rollout

    def split(self, size: int) -> list["Step"]:
        """Return micro-batches of at most `size` questions, the same number on every process; the last may be empty."""
        if size < 1:
            raise PMCError(f"size of a micro-batch is {size}: it must be at least 1")
        parts = [-(-n // size) for n in self.sizes]
        at = [slice(i * size, (i + 1) * size) for i in range(max(parts))]
        return [
            replace(
                self, indices=self.indices[s], answers=self.answers[s], weights=self.weights[s], parts=len(at),
                groups=sum(parts),
            )
            for s in at
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a micro-batch: call backward on it, and step once all micro-batches of the step are done."""

    loss: torch.Tensor  # [], differentiable: its share of the step's loss
    # [], or [P] of `PMC.step_losses`: an entry for each part; of all packs together if there are several
    collapse: torch.Tensor  # cross-entropy of the sampled answers
    retain: torch.Tensor  # retain loss, cross-entropy or divergence, not multiplied by lambda
    counters: dict[str, int]  # tokens and targets computed, packs
