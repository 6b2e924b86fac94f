"""Gradients of replayed passes: the parameters' own `.grad` are views of the buffers that graphs add to."""

import gc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..errors import PMCError
from ..ops.checks import no_double_backward
from .aliases import Caller
from .recorder import CaptureError
from .static_inputs import ALIGNED, round_up

ALL_AT_ONCE = (
    "a replayed pass adds to .grad of all trained parameters at once: call loss.backward() without inputs, or use "
    "cuda_graphs=False for torch.autograd.grad"
)
# Private, and the only way to tell whether memory is still in use, or which nodes a backward runs.
_storage_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
_will_run: Callable[[Any], bool] | None = getattr(torch._C, "_will_engine_execute_node", None)


class Gradients:
    """The buffers that all graphs of a model add gradients to, one for each dtype.

    Parameters
    ----------
    call : Module
        Each of its trained parameters has a part of a buffer.
    """

    def __init__(self, call: Any) -> None:
        if _storage_use_count is None:
            raise CaptureError("this torch does not tell whether the memory of gradients is in use")
        self._weights = list(call.parameters())
        self._named = {name: p for name, p in call.named_parameters() if p.requires_grad}
        ends: dict[torch.dtype, int] = {}
        self._places = {}
        for name, p in self._named.items():
            begin = ends.get(p.dtype, 0)
            self._places[name] = begin
            ends[p.dtype] = round_up(begin + p.numel(), ALIGNED)
        some = next(iter(self._named.values()))
        self.buffers = {dtype: torch.zeros(n, dtype=dtype, device=some.device) for dtype, n in ends.items()}
        self._idle = self._before = self._uses()  # references to the buffers where no gradient is handed out

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained ones."""
        return list(self._named.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def caller(self, call: Any) -> Caller:
        """Return the model with parameters whose gradients are added to the buffers."""
        aliases = {name: p.detach().requires_grad_() for name, p in self._named.items()}
        for name, alias in aliases.items():
            alias.grad = self._view(name)
        return Caller(call, aliases)

    def norms(self, names: Iterable[str]) -> torch.Tensor:
        """Return the gradients' norms: float32 or wider, [names]."""
        return torch.stack([_norm(self._view(name)) for name in names])

    def held(self) -> bool:
        """Return whether gradients that were taken from their parameters are still in use elsewhere.

        As where a user keeps those of one pass and sets `.grad` to None: a replay would overwrite them.
        """
        uses = self._other_uses()
        self._idle = {dtype: min(n, self._idle[dtype]) for dtype, n in uses.items()}
        all_out = all(self._is_ours(name, p.grad) for name, p in self._named.items())
        return not all_out and uses != self._idle

    def save(self) -> dict[torch.dtype, torch.Tensor] | None:
        """Return a copy of gradients that are in use, which a capture is about to overwrite."""
        gc.collect()  # what is garbage would be counted now and not afterwards
        self._before = self._other_uses()
        if not any(self._is_ours(name, p.grad) for name, p in self._named.items()):
            return None
        try:
            return {dtype: buffer.clone() for dtype, buffer in self.buffers.items()}
        except torch.OutOfMemoryError:
            return {dtype: buffer.cpu() for dtype, buffer in self.buffers.items()}

    def restore(self, saved: Mapping[torch.dtype, torch.Tensor] | None) -> None:
        """Undo what a capture wrote, and add the references that it holds to those that are no user's."""
        for dtype, buffer in (saved or {}).items():
            self.buffers[dtype].copy_(buffer)
        gc.collect()
        now = self._other_uses()
        self._idle = {dtype: self._idle[dtype] + now[dtype] - self._before[dtype] for dtype in now}

    def add(self, names: Iterable[str], replay: Callable[[], None]) -> None:
        """Add what a replay adds to the buffers to parameters' `.grad`, which are parts of the buffers from then on.

        A `.grad` that is other memory stays, and is added to.
        """
        if self.held():
            self._add_apart(names, replay)
            return
        new = [name for name in names if not self._is_ours(name, self._named[name].grad)]
        if not any(self._is_ours(name, p.grad) for name, p in self._named.items()):
            for buffer in self.buffers.values():
                buffer.zero_()
        elif new:
            torch._foreach_zero_([self._view(name) for name in new])
        others = [name for name in new if self._named[name].grad is not None]
        for name in new:
            if self._named[name].grad is None:
                self._named[name].grad = self._view(name)
        replay()
        for name in others:
            _accumulate(self._named[name], self._view(name))

    def _add_apart(self, names: Iterable[str], replay: Callable[[], None]) -> None:
        # what is held was taken between forward and backward
        before = {dtype: buffer.clone() for dtype, buffer in self.buffers.items()}
        for buffer in self.buffers.values():
            buffer.zero_()
        replay()
        made = {dtype: buffer.clone() for dtype, buffer in self.buffers.items()}
        for dtype, buffer in before.items():
            self.buffers[dtype].copy_(buffer)
        for name in names:
            _accumulate(self._named[name], self._view(name, made))

    def weights(self) -> list[tuple[int, int]]:
        """Return where the weights are and which version: backward must find what forward has read."""
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self._weights]

    def _view(self, name: str, buffers: Mapping[torch.dtype, torch.Tensor] | None = None) -> torch.Tensor:
        p, begin = self._named[name], self._places[name]
        return (buffers or self.buffers)[p.dtype][begin : begin + p.numel()].view(p.shape)

    def _is_ours(self, name: str, grad: torch.Tensor | None) -> bool:
        if grad is None or grad.layout != torch.strided:
            return False
        buffer = self.buffers[self._named[name].dtype]
        place = buffer.data_ptr() + self._places[name] * buffer.itemsize
        return grad.data_ptr() == place and grad.dtype == buffer.dtype and grad.is_contiguous()

    def _other_uses(self) -> dict[torch.dtype, int]:
        """Return the references to the buffers that are not parameters' `.grad`."""
        uses = self._uses()
        for name, p in self._named.items():
            uses[p.dtype] -= self._is_ours(name, p.grad)
        return uses

    def _uses(self) -> dict[torch.dtype, int]:
        assert _storage_use_count is not None
        return {dtype: _storage_use_count(b.untyped_storage()._cdata) for dtype, b in self.buffers.items()}


