"""Captures CUDA graphs, and tells whether a captured graph is still valid.

A replay repeats kernels on the memory that they were captured with. Python does not run again: hooks do not run, and
a weight that moved or an adapter that was switched off goes unnoticed. `fingerprint` detects such changes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import PMCError

SYNCS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique2", "unique_consecutive"}
SIMPLE = frozenset((type(None), bool, int, float, str))

# run around a module's forward, but not in a replay
HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_pre_hooks")


class CaptureError(PMCError):
    """A computation can't be captured, for example because it reads a number from the device."""


class ForbidHostSync(TorchDispatchMode):
    """Refuses operations that make the host wait for the device: a capture does not allow them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or raise CaptureError."""
        on_cuda = bool(args) and isinstance(args[0], torch.Tensor) and args[0].is_cuda
        if on_cuda and syncs_with_host(func, args):
            raise CaptureError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def syncs_with_host(func: Any, args: Any) -> bool:
    """Return whether a torch operation waits for a number from the device, such as the size of a masked selection."""
    overload = func.overloadpacket
    masks = args[1] if overload in (torch.ops.aten.index, torch.ops.aten.index_put) else []
    return overload._qualified_op_name.split("::")[1] in SYNCS or any(
        m is not None and m.dtype in (torch.bool, torch.uint8) for m in masks
    )


@contextmanager
def fresh_autocast_cache() -> Iterator[None]:
    """Clear autocast's cache of cast weights before and after a computation.

    A wrapper around the model's forward, such as accelerate's, may enter an autocast with the cache on. One capture
    would then read weights that were cast in another capture, or that are not cast again.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


class Recorder(Protocol):
    """Captures computations."""

    def record(self, *parts: Callable[[], Any]) -> list[Callable[[], None]]:
        """Run a computation, capture each of its parts, and return what repeats each on the same memory."""


class CudaRecorder:
    """Captures with torch.cuda.graph, on a stream and in a memory pool of its own.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            # shared: graphs never run at the same time, so that one may use another's intermediate memory
            self._pool = torch.cuda.graph_pool_handle()

    def record(self, *parts: Callable[[], Any]) -> list[Callable[[], None]]:
        """Capture the parts of a computation after a run without capture, in which libraries set themselves up.

        Raises
        ------
        CaptureError
            With torch's reason. The stream and the device's random generator are as before.
        """
        with torch.cuda.device(self._device):
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            try:  # before the capture: one that fails leaves the allocator of older torch damaged
                with ForbidHostSync(), torch.cuda.stream(self._stream):
                    for compute in parts:
                        compute()
            finally:  # memory that it read may be freed on this stream, also after an error
                here.wait_stream(self._stream)
            return [self._capture(compute) for compute in parts]

    def _capture(self, compute: Callable[[], Any]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: what a training program's other threads do (pin memory, say) does not end a capture
        capture = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        random = torch.cuda.get_rng_state()
        try:
            # the stream's own context also puts it back where the end of a failed capture raises
            with torch.cuda.stream(self._stream), capture:
                compute()
        except RuntimeError as error:
            _renew_generator(random)
            raise CaptureError(str(error).strip().splitlines()[0]) from error
        return graph.replay


def _renew_generator(state: torch.Tensor) -> None:
    # a capture that failed leaves the generator in a state that only captures may draw from
    fresh = torch.Generator(device="cuda")
    fresh.set_state(state)
    torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh.graphsafe_get_state())


def fingerprint(model: torch.nn.Module, copies: Mapping[Any, tuple[torch.Tensor | None, ...]]) -> list[Any]:
    """Return what captures of a model rely on: the addresses of its tensors and the settings of its modules.

    Weights may change in place: a graph reads the new values. A weight that moved, an adapter that was switched off
    or a hook that was added changes the fingerprint.

    Parameters
    ----------
    model : Module
    copies : mapping of modules to tuple of Tensor
        A module -> tensors that are read in place of its own.
    """
    found: list[Any] = []
    for module in model.modules():  # flat, and without a call for what is simple: training asks before every pass
        found.append(type(module))
        for name, value in vars(module).items():
            if type(value) in SIMPLE:
                found.append(value)
            elif name not in ("forward", "_original_forward"):  # replaced for a pass, wrapped by accelerate for a run
                copied = name == "_parameters" and module in copies
                _note(found, copies[module] if copied else value)
    return found


def _note(found: list[Any], value: Any) -> None:
    if type(value) in SIMPLE:
        found.append(value)
    elif isinstance(value, torch.Tensor):
        found += (value.data_ptr(), value.dtype, value.device, value.shape, value.stride(), value.requires_grad)
    elif isinstance(value, dict):
        found.append(len(value))
        for key, item in value.items():
            found.append(key)
            _note(found, item)
    elif isinstance(value, (list, tuple)):
        found.append(len(value))
        for item in value:
            _note(found, item)
    elif isinstance(value, (set, frozenset)):
        found.append(frozenset(value))
    else:
        found.append(id(value))  # a config, a function, a module within another
