"""Linear layers in a rollout: weights copied for autocast, LoRA adapters merged, products of one input computed as one.

On the CPU few rows are computed by our kernel.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ..cuda_graphs.recorder import HOOKS
from ..models.fused_layers import plain
from ..models.joined_weights import joined, siblings
from ..models.patching import is_bare
from ..ops.layers import fast_linear_serves, linear

# in fewer bits W + scaling B A would round away what the first steps of training add to B A
MERGED = (torch.float32, torch.float64)
JOINED = ("cuda",)  # devices on which one product replaces several; on a CPU core it is no faster (docs/kernels.md)

Forward = Callable[..., torch.Tensor]


class Weights(NamedTuple):
    """What a layer's product reads."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class RolloutWeights:
    """The weights that a model's linear layers read during a rollout.

    Under autocast float32 layers read copies in its dtype, which are cast once a rollout instead of in each step. LoRA
    layers without autocast compute one product with a merged copy instead of three. Copies of layers that read one
    input lie side by side. On CUDA one product computes all layers of one input whose weights lie so.

    Parameters
    ----------
    model : torch.nn.Module
    autocast_dtype : torch.dtype, optional
    """

    def __init__(self, model: Any, autocast_dtype: torch.dtype | None) -> None:
        self.model, self.autocast_dtype = model, autocast_dtype
        self.copies: dict[Any, Weights] = {}  # by layer

    def forwards(self) -> dict[Any, Forward]:
        """Update the copies and return what replaces the forward of each layer."""
        sources = self._sources()
        self.copies = {m: copy for m, copy in self.copies.items() if m in sources and self._copied_in(m, sources[m])}
        groups = [[m for layer in group if (m := _reading(layer, sources))] for group in siblings(self.model)]
        for group in (*groups, *([m] for m in sources)):
            self._make_copies({m: sources[m] for m in group})
        read = {m: self._updated(m, source) for m, source in sources.items()}
        found: dict[Any, Forward] = {}
        for group in groups:
            for run in _side_by_side({m: read[m] for m in group if self._joins(m, read[m])}):
                found |= JoinedProduct(run).forwards()
        for module, (weight, bias) in read.items():
            if module not in found and (module in self.copies or fast_linear_serves(weight)):
                found[module] = functools.partial(_product(weight), weight=weight, bias=bias)
        return found

    def _sources(self) -> dict[Any, torch.nn.Linear]:
        """Return whose weights each layer reads that may read them in another way than by its own forward."""
        free = [module for module in self.model.modules() if "forward" not in vars(module)]
        merge = [m for m in free if self.autocast_dtype is None and _merges(m)]
        found = {m: m.base_layer for m in merge if m.base_layer.weight.dtype in MERGED}
        inside = set(found.values())
        return found | {m: m for m in free if m not in inside and _is_linear(m)}

    def _copied_in(self, module: Any, source: torch.nn.Linear) -> torch.dtype | None:
        """Return the dtype of a layer's copy, or None if it reads the model's own weight."""
        if module is not source:  # LoRA, merged
            return source.weight.dtype
        return self.autocast_dtype if source.weight.dtype == torch.float32 else None

    def _make_copies(self, layers: Mapping[Any, torch.nn.Linear]) -> None:
        """Make memory for those copies of layers that are missing, side by side if they fit together."""
        new = {m: source for m, source in layers.items() if m not in self.copies and self._copied_in(m, source)}
        kinds = {(self._copied_in(m, s), s.weight.device, s.weight.shape[1], s.bias is None) for m, s in new.items()}
        if len(kinds) != 1:  # of several kinds: then each gets its own, since it is given alone too
            return
        [(dtype, device, width, no_bias)] = kinds
        empty = functools.partial(torch.empty, dtype=dtype, device=device)
        sizes = [source.weight.shape[0] for source in new.values()]
        biases = [None] * len(sizes) if no_bias else empty(sum(sizes)).split(sizes)
        for module, weight, bias in zip(new, empty(sum(sizes), width).split(sizes), biases, strict=True):
            self.copies[module] = Weights(weight, bias)

    def _updated(self, module: Any, source: torch.nn.Linear) -> Weights:
        """Return what a layer reads, a copy with the values of now."""
        copy = self.copies.get(module)
        if copy is None:
            return Weights(source.weight, source.bias)
        copy.weight.copy_(source.weight)
        if copy.bias is not None:
            copy.bias.copy_(source.bias)
        if module is not source:
            for name in module.active_adapters:
                if name in module.lora_A:
                    a, b = module.lora_A[name].weight, module.lora_B[name].weight
                    copy.weight.addmm_(b, a, alpha=module.scaling[name])
        return copy

    def _joins(self, module: Any, read: Weights) -> bool:
        """Return whether a layer's product may be computed together with others'."""
        low, hooked = self.autocast_dtype, any(getattr(module, kind) for kind in HOOKS)
        return read.weight.device.type in JOINED and not hooked and low in (None, read.weight.dtype)


