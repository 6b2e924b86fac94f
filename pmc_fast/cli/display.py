"""Output of the commands: progress, scores, gates, the plan of a dry run, verifications."""

import dataclasses
import sys
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from ..utils.text import printable
from .common import LEVELS, shows

if TYPE_CHECKING:  # torch and transformers load when a command runs: --help stays quick
    from collections.abc import Sequence

    from ..data import Row
    from ..jobs.memory import Memory
    from ..jobs.unlearn import Plan

GATE_MISSED = 3


def print_scores(made: dict[str, Any]) -> None:
    """Print a table of metrics, before and after."""
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
    out = console()
    out.print(table)
    out.print(escape(verdict(made)), soft_wrap=True)


def print_verification(made: dict[str, Any]) -> None:
    """Print the scores of each request, utility, and the requests that were not verified."""
    from rich.table import Table

    table = Table("request", "questions", "unlearn quality", "at least", "under 3 words", "leaking")
    for name, r in made["requests"].items():
        forget, leaks = r["sets"]["forget"], "-"
        if "sampling" in r:
            leaks = f"{r['sampling'].get('leaking_questions', 0):.0%}"
        table.add_row(
            name, str(forget["rows"]), f"{r['unlearn_quality']:.1f}", _bound(r), f"{forget['degenerate']:.0%}", leaks
        )
    console().print(table)
    if made["keep"]:
        click.echo(f"utility {made['keep']['utility']:.1f}, at least {_bound(made['keep'])}")
    for name in made["not_verified"]:
        click.echo(f"{name}: not verified")
    click.echo(f"effective weights {made['weights']}, as recorded")


def _bound(of: dict[str, Any]) -> str:
    return "-" if of["bound"] is None else f"{of['bound']:.1f}"


