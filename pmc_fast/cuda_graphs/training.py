"""CUDA graphs of training passes: forward and backward of a pack in one launch.

A PMC step has about a thousand tokens: on a GPU its thousands of small kernels take longer to launch than to run. So
packs are padded to a few sizes and their arrays are copied to the addresses that a graph reads. A replay computes the
loss, the log-probs and every gradient; autograd scales the gradients by the upstream gradient when it reads them.

The model's own forward is captured, with parameters that share the real ones' memory but have no autograd history,
because another thread's backward may use that. Models with hooks or dropout are not captured. Each graph is compared
with the pass itself before it is used.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from ..data.packing import Pack
from .cache import GraphCache
from .gradients import Gradients, Replayed
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
        if not self._serves(pack, call, dtype):
            return None
        # by identity too: a new Parameter on the same memory needs its own gradient
        if self.cache.require((dtype, fingerprint(call, {}), [id(p) for p in call.parameters()])):
            self._gradients = None
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
        pending = self._gradients.next()
        graph.replay()
        loss = Replayed.apply(pending, graph.loss, *self._gradients.parameters)
        return loss, graph.logps[: len(pack.targets)].clone()

    def _serves(self, pack: Pack, call: Any, dtype: torch.dtype) -> bool:
        inner = call.get_base_model() if hasattr(call, "get_base_model") else call
        return (
            torch.is_grad_enabled()
            and inner is self._base
            and dtype in DTYPES
            and any(p.requires_grad for p in call.parameters())
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
        gradients.next()

        def backward(pack: Pack, row_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with fresh_autocast_cache(), torch.enable_grad(), _autocast(device):
                loss, logps = compute(pack, row_scale, model=gradients.caller(call))
                loss.backward()
            return loss.detach(), logps

        graph = _Graph(size, device)
        graph.load(pack, row_scale)

        def padded() -> torch.Tensor:
            loss, logps = backward(graph.pack, graph.row_scale)
            graph.loss.copy_(loss)
            graph.logps.copy_(logps)
            return graph.loss

        graph.replay = recorder.record(padded)
        loss, logps = backward(pack.to(device), row_scale.to(device))
        norms = gradients.norms()
        for written in (graph.loss, graph.logps, *gradients.buffers.values()):
            written.zero_()  # a replay that does nothing must not pass for the pass before it
        graph.replay()
        near = self._tolerance(_computes_in(self._base))
        faint = norms.max() / 5  # gradients that are all rounding, such as that of a key's bias
        agree = [
            (graph.logps[: len(logps)] - logps).abs().mean() <= near.logps,
            (graph.loss - loss).abs() <= near.logps * row_scale.abs().sum().item(),
            ((gradients.norms() - norms).abs() <= near.gradients * (norms + faint)).all(),
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
        self.loss = torch.zeros((), dtype=wide, device=device)
        self.logps = torch.zeros(size.targets, dtype=wide, device=device)
        self.replay: Callable[[], None] = lambda: None
        self.pack: Pack | Any = None
        self.row_scale: torch.Tensor | Any = None

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


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    # without autocast's cache: a capture must cast the weights itself, each time
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False)
