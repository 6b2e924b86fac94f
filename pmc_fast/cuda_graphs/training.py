"""CUDA graphs of training passes: forward and backward of a pack, launched as one.

A step of PMC has about a thousand tokens: on a GPU its thousands of small kernels take longer to launch than to run.
A pack is padded to a size that was captured and its arrays go to the places that the capture reads. A replay leaves
loss, log-probs and every gradient; autograd gets the gradients, times what comes from above, when it asks for them.

Captured is the model's own forward, with parameters that share the real ones' memory and no history: what the real
ones are part of, such as another thread's backward, stays out of it. Python does not run in a replay, so a model with
hooks is not captured; nor is one with dropout. Before a capture is used, it is compared with the pass it replays.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from ..data.packing import Pack
from .gradients import Gradients, Replayed
from .padding import Size, pad
from .recorder import (
    HOOKS,
    CaptureError,
    Recorder,
    casting_afresh,
    fingerprint,
)
from .static_inputs import ALIGNED, Upload

DTYPES = (torch.bfloat16,)  # that varlen kernels serve; float16's gradients would miss what scales the loss
MOST = 32  # captures, each of which holds memory
ALIKE = 5e-2  # by which norms of gradients may differ: padding changes the order of sums, in bfloat16
FAINT = 1e-2  # of the largest norm: gradients that are all rounding, such as a key's bias

Compute = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class PaddedSegments:
    """The segments of a padded pack: their offsets are on the device alone."""

    shared = False

    def __init__(self, cu_seqlens: torch.Tensor, longest: int) -> None:
        self._cu_seqlens, self.longest = cu_seqlens, (longest, longest)

    @property
    def lengths(self) -> list[int]:
        """Not known on the host, where attention sequence by sequence would need them."""
        raise CaptureError("its attention goes sequence by sequence")

    def cu_seqlens(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return int32 [S + 1] offsets of queries and of keys."""
        return self._cu_seqlens, self._cu_seqlens


class PassGraphs:
    """Replays training passes of one model.

    Parameters
    ----------
    base : transformers.PreTrainedModel
        The causal language model itself.
    recorder : callable
        Makes a Recorder.
    close : mapping
        By dtype, how far log-probs of one model, computed in two ways, may be apart in the mean.
    """

    def __init__(self, base: Any, recorder: Callable[[], Recorder], close: Mapping[torch.dtype, float]) -> None:
        self._base, self._new_recorder, self._close = base, recorder, close
        self.captures = self.replays = 0
        self.drop()

    def drop(self) -> None:
        """Let go of all captures and their memory."""
        self._graphs: list[_Graph] = []
        self._seen: set[Size] = set()
        self._gradients: Gradients | None = None
        self._recorder: Recorder | None = None
        self._relies_on: Any = None

    def __call__(
        self, compute: Compute, pack: Pack, row_scale: torch.Tensor, call: Any
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return what `compute` returns, or None for a pass that is not to be replayed.

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

        Raises
        ------
        CaptureError
            The model can't be captured.
        """
        dtype = _computes_in(self._base)
        if not self._serves(pack, call, dtype):
            return None
        # by identity too: another Parameter on the same memory wants the gradients
        relies_on = (dtype, fingerprint(call, {}), [id(p) for p in call.parameters()])
        if relies_on != self._relies_on:
            self.drop()
            self._relies_on = relies_on
        size = Size.of(pack)
        graph = min((g for g in self._graphs if size.fits(g.size)), key=lambda g: g.size.tokens, default=None)
        if graph is None:
            if size.rounded() not in self._seen:  # the first of its size: libraries set themselves up
                self._seen.add(size.rounded())
                return None
            if len(self._graphs) == MOST:
                self.drop()
                self._relies_on = relies_on
            graph = self._captured(compute, size.rounded(), pack, row_scale, call)
        assert self._gradients is not None
        graph.upload(pack, row_scale)
        pending = self._gradients.next()
        graph.replay()
        self.replays += 1
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
            and not pack.segments.shared
            and pack.input_ids.device.type == "cpu"
            and not any(_does_more(module) for module in call.modules())
        )

    def _captured(self, compute: Compute, size: Size, pack: Pack, row_scale: torch.Tensor, call: Any) -> "_Graph":
        """Capture a size, after its replay was compared with the pass itself."""
        try:
            graph = self._capture(compute, size, pack, row_scale, call)
        except Exception as error:  # whatever it is: the pass can be computed without a graph
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CaptureError(
                f"{type(self._base).__name__}: a training pass can't be captured as a CUDA graph ({reason})"
            ) from error
        self.captures += 1
        self._graphs.append(graph)
        return graph

    def _capture(self, compute: Compute, size: Size, pack: Pack, row_scale: torch.Tensor, call: Any) -> "_Graph":
        device = self._base.get_input_embeddings().weight.device
        if self._recorder is None:
            self._recorder = self._new_recorder()
        if self._gradients is None:
            self._gradients = Gradients(call)
        gradients = self._gradients
        gradients.next()

        def backward(pack: Pack, row_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with casting_afresh(), torch.enable_grad(), _autocast(device):
                loss, logps = compute(pack, row_scale, model=gradients.caller(call))
                loss.backward()
            return loss.detach(), logps

        graph = _Graph(size, device)
        graph.upload(pack, row_scale)

        def padded() -> torch.Tensor:
            loss, logps = backward(graph.pack, graph.row_scale)
            graph.loss.copy_(loss)
            graph.logps.copy_(logps)
            return graph.loss

        self._recorder.warm_up(padded)
        graph.replay = self._recorder.record(padded)
        loss, logps = backward(pack.to(device), row_scale.to(device))
        norms = gradients.norms()
        for written in (graph.loss, graph.logps, *gradients.buffers.values()):
            written.zero_()  # a replay that does nothing must not pass for the pass before it
        graph.replay()
        near = self._close[_computes_in(self._base)]
        agree = [
            (graph.logps[: len(logps)] - logps).abs().mean() <= near,
            (graph.loss - loss).abs() <= near * row_scale.abs().sum().item(),
            ((gradients.norms() - norms).abs() <= ALIKE * norms + FAINT * norms.max()).all(),
        ]
        if not all(bool(a) for a in agree):
            raise CaptureError("what it replays is not what it computes")
        return graph


class _Graph:
    """A captured pass: where it reads and writes."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size = size
        self._upload = Upload(device, 8 * (2 * size.tokens + 4 * size.targets + size.sequences) + 16 * ALIGNED)
        wide = torch.float32 if device.type == "cuda" else torch.float64
        self.loss = torch.zeros((), dtype=wide, device=device)
        self.logps = torch.zeros(size.targets, dtype=wide, device=device)
        self.replay: Callable[[], None] = lambda: None
        self.pack: Pack | Any = None
        self.row_scale: torch.Tensor | Any = None

    def upload(self, pack: Pack, row_scale: torch.Tensor) -> None:
        """Pad a pack and bring it to where the capture reads it."""
        t = self._upload(pad(pack, row_scale, self.size))
        self.row_scale = t.pop("row_scale").view(torch.float64)
        segments: Any = PaddedSegments(t.pop("cu_seqlens"), self.size.longest)
        self.pack = replace(pack, **t, segments=segments, sequences=[])


def _does_more(module: torch.nn.Module) -> bool:
    """Return whether a module has hooks, which a replay would leave out, or dropout, which could not be compared."""
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