def console() -> Any:
    """Return where tables go: 100 columns wide where it is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 100)


def print_plan(plan: "Plan", output: str) -> dict[str, Any]:
    """Print what a run into `output` would do, and return it."""
    from ..jobs import methods

    c, s, method = plan.config, plan.schedule, methods.facts(plan.config)
    answered = sum(bool(row.answer) for row in plan.forget)
    click.echo(
        f"forget    {len(plan.forget)} questions of {c.forget}{_texts(plan.forget)}, {answered or 'none'} with an answer"
        + ("" if answered else ": the model's own first answers are taken for the truth")
    )
    click.echo(f"retain    {len(plan.retain)} pairs of {c.retain}{_texts(plan.retain)}")
    click.echo(f"evaluate  {', '.join(f'{e.name} ({len(e.rows)})' for e in plan.sets) or 'nothing'}")
    click.echo(f"prompts   {c.prompt_format}, prompt and answer at most {c.max_length} tokens")
    if method["name"] != "pmc":
        parameters = ", ".join(f"{name} {value}" for name, value in method["parameters"].items())
        told = ", trained on the answers to be forgotten" if method["told"] else ""
        click.echo(f"method    {method['name']} ({parameters}){told}")
    steps = f"what {c.max_seconds:g} s allow" if c.max_seconds else str(s.steps)
    samples = f", {c.num_samples} samples a question" if method["name"] == "pmc" else ""
    click.echo(
        f"steps     {steps} ({s.steps_per_epoch} an epoch), each {c.batch_size} x "
        f"{c.gradient_accumulation_steps} questions{samples}"
    )
    if c.chosen_filter.name:
        click.echo(f"filter    {c.filter or c.chosen_filter.name}: fewer steps where it leaves questions out")
    click.echo(f"output    {output}: nothing was written")
    print_warnings(plan.warnings)
    return {
        "method": method,
        "settings": dataclasses.asdict(c),
        "rows": {name: len(rows) for name, rows in plan.rows.items()},
        "answers_to_forget": answered,
        "parameters": plan.parameters,
        "steps": s.steps,
        "steps_per_epoch": s.steps_per_epoch,
        "cut": {source: len(rows) for source, rows in plan.cut.items()},
        "output": output,
        "warnings": plan.warnings,
    }


def _texts(rows: "Sequence[Row]") -> str:
    from ..data import is_text

    count = sum(is_text(row.question) for row in rows)
    return f", {'all' if count == len(rows) else count} of them texts to be continued as they stand" if count else ""


def print_warnings(texts: Iterable[str]) -> None:
    """Print warnings on stderr, unless --log-level leaves them out."""
    if shows("warning"):
        for text in texts:
            click.echo(f"warning: {text}", err=True)


def print_memory(memory: "Memory", name: str) -> dict[str, Any]:
    """Print what a run holds in the memory of a device, and refuse or warn as the run would; return it in bytes."""
    from ..jobs import memory_limits
    from ..jobs.memory import GIB, PHASES, Choice
    from ..models import loading
    from ..models.fsdp import fsdp_launched

    device = loading.resolve_device(name)
    plan = memory.plan(Choice.of(memory.config, memory.device))
    known = memory.work.tokens.expected is not None
    (most, phase), (expected, _) = plan.peak(), plan.peak(expected=True)
    rows = [(i.name + ("" if len(i.phases) == len(PHASES) else " *"), i.most, i.expected) for i in plan.items]
    click.echo(f"{f'memory    GiB on {device.type}':50} at most" + "  expected" * known)
    for name, *sizes in (*rows, (f"together, {PHASES[phase]}", most, expected)):
        click.echo(f"          {name:40}" + "".join(f"{n / GIB:8.2f}  " for n in sizes[: 1 + known]).rstrip())
    found = memory_limits.device_memory(device)
    if found is not None:
        click.echo(f"          {'free':40}{found[0] / GIB:8.2f} of {found[1] / GIB:.2f}")
    click.echo("          * in a part of a step; together: at any one time, with what an allocator may lose")
    if not known:
        click.echo("          evaluations are not counted: unlearn --dry-run knows how many questions they ask")
    texts = plan.warnings()
    if fsdp_launched():
        texts.append("memory: a process of FSDP holds a part of this, and the run is not bounded")
    elif found is not None and device.type in memory_limits.LIMITED:
        texts += memory_limits.choose(memory, found[0])[1]
    print_warnings(texts)
    free, total = found or (None, None)
    return {
        "device": device.type,
        "items": [
            {"name": i.name, "phases": list(i.phases), "most": i.most, "expected": i.expected if known else None}
            for i in plan.items
        ],
        "together": {"phase": phase, "most": most, "expected": expected if known else None},
        "free": free,
        "total": total,
        "warnings": texts,
    }


def print_gates(made: dict[str, Any]) -> int:
    """Print the missed gates and return the exit code."""
    for line in made["failed_gates"]:
        click.echo(f"gate missed: {line}", err=True)
    return GATE_MISSED if made["failed_gates"] else 0


class Progress:
    """Shows stages and steps on stderr: a live bar in a terminal, else whole lines, one at least every 30 seconds."""

    EVERY = 30.0  # seconds between lines of a log
    clock = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        terminal = sys.stderr.isatty()  # whatever FORCE_COLOR says: a log would keep the bar's every state
        self.console = Console(stderr=True, highlight=False, force_terminal=None if terminal else False)
        self.live = terminal and not self.console.is_dumb_terminal
        self.shows = {level: shows(level) for level in LEVELS}  # click's context is this thread's alone
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[state]}", table_column=Column(ratio=1, no_wrap=True)), expand=True, console=self.console, disable=not (self.live and self.shows["info"]),
            get_time=self.clock, speed_estimate_period=1800,
        )  # fmt: skip
        self.task: Any = None  # this stage's steps: the bar estimates when they end, also where it is not shown
        self.start = self.printed = self.began = self.clock()
        self.name = self.part = ""  # of the stage, and what it does now
        self.ended = threading.Event()

    def __enter__(self) -> "Progress":
        self.bar.start()
        if not self.live:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.set()
        self.bar.stop()

    def _watch(self) -> None:
        while not self.ended.wait(max(0.0, self.printed + self.EVERY - self.clock())):
            if self.clock() - self.printed >= self.EVERY:
                self.still()

    def _line(self, text: str, level: str = "info") -> None:
        self.printed = self.clock()
        if self.shows[level]:
            line = f"[{self.printed - self.start:6.1f} s] {printable(text)}"
            self.console.print(line, markup=False, soft_wrap=True)

    def still(self) -> None:
        """Print how far the stage is."""
        task = self.task
        if task is not None and not task.finished:
            left = task.time_remaining
            self._line(_of(task) + ("" if left is None else f"  about {_duration(left)} left"))
        elif self.name:
            part = f" ({self.part})" if self.part else ""
            self._line(f"{self.name}{part}, for {_duration(self.clock() - self.began)} now")

    def stage(self, name: str) -> None:
        if name.startswith(" "):  # a line about the stage
            self.part = name.strip()
        else:
            self.name, self.part, self.task, self.began = name, "", None, self.clock()
        self._line(name)

    def warn(self, text: str) -> None:
        self._line(f"warning: {text}", "warning")

    def step(self, record: dict[str, Any], steps: int) -> None:
        state = _state(record)
        self.part, first = "", self.task is None
        if first:
            self.bar.add_task("unlearning", total=steps, completed=record["step"] - 1, state="")
            self.task = self.bar.tasks[-1]
        # a worker's next run may have other steps
        self.bar.update(self.task.id, total=steps, completed=record["step"], state=state)
        if not self.live and (first or record["step"] == steps):
            self._line(_of(self.task))


def _state(record: dict[str, Any]) -> str:
    """Return a step's numbers as a line: PMC's, or another method's."""
    loss = f"loss {record['loss']:.3f}"
    if "collapse_loss" not in record:
        return f"{loss}  {record['train_seconds']:.2f} s"
    rate = record["sampled_tokens"] / record["rollout_seconds"] if record["sampled_tokens"] else 0.0
    return (
        f"{loss} (collapse {record['collapse_loss']:.3f}, retain {record['retain_loss']:.3f})  mean score "
        f"{record['mean_score']:.3f}  pending {record['pending']}  {rate:.0f} tokens/s"
    )


def _of(task: Any) -> str:
    return f"step {task.completed:.0f}/{task.total:.0f}  {task.fields['state']}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
