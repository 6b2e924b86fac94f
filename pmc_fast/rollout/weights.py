"""LoRA layers in a rollout: one product with a merged copy of the weight instead of three products."""

import sys
from typing import Any

import torch

from ..models.fused_layers import plain
from ..models.patching import is_bare


def merges(module: Any) -> bool:
    """Return whether a layer is PEFT's plain LoRA on torch.nn.Linear with adapters that are enabled and not merged."""
    lora = sys.modules.get("peft.tuners.lora.layer")  # imported if the model has such layers
    if lora is None or type(module) is not lora.Linear or type(module.base_layer) is not torch.nn.Linear:
        return False
    special = module.lora_variant or any(module.lora_bias.values()) or module.fan_in_fan_out
    if special or module.merged or module.disable_adapters or not plain(module.base_layer.weight):
        return False
    return all(map(is_bare, module.children()))  # hooks of the layer itself still run


def merge_into(weight: torch.Tensor, module: Any) -> None:
    """Write W + sum over the active adapters of scaling * B @ A into `weight`, as large as the layer's own."""
    source = module.base_layer.weight
    for name in module.active_adapters:
        if name in module.lora_A:
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            torch.addmm(source, b, a, alpha=module.scaling[name], out=weight)
            source = weight
    if source is not weight:
        weight.copy_(source)
