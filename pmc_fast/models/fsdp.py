"""Sharded models (FSDP2): which are supported, and how their processes run equally many forward passes."""

from typing import Any, Self

import torch
from torch import distributed

from ..distributed import Ranks
from ..errors import PMCError
from .context import eval_mode


def fsdp_launched() -> bool:
    """Return whether a launcher asks for FSDP: accelerate will shard the model, and is not asked to yet."""
    from accelerate.utils import parse_flag_from_env

    try:
        return parse_flag_from_env("ACCELERATE_USE_FSDP")
    except ValueError as error:
        raise PMCError(f"ACCELERATE_USE_FSDP can't be read ({error}): use true or false") from error


def is_sharded(model: Any) -> bool:
    """Return whether FSDP2 (torch.distributed.fsdp.fully_shard) holds parameters of `model`.

    Raises
    ------
    PMCError
        FSDP1 or ZeRO-3 holds them: they can't be read layer by layer from outside.
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
    """Return a module's class without the one that FSDP2 adds."""
    if _is_fsdp(module):
        return type(module).__mro__[2]  # FSDPLinear, FSDPModule, Linear
    return type(module)


def _is_fsdp(module: Any) -> bool:
    return type(module).__name__.startswith("FSDP") and any(c.__name__ == "FSDPModule" for c in type(module).__mro__)


class Lockstep:
    """Makes the processes of a sharded model run equally many forward passes, since each pass is collective.

    A process calls `forward` before each of its passes. At the end it joins the others' remaining passes with one
    token. For models that are not sharded nothing is done.
    """

    def __init__(self, model: Any, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        self._sharded = is_sharded(model)
        self._device = model.get_input_embeddings().weight.device

    def forward(self) -> None:
        """Announce a pass to the other processes."""
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
                module.reshard()  # the root keeps what it gathered until a backward pass, and it would become stale
