"""What an unlearning method is: which answers it trains on, and a loss of their tokens' log-probs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch

from ..errors import PMCError
from ..ops import sequence_logps

Kind = Literal["forget", "template"]
REFUSALS = (
    "I don't know the answer to that question.",
    "I'm not sure about that.",
    "I have no information on this.",
    "That is not something I know.",
)


@dataclass(frozen=True)
class Batch:
    """The answers to one step's forget questions, in the order of the questions, and how likely the model finds them.

    Attributes
    ----------
    logps : dict of Tensor [M]
        By kind of answer, log-probs of its sequences' tokens, one sequence after the other.
    offsets : dict of int64 Tensor [S + 1]
        Where each sequence's begin and end.
    reference : dict of Tensor [S]
        Log-probs of whole answers under the untouched model, of the kinds in `Method.reference`.
    """

    logps: Mapping[Kind, torch.Tensor]
    offsets: Mapping[Kind, torch.Tensor]
    reference: Mapping[Kind, torch.Tensor]

    def sums(self, kind: Kind) -> torch.Tensor:
        """Return the log-prob of each answer: [S]."""
        return sequence_logps(self.logps[kind], self.offsets[kind])

    def lengths(self, kind: Kind) -> torch.Tensor:
        """Return the number of tokens of each answer: [S]."""
        return self.offsets[kind].diff()

    def nll(self, kind: Kind) -> torch.Tensor:
        """Return the cross-entropy, the mean over the tokens of all answers."""
        return -self.logps[kind].mean()

    def mean_probs(self, kind: Kind) -> torch.Tensor:
        """Return the mean probability of each answer's tokens: [S]."""
        return sequence_logps(self.logps[kind].exp(), self.offsets[kind]) / self.lengths(kind)


@dataclass(frozen=True)
class Method:
    """An unlearning method: subclasses are frozen dataclasses of its parameters, with their papers' defaults.

    The loss of a step is ``objective(batch) + retain_weight * CE(retain pairs)``, and `divergences`. With retain_loss "kl" the
    divergence takes the cross-entropy's place.

    Attributes
    ----------
    told : bool
        Whether it trains on the answers to be forgotten.
    answers : tuple of {"forget", "template"}
        Of each forget question, the answers in its batches: the true one, or a refusal of `REFUSALS`.
    reference : tuple of {"forget", "template"}
        Those whose log-probs under the untouched model it needs. They are computed once, before training.
    linear : bool
        Whether the objective is linear in the log-probs. If not, a forward pass of the answers without gradients comes before
        each step's forward and backward pass, since the weight of a token depends on the log-probs.
    apart : bool
        Whether the gradients of objective and retain loss are computed apart and added with the weights of `mixture`. A step
        with both holds one more copy of the gradients, and yet another where `.grad` holds some already.
    above_0 : tuple of str
        Parameters that must not be 0. None may be negative.
    """

    told: ClassVar[bool] = True
    answers: ClassVar[tuple[Kind, ...]] = ("forget",)
    reference: ClassVar[tuple[Kind, ...]] = ()
    linear: ClassVar[bool] = False
    apart: ClassVar[bool] = False
    above_0: ClassVar[tuple[str, ...]] = ()
    retain_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not (
                0 <= value < math.inf and (value or name not in self.above_0)
            ):
                least = "above 0" if name in self.above_0 else "0 or more"
                raise PMCError(f"{type(self).__name__}: {name} is {value!r}: it must be {least}")

    def objective(self, batch: Batch) -> torch.Tensor:
        """Return the loss of a step's forget questions, a differentiable function of `batch.logps`."""
        raise NotImplementedError

    @property
    def divergences(self) -> tuple[float, float]:
        """Weights of KL(untouched model || model), a mean over the tokens of a step's answers, and of its retain pairs.

        If one is not 0, the untouched model is held: a copy of the weights, or none where an adapter alone is trained, and was new.
        """
        return 0.0, 0.0

    @property
    def needs_retain(self) -> bool:
        """Whether a step's retain pairs have a part in its loss."""
        return bool(self.retain_weight or self.divergences[1])

    def mixture(self, forget: float, both: float, retain: float) -> tuple[float, float]:
        """Return the weights of the two gradients, of which `forget`, `both` and `retain` are the inner products."""
        raise NotImplementedError
