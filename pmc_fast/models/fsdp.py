"""Models whose parameters are spread over processes: which are served, and how their processes stay in step."""

from typing import Any, Self

import torch
from torch import distributed

from ..distributed import Ranks
from ..errors import PMCError
from .context import eval_mode


def is_sharded(model: Any) -> bool:
    """Return whether FSDP2 (torch.distributed.fsdp.fully_shard) holds parameters of `model`.

    Raises
    ------
    PMCError
        FSDP1 or ZeRO-3 does: their parameters can't be read layer by layer from outside.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    modules = list(model.modules())
    if any(isinstance(m, FullyShardedDataParallel) for m in modules):
        raise PMCError("the model is sharded by FSDP1: use FSDP2 (fsdp_version 2, or fully_shard)")
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise PMCError("the model is sharded by DeepSpeed ZeRO-3: use ZeRO-1 or 2, or FSDP2 (fsdp_version 2)")
    return any(isinstance(m, FSDPModule) for m in modules)


def plain_type(module: Any) -> type:
    """Return a module's class as it was before FSDP2 put one of its own in front."""
    if _is_fsdp(module):
        return type(module).__mro__[2]  # FSDPLinear, FSDPModule, Linear
    return type(module)


def _is_fsdp(module: Any) -> bool:
    return type(module).__name__.startswith("FSDP") and any(c.__name__ == "FSDPModule" for c in type(module).__mro__)


class Lockstep:
    """Keeps the forward passes of a sharded model's processes equal in number: each gathers parameters from all.

    A process calls `forward` before every pass of its own; at the end it joins the others' remaining passes with one
    token. Models that are not sharded are left alone.
    """

    def __init__(self, model: Any, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        self._sharded = is_sharded(model)
        self._device = model.get_input_embeddings().weight.device

    def forward(self) -> None:
        """Tell the others that a pass follows."""
        if self._sharded:
            self.ranks.any(True, self._device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if not self._sharded:
            return
        if kind is None:
            token = torch.zeros((1, 1), dtype=torch.int64, device=self._device)
            with torch.no_grad(), eval_mode(self.model):
                while self.ranks.any(False, self._device):
                    self.model(input_ids=token, use_cache=False)
        for module in self.model.modules():
            if _is_fsdp(module):
                module.reshard()  # without a backward pass, what the root gathered would stay and grow stale
