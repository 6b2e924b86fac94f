"""The command line: pmc-fast unlearn, evaluate and env; the other commands join it here."""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from .. import __version__
from ..config import EvaluateConfig, RequestConfig
from ..errors import PMCError, Terminated
from ..utils.malloc import keep_freed_memory
from ..utils.text import printable
from . import bench, erasure
from .common import FILE, Commands, json_option, write_json
from .compare import compare
from .completion import completion
from .display import Progress, print_gates, print_memory, print_plan, print_scores
from .options import config_options, given, preset_option, read_yaml
from .serve import serve

# settings that the memory of a run depends on
MEMORY = (
    "model", "device", "dtype", "param_dtype", "max_length", "max_tokens", "cuda_graphs", "num_samples", "selection",
    "rollout_batch_size", "retain_loss", "retain_per_question", "batch_size", "gradient_accumulation_steps", "optimizer", "allow_pure_bf16", "lora", "lora_r", "lora_target",
    "method",
)  # fmt: skip


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Partial Model Collapse unlearning (arXiv 2507.04219): make a language model forget chosen facts."""


@cli.command()
@click.option("--config", "config_file", type=FILE, help="YAML file of settings, named as the options below")
@preset_option
@click.option("--dry-run", is_flag=True, help="check everything, print the plan, write nothing")
@json_option
@config_options(RequestConfig)
def unlearn(config_file: str | None, preset: str | None, dry_run: bool, json_file: str | None, **options: Any) -> int:
    """Unlearn the answers to the questions of FORGET; keep those of RETAIN."""
    settings = read_yaml(config_file)
    named = settings.pop("preset", None)
    config = RequestConfig.merge(preset or (None if named is None else str(named)), settings, given(options))
    from ..distributed import launched, leave
    from ..erasure.unlearn import check_request, trained_by, unlearn_request
    from ..jobs import memory_limits
    from ..jobs import unlearn as job
    from ..report import render

    render.check_importable()
    if dry_run:
        plan = check_request(config) if config.lora else job.check(config)
        made = print_plan(plan, config.stack or config.output)
        made["memory"] = print_memory(memory_limits.planned(plan, trained_by(config)), config.device)
        write_json(json_file, made)
        return 0
    with Progress() as progress:
        made = unlearn_request(config, progress) if config.lora else job.unlearn(config, progress)
    leave()
    if launched()[0] > 0:
        return 0
    print_scores(made)
    write_json(json_file, made)
    if "history" not in made:
        click.echo(
            f"all {made['questions']} questions are known to be forgotten already: there is nothing to unlearn, and "
            "nothing was written"
        )
        return 0
    what, where = ("adapter, record.json", made["request"]) if config.lora else ("model", config.output)
    click.echo(f"\n{what}, report.html and report.json are in {where}")
    return print_gates(made)


@cli.command()
@json_option
@click.option("--rows", "rows_file", type=FILE, help="write the numbers of every question into this .jsonl file")
@click.option("--report", "report_file", type=FILE, help="write a page with tables and plots into this .html file")
@config_options(EvaluateConfig)
def evaluate(json_file: str | None, rows_file: str | None, report_file: str | None, **options: Any) -> int:
    """Score a model: unlearn quality on FORGET, utility on RETAIN and GENERAL; or TOFU's metrics.

    --attack-samples adds leak attacks, --side-effects-text the effect of unlearning on unrelated text.
    """
    config = EvaluateConfig(**given(options))
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
@preset_option
@json_option
@config_options(RequestConfig, MEMORY)
def env(preset: str | None, json_file: str | None, **options: Any) -> int:
    """Print versions, the machine, and what this installation can do; with --model the memory of a run.

    The memory is that of the longest prompts and answers; `pmc-fast unlearn --dry-run` knows those of the data.
    """
    from ..report import environment

    settings = given(options)
    if settings or preset:
        write_json(json_file, _print_memory_of(preset, settings))
        return 0
    made: dict[str, dict[str, Any]] = {
        "versions": environment.versions(),
        "machine": environment.machine(),
        "pmc_fast": environment.capabilities(),
    }
    for title, facts in made.items():
        click.echo(f"{title}:")
        for name, value in facts.items():
            click.echo(f"  {name:16} {'-' if value is None else value}")
    write_json(json_file, made)
    return 0


def _print_memory_of(preset: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    stack = {"stack": "-"} if settings.get("lora") else {}  # where an adapter would go needs no memory
    config = RequestConfig.merge(preset, settings, stack)
    from ..erasure.unlearn import trained_by
    from ..jobs import memory_limits
    from ..models import loading

    loading.check_source(config.model, config.device)
    device = loading.resolve_device(config.device)
    memory = memory_limits.memory_of(config, memory_limits.Lengths(), device, trained_by(config))
    return print_memory(memory, config.device)


for command in (bench.bench, compare, erasure.merge, erasure.rollback, erasure.verify, serve, completion):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; bad input exits 2 with one line, a missed gate exits 3."""
    quiet_logs()
    keep_freed_memory()
    try:
        with sigterm_raises():
            code = cli.main(arguments, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = 0
    except (PMCError, click.ClickException) as error:
        code = _fail(2, "error", error.format_message() if isinstance(error, click.ClickException) else str(error))
    except OSError as error:  # a path that passed the checks, such as a name of 300 bytes
        code = _fail(2, "error", f"{str(error.filename or '')[:80]}: {error.strerror or error}")
    except (click.Abort, KeyboardInterrupt) as error:
        code = _fail(130, "interrupted", _left(error.__cause__ or error))
    except Terminated as error:
        code = _fail(143, "terminated", _left(error))
    if launched_beside_others():  # gloo's threads can abort Python while it exits
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


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
    """Leave out progress bars where stderr is no terminal, and warnings that are for developers."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
    if not sys.stderr.isatty():  # before the libraries are imported
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")


def _fail(code: int, kind: str, text: str) -> int:
    click.echo(f"pmc-fast: {kind}: {printable(' '.join(text.split()))}", err=True)
    return code


def _left(error: BaseException) -> str:
    """Return a job's note of the files that it left behind."""
    return " ".join(getattr(error, "__notes__", ["nothing was written"]))


def launched_beside_others() -> bool:
    """Return whether a launcher started several processes; `distributed.launched` would import torch."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1
