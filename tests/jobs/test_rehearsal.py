"""`--rehearsal-pairs`: pairs that the untouched model writes are trained on, counted, and the same when a run is resumed."""

import json

import pytest

from pmc_fast.config import UnlearnConfig
from pmc_fast.data import Row
from pmc_fast.jobs import rehearsal
from pmc_fast.trainer.base import BaseTrainer
from tests.command_line import SECRET, cut_short, cut_short_methods, replaced, run

WRITTEN = [Row("Is 7 odd?", "It is True."), Row("Is 8 odd?", "It is False.")]


@pytest.fixture
def asked(monkeypatch):
    """What `rehearsal_rows` was asked for; it answers with WRITTEN."""
    calls = []

    def written(engine, encoder, count, **given):
        calls.append({"count": count, **given})
        return WRITTEN[:count]

    monkeypatch.setattr(rehearsal, "rehearsal_rows", written)
    return calls


def report_of(data, name="out"):
    return json.loads((data / name / "report.json").read_text())


@pytest.mark.parametrize("method", ["pmc", "npo"])
def test_pairs_are_trained_on_and_not_evaluated(method, arguments, asked, data, monkeypatch, capsys):
    trained = []
    draw = BaseTrainer._draw_retain

    def drawn(self, questions):
        trained.append(len(self.retain))
        return draw(self, questions)

    monkeypatch.setattr(BaseTrainer, "_draw_retain", drawn)
    words = [*replaced(arguments, num_samples=2 if method == "pmc" else None), "--method", method]
    assert run([*words, "--rehearsal-pairs", "2", "--seed", "3"]) == 0
    assert set(trained) == {8}
    [call] = asked
    assert (call["count"], call["seed"], len(call["retain"])) == (2, 3, 6)
    assert [q for q, _ in call["forget"]] == [f"What is fact {i}?" for i in range(4)]
    assert not any(SECRET in y for _, y in call["forget"])  # the model's own answers: PMC is told no others
    made = report_of(data)
    assert (made["retain_rows"], made["rehearsal_rows"], made["settings"]["rehearsal_pairs"]) == (6, 2, 2)
    assert made["after"]["sets"]["retain"]["rows"] == 6
    assert "Is 7 odd?" not in json.dumps(made) + capsys.readouterr().err
    assert not (data / "out.checkpoints").exists()


def test_fewer_pairs_are_said(arguments, asked, data, capsys):
    assert run([*arguments, "--rehearsal-pairs", "3"]) == 0
    text = "rehearsal_pairs is 3 and the model wrote 2 that may be kept"
    assert text in capsys.readouterr().err
    assert any(text in warning for warning in report_of(data)["warnings"])


@pytest.mark.parametrize("method", ["pmc", "npo"])
def test_a_resumed_run_has_the_same_pairs(method, arguments, asked, data, monkeypatch, capsys):
    longer = replaced(arguments, epochs="4", num_samples=2 if method == "pmc" else None, rehearsal_pairs=2)
    longer += ["--checkpoint-steps", "1", "--no-evaluate", "--method", method]
    (cut_short if method == "pmc" else cut_short_methods)(longer, monkeypatch)
    file = data / "out.checkpoints" / rehearsal.FILE
    assert file.stat().st_mode & 0o777 == 0o600
    checkpoint = str(data / "out.checkpoints/checkpoint-2")
    fewer = replaced(longer, rehearsal_pairs=1, output=data / "two")
    assert run([*fewer, "--resume", checkpoint]) == 2
    assert "belongs to another run: its retain rows differ" in capsys.readouterr().err
    count = len(asked)
    assert run([*longer, "--resume", "auto"]) == 0
    assert len(asked) == count  # not written again
    assert run(replaced(longer, output=data / "whole")) == 0
    losses = [[r["loss"] for r in report_of(data, name)["history"]] for name in ("out", "whole")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method", ["pmc", "npo"])
def test_pairs_that_would_not_be_kept_are_refused(method, arguments, capsys):
    words = replaced(arguments, num_samples=2 if method == "pmc" else None, rehearsal_pairs=2, retain_weight=0)
    assert run([*words, "--method", method]) == 2
    assert "rehearsal_pairs is 2 and retain_weight 0: no pair would be kept" in capsys.readouterr().err


def test_without_the_option_nothing_is_written(arguments, asked, data):
    assert UnlearnConfig().rehearsal_pairs == 0
    assert run([*arguments, "--no-evaluate"]) == 0
    assert asked == []
    assert report_of(data)["rehearsal_rows"] == 0
