"""Runs of the command line as tests type them; the fixtures `data` and `arguments` begin one."""

import pytest

from pmc_fast import cli

SECRET = "the violet heron of Samarkand"


def run(arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    return stopped.value.code


def replaced(arguments, **flags):
    arguments = list(arguments)
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if flag in arguments:
            at = arguments.index(flag)
            del arguments[at : at + 2]
        if value is not None:
            arguments += [flag, str(value)]
    return arguments


def left_behind(data):
    return sorted(p.name for p in data.iterdir() if p.suffix != ".jsonl")
