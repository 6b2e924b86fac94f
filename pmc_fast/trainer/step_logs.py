"""What an optimizer step logs, and the end of runs that diverge.

On a GPU a step's losses are read while the next step is computed: a host that waited for them would prepare that step
too late.
"""

import math
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import Trainer, TrainerCallback

from ..pmc.algorithm import PMC
from ..utils.text import printable
from .base import BaseTrainer
from .callbacks import StopRule

DEFERS = ("cuda",)  # devices whose losses are read a step later
KNOWN = ("transformers", "pmc_fast")  # packages whose callbacks only report what is logged
MEANS = ("collapse_loss", "retain_loss")  # as the Trainer's loss
STATES = ("mean_score", "pending")  # as of the last step; all others are sums


class Copied:
    """Numbers of the device on their way to the host: no wait until they are read."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        numbers = torch.cat([t.detach().double().flatten() for t in tensors])
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._done = None
        if numbers.is_cuda:
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[float]:
        if self._done is not None:
            self._done.synchronize()
        return self._numbers.tolist()


@dataclass(slots=True)
class Log:
    """A log of the Trainer's that waits for its loss."""

    loss: Copied
    steps: int  # that the loss is a sum over
    learning_rate: float
    epoch: float
    start_time: float


@dataclass(slots=True)
class Queued:
    """An optimizer step that the device may still compute."""

    step: int
    losses: Copied  # the step's loss, then collapse and retain loss of each micro-batch
    asked: list[bool]  # micro-batches with a question of this process
    metrics: dict[str, Any]  # what the host knows
    begin: float
    log: Log | None = None


