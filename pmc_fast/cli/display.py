"""What the commands share: options from settings, progress, scores and gates on the terminal."""

import dataclasses
import os
import signal
import sys
import threading
import time
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from ..errors import Terminated
from ..utils.text import printable

GATE_MISSED = 3


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise Terminated when SIGTERM comes, unless someone handles it already or this is not the main thread."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(signum: int, frame: Any) -> None:
    raise Terminated


def quiet_logs() -> None:
    """Keep logs that are no terminal free of progress bars, and users from warnings that are for developers."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
    if not sys.stderr.isatty():  # before the libraries are imported
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")


def config_options(config: type[Any], names: Iterable[str] | None = None) -> Callable[[Any], Any]:
    """Give a command one option a field of `config`, in the order of `names`; options not given pass None."""

    def decorate(command: Any) -> Any:
        hints = typing.get_type_hints(config)
        fields = {f.name: f for f in dataclasses.fields(config)}
        for f in reversed([fields[name] for name in names or fields]):
            flag = "--" + f.name.replace("_", "-")
            kind = hints[f.name]
            options: dict[str, Any] = {"help": _help(f), "default": None}
            if kind is bool:
                flag += "/--no-" + f.name.replace("_", "-")
            elif kind == list[str]:
                options["multiple"] = True
            elif typing.get_origin(kind) is typing.Literal:
                options["type"] = click.Choice(typing.get_args(kind))
            else:
                options["type"] = _plain(kind)
            if "flag_value" in f.metadata:  # the flag without a value
                options |= {"is_flag": False, "flag_value": f.metadata["flag_value"]}
            command = click.option(flag, *f.metadata.get("aliases", ()), f.name, **options)(command)
        return command

    return decorate


def _plain(kind: Any) -> type:
    if isinstance(kind, types.UnionType):
        (kind,) = (k for k in typing.get_args(kind) if k is not type(None))
    return kind


def _help(f: dataclasses.Field[Any]) -> str:
    unset = (None, "", dataclasses.MISSING)
    return f.metadata["help"] + ("" if f.default in unset else f"  [default: {f.default}]")


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given; those given several times as lists."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if value not in (None, ())
    }


def print_scores(made: dict[str, Any]) -> None:
    """Print a table of metrics, before and after."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..report.render import metric_rows, verdict

    rows = metric_rows(made)
    if not rows:
        return
    both = "before" in made
    table = Table("metric", *(["before"] if both else []), "after" if both else "value")
    for metric, before, after in rows:
        table.add_row(escape(metric), *([before] if both else []), after)
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    console.print(escape(verdict(made)), soft_wrap=True)


def print_gates(made: dict[str, Any]) -> int:
    """Name the gates that were missed; return the exit code."""
    for line in made["failed_gates"]:
        click.echo(f"gate missed: {line}", err=True)
    return GATE_MISSED if made["failed_gates"] else 0


class Progress:
    """Shows a job's stages and steps on stderr: a live line in a terminal, now and then a line elsewhere."""

    LINES = 20

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.console = Console(stderr=True, highlight=False)
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task: Any = None
        self.start = time.perf_counter()

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def _line(self, text: str) -> None:
        line = f"[{time.perf_counter() - self.start:6.1f} s] {printable(text)}"
        self.console.print(line, markup=False, soft_wrap=True)

    def stage(self, name: str) -> None:
        self._line(name)

    def warn(self, text: str) -> None:
        self._line(f"warning: {text}")

    def step(self, record: dict[str, Any], steps: int) -> None:
        rate = record["sampled_tokens"] / record["rollout_seconds"] if record["sampled_tokens"] else 0.0
        state = (
            f"loss {record['loss']:.3f} (collapse {record['collapse_loss']:.3f}, retain "
            f"{record['retain_loss']:.3f})  mean score {record['mean_score']:.3f}  pending {record['pending']}"
            f"  {rate:.0f} tokens/s"
        )
        if not self.console.is_terminal:
            if record["step"] % max(1, steps // self.LINES) == 0 or record["step"] == steps:
                self._line(f"step {record['step']}/{steps}  {state}")
            return
        if self.task is None:
            self.task = self.bar.add_task("unlearning", total=steps, state="")
        self.bar.update(self.task, completed=record["step"], state=state)
