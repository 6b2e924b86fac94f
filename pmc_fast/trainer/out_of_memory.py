"""A training step that runs out of memory is made again in smaller passes."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer
from transformers.utils import logging

from ..errors import PMCError
from ..models.context import out_of_memory, release_memory
from ..pmc.algorithm import PMC
from ..pmc.batch import Loss

logger = logging.get_logger(__name__)


class ThriftyTrainer(Trainer):
    """A Trainer whose steps are made again, in passes of half the size, if the device's memory does not suffice.

    Gradients of a step are computed in one call, `accumulated`, before which there are none. So what a failed pass has
    added to them is dropped with the rest, and nothing counts twice. With several processes a step can't be made again,
    since the others wait in a collective call of the first attempt.
    """

    pmc: PMC
    args: Any
    state: Any
    model: Any
    stage = "the rollout"  # what runs, for the error

    def accumulated(self, model: Any, parts: Sequence[tuple[Any, Any]]) -> tuple[torch.Tensor, int, Loss]:
        """Compute the gradients of a whole optimizer step; return its loss, tokens, and the means of its last pass."""
        self.stage = "a training pass"
        made = self._attempted(model, parts)
        if made is None:  # and the error with the activations that it held is gone
            self._shrink()
            made = self._accumulated(model, parts)
        self.stage = "the optimizer step"
        return made

    def _attempted(self, model: Any, parts: Sequence[tuple[Any, Any]]) -> tuple[torch.Tensor, int, Loss] | None:
        try:
            return self._accumulated(model, parts)
        except Exception as error:
            # a subclass may have computed gradients of its own before these
            own = type(self).training_step.__module__.startswith(f"{__package__}.")
            if self.pmc.ranks.size > 1 or not own or not out_of_memory(error):
                raise
            return None

    def _accumulated(self, model: Any, parts: Sequence[tuple[Any, Any]]) -> tuple[torch.Tensor, int, Loss]:
        total, tokens = torch.zeros((), device=self.args.device), 0
        out = None
        for out in self.pmc.step_losses(parts, model=model):
            with self.pmc.ranks.watched():
                self.accelerator.backward(out.loss)
            total += out.loss.detach()
            tokens += out.counters["tokens"]
        assert out is not None
        return total, tokens, out

    def _shrink(self) -> None:
        """Drop the gradients and all that is kept to be faster; halve the passes from now on."""
        self.model.zero_grad()
        tokens = self.pmc.halve_passes()
        release_memory(self.args.device)
        logger.warning(
            f"step {self.state.global_step + 1} ran out of memory: it is made again without CUDA graphs, in passes of at "
            f"most {tokens} tokens, and so are later ones"
        )

    def out_of_memory(self, resume: str) -> PMCError:
        """Return the error that names what ran, with remedies; `resume` says what checkpoints there are."""
        step = f"step {self.state.global_step + 1} of {self.state.max_steps}"
        remedies = "a smaller max_tokens or num_samples"
        if self.stage == "the optimizer step":
            remedies = "bfloat16 parameters, LoRA, or an optimizer of fewer or 8-bit moments"
        return PMCError(
            f"the device ran out of memory in {self.stage} ({step}): use {remedies}, or a larger device; {resume}"
        )
