"""The command line: pmc-fast unlearn, evaluate and env."""

import dataclasses
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .config import PRESETS, EvaluateConfig, UnlearnConfig
from .errors import PMCError
from .printable import printable

if TYPE_CHECKING:  # torch and transformers load when a command runs: --help stays quick
    from .job import Plan

GATE_MISSED = 3
EVALUATED = (
    "model", "before", "suite", "forget", "retain", "paraphrased", "general", "tofu", "split", "tofu_rows",
    "truth_ratio", "retain_log", "prompt_format", "system_prompt", "date_string", "max_length", "max_tokens", "device",
    "dtype", "attack_samples", "attack_temperature", "attack_top_k", "attack_top_p", "attack_prefill",
    "attack_first_words", "leak_threshold", "confidence", "side_effects_text", "seed", "min_quality", "min_utility",
    "log_text", "allow_control_tokens",
)  # fmt: skip


def _config_options(config: type[UnlearnConfig], names: Iterable[str] | None = None) -> Callable[[Any], Any]:
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


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if value not in (None, ())
    }


def _read_yaml(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        import yaml
    except ImportError as error:
        raise PMCError("--config needs pyyaml: pip install 'pmc_fast[cli]'") from error
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise PMCError(f"config {path} can't be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise PMCError(f"config {path} must hold 'name: value' lines")
    # YAML 1.1 reads 1e-5 as a string
    floats = {f.name for f in dataclasses.fields(UnlearnConfig) if f.type in (float, "float")}
    for name in floats & content.keys():
        if isinstance(content[name], str):
            try:
                content[name] = float(content[name])
            except ValueError as error:
                raise PMCError(f"{name} is {content[name]!r} in {path}: it must be a number") from error
    return content


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Partial Model Collapse unlearning (arXiv 2507.04219): make a language model forget chosen facts."""


@cli.command()
@click.option("--config", "config_file", help="YAML file of settings by their names below, '-' being '_'")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="start from a set of published settings")
@click.option("--dry-run", is_flag=True, help="check everything, say what would be done, write nothing")
@_config_options(UnlearnConfig)
def unlearn(config_file: str | None, preset: str | None, dry_run: bool, **options: Any) -> int:
    """Unlearn the answers to the questions of FORGET; keep those of RETAIN."""
    config = UnlearnConfig.merge(preset, _read_yaml(config_file), _given(options))
    from . import job, report
    from .ranks import launched, leave

    report.check_importable()
    if dry_run:
        _print_plan(job.check(config))
        return 0
    with _Progress() as progress:
        made = job.unlearn(config, progress)
    leave()
    if launched()[0] > 0:
        return 0
    _print_scores(made)
    if "known_forgotten" in made and "history" not in made:
        click.echo(
            f"all {made['questions']} questions are known to be forgotten already: there is nothing to unlearn, and "
            "nothing was written"
        )
        return 0
    click.echo(f"\nmodel, report.html and report.json are in {config.output}")
    return _gates(made)


@cli.command()
@click.option("--json", "json_file", help="also write the scores into this file")
@click.option("--rows", "rows_file", help="and every question's numbers into this one (.jsonl)")
@click.option("--report", "report_file", help="and a page with tables and plots into this one (.html)")
@_config_options(EvaluateConfig, EVALUATED)
def evaluate(json_file: str | None, rows_file: str | None, report_file: str | None, **options: Any) -> int:
    """Score a model: unlearn quality on FORGET, utility on RETAIN and GENERAL; or TOFU's metrics.

    With --attack-samples also what leaks when it is asked often or helped, with --side-effects-text what unlearning
    did to other text.
    """
    config = EvaluateConfig.merge(None, _given(options))
    from . import report
    from .evaluate_job import evaluate_model
    from .output import check_new_files, write_file

    files = {"json": json_file, "rows": rows_file, "report": report_file}
    check_new_files(files)
    if report_file:
        report.check_importable()
    rows: list[dict[str, Any]] = []
    with _Progress() as progress:
        made = evaluate_model(config, progress, rows)
    _print_scores(made)
    make = {
        "json": lambda: report.summary(made),
        "rows": lambda: report.jsonl(rows),
        "report": lambda: report.html(made, rows),
    }
    for kind, file in files.items():
        if file:
            write_file(file, make[kind]())
    return _gates(made)


@cli.command()
def env() -> None:
    """Print versions, the machine, and what this installation can do."""
    from . import environment

    for title, facts in (
        ("versions", environment.versions()),
        ("machine", environment.machine()),
        ("pmc_fast", environment.capabilities()),
    ):
        click.echo(f"{title}:")
        for name, value in facts.items():
            click.echo(f"  {name:16} {'-' if value is None else value}")


def _print_plan(plan: "Plan") -> None:
    c, s = plan.config, plan.schedule
    click.echo(f"forget    {len(plan.forget)} questions of {c.forget}")
    click.echo(f"retain    {len(plan.retain)} pairs of {c.retain}")
    click.echo(f"evaluate  {', '.join(f'{e.name} ({len(e.rows)})' for e in plan.sets) or 'nothing'}")
    click.echo(f"prompts   {c.prompt_format}, prompt and answer at most {c.max_length} tokens")
    click.echo(
        f"steps     {s.steps} ({s.steps_per_epoch} an epoch), each {c.batch_size} x "
        f"{c.gradient_accumulation_steps} questions, {c.num_samples} samples a question"
    )
    if c.skip_known_forgotten:
        click.echo("skip      questions known to be forgotten: fewer steps where there are any")
    click.echo(f"output    {c.output}: nothing was written")
    for text in plan.warnings:
        click.echo(f"warning: {text}", err=True)


def _print_scores(made: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from .report import metric_rows

    rows = metric_rows(made)
    if not rows:
        return
    both = "before" in made
    table = Table("metric", *(["before"] if both else []), "after" if both else "value")
    for metric, before, after in rows:
        table.add_row(escape(metric), *([before] if both else []), after)
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def _gates(made: dict[str, Any]) -> int:
    for line in made["failed_gates"]:
        click.echo(f"gate missed: {line}", err=True)
    return GATE_MISSED if made["failed_gates"] else 0


class _Progress:
    """Shows a job's stages and steps on stderr: a live line in a terminal, now and then a line elsewhere."""

    LINES = 20

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task: Any = None
        self.start = time.perf_counter()

    def __enter__(self) -> "_Progress":
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


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; bad input exits 2 with one line, a missed gate exits 3."""
    try:
        code = cli.main(arguments, standalone_mode=False)
    except PMCError as error:
        text = printable(" ".join(str(error).split()))
        click.echo(f"pmc-fast: error: {text}", err=True)
        code = 2
    except click.ClickException as error:
        text = printable(" ".join(error.format_message().split()))
        click.echo(f"pmc-fast: error: {text}", err=True)
        code = 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("pmc-fast: interrupted: nothing was written", err=True)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
