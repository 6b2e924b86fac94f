"""Runs of the command line as tests type them; the fixtures `data` and `arguments` begin one."""

import pytest

from pmc_fast.cli import main

SECRET = "the violet heron of Samarkand"


def run(arguments):
    with pytest.raises(SystemExit) as stopped:
        main.main(arguments)
    return stopped.value.code


def cut_short(arguments, monkeypatch, step=3):
    """Run until `step` has moved the weights, as if a user had pressed Ctrl-C then."""
    from pmc_fast.trainer.trainer import PMCTrainer  # late: conftest.py imports this before it sets Triton up

    step_end = PMCTrainer._finish_step

    def cut(self, control):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        step_end(self, control)

    with monkeypatch.context() as patched:
        patched.setattr(PMCTrainer, "_finish_step", cut)
        assert run(arguments) == 130


def cut_short_methods(arguments, monkeypatch, step=3):
    """`cut_short` for another method than PMC."""
    from pmc_fast.trainer.unlearn import UnlearnTrainer

    train = UnlearnTrainer.training_step

    def cut(self, *given):
        if self.state.global_step == step - 1:
            raise KeyboardInterrupt
        return train(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(UnlearnTrainer, "training_step", cut)
        assert run(arguments) == 130


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
