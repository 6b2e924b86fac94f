"""LoRA adapters as numbers: trained by PEFT, summed into weights exactly, concatenated, hashed.

PEFT trains and loads them. What is summed into weights is summed here, because PEFT's merge is a matrix product in
the weights' own precision: its last bits depend on library, threads and processor, and a hash of weights must not.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import PMCError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ALL_LINEAR = "all-linear"
_PREFIX = "base_model.model."  # of a parameter's name in PEFT's files
_NAME = "default"
_ROWS = 1 << 16  # float64 numbers of a weight that are summed at once


@dataclass(frozen=True, slots=True)
class Factors:
    """One layer's change of weights, scaling * b @ a."""

    a: torch.Tensor  # [r, in]
    b: torch.Tensor  # [out, r]
    scaling: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter."""

    factors: dict[str, Factors]  # by the layer's name in the base model
    targets: list[str]  # PEFT's target_modules: ends of names, which match these layers and no others


def attach(model: Any, *, r: int, alpha: int, targets: Sequence[str], seed: int) -> Any:
    """Return PEFT's model around `model`: frozen, with a fresh adapter that changes nothing yet.

    Raises
    ------
    PMCError
        peft is missing, a target matches no layer, or one that is no plain linear layer, or the output head or
        embeddings, whose weights many models share.
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
    ends = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, layer in wrapped.named_modules():
        base = getattr(layer, "base_layer", None)
        if base is not None and (not isinstance(base, (torch.nn.Linear, _conv1d())) or id(layer) in ends):
            name, kind = name.removeprefix(_PREFIX), type(base).__name__
            raise PMCError(
                f"lora_target {name} ({kind}) is no linear layer between embeddings and head: leave it out"
            )
    return wrapped


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
def merge(model: Any, adapter: Adapter) -> None:
    """Add an adapter's change to a model's weights in place, rounding each weight once.

    A product of two float32 numbers is exact in float64; the r products are added in order, scaled, added to the
    weight and rounded to its dtype. Each is one IEEE operation an element: the result is the same bits on every
    machine and device.
    """
    for name, f in adapter.factors.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError as error:
            raise PMCError(f"the adapter changes {name}, which the model has not: it is another model's") from error
        weight = layer.weight.T if isinstance(layer, _conv1d()) else layer.weight
        if weight.shape != (f.b.shape[0], f.a.shape[1]):
            raise PMCError(
                f"the adapter's {name} is {(f.b.shape[0], f.a.shape[1])}, the model's {tuple(weight.shape)}"
            )
        a, b = (x.to(weight.device, torch.float64) for x in (f.a, f.b))
        for rows in range(0, len(weight), max(1, _ROWS // weight.shape[1])):
            part = weight[rows : rows + max(1, _ROWS // weight.shape[1])]
            change = torch.zeros(part.shape, dtype=torch.float64, device=weight.device)
            for k in range(len(a)):
                change.addcmul_(b[rows : rows + len(part), k, None], a[k])
            part.copy_(part.double() + change * f.scaling)


def concatenated(adapters: Sequence[Adapter]) -> Adapter:
    """Return one adapter whose change is the sum of all of theirs: a stacked, scaling * b side by side.

    Where the layers' ranks differ the lower ones are filled up with zeros: not every server takes a rank a layer.
    """
    names = dict.fromkeys(name for adapter in adapters for name in adapter.factors)
    factors = {}
    for name in names:
        parts = [adapter.factors[name] for adapter in adapters if name in adapter.factors]
        factors[name] = Factors(
            torch.cat([f.a for f in parts]), torch.cat([f.b * f.scaling for f in parts], dim=1), 1.0
        )
    rank = max(len(f.a) for f in factors.values())
    for name, f in factors.items():
        missing = rank - len(f.a)
        pad = torch.nn.functional.pad
        factors[name] = Factors(pad(f.a, (0, 0, 0, missing)), pad(f.b, (0, missing)), 1.0)
    return Adapter(factors, sorted({t for adapter in adapters for t in adapter.targets}))


def write(adapter: Adapter, directory: Path, base: str) -> None:
    """Write an adapter as PEFT does; `base` is the name of its model."""
    from safetensors.torch import save_file

    ranks = {len(f.a) for f in adapter.factors.values()}
    scalings = {f.scaling for f in adapter.factors.values()}
    assert len(ranks) == len(scalings) == 1  # as attach and concatenated make them
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