def measured(call: Any, norms: dict[str, torch.Tensor]) -> Caller:
    """Return the model with parameters whose gradients are measured and freed one by one, for `norms`."""

    def measure(name: str, alias: torch.Tensor) -> None:
        assert alias.grad is not None
        norms[name] = _norm(alias.grad)
        alias.grad = None

    aliases = {name: p.detach().requires_grad_() for name, p in call.named_parameters() if p.requires_grad}
    for name, alias in aliases.items():
        alias.register_post_accumulate_grad_hook(lambda alias, name=name: measure(name, alias))
    return Caller(call, aliases)


def _accumulate(p: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    if p.grad is None:
        p.grad = gradient
    else:
        p.grad.add_(gradient)


def _norm(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))


def needs_autograd(p: torch.nn.Parameter) -> bool:
    """Return whether only autograd serves a parameter.

    It has hooks, a gradient of another dtype, no elements, or strides that a part of a buffer does not have.
    """
    hooks = p._backward_hooks or p._post_accumulate_grad_hooks
    other = getattr(p, "grad_dtype", p.dtype) != p.dtype
    return bool(hooks) or other or not p.numel() or not p.is_contiguous()


class Pass:
    """A forward pass that was replayed, until its gradients are computed.

    Parameters
    ----------
    gradients : Gradients
    reached : collection of str
        Names of the parameters that the loss depends on.
    factor : Tensor []
        The upstream gradient, for the replay.
    replay : callable
        Adds the gradients times `factor` to the buffers.
    """

    def __init__(
        self, gradients: Gradients, reached: Iterable[str], factor: torch.Tensor, replay: Callable[[], None]
    ) -> None:
        self._gradients, self._reached, self._factor, self._replay = gradients, reached, factor, replay
        self._weights = gradients.weights()
        self.pending = True

    def backward(self, upstream: torch.Tensor) -> None:
        """Add the gradients to the parameters' `.grad`, once."""
        if not self.pending:
            raise RuntimeError("backward a second time through a replayed pass: compute the loss again")
        if self._weights != self._gradients.weights():
            raise RuntimeError(
                "a weight was changed between a replayed pass and its backward: compute the loss again"
            )
        if any(map(needs_autograd, self._gradients.parameters)):
            raise PMCError("a parameter got hooks between a replayed pass and its backward: register them before it")
        self.pending = False
        self._factor.copy_(upstream)
        self._gradients.add(self._reached, self._replay)


class Replayed(torch.autograd.Function):
    """A loss whose backward is replayed, and writes `.grad` itself."""

    @staticmethod
    def forward(ctx: Any, replayed: Pass, loss: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.replayed = replayed
        return loss.clone()

    @staticmethod
    @no_double_backward
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[Any, ...]:
        nodes = [node for node, _ in ctx.next_functions if node is not None]
        if not _all_run(nodes):
            raise PMCError(ALL_AT_ONCE)
        ctx.replayed.backward(upstream)
        return None, None, *[None] * len(nodes)


def _all_run(nodes: list[Any]) -> bool:
    """Return whether the running backward reaches all leaves, and accumulates rather than returns their gradients."""
    if _will_run is None:  # then torch itself says that it finds no gradients
        return True
    try:
        return all(map(_will_run, nodes))
    except RuntimeError:  # of torch.autograd.grad
        return False
