"""Temporary changes of a transformers model: they last for one pass."""

import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils.operations import ConvertOutputsToFp32
from transformers import AttentionInterface

from ..cuda_graphs.recorder import HOOKS
from ..errors import PMCError

UNKNOWN = ("s_aux", "sinks", "position_bias", "head_mask")  # arguments of an attention that ours do not support
# Models share modelling files and threads may share a model: changes by one must not be seen or undone by another.
ONE_AT_A_TIME = threading.RLock()


def is_bare(module: Any) -> bool:
    """Return whether a module has neither hooks nor a replaced forward, in itself and inside."""
    if not isinstance(module, torch.nn.Module):
        return True
    return all("forward" not in vars(m) and not any(getattr(m, kind) for kind in HOOKS) for m in module.modules())


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Register `function` with transformers' attention interface."""
    AttentionInterface.register(name, function)


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Let every layer of `model` call the attention function `name`."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    with ExitStack() as stack:
        for config in configs.values():
            if hasattr(config, "_attn_implementation_internal"):
                stack.enter_context(attribute(config, "_attn_implementation_internal", name))
        yield


@contextmanager
def outputs_as_computed(model: Any) -> Iterator[None]:
    """Leave out the conversion of results to float32 that accelerate wraps around a model's forward; keep its autocast."""
    own = vars(model).get("forward")
    wrapper = getattr(getattr(own, "__func__", own), "__wrapped__", None)
    with ExitStack() as stack:
        if isinstance(wrapper, ConvertOutputsToFp32):
            inner = wrapper.model_forward
            stack.enter_context(forward(model, types.MethodType(inner, model) if hasattr(own, "__func__") else inner))
        yield


def widened(value: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Pad values with zeros to the size of keys, for kernels that support one size; the caller cuts off the rest."""
    missing = key.shape[-1] - value.shape[-1]
    if missing < 0:
        raise PMCError(f"attention of values wider ({value.shape[-1]}) than keys ({key.shape[-1]}) is not supported")
    return torch.nn.functional.pad(value, (0, missing)) if missing else value


def check_rows(model: Any, found: int, wanted: int) -> None:
    """Refuse a model whose head is not called with the rows of `logits_to_keep`."""
    if found != wanted:
        raise PMCError(
            f"{type(model).__name__} ignores logits_to_keep ({found} rows for {wanted}): this family is not supported"
        )


def check_call(module: Any, state: Any, extras: dict[str, Any]) -> None:
    """Refuse a layer that does not pass on our `state`, or whose attention has arguments that ours does not support."""
    name = type(module).__name__
    if state is None or getattr(module, "layer_idx", None) is None:
        raise PMCError(
            f"{name} does not pass its arguments on to the attention interface: this family is not supported"
        )
    for extra in UNKNOWN:
        if extras.get(extra) is not None:
            raise PMCError(f"{name} needs {extra} in its attention: this family is not supported")


@contextmanager
def forward(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward; hooks and wrappers around it stay."""
    own = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            vars(module).pop("forward", None)
        else:
            module.forward = own


@contextmanager
def forwards(functions: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of several modules."""
    with ExitStack() as stack:
        for module, function in functions.items():
            stack.enter_context(forward(module, function))
        yield


@contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
