"""`--rehearsal-pairs`: pairs that the untouched model writes are trained on, counted, and the same when a run is resumed."""

import json

import pytest

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


@pytest.fixture
def drawn(monkeypatch):
    """The retain pairs of each question, in order."""
    pairs, draw = [], BaseTrainer._draw_retain

    def spied(self, questions):
        pairs.extend(made := draw(self, questions))
        return made

    monkeypatch.setattr(BaseTrainer, "_draw_retain", spied)
    return pairs


def report_of(data, name="out"):
    return json.loads((data / name / "report.json").read_text())


def with_method(arguments, method, **more):
    return [*replaced(arguments, num_samples=2 if method == "pmc" else None, **more), "--method", method]


@pytest.mark.parametrize("method", ["pmc", "npo"])
def test_pairs_are_trained_on_and_not_evaluated(method, arguments, asked, drawn, data, tokenizer, capsys):
    words = with_method(arguments, method, rehearsal_pairs=2, seed=3, epochs=2, retain_order="shuffled")
    assert run([*words, "--log-text"]) == 0
    texts = [tokenizer.decode(s.input_ids) for [s] in drawn]
    assert len(set(texts)) == 8  # all six and both, each once
    assert sum("odd" in text for text in texts) == 2
    [call] = asked
    assert (call["count"], call["seed"], len(call["retain"])) == (2, 3, 6)
    told = [y for _, y in call["forget"][4:]]
    assert [q for q, _ in call["forget"][:4]] == [f"What is fact {i}?" for i in range(4)]
    assert not any(SECRET in y for _, y in call["forget"][:4])  # the model's own answers
    assert told == ([] if method == "pmc" else [f"{SECRET} {i}" for i in range(4)])  # PMC is told no others
    made = report_of(data)
    assert (made["retain_rows"], made["rehearsal_rows"], made["settings"]["rehearsal_pairs"]) == (6, 2, 2)
    assert made["after"]["sets"]["retain"]["rows"] == 6
    assert "odd" not in json.dumps(made) + capsys.readouterr().err
    assert not (data / "out.checkpoints").exists()


def test_fewer_pairs_are_said(arguments, asked, data, capsys):
    assert run([*arguments, "--rehearsal-pairs", "3", "--dry-run"]) == 0
    assert "pairs of" in (shown := capsys.readouterr().out)
    assert ", and 3 that the model writes" in shown
    assert run([*arguments, "--rehearsal-pairs", "3"]) == 0
    text = "rehearsal_pairs is 3 and the model wrote 2"
    assert text in capsys.readouterr().err
    assert any(text in warning for warning in report_of(data)["warnings"])


def test_a_model_that_writes_none_keeps_the_given_ones(arguments, drawn, data):
    """The tiny model's weights are random: its words have no end."""
    assert run([*arguments, "--rehearsal-pairs", "2", "--no-evaluate"]) == 0
    made = report_of(data)
    assert made["rehearsal_rows"] == 0
    assert "the model wrote 0" in " ".join(made["warnings"])
    assert len(drawn) == 4


@pytest.mark.parametrize("method", ["pmc", "npo"])
def test_a_resumed_run_has_the_same_pairs(method, arguments, asked, drawn, data, monkeypatch, capsys):
    longer = with_method(arguments, method, epochs=4, rehearsal_pairs=2)
    longer += ["--checkpoint-steps", "1", "--no-evaluate"]
    (cut_short if method == "pmc" else cut_short_methods)(longer, monkeypatch)
    for other in (1, 0):
        checkpoint = str(data / "out.checkpoints/checkpoint-2")
        changed = replaced(longer, rehearsal_pairs=other, output=data / "two")
        assert run([*changed, "--resume", checkpoint]) == 2
        assert "belongs to another run: its number of rehearsal pairs differ" in capsys.readouterr().err
    count = len(asked)
    del drawn[:]
    assert run([*longer, "--resume", "auto"]) == 0
    assert len(asked) == count  # not written again
    assert report_of(data)["rehearsal_rows"] == 2
    resumed = [*drawn]
    del drawn[:]
    assert run(replaced(longer, output=data / "whole")) == 0
    assert drawn[-len(resumed) :] == resumed
    losses = [[r["loss"] for r in report_of(data, name)["history"]] for name in ("out", "whole")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method", ["pmc", "npo"])
def test_nothing_is_written_where_no_pair_is_trained_on(method, arguments, asked, capsys):
    assert run(with_method(arguments, method, rehearsal_pairs=2, retain_weight=0)) == 0
    assert (
        "rehearsal_pairs is 2 and retain_weight 0: no pair is trained on, and none is written"
        in capsys.readouterr().err
    )
    assert asked == []


def test_without_the_option_nothing_is_written(arguments, asked, data):
    assert run([*arguments, "--no-evaluate"]) == 0
    assert asked == []
    assert report_of(data)["rehearsal_rows"] == 0
