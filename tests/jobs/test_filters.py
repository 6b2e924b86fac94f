"""`--filter`: questions that are left out of training are evaluated, reported by row, and the same when a run is resumed."""

import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import pytest

from pmc_fast.config import Filter, RequestConfig, UnlearnConfig
from pmc_fast.config.filters import parse_filter
from pmc_fast.data import load_rows
from pmc_fast.errors import PMCError
from pmc_fast.jobs import filters
from pmc_fast.methods import upcore
from tests.command_line import SECRET, cut_short, cut_short_methods, left_behind, replaced, run

CHOICES = "it must be known_forgotten, or upcore:SHARE with a share of the forget questions above 0 and below 1"


@pytest.fixture
def filtered(arguments):
    """A run of the four questions without one or two of them."""
    return [*arguments, "--filter", "upcore:0.3"]


def outliers(data, tiny, tokenizer, **settings):
    """Return the rows, from 1, that `upcore` itself leaves out."""
    config = UnlearnConfig(prompt_format="tags", max_length=40, **settings)
    kept = upcore(tiny, tokenizer, config, load_rows(str(data / "forget.jsonl")), pruned=0.3, seed=config.seed)
    assert 0 < len(kept) < 4
    return [i + 1 for i in range(4) if i not in kept]


def report_of(data, name="out"):
    return json.loads((data / name / "report.json").read_text())


@pytest.mark.parametrize("method", ["pmc", "npo"])
def test_outliers_are_not_trained_on_and_all_are_evaluated(method, filtered, data, tiny, tokenizer, capsys):
    plain = replaced(filtered, num_samples=2 if method == "pmc" else None, seed=3, min_quality=1, epochs=2)
    assert run([*plain, "--method", method, "--log-text"]) in (0, 3)
    shown, made = capsys.readouterr(), report_of(data)
    rows = outliers(data, tiny, tokenizer, seed=3)
    assert made["left_out"]["rows"] == rows
    assert (made["left_out"]["filter"], made["left_out"]["questions"]) == ("upcore:0.3", 4)
    assert "known_forgotten" not in made
    assert f"{len(rows)} of 4 questions are left out (row" in shown.err
    assert SECRET not in shown.err
    assert SECRET not in json.dumps(made["left_out"])
    if method == "pmc":  # what was sampled and stored
        trained = [int(re.search(r"\d+", s["question"])[0]) + 1 for s in made["sampled_answers"]]
        assert sorted(trained) == [i for i in (1, 2, 3, 4) if i not in rows]
    for when in ("before", "after"):
        assert made[when]["sets"]["forget"]["rows"] == 4
    assert "unlearn_quality" in json.dumps(made["gates"])
    page = " ".join((data / "out/report.html").read_text().split())
    assert f"{len(rows)} of 4 forget questions were left out of training" in page
    assert f"{4 - len(rows)} questions unlearned" in (data / "out/README.md").read_text()


def test_known_forgotten_is_the_option_of_that_name(arguments, data, capsys):
    """Also for a method that is told the answers: NUM_SAMPLES are those of the filter then."""
    words = [*arguments, "--no-evaluate", "--method", "npo", "--skip-threshold", "0.9"]
    assert run([*replaced(words, output=data / "one"), "--filter", "known_forgotten", "--dry-run"]) == 0
    assert "filter    known_forgotten: fewer steps" in capsys.readouterr().out
    lines = [json.loads(line) for line in (data / "forget.jsonl").read_text().splitlines()]
    lines[1]["answer"] = "the"  # the one that a sample may say whole
    (data / "forget.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    codes = [
        run([*replaced(words, output=data / name), *option])
        for name, option in (("one", ["--filter", "known_forgotten"]), ("two", ["--skip-known-forgotten"]))
    ]
    assert codes == [0, 0]
    found = [
        (made["left_out"], made["known_forgotten"] | {"seconds": 0})
        for name in ("one", "two") if (data / name).exists() for made in [report_of(data, name)]
    ]  # fmt: skip
    assert len(found) in (0, 2)  # none where every question is known to be forgotten
    assert found[:1] == found[1:]


def test_what_was_found_is_remembered_for_the_same_run(tmp_path):
    base = SimpleNamespace(forget=[], paraphrases=[], config=UnlearnConfig(filter="upcore:0.5"))
    found = filters.LeftOut("upcore:0.5", [2], 3, "c")
    assert found.kept == [0, 2]
    key = filters._digest(base, "w")
    assert filters._remembered(tmp_path / "run", key) is None
    filters._remember(tmp_path / "run", found, key)
    [file] = (tmp_path / "run").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert filters._remembered(tmp_path / "run", key) == found
    others = [filters._digest(base, "another model's")]
    for settings in ({"seed": 1}, {"filter": "upcore:0.4"}, {"filter": "known_forgotten"}):
        base.config = dataclasses.replace(UnlearnConfig(filter="upcore:0.5"), **settings)
        others.append(filters._digest(base, "w"))
    for threshold in (0.1, 0.2):
        base.config = UnlearnConfig(skip_known_forgotten=True, skip_threshold=threshold)
        others.append(filters._digest(base, "w"))
    assert len({key, *others}) == 7
    assert all(filters._remembered(tmp_path / "run", other) is None for other in others)
    file.write_text("{")
    assert filters._remembered(tmp_path / "run", key) is None


