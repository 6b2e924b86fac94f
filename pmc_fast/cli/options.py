"""Flags and YAML files, from the fields of a settings class."""

import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from ..config import PRESETS, RequestConfig, written_columns
from ..config.parts import PathMarker
from ..errors import PMCError
from .common import FILE

preset_option = click.option("--preset", type=click.Choice(list(PRESETS)), help="start from a named set of settings")


def config_options(config: type[Any], names: Sequence[str] | None = None) -> Callable[[Any], Any]:
    """Give a command one option for each field of `config`, or for `names`; options that are not given pass None."""

    def decorate(command: Any) -> Any:
        hints, noted = (typing.get_type_hints(config, include_extras=extras) for extras in (False, True))
        for f in reversed(dataclasses.fields(config)):
            if names is not None and f.name not in names:
                continue
            flag, kind = "--" + f.name.replace("_", "-"), hints[f.name]
            options: dict[str, Any] = {"help": _help(f), "default": None}
            if kind is bool:
                flag += "/--no-" + f.name.replace("_", "-")
            elif kind == list[str]:
                options["multiple"] = True
            elif typing.get_origin(kind) is typing.Literal:
                options["type"] = click.Choice(typing.get_args(kind))
            elif isinstance(kind, types.UnionType):
                options["type"] = typing.get_args(kind)[0]  # float | None
            else:
                options["type"] = kind
            if PathMarker in typing.get_args(noted[f.name]):
                options["type"] = FILE
            if "flag_value" in f.metadata:  # the value of a flag without one
                options |= {"is_flag": False, "flag_value": f.metadata["flag_value"]}
            command = click.option(flag, *f.metadata.get("aliases", ()), f.name, **options)(command)
        return command

    return decorate


def _help(f: dataclasses.Field[Any]) -> str:
    unset = (None, "", dataclasses.MISSING)
    return f.metadata["help"] + ("" if f.default in unset else f"  [default: {f.default}]")


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given; those that may be given several times as lists."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if value not in (None, ())
    }


def read_yaml(path: str | None) -> dict[str, Any]:
    """Return the settings of a YAML file by their field names."""
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
    hints = typing.get_type_hints(RequestConfig)
    settings = RequestConfig.by_field({str(key): value for key, value in content.items()}, f"config {path}")
    for name, value in settings.items():
        if isinstance(value, str) and hints.get(name) in (float, float | None):
            with suppress(ValueError):  # YAML 1.1 reads 1e-5 as a string
                settings[name] = float(value)
        if name == "columns" and isinstance(value, dict):
            settings[name] = written_columns(value)
    return settings
