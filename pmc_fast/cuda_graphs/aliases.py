"""A model called with other parameters: they share the real ones' memory, and their gradients go elsewhere.

Aliases have no autograd history, which another thread's backward may use. In a capture they have gradients of their
own, which backward adds to. Where a weight is multiplied by `torch.nn.functional.linear`, the product that gives its
gradient is added there itself: no weight's gradient is made, copied or cast.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.func import functional_call
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from ..ops.checks import no_double_backward, under_autocast
from ..ops.products import weight_gradient


class Caller:
    """A model called with aliases of its trained parameters.

    Parameters
    ----------
    call : Module
    aliases : mapping of str to Tensor
        By the parameters' names.
    """

    def __init__(self, call: Any, aliases: Mapping[str, torch.Tensor]) -> None:
        self._call, self._aliases = call, dict(aliases)

    def modules(self) -> Iterator[torch.nn.Module]:
        modules: Iterator[torch.nn.Module] = self._call.modules()
        return modules

    def total(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Return what the gradient of a weight is to be added to, if it is an alias that has a gradient."""
        return weight.grad if any(weight is alias for alias in self._aliases.values()) else None

    def __call__(self, **inputs: Any) -> Any:
        with _Products({id(a): a.grad for a in self._aliases.values() if a.grad is not None}):
            return functional_call(self._call, self._aliases, (), inputs)


class _Products(TorchFunctionMode):
    """Lets linear layers add the gradients of their weights to totals."""

    def __init__(self, totals: Mapping[int, torch.Tensor]) -> None:
        super().__init__()
        self._totals = totals

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self._linear if func is linear else func)(*args, **(kwargs or {}))

    def _linear(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        total = self._totals.get(id(weight))
        if total is None:
            return linear(input, weight, bias)
        return _Linear.apply(*under_autocast(input, weight), bias, total)


class _Linear(torch.autograd.Function):
    """A linear layer that adds its weight's gradient to a total."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, total: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.total, ctx.bias = total, None if bias is None else bias.dtype
        return linear(x, weight, bias)

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = d_out.reshape(-1, d_out.shape[-1])
        weight_gradient(rows, x.reshape(-1, x.shape[-1]), ctx.total)
        d_x = d_out @ weight if ctx.needs_input_grad[0] else None
        return d_x, None, rows.sum(0, dtype=ctx.bias) if ctx.needs_input_grad[2] else None, None
