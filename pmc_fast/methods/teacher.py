"""The untouched model, for methods that need its distributions while the weights move."""

import copy
from typing import Any

import torch

from ..data.packing import Pack
from ..models.context import eval_mode
from ..models.lm_head import Head
from ..models.packed_forward import Also, PackedPass
from ..ops.divergence import divergence


class Teacher:
    """What a model computes as it is now: by itself with its new adapter switched off, else by a copy of its weights.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
    packed : PackedPass
        Of this model.
    probe : Pack
        On which an adapter has to change nothing, to be new.
    """

    def __init__(self, model: Any, packed: PackedPass, probe: Pack) -> None:
        self.packed = packed
        self._adapted = model if _trains_adapters_alone(model) else None
        if self._adapted is not None:
            before = self._run(packed, probe)[0]
            if torch.equal(self.hidden(probe)[0], before):
                return
        self._adapted = None
        still = copy.deepcopy(packed.base).requires_grad_(False)
        self.packed = PackedPass(still, autocast_dtype=packed.autocast_dtype)
        self.packed.check()

    def hidden(self, pack: Pack) -> tuple[torch.Tensor, Head]:
        """Return the hidden rows of a pack, [R, D], and the head."""
        if self._adapted is None:
            return self._run(self.packed, pack)
        with self._adapted.disable_adapter():
            return self._run(self.packed, pack)

    @staticmethod
    @torch.no_grad()
    def _run(packed: PackedPass, pack: Pack) -> tuple[torch.Tensor, Head]:
        kept: list[tuple[torch.Tensor, Head]] = []

        def keep(hidden: torch.Tensor, head: Head) -> torch.Tensor:
            kept.append((hidden.clone(), head))  # a model may scale in place
            return hidden.new_zeros(())

        with eval_mode(packed.base):
            packed(pack, torch.zeros(len(pack.targets)), also=keep)
        return kept[0]

    def divergence(self, pack: Pack, scale: torch.Tensor, found: list[torch.Tensor]) -> Also:
        """Return what adds sum of scale * KL(teacher || model) over a pack's targets to its loss, and its value to `found`."""
        counted = scale.nonzero()[:, 0]
        rows, scale = pack.rows[counted], scale[counted]
        theirs, their_head = self.hidden(pack)
        rows, scale = rows.to(theirs.device), scale.to(theirs.device)

        def also(hidden: torch.Tensor, head: Head) -> torch.Tensor:
            value = divergence(
                hidden[rows], head.weight, theirs[rows], their_head.weight, scale,
                options=head.options(), teacher_options=their_head.options(),
            )  # fmt: skip
            found.append(value.detach().double())
            return value

        return also


def _trains_adapters_alone(model: Any) -> bool:
    if not hasattr(model, "disable_adapter"):
        return False
    with model.disable_adapter():  # what is still trained is none of an adapter's
        return not any(p.requires_grad for p in model.parameters())
