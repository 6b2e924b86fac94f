"""What a job shows while it runs, and how long its stages take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Monitor(Protocol):
    """Shows the progress of a job."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def step(self, record: dict[str, Any], steps: int) -> None:
        """An optimizer step of `steps` is done."""

    def warn(self, text: str) -> None:
        """Something the user should know before waiting for it."""


class Silent:
    """A monitor that shows nothing."""

    def stage(self, name: str) -> None:
        pass

    def step(self, record: dict[str, Any], steps: int) -> None:
        pass

    def warn(self, text: str) -> None:
        pass


class Stages:
    """Names and times the stages of a run."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor, self.seconds = monitor, dict[str, float]()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.monitor.stage(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
