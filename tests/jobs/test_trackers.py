"""--report-to: what TensorBoard, Weights & Biases and MLflow are given, and what is refused before a run starts."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pmc_fast.errors import PMCError
from pmc_fast.jobs import trackers
from pmc_fast.jobs.progress import Silent
from tests.command_line import SECRET, cut_short, left_behind, replaced, run

TEXTS = (SECRET, "What is fact", "It is True")  # of the data; answers of the tiny model are no words
LOSSES = ("loss", "collapse_loss", "retain_loss", "mean_score", "pending")


def history(data):
    return json.loads((data / "out/report.json").read_text())["history"]


def bytes_below(directory):
    return b"".join(p.read_bytes() for p in Path(directory).rglob("*") if p.is_file())


def assert_no_text(directory):
    content = bytes_below(directory)
    assert content
    assert not [text for text in TEXTS if text.encode() in content]


def test_tensorboard_gets_the_numbers_of_every_step_and_no_text(arguments, data, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run([*arguments, "--report-to", "tensorboard"]) == 0
    (directory,) = (data / "out.tensorboard").iterdir()
    assert directory.name.startswith("out_")
    assert f"reported to tensorboard: {directory}" in capsys.readouterr().err
    events = EventAccumulator(str(directory)).Reload()
    for name in LOSSES:
        read = [(e.step, e.value) for e in events.Scalars(f"train/{name}")]
        assert [step for step, _ in read] == [1, 2]
        assert [value for _, value in read] == pytest.approx([r[name] for r in history(data)], rel=1e-6)
    assert set(events.Tags()["tensors"]) == {"args/text_summary", "model_config/text_summary"}
    assert_no_text(directory)
    assert left_behind(data) == ["out", "out.tensorboard"]


def test_a_run_that_is_cut_short_says_where_its_numbers_are(arguments, data, monkeypatch, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "all"))
    cut_short([*arguments, "--report-to", "tensorboard", "--no-evaluate"], monkeypatch, step=2)
    last = capsys.readouterr().err.splitlines()[-1]
    (directory,) = (tmp_path / "all").iterdir()
    assert last == f"pmc-fast: interrupted: {data / 'out'} was not written; its numbers are in {directory}"


def test_wandb_gets_the_numbers_and_no_text(arguments, data, monkeypatch, tmp_path):
    """Offline, in a git checkout whose changes hold the data, of which it would keep the difference."""
    pytest.importorskip("wandb")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.email=a@b", "-c", "user.name=x", "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=data, check=True)
    forget = data / "forget.jsonl"
    forget.write_text(forget.read_text() + forget.read_text().splitlines()[0].replace("0", "7") + "\n")
    monkeypatch.chdir(data)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert run([*arguments, "--report-to", "wandb"]) == 0
    content = bytes_below(tmp_path / "wandb")
    for name in LOSSES:
        assert f"train/{name}".encode() in content
    assert repr(history(data)[-1]["collapse_loss"]).encode()[:12] in content
    assert_no_text(tmp_path / "wandb")


def test_mlflow_gets_the_numbers_and_no_text(arguments, data, monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    assert run([*arguments, "--report-to", "mlflow"]) == 0
    (found,) = mlflow.MlflowClient().search_runs(["0"])
    assert found.info.run_name == "out"
    assert found.info.status == "FINISHED"
    for name in LOSSES:
        read = mlflow.MlflowClient().get_metric_history(found.info.run_id, name)
        assert [(m.step, m.value) for m in read] == [(r["step"], pytest.approx(r[name])) for r in history(data)]
    content = (tmp_path / "runs.db").read_bytes()
    assert not [text for text in TEXTS if text.encode() in content]


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_a_missing_package_is_refused_before_work(arguments, data, monkeypatch, capsys, name, module):
    for absent in (None, SimpleNamespace()):  # a folder called wandb, of earlier runs, is a module without anything
        monkeypatch.setitem(sys.modules, module, absent)
        assert run([*arguments, "--report-to", name]) == 2
        shown = capsys.readouterr().err.splitlines()
        assert shown[-1] == f"pmc-fast: error: report_to is '{name}' but {name} is not installed: pip install {name}"
        assert not any("loading" in line for line in shown)
        assert left_behind(data) == []


@pytest.mark.parametrize(
    ("name", "variable", "value"),
    [("wandb", "WANDB_LOG_MODEL", "checkpoint"), ("mlflow", "HF_MLFLOW_LOG_ARTIFACTS", "1"),
     ("mlflow", "DISABLE_MLFLOW_INTEGRATION", "true")],
)  # fmt: skip
def test_what_would_send_more_than_numbers_or_nothing_is_refused(monkeypatch, name, variable, value):
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=None, start_run=None))
    monkeypatch.setenv(variable, value)
    with pytest.raises(PMCError, match=variable):
        trackers.check(name)


class Wandb(SimpleNamespace):
    """What `check` asks of the package."""

    Error, init = type("Error", (Exception,), {}), None

    def login(self):
        if isinstance(self.known, Exception):
            raise self.known
        return self.known

    def setup(self):
        return SimpleNamespace(settings=SimpleNamespace(mode=self.mode))


@pytest.mark.parametrize("known", [False, Wandb.Error("api_key not configured (no-tty).\nmore")])
def test_wandb_without_a_key_is_refused_before_work_unless_it_is_offline(monkeypatch, known):
    monkeypatch.setitem(sys.modules, "wandb", Wandb(known=known, mode="online"))
    with pytest.raises(PMCError, match=r"report_to is 'wandb' but .*: run `wandb login`"):
        trackers.check("wandb")
    monkeypatch.setitem(sys.modules, "wandb", Wandb(known=known, mode="offline"))
    trackers.check("wandb")


class Failing:
    """A tracker's callback that can't be reached from its second log on."""

    def __init__(self):
        self.logs = []

    def on_train_begin(self, *args, **kwargs):
        pass

    def on_log(self, args, state, control, logs, **kwargs):
        if self.logs:
            raise RuntimeError("no route to host\nmore")
        self.logs.append(logs)


class Said(Silent):
    def __init__(self):
        self.warned = []

    def warn(self, text):
        self.warned.append(text)


def test_numbers_alone_are_passed_on_and_an_error_does_not_end_the_run(monkeypatch, tmp_path):
    said, failing = Said(), Failing()
    tracker = trackers.Tracker("tensorboard", tmp_path, "run", said)
    monkeypatch.setattr(tracker, "_tensorboard", lambda: failing)
    monkeypatch.setattr(tracker, "place", "here")
    state = SimpleNamespace(is_world_process_zero=True)
    tracker.on_log(None, state, None, logs={"loss": 1.0})  # before it has begun
    tracker.on_train_begin(None, state, None)
    for _ in range(3):
        tracker.on_log(None, state, None, logs={"loss": 1.0, "pending": 2, "answer": SECRET, "rows": [SECRET]})
    tracker.on_train_end(None, state, None)
    assert failing.logs == [{"loss": 1.0, "pending": 2}]
    assert said.warned == ["tensorboard is no longer reported to: no route to host"]
    other = trackers.Tracker("tensorboard", tmp_path, "run", said)
    other.on_train_begin(None, SimpleNamespace(is_world_process_zero=False), None)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_can_not_begin_ends_the_run(arguments, data, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    (data / "taken").write_text("a file")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(data / "taken"))
    assert run([*replaced(arguments, output=data / "new"), "--report-to", "tensorboard", "--no-evaluate"]) == 2
    assert "report_to is 'tensorboard' but it can't be written to: " in capsys.readouterr().err.splitlines()[-1]
    assert left_behind(data) == ["taken"]
