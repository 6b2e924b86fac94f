"""When a run stops early or its time is up, and a profiler trace of its first steps."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

TRACE = "trace.json.gz"
TRACED = 2  # optimizer steps, after one that also checks and allocates
SMOOTHING = 0.9  # weight of the past in the smoothed retain loss
SLACK = 0.05  # nats a token above the untouched model's retain loss


class StopRule:
    """Stops a run whose mean best score and smoothed retain loss stay within their bounds for `steps` steps.

    Parameters
    ----------
    score : float
        Bound of the mean stored score over all questions, once each was visited.
    retain_loss : float, optional
        Bound of the retain loss, smoothed over about ten steps. By default that of the first step, before any update,
        plus 0.05.
    steps : int
    """

    def __init__(self, score: float, retain_loss: float | None, steps: int) -> None:
        self.score, self.bound, self.steps = score, retain_loss, steps
        self._sum, self._weight, self._met = 0.0, 0.0, 0

    def update(self, mean_score: float, retain_loss: float, *, all_visited: bool) -> str | None:
        """Add a step's numbers; return the reason to stop, or None."""
        if self.bound is None:
            self.bound = retain_loss + SLACK
        self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * retain_loss
        self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        smoothed = self._sum / self._weight
        met = all_visited and mean_score <= self.score and smoothed <= self.bound
        self._met = self._met + 1 if met else 0
        if self._met < self.steps:
            return None
        return (
            f"mean best score {mean_score:.3f} <= {self.score:g} and smoothed retain loss {smoothed:.3f} <= "
            f"{self.bound:.3f} for {self.steps} steps"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"bound": self.bound, "sum": self._sum, "weight": self._weight, "met": self._met}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bound, self._sum, self._weight, self._met = (state[n] for n in ("bound", "sum", "weight", "met"))


class TrainingClock(TrainerCallback):
    """Times a run's training, and ends it before the step that would end after `limit` seconds.

    Parameters
    ----------
    limit : float, optional
        A trainer whose `clock` this is lets its learning rate fall to 0 with it. At least one step is made.

    Attributes
    ----------
    before : float
        Seconds that the method took before its first step, which count.
    """

    def __init__(self, limit: float | None = None) -> None:
        self.limit, self.before = limit, 0.0
        self._begin: float | None = None
        self._seconds, self._steps = 0.0, 0

    @property
    def seconds(self) -> float:
        """Seconds of training until now, or until its end."""
        return self.before + (self._seconds if self._begin is None else time.perf_counter() - self._begin)

    def rate(self, step: int, warmup: int) -> float:
        """Return the factor of the learning rate after `step` steps."""
        assert self.limit is not None
        return min(1.0, (step + 1) / max(1, warmup)) * max(0.0, 1 - self.seconds / self.limit)

    def expected(self, steps: int) -> int:
        """Return how many steps a run is expected to make that has made so many."""
        assert self.limit is not None
        a_step = max(self.seconds - self.before, 1e-9) / max(1, self._steps)
        return max(steps, steps + int((self.limit - self.seconds) / a_step))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._steps += 1
        if self.limit is not None:
            _wait(args.device)  # for the step
            control.should_training_stop = control.should_training_stop or (
                self.seconds + (self.seconds - self.before) / self._steps > self.limit
            )
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait(args.device)
        if self._begin is not None:
            self._seconds, self._begin = time.perf_counter() - self._begin, None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StepProfiler(TrainerCallback):
    """Traces the second and third optimizer step, rollouts included: names of operations and shapes, no text.

    `trace` is a gzipped Chrome trace once these steps are done. A run of one step has that step traced.
    """

    def __init__(self) -> None:
        self.trace: bytes | None = None
        self._profile: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        schedule = None
        if state.max_steps - state.global_step > 1:
            schedule = torch.profiler.schedule(wait=0, warmup=1, active=TRACED, repeat=1)
        self._profile = torch.profiler.profile(schedule=schedule, on_trace_ready=self._export, record_shapes=True)
        self._profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._profile.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._profile.stop()

    def _export(self, profile: Any) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / TRACE
            profile.export_chrome_trace(str(path))
            self.trace = path.read_bytes()
