"""Linear layers that read one input, and their weights side by side in one storage: one product computes them all."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..ops.adamw import ALIGNED
from .fused_layers import plain

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def siblings(model: torch.nn.Module) -> Iterator[list[Any]]:
    """Yield the projections of each attention and of each gated MLP, which are likely to read one input."""
    for module in model.modules():
        children = vars(module)["_modules"]
        for names in SIBLINGS:
            if all(isinstance(children.get(name), torch.nn.Module) for name in names):
                yield [children[name] for name in names]


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return one tensor over the memory of tensors that lie side by side in one storage, in their order.

    Parameters
    ----------
    tensors : sequence of Tensor [n, ...]
        Each of its own n.

    Returns
    -------
    Tensor [sum of n, ...], or None
        A view, without gradients. None unless all are contiguous, of one type, and one begins where another ends.
    """
    first = tensors[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for t in tensors:
        alike = (t.dtype, t.device, t.shape[1:]) == (first.dtype, first.device, first.shape[1:])
        if not (alike and t.is_contiguous() and (t.untyped_storage().data_ptr(), t.data_ptr()) == (storage, end)):
            return None
        end += t.nbytes
    return first.detach().as_strided((sum(t.shape[0] for t in tensors), *first.shape[1:]), first.stride())


@torch.no_grad()
def join_weights(model: torch.nn.Module) -> int:
    """Move the weights of `siblings`, and their biases, side by side, in which order they are computed.

    Parameters stay the objects that they were, and contiguous; only their memory is another. So this is for a model that
    nobody else holds memory of yet: a program that has just loaded it. What moves a weight later separates it again.

    Parameters
    ----------
    model : Module
        Left as they are: weights of several types, devices or widths, of other classes than torch's own, that modules
        share, that are a part of a larger storage (a flat buffer, say) or whose size is not a multiple of 16 bytes.

    Returns
    -------
    int
        The number of groups whose weights lie side by side now.
    """
    uses = Counter(id(p) for m in model.modules() for p in vars(m)["_parameters"].values())
    groups = 0
    for layers in siblings(model):
        if all(type(layer) is torch.nn.Linear for layer in layers):
            groups += _join([layer.weight for layer in layers], uses)
            if all(layer.bias is not None for layer in layers):
                _join([layer.bias for layer in layers], uses)
    return groups


def _join(parameters: Sequence[torch.nn.Parameter], uses: Counter[int]) -> bool:
    kinds = {(p.dtype, p.device, p.shape[1:]) for p in parameters}
    if len(kinds) > 1 or not all(map(_movable, parameters)) or any(uses[id(p)] > 1 for p in parameters):
        return False
    memory = torch.cat([p.data for p in parameters])
    for parameter, part in zip(parameters, memory.split([p.shape[0] for p in parameters]), strict=True):
        parameter.data = part
    return True


def _movable(parameter: torch.nn.Parameter) -> bool:
    whole = parameter.untyped_storage().nbytes() == parameter.nbytes > 0
    return plain(parameter) and parameter.is_contiguous() and whole and parameter.nbytes % ALIGNED == 0
