"""A model's output head as `ops.weighted_nll` takes it: weight, bias, softcap and scale."""

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import NotFiniteError, PMCError
from ..ops.nll_reference import transform_logits
from .context import eval_mode, tolerance
from .fsdp import plain_type


@dataclass(frozen=True, slots=True)
class Head:
    """Logits are softcap((hidden @ weight.T + bias) * logit_scale)."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None
    logit_scale: float

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `weighted_nll` and `gather_logps`."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


def output_head(model: Any, *, check: bool = True) -> Head:
    """Read the head of a transformers causal language model.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        Its output embeddings must be a linear layer, or one under LoRA: then the effective weight
        W + scaling B A is formed, differentiable in A and B.
    check : bool
        Compare with the model's own logits on four tokens (a short forward pass), because families name the scale and
        cap of their logits differently. Switch it off only for a model that passed before.

    Raises
    ------
    PMCError
        Any other head, by its class name, and one whose logits are not the model's.
    """
    head = read_head(model)
    if check:
        _check_logits(model, head)
    return head


@torch.no_grad()
def _check_logits(model: Any, head: Head) -> None:
    ids = torch.arange(1, 5, device=head.weight.device)[None] % head.weight.shape[0]
    cuda = [ids.device] if ids.device.type == "cuda" else []
    for mode in {False, model.training}:
        with eval_mode(model) if not mode else torch.random.fork_rng(cuda):
            out = model(ids, output_hidden_states=True, use_cache=False)
        hidden = out.hidden_states[-1][0].to(head.weight.dtype)
        x = hidden.float() @ head.weight.float().T
        ours = transform_logits(x, head.bias, 1.0, head.softcap, head.logit_scale)
        _require_equal(model, ours, out.logits[0], head.weight.dtype, mode)


@torch.no_grad()
def check_logits(model: Any, products: torch.Tensor, logits: torch.Tensor) -> None:
    """Refuse a model that computes its logits from the head's output otherwise than `weighted_nll` assumes.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    products : Tensor [1, M, any]
        What the head's forward returned in a pass of the model: logits, or what replaced them.
    logits : Tensor [1, M, any]
        What the model returned as logits in the same pass.
    """
    head = read_head(model)
    ours = transform_logits(products.float(), None, 1.0, head.softcap, head.logit_scale)
    _require_equal(model, ours, logits, products.dtype, model.training)


def _require_equal(model: Any, ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype, training: bool) -> None:
    same = ours.shape == theirs.shape
    error = float((ours - theirs.float()).abs().max()) if same else float("inf")
    size = float(theirs.abs().max())
    if math.isnan(size):
        raise NotFiniteError("the model's logits are NaN: its weights are damaged, or it overflows")
    if not error <= tolerance(dtype, theirs.dtype).logits * max(size, 1e-3):
        mode = " in train mode" if training else ""
        raise PMCError(
            f"{type(model).__name__}: its logits{mode} are not what its head's weight, bias, softcap and scale give (off "
            f"by {error:.3g} of {size:.3g}): this family is not supported"
        )


def read_head(model: Any) -> Head:
    """Read the head without comparing its logits with the model's."""
    layer = model.get_output_embeddings()
    if layer is None:
        raise PMCError(f"{type(model).__name__} has no output embeddings: pmc_fast needs a causal language model")
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    scaling = getattr(config, "logits_scaling", None)  # Granite divides, Cohere multiplies
    return Head(
        weight=_effective_weight(layer),
        bias=getattr(getattr(layer, "base_layer", layer), "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=1.0 / scaling if scaling else float(getattr(config, "logit_scale", None) or 1.0),
    )


def check_head(layer: Any, *, training: bool | None = None) -> None:
    """Refuse a layer whose weight can't be formed: anything but torch.nn.Linear, or plain LoRA on one.

    Parameters
    ----------
    layer : Module
    training : bool, optional
        Whether train mode is assumed, where LoRA has dropout; by default the layer's own mode.
    """
    base = getattr(layer, "base_layer", layer)
    plain = plain_type(base) is torch.nn.Linear
    if plain and (layer is base or (is_lora(layer) and (layer.disable_adapters or layer.merged))):
        return
    if not plain or not is_lora(layer):
        raise PMCError(
            f"the head is a {type(layer).__name__} of {type(layer).__module__}: pmc_fast needs torch.nn.Linear, or "
            "PEFT's LoRA on one; leave lm_head out of the adapter's target_modules and modules_to_save, and the tied "
            "embeddings' tokens too"
        )
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        dropout = getattr(layer.lora_dropout[adapter], "p", 0.0)
        drops = dropout and (layer.training if training is None else training)
        if drops or adapter in getattr(layer, "lora_variant", {}) or layer.lora_bias[adapter]:
            raise PMCError(
                f"the head's LoRA adapter {adapter!r} has dropout, a bias or is a variant: leave lm_head out"
            )


def is_lora(layer: Any) -> bool:
    """Return whether a layer is PEFT's LoRA around a linear one, and no other of its methods."""
    lora = sys.modules.get("peft.tuners.lora.layer")  # a model that has such layers has imported it
    return lora is not None and plain_type(layer) is lora.Linear


def _effective_weight(layer: Any) -> torch.Tensor:
    check_head(layer)
    base = getattr(layer, "base_layer", layer)
    weight = base.weight
    if layer is base or layer.disable_adapters or layer.merged:
        return weight
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            weight = weight + (layer.scaling[adapter] * (b @ a)).to(weight.dtype)
    return weight
