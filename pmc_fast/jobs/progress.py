"""Who is told what a job does, and how long its stages take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ..evaluation import EvalSet


class Monitor(Protocol):
    """Who is told what a job does."""

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

    def on_set(self, s: EvalSet) -> None:
        """Show which questions are asked: an evaluation takes a while."""
        self.monitor.stage(f"  {s.name}: {len(s.rows)} questions")

    def on_attack(self, questions: str, attack: str) -> None:
        """Show which leak attack begins: each is a rollout of its own."""
        self.monitor.stage(f"  {questions}: {attack}")
