"""The untouched model, for losses that need its distributions while the weights move."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from ..data import Encoded
from ..data.packing import Pack, pack
from ..ops.divergence import divergence
from ..utils.labels import IGNORED
from .context import eval_mode
from .lm_head import Head
from .packed_forward import Also, PackedPass


class Teacher:
    """What a model computes as it is now: by itself with its new adapter switched off, else by a copy of its weights.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
    packed : PackedPass
        Of this model.
    probe : Pack
        On which an adapter has to change nothing, to be new.

    Notes
    -----
    A sequence's hidden rows are computed once and kept on the host: [targets, D] in the model's compute dtype.
    """

    def __init__(self, model: Any, packed: PackedPass, probe: Pack) -> None:
        self.packed = packed
        self._rows: dict[Any, torch.Tensor] = {}
        self._head: Head | None = None
        self._adapted = model if _trains_adapters_alone(model) else None
        if self._adapted is not None:
            before = self._run(packed, probe)[0]
            if torch.equal(self._hidden(probe)[0], before):
                return
        self._adapted = None
        still = copy.deepcopy(packed.base).requires_grad_(False)
        self.packed = PackedPass(still, autocast_dtype=packed.autocast_dtype)
        self.packed.check()

    def _hidden(self, pack: Pack) -> tuple[torch.Tensor, Head]:
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

    def rows(self, sequences: Sequence[Encoded], max_tokens: int) -> list[torch.Tensor]:
        """Return the hidden rows that predict each sequence's targets: [M, D], on the host.

        Parameters
        ----------
        sequences : sequence of Encoded
        max_tokens : int
            Of a pass over those that are new.
        """
        keys = [_key(s) for s in sequences]
        new = {key: s for key, s in zip(keys, sequences, strict=True) if key not in self._rows}
        for p in pack([[s] for s in new.values()], max_tokens):
            hidden, self._head = self._hidden(p)
            parts = hidden[p.rows.to(hidden.device)].cpu().split(p.cu_targets.diff().tolist())
            self._rows |= {list(new)[i]: part.clone() for i, part in zip(p.sequences, parts, strict=True)}
        return [self._rows[key] for key in keys]

    def divergence(
        self, pack: Pack, sequences: Sequence[Encoded], scale: torch.Tensor, found: list[torch.Tensor] | None = None
    ) -> Also | None:
        """Return what adds sum of scale * KL(teacher || model) over a pack's targets to its loss, or None where all are 0.

        Parameters
        ----------
        pack : Pack
        sequences : sequence of Encoded
            Those that the pack was made of; `pack.sequences` are their numbers.
        scale : Tensor [M]
            Of each target.
        found : list, optional
            The value is appended.
        """
        scale = scale.cpu()
        lengths = pack.cu_targets.diff().tolist()
        numbers = [i for i, part in zip(pack.sequences, scale.split(lengths), strict=True) if part.any()]
        if not numbers:
            return None
        theirs = torch.cat(self.rows([sequences[i] for i in numbers], len(pack)))
        at = torch.tensor([i in numbers for i in pack.sequences]).repeat_interleave(torch.tensor(lengths))
        rows, scale, head = pack.rows[at], scale[at], self._head
        assert head is not None
        device = head.weight.device
        rows, scale, theirs = (t.to(device, non_blocking=True) for t in (rows, scale, theirs))

        def also(hidden: torch.Tensor, own: Head) -> torch.Tensor:
            value = divergence(
                hidden[rows], own.weight, theirs, head.weight, scale,
                options=own.options(), teacher_options=head.options(),
            )  # fmt: skip
            if found is not None:
                found.append(value.detach().double())
            return value

        return also


def _key(sequence: Encoded) -> Any:
    trained = tuple(label != IGNORED for label in sequence.labels)
    positions = None if sequence.positions is None else tuple(sequence.positions)
    return tuple(sequence.input_ids), trained, positions


def _trains_adapters_alone(model: Any) -> bool:
    if not hasattr(model, "disable_adapter"):
        return False
    with model.disable_adapter():  # what is still trained is none of an adapter's
        return not any(p.requires_grad for p in model.parameters())
