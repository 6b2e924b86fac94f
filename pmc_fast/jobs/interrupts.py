"""Interrupted runs: a checkpoint on SIGTERM, which batch systems and containers send, and what stays on disk."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..errors import Terminated


class CheckpointOnSigterm(TrainerCallback):
    """A context in which SIGTERM writes a checkpoint after the current step and then raises Terminated.

    A second SIGTERM raises Terminated at once.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.warn, self.asked = warn, False
        self._before: Any = None

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGTERM, self._ask)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if self.asked and kind is None:
            raise Terminated

    def _ask(self, signum: int, frame: Any) -> None:
        if self.asked:
            raise Terminated
        self.asked = True
        self.warn("SIGTERM: a checkpoint is written after this step, then the run ends; a second one ends it at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control


def what_is_left(output: str, checkpoints: Path, reported_to: str = "") -> str:
    """Return a sentence that names what an interrupted run leaves on disk, and where its numbers were reported to."""
    kept = sorted(checkpoints.glob("checkpoint-*"), key=lambda p: (len(p.name), p.name))
    if not kept:
        return f"{output} was not written; its numbers are in {reported_to}" if reported_to else "nothing was written"
    return (
        f"{output} was not written; {kept[-1]} is kept and holds the initial answers (mode 0600): go on with --resume "
        "auto, or delete it"
    )
