"""An unlearning run that is timed: its task, its clock, and what it looked like along the way."""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers

from examples.demo_model import FILES, Task, finetuned_model
from pmc_fast import PMC
from pmc_fast.config import UnlearnConfig
from pmc_fast.data import Question, load_rows
from pmc_fast.evaluation import evaluate, greedy_answers, load_sets
from pmc_fast.models import loading
from pmc_fast.pmc.schedule import Schedule
from pmc_fast.report.environment import commit

from . import harness
from .settings import TOFU


def demo_config(seed: int, **values: Any) -> UnlearnConfig:
    """Return the demo's settings: its fine-tuned model, its rows and the preset "small"."""
    return task_config("demo", seed, **values)


def task_config(task: Task, seed: int, **values: Any) -> UnlearnConfig:
    """Return the demo's settings with a task's taught model and rows."""
    forget, retain = (f"{TOFU}/{file}" for file in FILES[task])
    own = {
        "model": str(finetuned_model(task)), "forget": forget, "retain": retain, "paraphrased": forget, "seed": seed,
        "device": "cpu", "general": [f"{TOFU}/real_authors30.jsonl", f"{TOFU}/world_facts30.jsonl"],
    }  # fmt: skip
    return UnlearnConfig.merge("small", own | values)


class Run:
    """A task with one method and seed, and its clock, of wall time.

    Parameters
    ----------
    method : str
    config : UnlearnConfig
    due : callable
        Of a step and the clock's seconds: whether to evaluate now.
    """

    def __init__(
        self, method: str, config: UnlearnConfig, due: Callable[[int, float], bool] = lambda step, seconds: False
    ) -> None:
        self.method, self.config, self.due = method, config, due
        self.forget = load_rows(config.forget)
        self.retain = load_rows(config.retain, answers=True)
        self.tokenizer = loading.load_tokenizer(config.model)
        device = loading.resolve_device(config.device)
        self.loaded = loading.load_model(
            config.model, device=device, dtype=config.dtype, param_dtype=config.param_dtype
        )
        self.model = self.loaded.model
        self.sets = load_sets(config, self.forget, self.retain)
        steps = Schedule.plan(config, len(self.forget)).steps
        assert steps is not None  # no run here ends by max_seconds
        self.steps = steps
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.curve: list[dict[str, Any]] = []
        self.answer: Callable[[Sequence[Question]], list[str]] = lambda questions: []
        self.clock = time.perf_counter
        self.started = 0.0
        self.lock = ExitStack()
        torch.manual_seed(config.seed)

    def start(self) -> None:
        """Let the clock run, with the machine for ourselves."""
        self.lock.enter_context(harness.alone())
        self.started = self.clock()

    def stop(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += self.clock() - self.started

    def resume(self) -> None:
        self.lock.close()
        time.sleep(0.1)  # another benchmark that waits gets its turn
        self.start()

    def on_step(self, record: dict[str, Any]) -> None:
        """Take note of an optimizer step; the clock stands still meanwhile."""
        self.stop()
        kept = {k: v for k, v in record.items() if isinstance(v, (int, float))}
        self.history.append(kept | {"seconds": self.seconds})
        step = int(record["step"])
        if step % 10 == 0:
            print(f"  step {step}: {self.seconds:.0f} s, loss {record['loss']:.3f}", flush=True)
        if self.due(step, self.seconds):
            self.evaluate(step)
        self.resume()

    def evaluate(self, step: int) -> None:
        self.curve.append({"step": step, "seconds": self.seconds, **evaluate(self.answer, self.sets)})
        print(f"  {summary(self.curve[-1])}", flush=True)

    def result(self, steps: int, **more: Any) -> dict[str, Any]:
        self.evaluate(steps)
        self.lock.close()
        return {
            "method": self.method, "seed": self.config.seed, "seconds": self.seconds, "steps": steps,
            "curve": self.curve, "commit": commit(), **more,
        }  # fmt: skip


def summary(point: dict[str, Any]) -> str:
    retain, forget = point["sets"]["retain"]["rouge_l_recall"], point["sets"]["forget"]
    return (
        f"step {point['step']}, {point['seconds']:.0f} s: quality {point['unlearn_quality']:.1f}, utility "
        f"{point['utility']:.1f}, retain {retain:.3f}, {forget['degenerate']:.0%} under 3 words"
    )


def measured(path: Path) -> list[dict[str, Any]]:
    """Return the runs that a file has."""
    return json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []


class Clock(transformers.TrainerCallback):
    """Tells a run of each step that a Trainer logs."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "collapse_loss" in logs:
            self.run.on_step(logs | {"step": state.global_step})


def training_arguments(config: UnlearnConfig, **more: Any) -> dict[str, Any]:
    """Return a run's settings by their names in TrainingArguments."""
    c = config
    return {
        "output_dir": tempfile.mkdtemp(), "num_train_epochs": c.num_epochs, "learning_rate": c.learning_rate,
        "per_device_train_batch_size": c.batch_size, "gradient_accumulation_steps": c.gradient_accumulation_steps,
        "weight_decay": c.weight_decay, "use_cpu": loading.resolve_device(c.device).type == "cpu",
        "disable_tqdm": True, "report_to": "none", "seed": c.seed, "logging_steps": 1,
    } | more  # fmt: skip


def optimizer_of(run: Run) -> torch.optim.Optimizer:
    """Return the optimizer that the Trainer makes for these settings."""
    c = run.config
    return torch.optim.AdamW(run.model.parameters(), lr=c.learning_rate, weight_decay=c.weight_decay, fused=True)


def prepared(run: Run, pmc: PMC, encoder: Any = None) -> None:
    """Take the initial answers on the clock and evaluate the untouched model; the clock runs on."""
    run.answer = lambda asked: greedy_answers(pmc.engine, encoder or pmc.encoder, asked)
    run.start()
    pmc.prepare()
    run.stop()
    run.evaluate(0)
    run.resume()
