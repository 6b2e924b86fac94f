"""A torch profiler trace of a run's second and third optimizer step."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

SKIPPED, TRACED = 1, 2  # steps; the first one also checks and allocates
NAME = "trace.json.gz"


class StepProfiler(TrainerCallback):
    """Traces a few optimizer steps, rollouts included; names of operations and shapes alone, never a text."""

    def __init__(self) -> None:
        self.trace: bytes | None = None
        self._profile: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.max_steps <= SKIPPED:
            self._start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step
        if self._profile is not None and done >= SKIPPED + TRACED:
            self._stop()
        elif self._profile is None and self.trace is None and done >= SKIPPED:
            self._start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._profile is not None:
            self._stop()

    def _start(self) -> None:
        # __enter__ and not start(): without a schedule it is one window
        self._profile = torch.profiler.profile(record_shapes=True)
        self._profile.__enter__()

    def _stop(self) -> None:
        self._profile.__exit__(None, None, None)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / NAME
            self._profile.export_chrome_trace(str(path))
            self.trace = path.read_bytes()
        self._profile = None
