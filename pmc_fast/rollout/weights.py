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
from ..ops.fp8_linear import FP8, MULTIPLE, fp8_linear, fp8_rows
from ..ops.layers import fast_linear_serves, linear

# in fewer bits W + scaling B A would round away what the first steps of training add to B A
MERGED = (torch.float32, torch.float64)
JOINED = ("cuda",)  # devices on which one product replaces several; on a CPU core it is no faster (docs/kernels.md)

Forward = Callable[..., torch.Tensor]


class Weights(NamedTuple):
    """What a layer's product reads."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor | None = None  # of each row of a weight in 8 bits

    def forward(self) -> Forward:
        """Return what computes products without gradients, on any device: few rows by our kernel where it serves."""
        if self.scale is not None:
            return functools.partial(fp8_linear, weight=self.weight, scale=self.scale, bias=self.bias)
        call = linear if fast_linear_serves(self.weight) else torch.nn.functional.linear
        return functools.partial(call, weight=self.weight, bias=self.bias)


class RolloutWeights:
    """The weights that a model's linear layers read during a rollout.

    Under autocast float32 layers read copies in its dtype, which are cast once a rollout instead of in each step. LoRA
    layers without autocast compute one product with a merged copy instead of three. Copies of layers that read one
    input lie side by side. On CUDA one product computes all layers of one input whose weights lie so.

    Parameters
    ----------
    model : torch.nn.Module
    autocast_dtype : torch.dtype, optional
    fp8 : bool
        Read copies in 8 bits instead, of all layers but the head whose sizes are multiples of 16.
    """

    def __init__(self, model: Any, autocast_dtype: torch.dtype | None, *, fp8: bool = False) -> None:
        self.model, self.autocast_dtype, self.fp8 = model, autocast_dtype, fp8
        self.copies: dict[Any, Weights] = {}  # by layer

    @torch.no_grad()
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
        for module, weights in read.items():
            if module not in found and (module in self.copies or fast_linear_serves(weights.weight)):
                found[module] = weights.forward()
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
        fits = self.fp8 and not any(n % MULTIPLE for n in source.weight.shape)
        if fits and source not in set(self.model.get_output_embeddings().modules()):
            return FP8
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
        empty = functools.partial(torch.empty, device=device)
        sizes = [source.weight.shape[0] for source in new.values()]
        nothing = [None] * len(sizes)
        low = self.autocast_dtype or next(iter(new.values())).weight.dtype
        weights = empty(sum(sizes), width, dtype=dtype).split(sizes)
        biases = nothing if no_bias else empty(sum(sizes), dtype=low if dtype == FP8 else dtype).split(sizes)
        scales = empty(sum(sizes), dtype=torch.float32).split(sizes) if dtype == FP8 else nothing
        self.copies |= {m: Weights(*parts) for m, *parts in zip(new, weights, biases, scales, strict=True)}

    def _updated(self, module: Any, source: torch.nn.Linear) -> Weights:
        """Return what a layer reads, a copy with the values of now."""
        copy = self.copies.get(module)
        if copy is None:
            return Weights(source.weight, source.bias)
        if copy.scale is None:
            _write(copy.weight, module, source)
        else:  # 8 bits of the merged weight, not of the parts
            for mine, new in zip((copy.weight, copy.scale), fp8_rows(_exact(module, source)), strict=True):
                mine.copy_(new)
        if copy.bias is not None:
            copy.bias.copy_(source.bias)
        return copy

    @torch.no_grad()
    def fp8_error(self) -> float | None:
        """Return the largest relative error of a layer's product in 8 bits, or None if there is none.

        Rows of the weight are multiplied with themselves: no term is negative, so rounding bounds the error of the sum.
        """
        errors = []
        for module, source in self._sources().items():
            copy = self.copies.get(module)
            if copy is None or copy.scale is None:
                continue
            weight = _exact(module, source)
            rows = weight[:: max(1, len(weight) // 16)]
            made = copy._replace(bias=None).forward()(rows.to(self.autocast_dtype or rows.dtype))
            made = made[:, :: max(1, len(weight) // 16)].diagonal().float()
            exact = rows.float().square().sum(1)
            errors.append(((made - exact).abs() / exact.clamp_min(1e-12)).max())
        return torch.stack(errors).max().item() if errors else None

    def _joins(self, module: Any, read: Weights) -> bool:
        """Return whether a layer's product may be computed together with others'."""
        low, hooked = self.autocast_dtype, any(getattr(module, kind) for kind in HOOKS)
        good = read.scale is not None or low in (None, read.weight.dtype)
        return read.weight.device.type in JOINED and not hooked and good


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
        together = _as_one(layers.values())
        if together is None:
            raise ValueError("the layers' weights do not lie side by side")
        self._own, self._all = [own.forward() for own in layers.values()], together.forward()
        self._sizes = [len(own.weight) for own in layers.values()]
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
            return self._own[layer](x)
        if not self._parts:
            self._parts = dict(enumerate(self._all(x).split(self._sizes, -1)))
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


def _exact(module: Any, source: torch.nn.Linear) -> torch.Tensor:
    """Return the weight that a layer multiplies with: its own, or a new one with adapters merged into it."""
    return source.weight if module is source else _write(torch.empty_like(source.weight), module, source)


def _write(weight: torch.Tensor, module: Any, source: torch.nn.Linear) -> torch.Tensor:
    """Write a layer's weight, with the active adapters of LoRA where they are merged: W + sum of scaling * B @ A."""
    weight.copy_(source.weight)
    for name in module.active_adapters if module is not source else ():
        if name in module.lora_A:
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            weight.addmm_(b, a, alpha=module.scaling[name])
    return weight


def _as_one(layers: Iterable[Weights]) -> Weights | None:
    """Return the weights of layers as those of one, or None if they do not lie side by side."""
    found: list[Any] = []
    for parts in zip(*layers, strict=True):  # all weights, biases, scales
        given = [t for t in parts if t is not None]
        whole = joined(given) if given else None
        if given and (whole is None or len(given) < len(parts)):
            return None
        found.append(whole)
    return Weights(*found)


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
