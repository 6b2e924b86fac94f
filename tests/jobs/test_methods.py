"""`pmc-fast unlearn --method`: each method as an ordinary run, what says that it is told, what is refused."""

import dataclasses
import json
import re
from typing import get_args

import pytest
import torch
import transformers

from pmc_fast.config import PARAMETERS, MethodName, RequestConfig, UnlearnConfig
from pmc_fast.errors import PMCError
from pmc_fast.jobs import memory_limits, methods
from pmc_fast.jobs.memory import Choice
from pmc_fast.methods import METHODS
from pmc_fast.pmc.schedule import RetainDraws
from tests.command_line import SECRET, cut_short_methods, left_behind, replaced, run

TOLD = "trained on the answers to be forgotten"


@pytest.fixture
def short(arguments):
    """A run of two steps with another method: PMC's settings are left out."""
    return [*replaced(arguments, num_samples=None), "--no-evaluate"]


def report_of(data):
    return json.loads((data / "out/report.json").read_text())


def test_every_method_and_parameter_has_a_flag():
    assert get_args(MethodName) == ("pmc", *METHODS)
    assert set(PARAMETERS) == {f.name for method in METHODS.values() for f in dataclasses.fields(method)}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_trains_and_is_saved(name, short, data, tiny, capsys):
    assert run([*short, "--method", name]) == 0
    shown = capsys.readouterr()
    made = report_of(data)
    assert made["method"]["name"] == name
    assert [r["step"] for r in made["history"]] == [1, 2]
    assert made["training_seconds"] > 0
    changed = transformers.AutoModelForCausalLM.from_pretrained(data / "out", dtype=torch.float32)
    assert any(not torch.equal(a, b) for a, b in zip(tiny.parameters(), changed.parameters(), strict=True))
    told = METHODS[name].told
    assert (f"method {name} trains on the answers" in shown.err) is told
    for file in ("report.html", "README.md"):
        text = (data / "out" / file).read_text()
        [first] = [line for line in text.splitlines() if line.startswith(("<h1>", "# "))]
        assert (TOLD in first) is told
        assert METHODS[name].__name__ in text
        assert SECRET not in text


@pytest.mark.parametrize("method", ["pmc", "npo"])
def test_retain_draws_are_every_methods(arguments, data, monkeypatch, method):
    """Two steps of two questions have two pairs each, and none twice before all were drawn."""
    drawn, draw = [], RetainDraws.__call__
    monkeypatch.setattr(
        RetainDraws, "__call__", lambda draws, questions: (drawn.append(draw(draws, questions)), drawn[-1])[1]
    )
    given = arguments if method == "pmc" else replaced(arguments, num_samples=None)
    given = [*given, "--no-evaluate", "--method", method]
    assert run([*given, "--retain-order", "shuffled", "--retain-per-question", "2"]) == 0
    rows = len((data / "retain.jsonl").read_text().splitlines())
    flat = [i for pairs in drawn for two in pairs for i in two]
    assert {len(two) for pairs in drawn for two in pairs} == {2}
    assert all(len(set(flat[i : i + rows])) == len(flat[i : i + rows]) for i in range(0, len(flat), rows))
    assert len(flat) > rows


def test_parameters_are_the_papers_unless_they_are_given(short, data, capsys):
    assert run([*short, "--method", "npo", "--beta", "0.3", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert f"method    npo (retain_weight 1.0, beta 0.3), {TOLD}" in shown.out
    assert "samples a question" not in shown.out
    assert run([*short, "--method", "npo", "--lambda", "2"]) == 0
    assert report_of(data)["method"]["parameters"] == {"retain_weight": 2.0, "beta": 0.1}
    assert UnlearnConfig().retain_weight == 1.25
    assert UnlearnConfig.merge("phi").retain_weight == 1.5
    assert UnlearnConfig.merge("phi", {"method": "flat"}).retain_weight is None


def test_the_evaluation_is_that_of_every_run(arguments, data, capsys):
    """Also where no answers are given, which a method that is not told does without."""
    rows = [json.loads(line) for line in (data / "forget.jsonl").read_text().splitlines()]
    (data / "forget.jsonl").write_text("".join(json.dumps({"question": row["question"]}) + "\n" for row in rows))
    plain = replaced(arguments, num_samples=None)
    assert run([*plain, "--method", "retain_only"]) == 0
    made = report_of(data)
    assert made["truth_of_forget"] == "initial answers"
    assert made["before"]["unlearn_quality"] == 0  # its own answers are the truth
    assert set(made["after"]["sets"]) == {"forget", "retain"}
    assert (data / "out/report.html").read_text().count("<svg") == 4  # no scores
    assert run([*replaced(plain, output=data / "npo"), "--method", "npo"]) == 2
    assert "forget.jsonl, rows 1, 2, 3, 4: no answer is given, and NPO trains on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--method", "npo", "--num-samples", "20"], r"num_samples is 20: it must be left out with method npo: it is a"),
        (["--method", "npo", "--stop-score", "0.1"], r"stop_score is 0.1: it must be left out with method npo"),
        (["--method", "ga", "--beta", "1"], r"beta is 1.0: method ga has no such parameter, only retain_weight"),
        (["--beta", "1"], r"beta is 1.0: it must be left out with method pmc: it is another method's parameter"),
        (["--method", "flat", "--divergence", "tv"], r"divergence is 'tv': use one of kl, "),
        (["--method", "idk", "--prompt-words", "2"], r"a text to be continued, and IDK trains on refusals"),
        (["--method", "eul", "--alpha", "1.5"], r"alpha is 1.5: it must be between 0 and 1"),
        (["--max-seconds", "9", "--checkpoint-steps", "1"], r"checkpoint_steps is 1: it must be left out with max_s"),
    ],
)  # fmt: skip
def test_what_a_method_can_not_use_is_refused(more, error, short, data, capsys):
    if "--prompt-words" in more:
        (data / "forget.jsonl").write_text(json.dumps({"text": "one two three four five"}) + "\n")
    assert run([*short, *more]) == 2
    shown = capsys.readouterr().err
    assert re.search(error, shown), shown
    assert left_behind(data) == []


