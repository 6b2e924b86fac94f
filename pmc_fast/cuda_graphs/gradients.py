"""Gradients of replayed passes: the buffers that graphs write, and how autograd reads them."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.func import functional_call

from ..ops.checks import no_double_backward
from ..ops.scaled import scaled
from .static_inputs import ALIGNED, round_up


class Gradients:
    """The buffers that all graphs of a model write gradients to, one for each dtype.

    Parameters
    ----------
    call : Module
        Each of its trained parameters has a part of a buffer.
    """

    def __init__(self, call: Any) -> None:
        self._named = {name: p for name, p in call.named_parameters() if p.requires_grad}
        ends: dict[torch.dtype, int] = {}
        places = {}
        for name, p in self._named.items():
            begin = ends.get(p.dtype, 0)
            places[name] = begin
            ends[p.dtype] = round_up(begin + p.numel(), ALIGNED)
        some = next(iter(self._named.values()))
        self.buffers = {dtype: torch.zeros(n, dtype=dtype, device=some.device) for dtype, n in ends.items()}
        self._places = places
        self._reached: set[str] = set()  # by the loss; other parameters get no gradient
        self._pending: weakref.ref[Pending] | None = None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained ones, in the order of `views`."""
        return list(self._named.values())

    def views(self, buffers: Mapping[torch.dtype, torch.Tensor]) -> list[torch.Tensor | None]:
        """Return each parameter's part of buffers."""
        return [self._view(buffers, name) if name in self._reached else None for name in self._named]

    def _view(self, buffers: Mapping[torch.dtype, torch.Tensor], name: str) -> torch.Tensor:
        p, begin = self._named[name], self._places[name]
        return buffers[p.dtype][begin : begin + p.numel()].view(p.shape)

    def norms(self) -> torch.Tensor:
        """Return each gradient's norm: float32 [parameters that are part of the loss]."""
        views = [v for v in self.views(self.buffers) if v is not None]
        return torch.stack(
            [torch.linalg.vector_norm(v, dtype=torch.promote_types(v.dtype, torch.float32)) for v in views]
        )

    def next(self) -> "Pending":
        """Return the gradients of the next replay, after copying those of the last one that autograd has yet to read."""
        before = self._pending() if self._pending is not None else None
        if before is not None:
            before.move()
        pending = Pending(self)
        self._pending = weakref.ref(pending)
        return pending

    def caller(self, call: Any) -> "_Caller":
        """Return the model with parameters that share the real ones' memory and write their gradients here."""
        aliases = {}
        for name, p in self._named.items():
            alias = p.detach().requires_grad_()
            alias.register_post_accumulate_grad_hook(self._keeper(name))
            aliases[name] = alias
        return _Caller(call, aliases)

    def _keeper(self, name: str) -> Callable[[torch.Tensor], None]:
        def keep(alias: torch.Tensor) -> None:
            assert alias.grad is not None
            self._reached.add(name)
            self._view(self.buffers, name).copy_(alias.grad)
            alias.grad = None  # its memory is used for the next one

        return keep


class _Caller:
    """A model called with other parameters."""

    def __init__(self, call: Any, parameters: dict[str, torch.Tensor]) -> None:
        self._call, self._parameters = call, parameters
        self.modules = call.modules

    def __call__(self, **inputs: Any) -> Any:
        return functional_call(self._call, self._parameters, (), inputs)


class Pending:
    """Gradients of one pass, until autograd reads them."""

    def __init__(self, gradients: Gradients) -> None:
        self._gradients = gradients
        self._buffers: Mapping[torch.dtype, torch.Tensor] | None = gradients.buffers

    def move(self) -> None:
        """Copy what the next pass is about to overwrite."""
        if self._buffers is self._gradients.buffers:
            self._buffers = {dtype: buffer.clone() for dtype, buffer in self._buffers.items()}

    def consume(self, factor: torch.Tensor) -> list[torch.Tensor | None]:
        """Return the gradients times `factor`; a second call is an error."""
        if self._buffers is None:
            raise RuntimeError("backward a second time through a replayed pass: compute the loss again")
        buffers, self._buffers = self._buffers, None
        return self._gradients.views({dtype: scaled(buffer, factor) for dtype, buffer in buffers.items()})


class Replayed(torch.autograd.Function):
    """A loss whose gradients have been computed."""

    @staticmethod
    def forward(ctx: Any, pending: Pending, loss: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.pending = pending
        return loss.clone()

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.pending.consume(factor)
