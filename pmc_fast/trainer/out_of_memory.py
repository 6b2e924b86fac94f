"""A training step that runs out of memory is made again in smaller passes."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils import logging

from ..errors import PMCError
from ..models.context import out_of_memory, release_memory
from ..models.teacher import trains_adapters_alone
from ..pmc.algorithm import PMC
from ..pmc.batch import Loss
from .base import BaseTrainer

logger = logging.get_logger(__name__)


class ThriftyTrainer(BaseTrainer):
    """A Trainer whose steps are made again, in passes of half the size, while the device's memory does not suffice.

    Gradients of a step are computed in one call, `accumulated`, before which there are none. So what a failed pass has
    added to them is dropped with the rest, and nothing counts twice. With several processes a step can't be made again,
    since the others wait in a collective call of the first attempt.
    """

    pmc: PMC
    state: Any
    model: Any
    stage = "the rollout"  # what runs, for the error

    def accumulated(self, model: Any, parts: Sequence[tuple[Any, Any]]) -> tuple[torch.Tensor, int, Loss]:
        """Compute the gradients of a whole optimizer step; return its loss, tokens, and the means of its last pass."""
        self.stage, first = "a training pass", True
        while (made := self._attempted(model, parts, first=first)) is None:
            self._shrink()  # the error with the activations that it held is gone
            first = False
        self.stage = "the optimizer step"
        return made

    def _attempted(
        self, model: Any, parts: Sequence[tuple[Any, Any]], *, first: bool
    ) -> tuple[torch.Tensor, int, Loss] | None:
        """Return what `_accumulated` does, or None if less memory can be tried; the first time graphs are released."""
        try:
            return self._accumulated(model, parts)
        except Exception as error:
            # a subclass may have computed gradients of its own before these
            own = type(self).training_step.__module__.startswith(f"{__package__}.")
            smaller = first or self.pmc.passes_divide
            if self.pmc.ranks.size > 1 or not own or not smaller or not out_of_memory(error):
                raise
            return None

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the Trainer does; what runs is noted for the error."""
        before, self.stage = self.stage, "an evaluation"
        made = super().evaluate(*args, **kwargs)
        self.stage = before  # not after an error, which asks for it
        return made

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
            f"most {tokens} tokens or one longer sequence, and so are later ones"
        )

    def out_of_memory(self, resume: str) -> PMCError:
        """Return the error that names what ran, with remedies; `resume` says what checkpoints there are."""
        done, of = self.state.global_step, self._of_steps()
        within = self.stage in ("the rollout", "a training pass", "the optimizer step")
        step = f"step {done + 1}{of}" if within else f"after step {done}{of}"
        use = "".join(f"{remedy}, " for remedy in self._remedies())
        return PMCError(
            f"the device ran out of memory in {self.stage} ({step}): use {use}or a larger device; {resume}"
        )

    def _remedies(self) -> list[str]:
        lighter = self._lighter()
        fewer = ["a smaller num_samples"] if self.pmc.config.num_samples > 1 else []
        match self.stage:
            case "the rollout":
                return [*fewer, "a smaller max_length", *lighter]
            case "a training pass":
                return [
                    *(["a smaller max_tokens"] if self.pmc.passes_divide else [*fewer, "a smaller max_length"]),
                    *lighter,
                ]
            case "the optimizer step":
                return [*lighter, "an optimizer of fewer or 8-bit moments"]
            case "an evaluation":
                return ["a smaller per_device_eval_batch_size", "eval_accumulation_steps", "prediction_loss_only"]
        return lighter

    def _lighter(self) -> list[str]:
        parameters = list(self.model.parameters())
        lighter = ["bfloat16 parameters"] if any(p.dtype.itemsize > 2 for p in parameters) else []
        if self.retain_loss == "kl" and not trains_adapters_alone(self.model):  # else nothing is copied
            lighter.append("retain_loss 'nll'")
        return lighter + (["LoRA"] if all(p.requires_grad for p in parameters) else [])