@pytest.mark.parametrize("method", ["pmc", "npo"])
def test_a_resumed_run_leaves_out_the_same(method, filtered, data, monkeypatch, capsys):
    longer = replaced(filtered, epochs="4", num_samples=2 if method == "pmc" else None)
    longer += ["--checkpoint-steps", "1", "--no-evaluate", "--method", method]
    cut = cut_short if method == "pmc" else cut_short_methods
    cut(longer, monkeypatch)
    assert (data / "out.checkpoints" / filters.FILE).exists()
    # with another share it is another run
    checkpoint = str(data / "out.checkpoints/checkpoint-2")
    assert run([*replaced(longer, filter="upcore:0.31", output=data / "two"), "--resume", checkpoint]) == 2
    assert "belongs to another run: its filter differ" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(filters, "upcore", None)  # not asked again
        assert run([*longer, "--resume", "auto"]) == 0
    assert "from checkpoint-2 on" in capsys.readouterr().err
    assert report_of(data)["left_out"]["filter"] == "upcore:0.3"
    # whole, it leaves out and trains the same
    assert run(replaced(longer, output=data / "whole")) == 0
    assert report_of(data)["left_out"] == report_of(data, "whole")["left_out"]
    losses = [[r["loss"] for r in report_of(data, name)["history"]] for name in ("out", "whole")]
    assert losses[0] == losses[1]


def test_a_comparison_says_what_was_left_out(arguments, data, capsys):
    given = replaced(arguments[1:], num_samples=None, epochs=None, output=data / "cmp", seeds="0", steps=2)
    words = ["compare", *given, "--methods", "idk,npo", "--filter", "upcore:0.3"]
    assert run(words) == 0
    made = json.loads((data / "cmp/compare.json").read_text())
    [rows] = {tuple(r["left_out"]["rows"]) for r in made["runs"]}  # the same for each method
    assert rows
    page = (data / "cmp/compare.html").read_text()
    assert f"npo, seed 0: {len(rows)} of 4 forget questions were left out of training" in page
    capsys.readouterr()
    assert run(replaced(words, filter="upcore:0.5")) == 2
    assert "its filter is 'upcore:0.3', not 'upcore:0.5'; choose another output" in capsys.readouterr().err


def test_nothing_to_compare_is_an_error(arguments, data, capsys):
    given = replaced(arguments[1:], num_samples=None, epochs=None, output=data / "cmp", seeds="0", steps=2)
    words = ["compare", *given, "--methods", "npo", "--filter", "known_forgotten", "--skip-threshold", "0.999"]
    assert run([*words, "--set", "npo.num_samples=1"]) == 2
    shown = capsys.readouterr().err
    assert "filter known_forgotten leaves none of" in shown
    assert "to method npo with seed 0: there is nothing to compare" in shown


@pytest.mark.parametrize("text", ["upcore", "upcore:", "upcore:x", "upcore:0", "upcore:1", "upcore:nan", "upcore:-0.1",
                                  "known_forgotten:0.1", "outliers:0.1", ":"])  # fmt: skip
def test_filters_are_named_with_their_list(text):
    with pytest.raises(PMCError) as refused:
        UnlearnConfig(filter=text)
    assert str(refused.value) == f"filter is {text!r}: {CHOICES}"
    with pytest.raises(PMCError):
        UnlearnConfig.merge("small", {"method": "npo", "filter": text})


def test_filters_are_parsed():
    assert parse_filter("") == UnlearnConfig().chosen_filter == Filter()
    assert parse_filter("upcore:0.25") == Filter("upcore", 0.25)
    for config in (UnlearnConfig(filter="known_forgotten"), UnlearnConfig(skip_known_forgotten=True)):
        assert config.chosen_filter == Filter("known_forgotten")
    with pytest.raises(PMCError, match=r"filter is 'upcore:0\.1': it must be left out with skip_known_forgotten"):
        UnlearnConfig(filter="upcore:0.1", skip_known_forgotten=True)


def test_a_request_trains_on_all_that_it_is_to_erase():
    with pytest.raises(
        PMCError, match=r"filter is 'upcore:0\.1': it must be left out with lora: a request trains on all"
    ):
        RequestConfig(filter="upcore:0.1", lora=True, stack="s")
    assert RequestConfig(filter="known_forgotten", lora=True, stack="s").chosen_filter.samples


def test_what_upcore_needs_is_checked_before_any_work(filtered, data, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "sklearn.ensemble", None)
        assert run([*filtered, "--dry-run"]) == 2
    assert "upcore needs scikit-learn: pip install 'pmc_fast[filters]'" in capsys.readouterr().err
    first = (data / "forget.jsonl").read_text().splitlines()[0]
    (data / "forget.jsonl").write_text(first + "\n")
    assert run(filtered) == 2
    assert re.search(r"forget\.jsonl has 1 questions: outliers need at least 2", capsys.readouterr().err)
    assert left_behind(data) == []
