"""CUDA graphs of training passes: the forward pass of a pack in one launch, and its backward in another.

A PMC step has about a thousand tokens: on a GPU its thousands of small kernels take longer to launch than to run. So
packs are padded to a few sizes and their arrays are copied to the addresses that a graph reads. The loss that is
returned replays the backward graph when autograd asks for gradients: times the upstream gradient, they are added to
the parameters' own `.grad`.

The model's own forward is captured, with aliases of its parameters. Models with hooks or dropout are not captured.
Each pair of graphs is compared with the pass itself before it is used. All share memory: while a loss waits for its
backward, further passes run eagerly.
"""

import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from ..data.packing import Pack
from .cache import GraphCache
from .gradients import Gradients, Pass, Replayed, measured, needs_autograd
from .padding import PaddedSegments, Size, pad
from .recorder import HOOKS, CaptureError, Recorder, fingerprint, fresh_autocast_cache
from .static_inputs import ALIGNED, StaticInputs

DTYPES = (torch.bfloat16,)  # of varlen kernels; float16's gradients would miss the scale of the loss
LIMIT = 32  # graphs, each of which holds memory

Compute = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class PassGraphs:
    """Replays training passes of one model.

    Parameters
    ----------
    base : transformers.PreTrainedModel
        The causal language model itself.
    recorder : callable
        Makes a Recorder.
    tolerance : callable
        Returns, for a dtype, how far rounding may put `logps` (mean difference) and `gradients` (relative difference
        of a norm) apart.
    """

    def __init__(self, base: Any, recorder: Callable[[], Recorder], tolerance: Callable[[torch.dtype], Any]) -> None:
        self._base, self._tolerance = base, tolerance
        self.cache: GraphCache[_Graph] = GraphCache(recorder, f"{type(base).__name__}: a training pass", LIMIT)
        self._gradients: Gradients | None = None
        self._last: weakref.ref[Pass] | None = None
        self._waited = 0  # passes since a loss waits for its backward

    @property
    def nbytes(self) -> int:
        """Bytes of buffers outside the graphs' memory pool: the gradients, which `.grad` shares, inputs and results."""
        graphs = sum(graph.nbytes for graph in self.cache.graphs())
        return graphs + (0 if self._gradients is None else self._gradients.nbytes)

    def __call__(
        self, compute: Compute, pack: Pack, row_scale: torch.Tensor, call: Any
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return what `compute` returns, or None for a pass that is to run eagerly.

        Parameters
        ----------
        compute : callable
            (pack, row_scale, model=...) -> (loss, logps), as `PackedPass` computes it.
        pack : Pack
            On the host.
        row_scale : Tensor [M]
            On the host.
        call : Module
            What is called: the base model or PEFT's.
        """
        dtype = _computes_in(self._base)
        if self._pending():
            self._waited += 1
            if self._waited == LIMIT:  # a few are normal: packs whose losses are added up
                warnings.warn(
                    f"{LIMIT} passes ran eagerly, which is slower, while a loss waits for its backward: call it, or "
                    "detach() losses that are kept",
                    stacklevel=2,
                )
            return None
        self._waited = 0
        if not self._serves(pack, call, dtype):
            return None
        # by identity too: a new Parameter on the same memory needs its own gradient
        exact = torch.are_deterministic_algorithms_enabled()
        if self.cache.require((dtype, exact, fingerprint(call, {}), [id(p) for p in call.parameters()])):
            self._gradients = None
        if self._gradients is not None and self._gradients.held():
            warnings.warn(
                "gradients of an earlier pass are still in use, after `.grad` was set to None: this pass runs eagerly, "
                "which is slower (clone() what you keep)",
                stacklevel=2,
            )
            return None
        own = Size.of(pack)
        fitting = (size for size in self.cache.captured() if own.fits(size))
        size = min(fitting, key=lambda size: (size.tokens, size.keys), default=own.rounded())
        graph = self.cache.get(size, lambda recorder: self._capture(recorder, compute, size, pack, row_scale, call))
        if graph is None:
            if not self.cache.captured():
                self._gradients = None  # frees their memory if the only capture failed
            return None
        assert self._gradients is not None
        graph.load(pack, row_scale)
        graph.forward()
        replayed = Pass(self._gradients, graph.reached, graph.factor, graph.backward)
        self._last = weakref.ref(replayed)
        loss = Replayed.apply(replayed, graph.loss, *self._gradients.parameters)
        return loss, graph.logps[: len(pack.targets)].clone()

    def _pending(self) -> bool:
        """Return whether a backward may come that needs what the next replay would overwrite."""
        last = None if self._last is None else self._last()
        return last is not None and last.pending

    def _serves(self, pack: Pack, call: Any, dtype: torch.dtype) -> bool:
        inner = call.get_base_model() if hasattr(call, "get_base_model") else call
        return (
            torch.is_grad_enabled()
            and inner is self._base
            and dtype in DTYPES
            and any(p.requires_grad for p in call.parameters())
            and not any(p.requires_grad and needs_autograd(p) for p in call.parameters())
            and len({p.device for p in call.parameters()}) == 1
            and pack.input_ids.device.type == "cpu"
            and not any(has_hooks_or_dropout(module) for module in call.modules())
        )

    def _capture(
        self, recorder: Recorder, compute: Compute, size: Size, pack: Pack, row_scale: torch.Tensor, call: Any
    ) -> "_Graph":
        """Capture a size and compare its replay with the pass itself."""
        device = self._base.get_input_embeddings().weight.device
        if self._gradients is None:
            self._gradients = Gradients(call)
        gradients = self._gradients
        graph = _Graph(size, device)
        graph.load(pack, row_scale)

        def run(pack: Pack, row_scale: torch.Tensor, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
            with fresh_autocast_cache(), torch.enable_grad(), _autocast(device):
                return compute(pack, row_scale, model=model)

        waiting = []  # for backward

        def forward() -> torch.Tensor:
            loss, logps = run(graph.pack, graph.row_scale, gradients.caller(call))
            waiting.append(loss)
            graph.loss.copy_(loss.detach())
            graph.logps.copy_(logps)
            return graph.loss

        def backward() -> None:
            _backward(waiting.pop(), graph.factor)

        saved = gradients.save()
        try:
            graph.forward, graph.backward = recorder.record(forward, backward)
            norms: dict[str, torch.Tensor] = {}
            loss, logps = run(pack.to(device), row_scale.to(device), measured(call, norms))
            graph.factor.fill_(0.5)
            _backward(loss, graph.factor)
            graph.reached = list(norms)
            for written in (graph.loss, graph.logps, *gradients.buffers.values()):
                written.zero_()  # a replay that does nothing must not pass for the pass before it
            graph.forward()
            graph.backward()
            ours, theirs = gradients.norms(norms), torch.stack(list(norms.values()))
        finally:
            gradients.restore(saved)
        near = self._tolerance(_computes_in(self._base))
        faint = theirs.max() / 5  # gradients that are all rounding, such as that of a key's bias
        agree = [
            (graph.logps[: len(logps)] - logps).abs().mean() <= near.logps,
            (graph.loss - loss.detach()).abs() <= near.logps * row_scale.abs().sum().item(),
            ((ours - theirs).abs() <= near.gradients * (theirs + faint)).all(),
        ]
        if not all(bool(a) for a in agree):
            raise CaptureError("its replay does not compute what the pass computes")
        return graph


class _Graph:
    """A captured pass and the memory that it reads and writes."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size = size
        numbers = 2 * size.tokens + 4 * size.targets + size.keys + size.segments + 1
        self._inputs = StaticInputs(device, 8 * numbers + 16 * ALIGNED)
        wide = torch.float32 if device.type == "cuda" else torch.float64
        self.loss, self.factor = (torch.zeros((), dtype=wide, device=device) for _ in range(2))
        self.logps = torch.zeros(size.targets, dtype=wide, device=device)
        self.forward: Callable[[], None] = lambda: None
        self.backward: Callable[[], None] = lambda: None
        self.reached: list[str] = []  # names of the parameters that the loss depends on
        self.pack: Pack | Any = None
        self.row_scale: torch.Tensor | Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of inputs and results."""
        return self._inputs.nbytes + self.logps.nbytes + self.loss.nbytes + self.factor.nbytes

    def load(self, pack: Pack, row_scale: torch.Tensor) -> None:
        """Pad a pack and copy it to where the graph reads it."""
        t = self._inputs(pad(pack, row_scale, self.size))
        self.row_scale = t.pop("row_scale").view(torch.float64)
        offsets = {name: t.pop(name) for name in ("cu_queries", "cu_keys", "keys") if name in t}
        segments: Any = PaddedSegments(self.size, **offsets)
        self.pack = replace(pack, **t, segments=segments, sequences=[])


def has_hooks_or_dropout(module: torch.nn.Module) -> bool:
    """Return whether a module has hooks, which a replay would not run, or dropout, which can't be compared."""
    drops = isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.training and module.p > 0
    hooks = any(getattr(module, name) for name in HOOKS) or hasattr(module, "_hf_hook")  # accelerate's device_map
    return drops or hooks


def _computes_in(base: Any) -> torch.dtype:
    weight = base.get_input_embeddings().weight
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _backward(loss: torch.Tensor, upstream: torch.Tensor) -> None:
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward(upstream.to(loss.dtype))


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    # without autocast's cache: a capture must cast the weights itself, each time
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False)
