"""Runs that are cut short, and two that want one output: nothing lost, nothing half done, one line."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers

from pmc_fast.jobs import unlearn
from pmc_fast.utils.files import claimed
from tests.command_line import cut_short, left_behind, replaced, run


@pytest.fixture
def longer(arguments):
    return [*replaced(arguments, epochs="2"), "--no-evaluate"]


def signalled(monkeypatch, step, times=1):
    """Send this process SIGTERM while `step` is under way."""
    from pmc_fast.trainer.trainer import PMCTrainer

    finish = PMCTrainer._finish_step

    def finish_step(self, control):
        finish(self, control)
        if self.state.global_step == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(PMCTrainer, "_finish_step", finish_step)


def test_sigterm_leaves_a_checkpoint_that_goes_on(longer, data, monkeypatch, capsys):
    checkpoints = [*longer, "--checkpoint-steps", "100"]
    assert run(replaced(checkpoints, output=data / "whole")) == 0
    with monkeypatch.context() as patched:
        signalled(patched, 2)
        assert run(checkpoints) == 143
    shown = capsys.readouterr().err
    assert "SIGTERM: a checkpoint is written after this step" in shown
    assert "pmc-fast: terminated:" in shown.splitlines()[-1]
    assert "out.checkpoints/checkpoint-2 is kept" in shown.splitlines()[-1]
    assert left_behind(data) == ["out.checkpoints", "whole"]
    assert run([*checkpoints, "--resume", "auto"]) == 0
    assert "from checkpoint-2 on" in capsys.readouterr().err
    ours, whole = (
        transformers.AutoModelForCausalLM.from_pretrained(data / name, dtype=torch.float32)
        for name in ("out", "whole")
    )
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), whole.parameters(), strict=True))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_without_checkpoints_or_twice_ends_at_once(longer, data, monkeypatch, capsys, times):
    more = ["--checkpoint-steps", "100"] if times == 2 else []
    signalled(monkeypatch, 1, times)
    assert run([*longer, *more]) == 143
    assert capsys.readouterr().err.splitlines()[-1] == "pmc-fast: terminated: nothing was written"
    assert left_behind(data) == []


def test_an_interrupt_names_the_checkpoint_that_it_leaves(longer, data, monkeypatch, capsys):
    cut_short([*longer, "--checkpoint-steps", "1"], monkeypatch)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "interrupted: " in last
    assert "checkpoint-2 is kept and holds the initial answers (mode 0600): go on with --resume auto" in last
    cut_short(replaced(longer, output=data / "other"), monkeypatch)
    assert capsys.readouterr().err.splitlines()[-1] == "pmc-fast: interrupted: nothing was written"


def test_an_interrupt_while_it_starts_is_one_line():
    """From Python's own start on: a moment later there would be a traceback of half-imported modules."""
    broken = "import builtins, signal, os; real = builtins.__import__\n" + (
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background processes ignore it
        "def hook(name, *a, **k):\n"
        "    if name == 'click': os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(name, *a, **k)\n"
        "builtins.__import__ = hook\nimport pmc_fast.__main__ as m; m.main()"
    )
    done = subprocess.run([sys.executable, "-c", broken], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr == "pmc-fast: interrupted: nothing was written\n"


def test_two_runs_do_not_write_one_output(arguments, data, capsys):
    with claimed(str(data / "out")):
        assert run(arguments) == 2
        assert "out is being written by another run: wait for it" in capsys.readouterr().err.splitlines()[-1]
        assert [p for p in left_behind(data) if p != ".out.lock"] == []
    assert left_behind(data) == []
    (data / ".out.lock").touch()  # of a process that was killed: its lock went with it
    assert run(arguments) == 0
    assert left_behind(data) == ["out"]


def test_of_two_processes_one_is_refused(arguments, data):
    """Both pass the first look at an output that is not there; the second finds it taken, before any work."""
    command = [sys.executable, "-m", "pmc_fast", *arguments, "--no-evaluate"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (data / ".out.lock").exists() and first.poll() is None:
        time.sleep(0.01)
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    _, shown = first.communicate()
    assert first.returncode == 0, shown
    assert second.returncode == 2
    assert "another run" in second.stderr or "is not empty" in second.stderr
    assert "\r" not in shown + second.stderr
    assert "Warning" not in shown


def test_an_output_that_another_run_finished_meanwhile_is_refused(arguments, data, monkeypatch, capsys):
    """It ended between this run's check and its lock: its model is not lost at the rename, nor this one's hours."""
    check = unlearn.check

    def checked(*of):
        plan = check(*of)
        (data / "out").mkdir()
        (data / "out/theirs").touch()
        return plan

    monkeypatch.setattr(unlearn, "check", checked)
    assert run(arguments) == 2
    shown = capsys.readouterr().err
    assert "is not empty" in shown.splitlines()[-1]
    assert "loading the model" not in shown
