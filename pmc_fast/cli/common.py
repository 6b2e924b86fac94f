"""What every command has: --log-level, names of files that a shell completes, and a result as JSON."""

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..errors import PMCError

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_KEY = "pmc_fast.log_level"  # in click's context
# their own loggers, or modules with a `set_verbosity`
_LOGGERS = ("pmc_fast", "accelerate", "peft")
_VERBOSITIES = ("transformers.utils.logging", "datasets.utils.logging", "huggingface_hub.utils.logging")


class FileName(click.types.StringParamType):
    """A text that a shell completes as a file's name; the commands check it themselves."""

    name = "path"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


FILE = FileName()


class Commands(click.Group):
    """A group whose commands all have --log-level."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        cmd.params.append(
            click.Option(
                ["--log-level"], type=click.Choice(list(LEVELS)), default="info", show_default=True, is_eager=True,
                expose_value=False, callback=_set_level,
                help="error: errors alone; warning: warnings, too; info: progress, too; debug: and what libraries log",
            )
        )  # fmt: skip
        super().add_command(cmd, name)


def shows(level: str) -> bool:
    """Return whether the running command shows messages of a level."""
    context = click.get_current_context(silent=True)
    chosen = context.meta.get(_KEY, "info") if context else "info"
    return LEVELS[level] >= LEVELS[chosen]


def _set_level(context: click.Context, parameter: click.Parameter, value: str) -> None:
    if context.resilient_parsing:  # a shell asks for completions
        return
    context.meta[_KEY] = value
    if value == "error" and not sys.warnoptions:
        warnings.simplefilter("ignore")
    if value in ("warning", "error"):  # before the libraries are imported
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    if value in ("debug", "error"):  # else what they show by themselves: warnings
        logging.basicConfig(format="[%(levelname)s] %(name)s: %(message)s", stream=sys.stderr)
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(LEVELS[value])
        for name in _VERBOSITIES:
            with suppress(ImportError):
                importlib.import_module(name).set_verbosity(LEVELS[value])


def json_option(command: Callable[..., Any]) -> Any:
    """Give a command --json FILE, which it gets as `json_file`."""
    return click.option(
        "--json", "json_file", type=FILE, help="write the result into this file", callback=_check_json
    )(command)


def _check_json(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse what can't be written, before any work; - is no file, and standard output has text for people."""
    if value and not context.resilient_parsing:
        from ..utils.files import check_new_files

        if value == "-":
            raise PMCError("json file -: name a new file; standard output shows the result to people")
        check_new_files({"json": value})
    return value


def write_json(file: str | None, made: Mapping[str, Any]) -> None:
    """Write a command's result, if --json names a file."""
    if file:
        from ..report import render
        from ..utils.files import write_file

        write_file(file, render.summary(made))
