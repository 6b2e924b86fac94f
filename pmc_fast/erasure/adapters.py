"""LoRA adapters: trained by PEFT, merged into weights bit-reproducibly, concatenated, read and written.

PEFT's own merge is a matrix product in the weights' precision. Its last bits depend on library, threads and processor, so
that a hash of merged weights could not be compared between machines; `merge` is exact up to one rounding.
"""

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import PMCError
from ..models import loading

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ALL_LINEAR = "all-linear"
_PREFIX = "base_model.model."  # of parameter names in PEFT's files
_NAME, _FRESH = "default", "fresh"
_BLOCK = 1 << 16  # elements of a weight that are merged at once, in float64


@dataclass(frozen=True, slots=True)
class Factors:
    """A layer's weight update, scaling * b @ a."""

    a: torch.Tensor  # [r, in]
    b: torch.Tensor  # [out, r]
    scaling: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter."""

    factors: dict[str, Factors]  # by the layer's name in the base model
    targets: list[str]  # PEFT's target_modules: name suffixes that match these layers and no others


def attach(model: Any, *, r: int, alpha: int, targets: Sequence[str], seed: int) -> Any:
    """Return PEFT's model around `model`: frozen, with a new adapter that changes no output yet.

    Raises
    ------
    PMCError
        peft is missing; a target matches no layer, or one that is not a plain linear layer, or the output head or
        embeddings, whose weights many models tie.
    """
    peft = _peft()
    names = ALL_LINEAR if list(targets) == [ALL_LINEAR] else list(targets)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=names, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            wrapped = peft.get_peft_model(model, config)
        except ValueError as error:
            raise PMCError(f"lora_target is {', '.join(targets)}: {str(error).splitlines()[0]}") from error
    for layer in wrapped.modules():
        if hasattr(layer, "cast_input_dtype_enabled"):
            # autocast casts inputs where it must; PEFT's casts would be kept for backward in each layer
            layer.cast_input_dtype_enabled = False
    ends = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, layer in wrapped.named_modules():
        base = getattr(layer, "base_layer", None)
        if base is not None and (not isinstance(base, (torch.nn.Linear, _conv1d())) or id(layer) in ends):
            name, kind = name.removeprefix(_PREFIX), type(base).__name__
            raise PMCError(
                f"lora_target {name} ({kind}) is no linear layer between embeddings and head: leave it out"
            )
    return wrapped


def renew(wrapped: Any, *, seed: int) -> None:
    """Give an adapter the numbers that `attach` would give a new one, in the memory that it has.

    What was captured with the adapter's addresses stays valid.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped.add_adapter(_FRESH, copy.copy(wrapped.peft_config[_NAME]))
    with torch.no_grad():
        for _, layer in _lora_layers(wrapped):
            for factors in (layer.lora_A, layer.lora_B):
                factors[_NAME].weight.copy_(factors[_FRESH].weight)
    wrapped.delete_adapter(_FRESH)


@torch.no_grad()
def clear(wrapped: Any) -> None:
    """Let an adapter change nothing: what its layers add is zero, exactly."""
    for _, layer in _lora_layers(wrapped):
        layer.lora_B[_NAME].weight.zero_()


def bare_names(model: Any) -> dict[str, str]:
    """Return the names of a model's tensors by those that they have without adapters, which are left out."""
    prefixes = tuple(f"{name}." for name, _ in _lora_layers(model))
    found = {}
    for name in model.state_dict():
        layer = next((p for p in prefixes if name.startswith(p)), None)
        if layer is None:
            found[name] = name
        elif name.startswith(f"{layer}base_layer."):
            found[layer + name.removeprefix(f"{layer}base_layer.")] = name
    return found


def bare_hash(model: Any) -> str:
    """Return `weights_hash` of a model as it is without the adapter that may be attached to it."""
    state = model.state_dict()
    return loading.weights_hash(model, state={name: state[own] for name, own in bare_names(model).items()})


def extract(wrapped: Any) -> Adapter:
    """Return the adapter of PEFT's model, copied to the CPU."""
    factors = {
        name: Factors(
            layer.lora_A[_NAME].weight.detach().cpu().clone(),
            layer.lora_B[_NAME].weight.detach().cpu().clone(),
            float(layer.scaling[_NAME]),
        )
        for name, layer in _lora_layers(wrapped)
    }
    return Adapter(factors, sorted(wrapped.peft_config[_NAME].target_modules))