def test_lora_is_pmcs():
    with pytest.raises(PMCError, match="method is 'npo': it must be pmc with lora"):
        RequestConfig(method="npo", lora=True, stack="s")


def test_questions_that_are_known_to_be_forgotten_are_sampled_for_any_method():
    config = UnlearnConfig.merge("phi", {"method": "npo", "skip_known_forgotten": True, "num_samples": 7})
    assert (config.num_samples, config.temperature) == (7, 1.25)
    with pytest.raises(PMCError, match="num_samples is 7: it must be left out with method npo"):
        UnlearnConfig(method="npo", num_samples=7)


def test_a_killed_run_goes_on(short, data, monkeypatch):
    longer = [*replaced(short, epochs="2"), "--checkpoint-steps", "1", "--method", "npo"]
    assert run(replaced(longer, output=data / "whole")) == 0
    cut_short_methods(longer, monkeypatch)
    assert left_behind(data) == ["out.checkpoints", "whole"]
    assert run([*longer, "--resume", "auto"]) == 0
    ours, whole = (
        transformers.AutoModelForCausalLM.from_pretrained(data / name, dtype=torch.float32)
        for name in ("out", "whole")
    )
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), whole.parameters(), strict=True))


def test_a_run_ends_after_steps_or_seconds(short, data):
    assert run([*short, "--method", "idk", "--max-steps", "5"]) == 0
    assert len(report_of(data)["history"]) == 5


@pytest.mark.parametrize("name", ["pmc", "npo"])
def test_a_clock_that_the_preparation_uses_up_is_refused(name, short, data, capsys):
    assert run([*short, "--method", name, "--max-seconds", "1e-6"]) == 2
    shown = capsys.readouterr().err
    assert f"max_seconds is 1e-06, and what method {name} needs of the untouched model took" in shown
    assert left_behind(data) == []


@pytest.mark.parametrize("name", ["pmc", "npo"])
def test_a_run_ends_before_the_step_that_would_end_too_late(name, short, data, monkeypatch):
    """With a clock on which the preparation takes 2 seconds, and each of two looks a step another."""
    from pmc_fast.trainer import callbacks

    now = [0.0]

    class Clock:
        @staticmethod
        def perf_counter():
            return now[0]

    monkeypatch.setattr(callbacks, "time", Clock)
    end = callbacks.TrainingClock.on_step_end

    def on_step_end(self, *given, **how):
        now[0] += 10.0
        self.before = 2.0
        return end(self, *given, **how)

    monkeypatch.setattr(callbacks.TrainingClock, "on_step_end", on_step_end)
    assert run([*short, "--method", name, "--max-seconds", "35"]) == 0
    made = report_of(data)
    assert [r["step"] for r in made["history"]] == [1, 2, 3]
    assert made["training_seconds"] == 32.0
    rates = [r["learning_rate"] for r in made["history"]]
    assert rates[2] == pytest.approx(5e-5 * (1 - 12 / 35))  # as of the clock when it was set, a step earlier
    assert rates[1] > rates[2]


def test_memory_counts_what_a_method_trains_on(short):
    given = {"model": short[2], "device": "cpu", "max_length": 40}
    lengths = memory_limits.Lengths()
    pmc, idk, dpo = (
        memory_limits.work_of(UnlearnConfig(method=name, **given), lengths, "cpu") for name in ("pmc", "idk", "dpo")
    )
    more = memory_limits.work_of(UnlearnConfig(method="idk", retain_per_question=3, **given), lengths, "cpu")
    assert more.tokens.most == idk.tokens.most * 4 // 2  # three pairs for a question's one answer, not one
    assert more.targets.most > idk.targets.most
    assert idk.rows < pmc.rows
    assert idk.tokens.most < dpo.tokens.most
    assert methods.method_of(UnlearnConfig(method="pmc")) is None


@pytest.mark.parametrize(
    ("name", "item"),
    [("eul", "the untouched model"), ("icu", "the untouched model"), ("mollm", "gradients of one loss alone")],
)
def test_memory_counts_what_a_method_holds(name, item, short):
    def held(method, **given):
        config = UnlearnConfig(method=method, model=short[2], device="cpu", max_length=40, **given)
        memory = memory_limits.memory_of(config, memory_limits.Lengths(), torch.device("cpu"))
        return {i.name: i.most for i in memory.plan(Choice.of(config, "cpu")).items}

    assert item not in held("npo")
    if "model" in item:
        assert all(held(other, retain_loss="kl")[item] == held(name)[item] for other in ("npo", "pmc"))
    same = "parameters" if "model" in item else "gradients"
    assert held(name)[item] == held(name)[same]
