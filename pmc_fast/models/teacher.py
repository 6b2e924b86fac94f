"""The untouched model, for losses that need its distributions while the weights move."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..data import Encoded
from ..data.packing import Pack, pack
from ..ops.divergence import divergence
from ..utils.labels import IGNORED
from .context import eval_mode
from .lm_head import Head, read_head
from .packed_forward import Also, PackedPass

SHARDED = (  # why it is refused
    "retain_loss is 'kl' and the model is sharded (FSDP): the untouched model has to be whole; use retain_loss='nll', or DDP"
)
KEPT = 2 << 30  # bytes of hidden rows that are kept; what does not fit is computed again


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
    A sequence's hidden rows, [targets, D], are computed once and kept on the host, up to `KEPT` bytes in all.
    """

    def __init__(self, model: Any, packed: PackedPass, probe: Pack) -> None:
        self.packed = self._student = packed
        self._rows: dict[bytes, torch.Tensor] = {}
        self._bytes = 0
        self._head: Head | None = None
        self._adapted = model if trains_adapters_alone(model) else None
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
        with _switched_off(self._adapted):
            return self._run(self.packed, pack)

    @staticmethod
    @torch.no_grad()
    def _run(packed: PackedPass, pack: Pack) -> tuple[torch.Tensor, Head]:
        kept: list[tuple[torch.Tensor, Head]] = []

        def keep(hidden: torch.Tensor, head: Head) -> torch.Tensor:
            kept.append((hidden.clone(), head))  # a model may scale in place
            return hidden.new_zeros(())

        none = replace(pack, targets=pack.targets[:0], rows=pack.rows[:0])  # of the head's loss
        with eval_mode(packed.base):
            packed(none, torch.zeros(0), also=keep)
        return kept[0]

    def drop_rows(self) -> None:
        """Release what is kept of sequences."""
        self._rows, self._bytes = {}, 0

    def follow(self) -> torch.device:
        """Return where the model is now, and move a copy there: trainers may move the model after `prepare`."""
        device = self._student.base.get_input_embeddings().weight.device
        if self._adapted is None and self.packed.base.get_input_embeddings().weight.device != device:
            self.packed.base.to(device)
            self.packed.check()
            self._head = None
        return device

    def rows(self, sequences: Sequence[Encoded]) -> list[torch.Tensor]:
        """Return the hidden rows that predict each sequence's targets: [M, D], on the host.

        Each sequence has a pass of its own: what a resumed run computes anew is the same, whatever it computes first.
        """
        made = []
        for s in sequences:
            key = _key(s)
            rows = self._rows.get(key)
            if rows is None:
                p = pack([[s]], len(s.input_ids))[0]
                hidden, self._head = self._hidden(p)
                rows = hidden[p.rows.to(hidden.device)].to(self._dtype).cpu()
                if self._bytes + rows.nbytes <= KEPT:
                    self._rows[key], self._bytes = rows, self._bytes + rows.nbytes
            made.append(rows)
        return made

    @property
    def _dtype(self) -> torch.dtype:
        """What the head's products are computed in: a final norm may return more."""
        return self.packed.autocast_dtype or self.packed.base.get_input_embeddings().weight.dtype

    def loss(
        self,
        pack: Pack,
        sequences: Sequence[Encoded],
        row_scale: torch.Tensor,
        scale: torch.Tensor,
        *,
        model: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return sum of row_scale * -logp + scale * KL(teacher || model) over a pack's targets, in one pass.

        Parameters
        ----------
        pack : Pack
            On the host.
        sequences : sequence of Encoded
            Those that the pack was made of; `pack.sequences` are their numbers.
        row_scale, scale : Tensor [M]
            Of each target; on the host. `scale` is 0 for all targets of a sequence or for none.
        model : callable, optional
            What to call: the model as it is wrapped for training.

        Returns
        -------
        loss : Tensor []
            Differentiable.
        logps : float64 [M]
            Not differentiable; 0 where only the divergence counts.
        divergences : float64 [M]
            Not differentiable; 0 where `scale` is.
        """
        device, size = self.follow(), len(pack.targets)
        found = torch.zeros(size, dtype=torch.float64, device=device)
        logps = torch.zeros_like(found)
        # of the others the head's products are left out on the CPU; on CUDA it multiplies all rows of a pass
        asked = ((row_scale != 0) | (scale == 0)).nonzero()[:, 0]
        part = replace(pack, targets=pack.targets[asked], rows=pack.rows[asked])
        # where nothing diverges, too: a graph of such packs alone would hold memory for little
        also = self._divergence(pack, sequences, scale, found) or _nothing
        loss, of_asked = self._student(part, row_scale[asked], model=model, also=also)
        return loss, logps.index_copy_(0, asked.to(device, non_blocking=True), of_asked.double()), found

    def _divergence(
        self, pack: Pack, sequences: Sequence[Encoded], scale: torch.Tensor, found: torch.Tensor
    ) -> Also | None:
        """Return what adds the divergences to a pass's loss, and writes each to `found`; None where there is none."""
        lengths = pack.cu_targets.diff()
        numbers = [
            i for i, part in zip(pack.sequences, scale.split(lengths.tolist()), strict=True) if bool(part.any())
        ]
        if not numbers:
            return None
        theirs = torch.cat(self.rows([sequences[i] for i in numbers]))
        at = torch.tensor([i in numbers for i in pack.sequences]).repeat_interleave(lengths).nonzero()[:, 0]
        rows, scale = pack.rows[at], scale[at]
        if self._head is None:  # a copy that was moved
            self._head = read_head(self.packed.base)
        head = self._head
        # ahead of the pass, in which the host would wait for them
        rows, scale, theirs, at = (t.to(found.device, non_blocking=True) for t in (rows, scale, theirs, at))

        def also(hidden: torch.Tensor, own: Head) -> torch.Tensor:
            value, each = divergence(
                hidden[rows], own.weight, theirs, head.weight, scale,
                options=own.options(), teacher_options=head.options(),
            )  # fmt: skip
            found.index_copy_(0, at, each.double())
            return value

        return also


def _nothing(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    return hidden.new_zeros(())


def _key(sequence: Encoded) -> bytes:
    """Return what a sequence's hidden rows depend on: its tokens, their positions, and which of them are targets."""
    trained = [label != IGNORED for label in sequence.labels]
    return np.array([sequence.input_ids, trained, sequence.positions or range(len(trained))], np.int64).tobytes()


@contextmanager
def _switched_off(model: Any) -> Iterator[None]:
    """Switch a PEFT model's adapters off, and leave what is trained as it was: switching on unfreezes all of an adapter."""
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for p, requires_grad in trained:
            p.requires_grad_(requires_grad)


def trains_adapters_alone(model: Any) -> bool:
    """Return whether a model's adapters alone are trained: switched off, they leave it as it was, and no copy is held of it."""
    if not hasattr(model, "disable_adapter"):
        return False
    with _switched_off(model):  # what is still trained is none of an adapter's
        return not any(p.requires_grad for p in model.parameters())