@torch.no_grad()
def merge(model: Any, adapter: Adapter, device: torch.device | None = None) -> None:
    """Add an adapter's update to a model's weights in place, rounding each weight once.

    `device` computes the sum, by default the weights' own.

    Products of two float32 numbers are exact in float64. The r products are added in order, scaled, added to the weight
    and rounded to its dtype: one IEEE operation per element at a time, so every machine and device gets the same bits.
    """
    for name, f in adapter.factors.items():
        try:
            layer = model.get_submodule(name)
            layer = getattr(layer, "base_layer", layer)  # one with an adapter for the next request
        except AttributeError as error:
            raise PMCError(f"the adapter changes {name}, which the model has not: it is another model's") from error
        weight = layer.weight.T if isinstance(layer, _conv1d()) else layer.weight
        if weight.shape != (f.b.shape[0], f.a.shape[1]):
            raise PMCError(
                f"the adapter's {name} is {(f.b.shape[0], f.a.shape[1])}, the model's {tuple(weight.shape)}"
            )
        at = weight.device if device is None else device
        a, b = (x.to(at, torch.float64) for x in (f.a, f.b))
        count = max(1, _BLOCK // weight.shape[1])
        for begin in range(0, len(weight), count):
            part = weight[begin : begin + count]
            change = torch.zeros(part.shape, dtype=torch.float64, device=at)
            for k in range(len(a)):
                change.addcmul_(b[begin : begin + len(part), k, None], a[k])
            part.copy_(part.to(at, torch.float64) + change * f.scaling)


def extrapolated(adapter: Adapter, alpha: float = 4.0) -> Adapter:
    """Return the adapter that leads `alpha` times as far the other way: weights become W - alpha (scaling * b @ a).

    Of an adapter that learned answers by heart, it is the one that forgets them (arXiv 2602.06441; `methods.Memorize`).
    """
    if not alpha > 0:
        raise PMCError(f"alpha is {alpha}: it must be above 0")
    factors = {name: Factors(f.a, f.b, -alpha * f.scaling) for name, f in adapter.factors.items()}
    return Adapter(factors, adapter.targets)


def concatenated(adapters: Sequence[Adapter]) -> Adapter:
    """Return one adapter whose update is the sum of theirs: all a stacked, all scaling * b side by side.

    Lower ranks are padded with zeros, since not every server takes a rank per layer.
    """
    layers: dict[str, list[Factors]] = {}
    for adapter in adapters:
        for name, f in adapter.factors.items():
            layers.setdefault(name, []).append(f)
    rank = max(sum(len(f.a) for f in parts) for parts in layers.values())
    factors = {}
    for name, parts in layers.items():
        a, b = torch.cat([f.a for f in parts]), torch.cat([f.b * f.scaling for f in parts], dim=1)
        missing = rank - len(a)
        factors[name] = Factors(
            torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing)), 1.0
        )
    return Adapter(factors, sorted({t for adapter in adapters for t in adapter.targets}))


def write(adapter: Adapter, directory: Path, base: str) -> None:
    """Write an adapter in PEFT's format; `base` names its base model."""
    from safetensors.torch import save_file

    ranks = {len(f.a) for f in adapter.factors.values()}
    scalings = {f.scaling for f in adapter.factors.values()}
    assert len(ranks) == len(scalings) == 1  # as of extract and concatenated
    (rank,), (scaling,) = ranks, scalings
    tensors = {}
    for name, f in adapter.factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = f.a.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = f.b.contiguous()
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    config = _peft().LoraConfig(
        r=rank, lora_alpha=_whole(scaling * rank), target_modules=adapter.targets, task_type="CAUSAL_LM",
        base_model_name_or_path=base, inference_mode=True,
    )  # fmt: skip
    config.save_pretrained(directory)


def read(directory: Path) -> Adapter:
    """Read an adapter that `write` wrote."""
    from safetensors.torch import load_file

    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(directory / WEIGHTS)
    except Exception as error:  # OSError, ValueError or safetensors' own
        raise PMCError(f"adapter {directory} can't be read: {str(error).splitlines()[0]}") from error
    scaling = config["lora_alpha"] / config["r"]
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    factors = {
        name.removeprefix(_PREFIX): Factors(
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"], scaling
        )
        for name in sorted(names)
    }
    return Adapter(factors, sorted(config["target_modules"]))


def _lora_layers(wrapped: Any) -> Iterable[tuple[str, Any]]:
    for name, module in wrapped.named_modules():
        if hasattr(module, "lora_A") and _NAME in module.lora_A:
            yield name.removeprefix(_PREFIX), module


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _conv1d() -> Any:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def check_peft() -> None:
    """Refuse early where peft is missing."""
    _peft()


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise PMCError("adapters need peft: pip install 'pmc_fast[lora]'") from error
    return peft