class JoinedProduct:
    """Layers whose weights lie side by side: the first that is called computes the product for all of them.

    Another one takes its part if its input is the same tensor, unchanged, and computes by itself if not. If that
    happens, or one is not called before the next product, then their inputs differ: from then on each computes its own.

    Parameters
    ----------
    layers : mapping of modules to Weights
        In the order of their weights in memory.
    """

    def __init__(self, layers: Mapping[Any, Weights]) -> None:
        self._layers = list(layers)
        self._own, self._all = list(layers.values()), _as_one(layers.values())
        self._sizes = [len(own.weight) for own in self._own]
        self._apart = False
        self._forget()

    def forwards(self) -> dict[Any, Forward]:
        """Return what replaces the forward of each layer."""
        return {layer: functools.partial(self._forward, i) for i, layer in enumerate(self._layers)}

    def _forget(self) -> None:
        self._input: tuple[torch.Tensor, int] | None = None  # of the last product, and its version
        self._parts: dict[int, torch.Tensor] = {}  # of the last product, which no layer has taken

    def _forward(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        if self._parts and not (layer in self._parts and self._is_last(x)):
            self._apart = True
            self._forget()
        if self._apart or x.is_inference():  # such tensors have no version
            weight, bias = self._own[layer]
            return _product(weight)(x, weight, bias)
        if not self._parts:
            weight, bias = self._all
            self._parts = dict(enumerate(_product(weight)(x, weight, bias).split(self._sizes, -1)))
            self._input = x, x._version
        part = self._parts.pop(layer)
        if not self._parts:
            self._forget()
        return part

    def _is_last(self, x: torch.Tensor) -> bool:
        return self._input is not None and self._input[0] is x and self._input[1] == x._version


def _reading(layer: Any, sources: Mapping[Any, Any]) -> Any:
    """Return which module computes a layer's product with its weight: of an adapter's layer the one that it wraps."""
    inner = vars(layer)["_modules"].get("base_layer")
    return next((m for m in (layer, inner) if m in sources), None)


def _product(weight: torch.Tensor) -> Forward:
    """Return what computes products without gradients, on any device: few rows by our kernel where it serves."""
    return linear if fast_linear_serves(weight) else torch.nn.functional.linear


def _as_one(layers: Iterable[Weights]) -> Weights | None:
    """Return the weights of layers as those of one, or None if they do not lie side by side."""
    weights, biases = zip(*layers, strict=True)
    weight, given = joined(weights), [b for b in biases if b is not None]
    bias = joined(given) if given else None
    good = weight is not None and len(given) in (0, len(biases)) and (bias is not None or not given)
    return Weights(weight, bias) if good else None


def _side_by_side(layers: Mapping[Any, Weights]) -> Iterator[dict[Any, Weights]]:
    """Yield the longest runs of two or more layers whose weights lie side by side."""
    run: dict[Any, Weights] = {}
    for module, weights in layers.items():
        if run and _as_one((*run.values(), weights)) is None:
            yield from [run] * (len(run) > 1)
            run = {}
        run[module] = weights
    yield from [run] * (len(run) > 1)


def _is_linear(module: Any) -> bool:
    """Return whether a layer is torch.nn.Linear on a weight of its own, and not pruned, normed or quantised in each call."""
    if type(module) is not torch.nn.Linear or module._forward_pre_hooks or "weight" not in module._parameters:
        return False
    return plain(module.weight)


def _merges(module: Any) -> bool:
    """Return whether a layer is PEFT's plain LoRA on torch.nn.Linear with adapters that are enabled and not merged."""
    lora = sys.modules.get("peft.tuners.lora.layer")  # imported if the model has such layers
    if lora is None or type(module) is not lora.Linear or type(module.base_layer) is not torch.nn.Linear:
        return False
    special = module.lora_variant or any(module.lora_bias.values()) or module.fan_in_fan_out
    if special or module.merged or module.disable_adapters or not plain(module.base_layer.weight):
        return False
    return all(map(is_bare, module.children()))  # hooks of the layer itself still run
