"""The command line: pmc-fast unlearn, evaluate, env, and the commands for requests."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import click

from .. import __version__
from ..config import PRESETS, EvaluateConfig, UnlearnConfig
from ..errors import PMCError, Terminated
from ..utils.text import printable
from . import erasure
from .display import (
    Progress,
    config_options,
    given,
    print_gates,
    print_scores,
    quiet_logs,
    sigterm_raises,
)

if TYPE_CHECKING:  # torch and transformers load when a command runs: --help stays quick
    from ..jobs.unlearn import Plan

EVALUATED = (
    "model", "before", "suite", "forget", "retain", "paraphrased", "general", "tofu", "split", "tofu_rows",
    "truth_ratio", "retain_log", "reward", "prompt_format", "system_prompt", "date_string", "max_length", "max_tokens", "device",
    "dtype", "cuda_graphs", "attack_samples", "attack_temperature", "attack_top_k", "attack_top_p", "attack_prefill",
    "attack_first_words", "leak_threshold", "confidence", "side_effects_text", "seed", "min_quality", "min_utility", "max_degenerate",
    "log_text", "allow_control_tokens",
)  # fmt: skip


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
    names = UnlearnConfig.names()
    settings: dict[str, Any] = {}
    for key, value in content.items():
        name = names.get(str(key).removeprefix("--").replace("-", "_"), str(key))
        if name in settings:
            raise PMCError(f"config {path} gives {name} twice, under two names: keep one")
        settings[name] = value
    # YAML 1.1 reads 1e-5 as a string
    floats = {name for name, hint in get_type_hints(UnlearnConfig).items() if hint in (float, float | None)}
    for name in floats & settings.keys():
        if isinstance(settings[name], str):
            try:
                settings[name] = float(settings[name])
            except ValueError as error:
                raise PMCError(f"{name} is {settings[name]!r} in {path}: it must be a number") from error
    return settings


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Partial Model Collapse unlearning (arXiv 2507.04219): make a language model forget chosen facts."""


@cli.command()
@click.option("--config", "config_file", help="YAML file of settings by their names below")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="start from a set of published settings")
@click.option("--dry-run", is_flag=True, help="check everything, say what would be done, write nothing")
@config_options(UnlearnConfig)
def unlearn(config_file: str | None, preset: str | None, dry_run: bool, **options: Any) -> int:
    """Unlearn the answers to the questions of FORGET; keep those of RETAIN."""
    settings = _read_yaml(config_file)
    named = settings.pop("preset", None)
    config = UnlearnConfig.merge(preset or (None if named is None else str(named)), settings, given(options))
    from ..distributed import launched, leave
    from ..erasure.unlearn import check_request, unlearn_request
    from ..jobs import unlearn as job
    from ..report import render

    render.check_importable()
    if dry_run:
        _print_plan(check_request(config) if config.lora else job.check(config))
        return 0
    with Progress() as progress:
        made = unlearn_request(config, progress) if config.lora else job.unlearn(config, progress)
    leave()
    if launched()[0] > 0:
        return 0
    print_scores(made)
    if "known_forgotten" in made and "history" not in made:
        click.echo(
            f"all {made['questions']} questions are known to be forgotten already: there is nothing to unlearn, and "
            "nothing was written"
        )
        return 0
    what, where = ("adapter, record.json", made["request"]) if config.lora else ("model", config.output)
    click.echo(f"\n{what}, report.html and report.json are in {where}")
    return print_gates(made)


@cli.command()
@click.option("--json", "json_file", help="also write the scores into this file")
@click.option("--rows", "rows_file", help="and every question's numbers into this one (.jsonl)")
@click.option("--report", "report_file", help="and a page with tables and plots into this one (.html)")
@config_options(EvaluateConfig, EVALUATED)
def evaluate(json_file: str | None, rows_file: str | None, report_file: str | None, **options: Any) -> int:
    """Score a model: unlearn quality on FORGET, utility on RETAIN and GENERAL; or TOFU's metrics.

    With --attack-samples also what leaks when it is asked often or helped, with --side-effects-text what unlearning
    did to other text.
    """
    config = EvaluateConfig.merge(None, given(options))
    from ..jobs.evaluate import evaluate_model
    from ..report import render
    from ..utils.files import check_new_files, write_file

    files = {"json": json_file, "rows": rows_file, "report": report_file}
    check_new_files(files)
    if report_file:
        render.check_importable()
    rows: list[dict[str, Any]] = []
    with Progress() as progress:
        made = evaluate_model(config, progress, rows)
    print_scores(made)
    make = {
        "json": lambda: render.summary(made),
        "rows": lambda: render.jsonl(rows),
        "report": lambda: render.html(made, rows),
    }
    for kind, file in files.items():
        if file:
            write_file(file, make[kind]())
    return print_gates(made)


@cli.command()
def env() -> None:
    """Print versions, the machine, and what this installation can do."""
    from ..report import environment

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
    answered = sum(bool(row.answer) for row in plan.forget)
    click.echo(
        f"forget    {len(plan.forget)} questions of {c.forget}, {answered or 'none'} with an answer"
        + ("" if answered else ": the model's own first answers are taken for the truth")
    )
    click.echo(f"retain    {len(plan.retain)} pairs of {c.retain}")
    click.echo(f"evaluate  {', '.join(f'{e.name} ({len(e.rows)})' for e in plan.sets) or 'nothing'}")
    click.echo(f"prompts   {c.prompt_format}, prompt and answer at most {c.max_length} tokens")
    click.echo(
        f"steps     {s.steps} ({s.steps_per_epoch} an epoch), each {c.batch_size} x "
        f"{c.gradient_accumulation_steps} questions, {c.num_samples} samples a question"
    )
    if c.skip_known_forgotten:
        click.echo("skip      questions known to be forgotten: fewer steps where there are any")
    click.echo(f"output    {c.stack or c.output}: nothing was written")
    for text in plan.warnings:
        click.echo(f"warning: {text}", err=True)


for command in (erasure.merge, erasure.rollback, erasure.verify):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; bad input exits 2 with one line, a missed gate exits 3."""
    quiet_logs()
    try:
        with sigterm_raises():
            code = cli.main(arguments, standalone_mode=False)
    except PMCError as error:
        text = printable(" ".join(str(error).split()))
        click.echo(f"pmc-fast: error: {text}", err=True)
        code = 2
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = 0
    except OSError as error:  # of a path that no check foresaw, such as a name of 300 bytes
        click.echo(
            f"pmc-fast: error: {printable(str(error.filename or ''))[:80]}: {error.strerror or error}", err=True
        )
        code = 2
    except click.ClickException as error:
        text = printable(" ".join(error.format_message().split()))
        click.echo(f"pmc-fast: error: {text}", err=True)
        code = 2
    except (click.Abort, KeyboardInterrupt) as error:
        click.echo(f"pmc-fast: interrupted: {_left(error.__cause__ or error)}", err=True)
        code = 130
    except Terminated as error:
        click.echo(f"pmc-fast: terminated: {_left(error)}", err=True)
        code = 143
    if launched_beside_others():  # gloo's threads live as long as Python does, and some abort it at its end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


def _left(error: BaseException) -> str:
    """Return what a job has noted of what it leaves."""
    return printable(" ".join(getattr(error, "__notes__", ["nothing was written"])))


def launched_beside_others() -> bool:
    """Return whether a launcher started this process as one of several; `ranks.launched` would import torch."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1


if __name__ == "__main__":
    main()
