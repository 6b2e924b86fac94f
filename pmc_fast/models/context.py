"""Around a forward pass of a model: eval mode, autocast, and its plain log-probs to compare with."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ..errors import PMCError


def autocast(
    device: torch.device, dtype: torch.dtype | None, *, cache_enabled: bool = True
) -> AbstractContextManager[Any]:
    """Return torch.autocast's context, or one that does nothing where `dtype` is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype, cache_enabled=cache_enabled)


def check_placement(model: Any) -> None:
    """Refuse weights that can't be read where they are: quantised by torch, offloaded, or spread over devices."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao."):
            raise PMCError(
                f"{type(model).__name__} is quantised by torch ({name} is a {type(module).__module__} layer): give the "
                "model as it was before"
            )
    devices = {p.device for p in model.parameters()}
    if unknown := sorted({d.type for d in devices} - {"cpu", "cuda"}):
        offloaded = " (offloaded, or without weights)" if unknown == ["meta"] else ""
        raise PMCError(
            f"{type(model).__name__} has parameters on {', '.join(unknown)}{offloaded}: load it without device_map, as "
            "a whole on cpu or cuda"
        )
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise PMCError(f"{type(model).__name__} is spread over {names}: load it without device_map, on one of them")


def known_tokens(model: Any) -> int:
    """Return how many tokens a model both reads and predicts: some embed more than their head knows."""
    head = model.get_output_embeddings()
    sizes = [
        e.weight.shape[0] for e in (model.get_input_embeddings(), head) if getattr(e, "weight", None) is not None
    ]
    return min(sizes)


# mean differences of log-probs (kept in float32): rounding stays well below, another computation goes above
CLOSE = {torch.float64: 2e-6, torch.float32: 2e-4, torch.bfloat16: 0.15, torch.float16: 0.03}


@torch.no_grad()
def plain_logps(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return what a model's plain forward pass, in eval mode, gives each token but the first: [B, T] -> [B, T - 1]."""
    with eval_mode(model):
        logits = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1].double().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Switch a model to eval, and module by module back to what it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