class LoggingTrainer(BaseTrainer):
    """A Trainer that logs PMC's numbers beside its own, and ends a run whose loss is not finite."""

    pmc: PMC
    stop_rule: StopRule | None
    stopped: str | None
    _step: dict[str, Any]
    _window: list[dict[str, float]]  # metrics of the steps since the last log
    _queued: Queued | None = None
    _settled = 0.0  # when a step was last read
    _globalstep_last_logged: int

    def _finish_step(self, control: Any) -> None:
        """Note the metrics of an optimizer step; apply the stopping rule."""
        self._settle()
        scores = self.pmc.scores()
        questions = len(self.pmc.questions)
        counters = self._step["counters"]
        metrics = {
            "collapse_loss": 0.0,
            "retain_loss": 0.0,
            "mean_score": sum(scores) / len(scores),
            "pending": len(self.pmc.pending()),
            "sampled_tokens": counters.get("sampled_tokens", 0.0),
            "cut_samples": counters.get("cut_samples", 0.0),
            "rows": counters.get("rows", 0.0),
            "rollout_seconds": self._step["rollout_seconds"],
        }
        losses = Copied(self._step["loss"], self._step["means"])
        self._queued = Queued(self.state.global_step, losses, self._step["asked"], metrics, self._step["begin"])
        if self.args.include_num_input_tokens_seen != "no":
            self.state.num_input_tokens_seen += sum(self.pmc.ranks.gather(self._step["tokens"]))
        if not self._defers():
            self._settle()
        if self.stop_rule is not None:
            retain_loss = self._window[-1]["retain_loss"]
            self.stopped = self.stop_rule.update(
                metrics["mean_score"], retain_loss, all_visited=len(scores) == questions
            )
            control.should_training_stop = control.should_training_stop or self.stopped is not None

    def _defers(self) -> bool:
        """Return whether a step's numbers may be read a step later: nothing asks for them at once."""
        a = self.args
        at_once = self.stop_rule is not None or self.pmc.ranks.size > 1 or getattr(a, "log_text", False)
        # a later step forgets what they set in `control`: to save, say
        at_once = at_once or not all(map(_only_reports, [self, *self.callback_handler.callbacks]))
        return a.device.type in DEFERS and not at_once and a.include_num_input_tokens_seen == "no"

    def _settle(self) -> None:
        """Read the losses of the queued step, if any; log it if it is to be logged.

        Raises
        ------
        PMCError
            They are not finite.
        """
        queued, self._queued = self._queued, None
        if queued is None:
            return
        loss, *numbers = queued.losses.read()
        means = [own for *own, asked in zip(numbers[0::2], numbers[1::2], queued.asked, strict=True) if asked]
        losses, gathered = zip(*self.pmc.ranks.gather((loss, means)), strict=True)
        collapse, retain = zip(*(own for theirs in gathered for own in theirs), strict=True)
        if not math.isfinite(sum(losses)):
            raise self.diverged(queued.step)
        means_of = {"collapse_loss": sum(collapse) / len(collapse), "retain_loss": sum(retain) / len(retain)}
        # read a step later, it took until now since the step before it was read
        begin, self._settled = max(queued.begin, self._settled), time.perf_counter()
        self._window.append(queued.metrics | means_of | {"train_seconds": self._settled - begin})
        if queued.log is not None:
            self._emit(queued.step, queued.log)

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Let a log wait for the next step where nothing else needs the step's numbers now."""
        c, queued = self.control, self._queued
        must = c.should_save or c.should_evaluate or c.should_training_stop or c.should_epoch_stop
        new = queued is not None and queued.log is None and self.state.global_step == queued.step
        if must or not new or grad_norm is not None or "start_time" in kwargs:
            if must or c.should_log:
                self._settle()
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        elif c.should_log and queued is not None:
            *_, start_time = args
            rate = kwargs.get("learning_rate")
            rate = self._get_learning_rate() if rate is None else rate
            steps = self.state.global_step - self._globalstep_last_logged
            queued.log = Log(Copied(tr_loss), steps, rate, self.state.epoch or 0.0, start_time)
            tr_loss -= tr_loss  # as the Trainer
            self._globalstep_last_logged = self.state.global_step
            c.should_log = False  # as after a log

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._inner_training_loop(*args, **kwargs)
        except BaseException:
            if self.pmc.ranks.size == 1:  # several log at once, and can't meet after an error
                with suppress(Exception):  # the error that ends the run is the one to see
                    self._settle()
            raise

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._settle()
        return super()._finalize_training(*args, **kwargs)

    def _emit(self, step: int, log: Log) -> None:
        """Log as the Trainer would have at the end of `step`."""
        state, should_log = self.state, self.control.should_log
        now = state.global_step, state.epoch
        state.global_step, state.epoch = step, log.epoch
        try:
            [loss] = log.loss.read()
            self._total_loss_scalar += loss
            self.store_flos()
            self.log({"loss": loss / log.steps, "learning_rate": log.learning_rate}, log.start_time)
        finally:
            state.global_step, state.epoch = now
            self.control.should_log = should_log

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the Trainer's numbers and, beside a training loss, PMC's over the same steps."""
        if "loss" in logs and self._window:
            logs |= _combined(self._window)
            self._window = []
            if getattr(self.args, "log_text", False) and self.is_world_process_zero():
                self._print_answers()
        super().log(logs, *args, **kwargs)

    def _print_answers(self) -> None:
        table = Table("question", "initial answer", "stored", "score", title=f"step {self.state.global_step}")
        pmc = self.pmc
        for i in self._step["indices"]:
            stored = " | ".join(str(answer) for answer, _ in pmc.store.answer(i))
            row = (str(pmc.questions[i]), pmc.initial_answers[i], stored, f"{pmc.store.score(i):.3f}")
            table.add_row(*(escape(printable(text)) for text in row))
        Console().print(table)


def _only_reports(owner: Any) -> bool:
    """Return whether a trainer's `log`, or a callback's `on_log`, is transformers' or ours."""
    method = owner.log if isinstance(owner, Trainer) else owner.on_log
    return str(getattr(method, "__module__", "")).split(".")[0] in KNOWN


def _combined(window: list[dict[str, float]]) -> dict[str, float]:
    """Combine the metrics of several steps."""
    combined = {}
    for name, last in window[-1].items():
        total = sum(metrics[name] for metrics in window)
        combined[name] = last if name in STATES else total / len(window) if name in MEANS else total
    return combined


class StepEnd(TrainerCallback):
    """Calls the trainer at the end of each optimizer step, before logging and saving."""

    def __init__(self, trainer: LoggingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._window, self.trainer._queued = [], None  # as the Trainer's own sum

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.stage = "a callback or checkpoint"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.trainer._finish_step(control)
        return control
