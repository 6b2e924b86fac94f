"""CUDA graphs of decode steps: a step of a bucket is launched as one, not kernel by kernel."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from ..cuda_graphs.recorder import CaptureError, Recorder, casting_afresh

Compute = Callable[[], torch.Tensor]


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
        CaptureError
            A step that can't be captured, as one that asks the device for a number.
        """
        if relies_on != self._relies_on:
            self.drop()
        if self._recorder is None:
            self._recorder, self._relies_on = self._new_recorder(), relies_on
        compute = casting_afresh()(compute)
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
        except (RuntimeError, CaptureError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CaptureError(f"{self._name}: a step can't be captured as a CUDA graph ({reason})") from error
        self.captures += 1
        return replay
