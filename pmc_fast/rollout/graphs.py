"""CUDA graphs of decode steps: a step of a bucket is launched as one, not kernel by kernel.

`StepGraphs` decides what may be replayed and is tested without a GPU, on a recorder that replays torch's
operations. **`CudaRecorder` has not run on a GPU yet**: `python -m pytest tests/test_rollout_graphs.py` there.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..errors import PMCError

Compute = Callable[[], torch.Tensor]


class Recorder(Protocol):
    """What captures steps."""

    def warm_up(self, compute: Compute) -> torch.Tensor:
        """Compute as a capture would, without one: libraries set themselves up in a first run."""

    def record(self, compute: Compute) -> Callable[[], None]:
        """Capture a computation, without result yet, and return what repeats it on the same memory."""


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

    def warm_up(self, compute: Compute) -> torch.Tensor:
        """Compute on the stream of captures."""
        with torch.cuda.device(self._device):
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                out = compute()
            here.wait_stream(self._stream)
            out.record_stream(here)
        return out

    def record(self, compute: Compute) -> Callable[[], None]:
        """Capture."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: what a training program's other threads do (pin memory, say) does not end a capture
        capture = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        # the stream's own context also puts it back where the end of a failed capture raises
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream), capture:
            compute()
        return graph.replay


@dataclass(slots=True)
class _Step:
    inputs: Hashable  # where they lie
    out: torch.Tensor
    replay: Callable[[], None] | None = None  # None: warmed up


class StepGraphs:
    """Captures a step when its bucket comes for the second time, and replays it from then on.

    Parameters
    ----------
    recorder : callable
        Makes a Recorder; another one each time that all captures are dropped, for with its last graph a pool
        of memory ends.
    name : str
        Of the model, for messages.
    """

    def __init__(self, recorder: Callable[[], Recorder], name: str) -> None:
        self._new_recorder, self._name = recorder, name
        self._recorder: Recorder | None = None
        self._steps: dict[Hashable, _Step] = {}
        self._relies_on: Any = None
        self._out: torch.Tensor | None = None
        self.captures = self.replays = 0

    def __call__(self, bucket: Hashable, inputs: Hashable, relies_on: Any, compute: Compute) -> torch.Tensor:
        """Compute a step, by replaying its graph where that still computes the same.

        Parameters
        ----------
        bucket : hashable
            Steps of one bucket launch the same on inputs at the same places.
        inputs : hashable
            Where this step's inputs lie.
        relies_on : comparable
            Everything else that a capture holds on to: see `fingerprint`.
        compute : callable
            Computes the step and returns its logits.

        Returns
        -------
        Tensor
            Gone with the next step.

        Raises
        ------
        PMCError
            A step that can't be captured, as one that asks the device for a number.
        """
        if relies_on != self._relies_on:
            self.drop()
        if self._recorder is None:
            self._recorder, self._relies_on = self._new_recorder(), relies_on
        step = self._steps.get(bucket)
        if step is None or step.inputs != inputs:
            logits = self._recorder.warm_up(compute)
            self._steps[bucket] = _Step(inputs, self._room_for(logits))
            return logits
        if step.replay is None:
            step.replay = self._capture(step.out, compute)
        step.replay()
        self.replays += 1
        return step.out

    def drop(self) -> None:
        """Let go of all captures and their memory."""
        self._steps.clear()
        self._out = self._recorder = None

    def _room_for(self, logits: torch.Tensor) -> torch.Tensor:
        # all graphs write the same memory: logits are large, and read before the next step
        if self._out is None or len(self._out) < len(logits):
            self._out = torch.empty_like(logits)  # graphs of smaller buckets keep what they write
        return self._out[: len(logits)]

    def _capture(self, out: torch.Tensor, compute: Compute) -> Callable[[], None]:
        assert self._recorder is not None
        try:
            replay = self._recorder.record(lambda: out.copy_(compute()))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise PMCError(
                f"{self._name}: a step can't be captured as a CUDA graph ({reason}): leave cuda_graphs out"
            ) from error
        self.captures += 1
        return replay


def fingerprint(model: torch.nn.Module, copies: Mapping[int, tuple[torch.Tensor | None, ...]]) -> list[Any]:
    """Return what the steps of a model rely on: where its tensors lie, and how its modules are set.

    Weights may change in place, and a graph reads the new ones. A weight that moved, an adapter that was
    switched off or a hook that was added make another step, and another fingerprint.

    Parameters
    ----------
    model : Module
    copies : mapping of int to tuple of Tensor
        id of a module -> tensors that are read in place of its own.
    """
    found = []
    for module in model.modules():
        state = {name: value for name, value in vars(module).items() if name != "forward"}  # lent, anew each time
        if id(module) in copies:
            state["_parameters"] = copies[id(module)]
        found.append((type(module), _relied_on(state)))
    return found


def _relied_on(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.dtype, value.device, value.shape, value.stride()
    if isinstance(value, dict):
        return [(key, _relied_on(v)) for key, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [_relied_on(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return set(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return id(value)  # a config, a function, a module within another
