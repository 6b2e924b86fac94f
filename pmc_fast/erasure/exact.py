"""A stack's weights are float32 numbers; a model that keeps bfloat16 computes with them rounded."""

from typing import Any

import torch

from ..errors import PMCError
from ..models import loading
from . import adapters


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
    """Write exact weights to a model, rounded to its dtype; where they are one model, there is nothing to do.

    An adapter that is attached to `model` stays as it is.
    """
    if model is exact:
        return
    found, own = dict(exact.named_parameters()), dict(model.named_parameters())
    names = {name: full for name, full in adapters.bare_names(model).items() if full in own}
    if odd := found.keys() ^ names.keys():
        raise PMCError(
            f"the model has other parameters in float32 than in bfloat16 ({min(odd)}): use --param-dtype float32"
        )
    for name, full in names.items():
        own[full].copy_(found[name])
