"""What every command has: results as JSON, --log-level, progress in terminals and logs, completion, `python -m`."""

import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import click
import pytest

from pmc_fast.cli.completion import VARIABLE
from pmc_fast.cli.display import Progress
from pmc_fast.cli.main import cli
from tests.command_line import SECRET, left_behind, run

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_RESULT = {"completion", "serve"}


@pytest.fixture
def program(tmp_path):
    """The directory of a `pmc-fast` as pip installs it, and the environment to run it in."""
    directory = tmp_path / "bin"
    directory.mkdir()
    script = directory / "pmc-fast"
    script.write_text(f"#!{sys.executable}\nfrom pmc_fast.__main__ import main\nmain()\n")
    script.chmod(0o755)
    return os.environ | {"PATH": f"{directory}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


# --- results as JSON


def test_every_command_has_json_and_log_level():
    for name, command in cli.commands.items():
        flags = {flag for parameter in command.params for flag in parameter.opts}
        assert "--log-level" in flags, name
        assert ("--json" in flags) == (name not in WITHOUT_RESULT), name


def test_env_as_json_is_what_it_prints(tmp_path, tiny_dir, capsys):
    assert run(["env", "--json", str(tmp_path / "env.json")]) == 0
    shown = capsys.readouterr().out
    made = json.loads((tmp_path / "env.json").read_text())
    assert list(made) == ["versions", "machine", "pmc_fast"]
    for facts in made.values():
        for name, value in facts.items():
            assert re.search(
                rf"^  {re.escape(name)} +{re.escape('-' if value is None else str(value))}$", shown, re.M
            )
    assert run(["env", "--model", str(tiny_dir), "--device", "cpu", "--json", str(tmp_path / "memory.json")]) == 0
    shown, memory = capsys.readouterr().out, json.loads((tmp_path / "memory.json").read_text())
    assert memory["together"]["most"] >= max(item["most"] for item in memory["items"]) > 0
    assert memory["device"] == "cpu"
    assert f"{memory['together']['most'] / 2**30:.2f}" in shown
    more = ["--retain-per-question", "4", "--rollout-batch-size", "64"]
    assert (
        run(["env", "--model", str(tiny_dir), "--device", "cpu", *more, "--json", str(tmp_path / "more.json")]) == 0
    )
    assert json.loads((tmp_path / "more.json").read_text())["together"]["most"] > memory["together"]["most"]


def test_a_run_and_its_plan_as_json(arguments, data, capsys):
    plan, made = data / "plan.json", data / "made.json"
    assert run([*arguments, "--dry-run", "--json", str(plan)]) == 0
    planned = json.loads(plan.read_text())
    assert planned["rows"] == {"forget": 4, "retain": 6}
    assert planned["steps"] == 2
    assert planned["memory"]["together"]["most"] >= planned["memory"]["together"]["expected"] > 0
    clocked = data / "clocked.json"
    assert run([*arguments, "--dry-run", "--json", str(clocked), "--max-seconds", "9"]) == 0
    assert json.loads(clocked.read_text())["steps"] is None
    assert "steps     what 9 s allow (2 an epoch)" in capsys.readouterr().out
    assert run([*arguments, "--json", str(made), "--log-level", "warning"]) == 0
    result, report = (json.loads(file.read_text()) for file in (made, data / "out/report.json"))
    assert set(result.pop("stage_seconds")) - set(report.pop("stage_seconds")) == {
        "rendering",
        "saving",
    }  # after it was made
    assert result == report
    assert SECRET not in plan.read_text() + made.read_text()
    shown = capsys.readouterr().err
    assert "warning: " in shown
    assert "evaluation after" not in shown


@pytest.mark.parametrize(
    ("name", "message"), [("forget.jsonl", "json file"), ("-", "json file -"), ("no/x", "json file")]
)
def test_a_result_that_can_not_be_written_is_refused_before_work(arguments, data, capsys, monkeypatch, name, message):
    monkeypatch.chdir(data)
    assert run([*arguments, "--json", name]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1
    assert left_behind(data) == []


# --- levels


def test_errors_alone(arguments, program, capsys):
    done = subprocess.run(
        ["pmc-fast", *arguments, "--log-level", "error"], env=program, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "unlearn quality" in done.stdout
    assert run([*arguments, "--log-level", "loud"]) == 2
    assert "'loud' is not one of 'debug', 'info', 'warning', 'error'" in capsys.readouterr().err


def test_debug_shows_the_libraries_and_no_text(arguments, data, program):
    done = subprocess.run(
        ["pmc-fast", *arguments, "--log-level", "debug"], env=program, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\[transformers\] ", done.stderr, re.M)
    assert SECRET not in done.stdout + done.stderr
    assert "What is fact" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr


# --- progress


class Log(io.StringIO):
    def isatty(self):
        return False


class Terminal(io.StringIO):
    def isatty(self):
        return True


def record(step, loss=1.0):
    return {
        "step": step, "loss": loss, "collapse_loss": 0.5, "retain_loss": 0.25, "mean_score": 0.5, "pending": 3,
        "sampled_tokens": 60, "rollout_seconds": 2.0,
    }  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(Progress, "clock", staticmethod(lambda: now[0]))
    return now


def test_a_log_has_lines_with_how_far_and_how_long(monkeypatch, clock):
    """A line for each stage, the first and the last step, and what `still` says in between; whatever colours are forced."""
    log = Log()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setenv("FORCE_COLOR", "1")
    progress = Progress()
    progress.still()  # nothing has begun
    progress.stage("evaluation before")
    progress.stage("  retain: 9 questions")
    clock[0] = 40
    progress.still()
    progress.stage("unlearning")
    progress.stage("  reported to tensorboard: here")
    for step in range(1, 6):
        clock[0] += 60
        progress.step(record(step), 10)
    progress.still()
    for step in range(6, 11):
        progress.step(record(step), 10)
    progress.still()
    progress.stage("saving")
    progress.warn("late")
    clock[0] = 10000
    progress.still()
    state = "loss 1.000 (collapse 0.500, retain 0.250)  mean score 0.500  pending 3  30 tokens/s"
    assert log.getvalue().splitlines() == [
        "[   0.0 s] evaluation before",
        "[   0.0 s]   retain: 9 questions",
        "[  40.0 s] evaluation before (retain: 9 questions), for 40 s now",
        "[  40.0 s] unlearning",
        "[  40.0 s]   reported to tensorboard: here",
        f"[ 100.0 s] step 1/10  {state}",
        f"[ 340.0 s] step 5/10  {state}  about 5 min left",
        f"[ 340.0 s] step 10/10  {state}",
        "[ 340.0 s] unlearning, for 5 min now",
        "[ 340.0 s] saving",
        "[ 340.0 s] warning: late",
        "[10000.0 s] saving, for 2.7 h now",
    ]


def test_steps_that_stopped_early_are_not_counted_in_the_next_stage(monkeypatch, clock):
    log = Log()
    monkeypatch.setattr(sys, "stderr", log)
    progress = Progress()
    for stage, first in (("unlearning", 3), ("unlearning again", 1)):
        progress.stage(stage)
        for step in (first, first + 1):
            clock[0] += 10
            progress.step(record(step), 8)
        progress.still()
        progress.stage("evaluation after")
        progress.still()
    lines = [line.split("] ")[1].split("  loss")[0] for line in log.getvalue().splitlines()]
    assert lines == [
        "unlearning", "step 3/8", "step 4/8", "evaluation after", "evaluation after, for 0 s now",
        "unlearning again", "step 1/8", "step 2/8", "evaluation after", "evaluation after, for 0 s now",
    ]  # fmt: skip
    assert [text.split("about ")[1] for text in log.getvalue().splitlines() if "about" in text] == [
        "40 s left", "60 s left"
    ]  # fmt: skip


def test_a_long_stage_says_that_it_goes_on(monkeypatch):
    """A thread of its own, whatever the stage does; it ends with the progress."""
    said = threading.Event()
    monkeypatch.setattr(sys, "stderr", Log())
    monkeypatch.setattr(Progress, "EVERY", 0.01)
    monkeypatch.setattr(Progress, "still", lambda self: said.set())
    before = threading.active_count()
    with Progress() as progress:
        progress.stage("loading the model")
        assert said.wait(30)
        (thread,) = (t for t in threading.enumerate() if "_watch" in t.name)
    thread.join(30)
    assert threading.active_count() == before


def test_a_terminal_has_a_bar_and_a_quiet_one_none(monkeypatch):
    for level, shown in (("info", True), ("warning", False)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        context = click.Context(cli)
        context.meta["pmc_fast.log_level"] = level
        with context, Progress() as progress:
            progress.stage("unlearning")
            progress.step(record(1), 2)
            progress.warn("late")
        assert ("1/2" in terminal.getvalue()) == shown
        assert ("unlearning" in terminal.getvalue()) == shown
        assert "warning: late" in terminal.getvalue()


# --- shells


def complete(program, *words):
    """Source the script that the command prints into bash, and return what it completes the last word to."""
    quoted = " ".join(f"'{word}'" for word in words)
    code = (
        "source <(pmc-fast completion bash) || exit 1\n"
        f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; COMPREPLY=()\n"
        'compopt() { local IFS=" "; echo "compopt $*"; }\n'
        '_pmc_fast_completion pmc-fast\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", code], env=program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_bash_completes_commands_options_values_and_files(program):
    assert complete(program, "pmc-fast", "ro") == ["rollback"]
    assert complete(program, "pmc-fast", "unlearn", "--report") == ["--report-to"]
    values = complete(program, "pmc-fast", "unlearn", "--report-to", "")
    assert values == ["none", "tensorboard", "wandb", "mlflow"]
    for words in (["unlearn", "--model", "x"], ["verify", "x"], ["merge", "--stack", "x"], ["env", "--json", "x"]):
        assert "compopt -o default" in complete(program, "pmc-fast", *words), words


def test_scripts_of_all_shells_name_the_variable_that_click_reads(program, capsys):
    for shell in ("bash", "zsh", "fish"):
        assert run(["completion", shell]) == 0
        assert f"{VARIABLE}={shell}_complete" in capsys.readouterr().out
    # click's name for the program that is installed, as the variable alone shows
    made = subprocess.run(
        ["pmc-fast"], env=program | {VARIABLE: "zsh_source"}, capture_output=True, text=True, check=False
    )
    assert run(["completion", "zsh"]) == 0
    assert made.stdout.strip() == capsys.readouterr().out.strip()
    assert run(["completion", "tcsh"]) == 2


def test_python_m_is_the_command(program, tmp_path):
    def python(*words):
        return subprocess.run(
            [sys.executable, "-m", "pmc_fast", *words], env=program, cwd=tmp_path, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    shown = python("--version")
    assert shown.returncode == 0
    assert "pmc_fast, version" in shown.stdout
    bad = python("merge", "--stack", "nowhere", "--output", "out")
    assert bad.returncode == 2
    assert bad.stderr.startswith("pmc-fast: error: ")
    assert list(tmp_path.iterdir()) == [tmp_path / "bin"]
