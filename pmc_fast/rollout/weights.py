"""Linear layers in a rollout: weights copied for autocast, LoRA adapters merged, few rows computed by our kernel."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..models.fused_layers import plain
from ..models.patching import is_bare
from ..ops.layers import fast_linear_serves, linear

# in fewer bits W + scaling B A would round away what the first steps of training add to B A
MERGED = (torch.float32, torch.float64)


class RolloutWeights:
    """The weights that a model's linear layers read during a rollout.

    Under autocast float32 layers read copies in its dtype, which are cast once a rollout instead of in each step. LoRA
    layers without autocast compute one product with a merged copy instead of three.

    Parameters
    ----------
    model : torch.nn.Module
    autocast_dtype : torch.dtype, optional
    """

    def __init__(self, model: Any, autocast_dtype: torch.dtype | None) -> None:
        self.model, self.autocast_dtype = model, autocast_dtype
        self.copies: dict[Any, tuple[torch.Tensor, torch.Tensor | None]] = {}  # weight and bias, by layer

    def forwards(self) -> dict[Any, Callable[..., torch.Tensor]]:
        """Update the copies and return what replaces the forward of each layer."""
        free = (module for module in self.model.modules() if "forward" not in vars(module))
        found = {module: self._forward(module) for module in free}
        return {module: forward for module, forward in found.items() if forward is not None}

    def _forward(self, module: Any) -> Callable[..., torch.Tensor] | None:
        low = self.autocast_dtype
        if low is None and _merges(module) and module.base_layer.weight.dtype in MERGED:
            weight, bias = self._merged(module), module.base_layer.bias
            # a layer without gradients, on any device: few rows by our kernel where it serves
            call = linear if fast_linear_serves(weight) else torch.nn.functional.linear
            return functools.partial(call, weight=weight, bias=bias)
        if type(module) is not torch.nn.Linear or not plain(module.weight) or _makes_weight(module):
            return None
        if low is not None and module.weight.dtype == torch.float32:
            weight, bias = self._cast(module, low)
            return functools.partial(torch.nn.functional.linear, weight=weight, bias=bias)
        if low is None and fast_linear_serves(module.weight):
            return functools.partial(linear, weight=module.weight, bias=module.bias)
        return None

    def _cast(self, module: torch.nn.Linear, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        if module not in self.copies:
            new = functools.partial(torch.empty_like, dtype=dtype, requires_grad=False)
            self.copies[module] = (new(module.weight), None if module.bias is None else new(module.bias))
        weight, bias = self.copies[module]
        weight.copy_(module.weight)
        if bias is not None:
            bias.copy_(module.bias)
        return weight, bias

    def _merged(self, module: Any) -> torch.Tensor:
        """Return W + sum over the active adapters of scaling * B @ A."""
        source = module.base_layer.weight
        weight, _ = self.copies.setdefault(module, (torch.empty_like(source, requires_grad=False), None))
        for name in module.active_adapters:
            if name in module.lora_A:
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
                source = torch.addmm(source, b, a, alpha=module.scaling[name], out=weight)
        if source is not weight:
            weight.copy_(source)
        return weight


def _merges(module: Any) -> bool:
    """Return whether a layer is PEFT's plain LoRA on torch.nn.Linear with adapters that are enabled and not merged."""
    lora = sys.modules.get("peft.tuners.lora.layer")  # imported if the model has such layers
    if lora is None or type(module) is not lora.Linear or type(module.base_layer) is not torch.nn.Linear:
        return False
    special = module.lora_variant or any(module.lora_bias.values()) or module.fan_in_fan_out
    if special or module.merged or module.disable_adapters or not plain(module.base_layer.weight):
        return False
    return all(map(is_bare, module.children()))  # hooks of the layer itself still run


def _makes_weight(module: torch.nn.Linear) -> bool:
    """Return whether a layer may compute its weight in each call: pruning, weight norm or fake quantisation."""
    return bool(module._forward_pre_hooks) or "weight" not in module._parameters
