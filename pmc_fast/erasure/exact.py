"""A stack's weights are float32 numbers; a model that keeps bfloat16 computes with them rounded."""

from typing import Any

import torch

from ..errors import PMCError
from ..models import loading


def exact_model(loaded: loading.LoadedModel, source: str) -> Any:
    """Return the model whose float32 weights adapters are merged into.

    That is the loaded one itself, or, where it keeps bfloat16, another one on the CPU. Then adapters and their gradients
    are float32, and `loaded` computes under autocast.
    """
    if loaded.model.get_input_embeddings().weight.dtype == torch.float32:
        return loaded.model
    loaded.autocast_dtype = torch.bfloat16
    return loading.load_model(source, device=torch.device("cpu")).model


@torch.no_grad()
def round_into(model: Any, exact: Any) -> None:
    """Write exact weights to a model, rounded to its dtype; where they are one model, there is nothing to do."""
    if model is exact:
        return
    found = dict(exact.named_parameters())
    if odd := found.keys() ^ {name for name, _ in model.named_parameters()}:
        raise PMCError(
            f"the model has other parameters in float32 than in bfloat16 ({min(odd)}): use --param-dtype float32"
        )
    for name, parameter in model.named_parameters():
        parameter.copy_(found[name])
