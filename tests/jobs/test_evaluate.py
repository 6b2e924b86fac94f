"""What `evaluate` shows beyond greedy answers: leak attacks, side effects, the page; on a tiny model."""

import json
import re

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from pmc_fast.report import plots, render
from pmc_fast.utils.files import check_new_files, write_file
from tests.command_line import run
from tests.evaluation.test_questions import write_tofu

SECRET = "the violet <b>heron</b> of Samarkand"
PARTS = ("violet", "heron", "Samarkand")
ODD = "a$\\frac{_of <i>.jsonl"  # a set's name: mathematics to a plot, a tag to a page
TEXT = "Rivers carry sand to the sea. The violet sea gives it back, grain by grain, over ten thousand years.\n"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path):
    """Three questions with secret answers, the same in other words, pairs to keep, a text."""
    write(
        tmp_path / "forget.jsonl", [{"question": f"What is fact {i}?", "answer": f"{SECRET} {i}"} for i in range(3)]
    )
    write(
        tmp_path / "other.jsonl", [{"question": f"Name fact {i}!", "answer": f"It is {SECRET} {i}"} for i in range(2)]
    )
    write(tmp_path / ODD, [{"question": f"Is {i} even?", "answer": f"It is {i % 2 == 0}."} for i in range(3)])
    (tmp_path / "text.md").write_text(TEXT)
    return tmp_path


@pytest.fixture
def changed(data, tiny, tokenizer):
    """The tiny model with other weights."""
    with torch.no_grad():
        tiny.model.norm.weight.mul_(3)
    tiny.save_pretrained(data / "changed")
    tokenizer.save_pretrained(data / "changed")
    return data / "changed"


@pytest.fixture
def command(data, tiny_dir):
    return [
        "evaluate", "--model", str(tiny_dir), "--forget", str(data / "forget.jsonl"), "--paraphrased",
        str(data / "other.jsonl"), "--general", str(data / ODD), "--max-length", "40", "--prompt-format", "tags",
        "--device", "cpu",
    ]  # fmt: skip


def test_attacks_side_effects_and_page(command, data, changed, capsys):
    files = {kind: data / f"out.{kind}" for kind in ("json", "rows", "report")}
    flags = [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    more = ["--before", str(changed), "--attack-samples", "3", "--attack-first-words", "1", "--side-effects-text",
            str(data / "text.md")]  # fmt: skip
    assert run([*command, *more, *flags]) == 0
    made = json.loads(files["json"].read_text())
    rows = [json.loads(line) for line in files["rows"].read_text().splitlines()]
    assert "per_question" not in files["json"].read_text()
    for when in ("before", "after"):
        sets = made[when]["leakage"]["sets"]
        assert list(sets) == ["forget", "forget_paraphrased"]
        for name, attacks in sets.items():
            assert list(attacks) == ["sampling", "prefill", "first_words"]
            mine = [r["attacks"] for r in rows if (r["model"], r["set"]) == (when, name)]
            for kind, summary in attacks.items():
                assert summary["samples"] == 3
                assert np.mean([a[kind]["worst"] for a in mine]) == pytest.approx(summary["worst"]["value"])
                leaks = [a[kind]["leaking"] > 0 for a in mine]
                assert np.mean(leaks) == pytest.approx(summary["leak_at_k"]["3"]["value"])
        assert made[when]["perplexity"] == pytest.approx(made["side_effects"][f"perplexity_{when}"])
    assert not any("attacks" in r for r in rows if r["set"] == ODD.removesuffix(".jsonl"))
    assert made["before"]["perplexity"] != made["after"]["perplexity"]
    assert made["side_effects"]["positions"] > 20
    page, shown = files["report"].read_text(), capsys.readouterr()
    assert page.count("<svg") == 5  # sets, Pareto, two histograms, leak@k
    assert "<i>" not in page
    assert "src=" not in page
    assert "largest recall of 3" in shown.out
    assert "unrelated text: perplexity" in shown.out
    everything = shown.out + shown.err + "".join(f.read_text() for f in files.values())
    assert not any(part in everything for part in PARTS)
    assert "fact" not in everything


def test_texts_of_attacks_on_demand_and_escaped(command, data):
    files = {kind: data / f"out.{kind}" for kind in ("json", "rows", "report")}
    flags = [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    assert run([*command, "--attack-samples", "2", "--attack-prefill", "", "--log-text", *flags]) == 0
    page = files["report"].read_text()
    assert "Samples of the largest recall: forget, sampling" in page
    assert "first words given" in page
    assert "<b>heron" not in page
    assert "&lt;b&gt;heron" in page
    attacks = json.loads(files["json"].read_text())["after"]["leakage"]["sets"]["forget"]
    assert list(attacks) == ["sampling", "first_words"]
    assert attacks["sampling"]["texts"][0]["truth"] == f"{SECRET} 0"


def test_few_rows_and_a_models_own_log_are_told(data, tiny_dir, capsys):
    write_tofu(data)
    command = ["evaluate", "--suite", "tofu", "--tofu", str(data), "--split", "forget01", "--max-length", "40",
               "--tofu-rows", "1", "--model", str(tiny_dir), "--device", "cpu"]  # fmt: skip
    log, page = data / "rows.jsonl", data / "page.html"
    assert run([*command, "--rows", str(log), "--report", str(page), "--json", str(data / "made.json")]) == 0
    shown = capsys.readouterr()
    assert "tofu_rows is 1: all metrics are of no more than the first 1 rows of each set" in shown.err
    assert "tofu_rows is 1" in page.read_text()
    assert re.search(r"forget: rows +│ +1", shown.out)
    assert json.loads((data / "made.json").read_text())["warnings"]
    assert run([*command, "--retain-log", str(log)]) == 2
    assert "its 1 truth ratios are this model's own" in capsys.readouterr().err
    other = [json.loads(line) for line in log.read_text().splitlines()]
    for row in other:
        row["nll_perturbed"] = [nll + 1 for nll in row.get("nll_perturbed", [])]
    log.write_text("".join(json.dumps(row) + "\n" for row in other))
    assert run([*command, "--retain-log", str(log)]) == 0
    shown = capsys.readouterr()
    assert "forget quality of 1 rows is at least 1, whatever the model knows" in shown.err
    assert re.search(r"TOFU forget quality: rows of each model +│ +1", shown.out)


def test_tofu_is_attacked_likewise(data, tiny_dir):
    write_tofu(data)
    command = ["evaluate", "--suite", "tofu", "--tofu", str(data), "--split", "forget01", "--max-length", "40",
               "--model", str(tiny_dir), "--prompt-format", "tags", "--attack-samples", "2", "--rows",
               str(data / "rows"), "--side-effects-text", str(data / "text.md"), "--json", str(data / "json")]  # fmt: skip
    assert run(command) == 0
    rows = [json.loads(line) for line in (data / "rows").read_text().splitlines()]
    assert {r["set"] for r in rows if "attacks" in r} == {"forget", "forget_paraphrased"}
    made = json.loads((data / "json").read_text())
    assert made["after"]["perplexity"] > 1
    assert "side_effects" not in made  # a shift is one between two models
    assert "model_utility" in made["after"]


def test_what_can_not_be_attacked_is_refused_before_a_model_is_loaded(command, data, tiny_dir, capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_dir)
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    (data / "lower").mkdir()
    for file in tiny_dir.iterdir():
        (data / "lower" / file.name).symlink_to(file)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (data / "lower" / file).unlink(missing_ok=True)
    tokenizer.save_pretrained(data / "lower")
    (data / "empty.md").write_text(" \n")
    text = ["--side-effects-text", str(data / "text.md")]
    for flags, message in (
        (["--attack-first-words", "-1"], "attack_first_words is -1: it must be 0 or more"),
        (["--attack-samples", "2", "--attack-prefill", "word " * 30], "forget: row 1 and what its answer must begin"),
        (["--leak-threshold", "0"], "leak_threshold is 0.0"),
        (["--confidence", "1"], "confidence is 1.0"),
        (["--side-effects-text", "no.md"], "text no.md can't be read"),
        (["--side-effects-text", str(data / "empty.md")], "is empty"),
        ([*text, "--before", str(data / "lower")], "have different tokenizers"),
        (["--report", str(data / "text.md")], "report file"),
        (["--report", str(data / "x"), "--rows", str(data / "x")], "are both"),
    ):
        assert run([*command, *flags]) == 2, flags
        shown = capsys.readouterr().err
        assert message in shown.splitlines()[-1]
        assert "loading the model" not in shown
        assert "weights" not in shown


def test_unsound_weights_are_found_before_the_other_model_is_scored(command, data, tiny, tiny_dir, tokenizer, capsys):
    with torch.no_grad():
        tiny.model.norm.weight[0] = torch.nan
    tiny.save_pretrained(data / "nan")
    tokenizer.save_pretrained(data / "nan")
    both = [str(data / "nan"), str(tiny_dir)]
    for model, before in (both, both[::-1]):
        flags = [*command, "--model", model, "--before", before]
        assert run(flags) == 2
        shown = capsys.readouterr().err
        assert "NaN or infinite weights in model.norm.weight" in shown
        assert "evaluation before" not in shown


def made_up(**change):
    """A result with the numbers that plots need."""
    interval = {"value": 0.5, "interval": [0.25, 0.75]}
    leak = {"questions": 2, "left_out": 0, "samples": 100, "worst": interval, "degenerate": 0.0,
            "leak_at_k": {str(k): interval for k in (1, 2, 64, 100)}}  # fmt: skip
    scores = {"sets": {"forget": {"role": "forget", "rouge_l_recall": 0.5, "rows": 2}}, "unlearn_quality": 50.0, "utility": 60.0,
              "leakage": {"sets": {"forget": {"sampling": leak}}}}  # fmt: skip
    return {"before": scores, "after": scores, **change}


def test_plots_show_what_there_is():
    rows = [{"model": when, "set": "forget", "row": 1, "rouge_l_recall": 1.0, "attacks": {"sampling": {"worst": 0.3}}}
            for when in ("before", "after")]  # fmt: skip
    assert len(plots.plots(made_up(), rows)) == 5
    assert len(plots.plots(made_up())) == 3  # no single questions: no histograms
    history = [
        {"step": i, "mean_score": 1 / i, "pending": 9 - i, "collapse_loss": 1.0, "retain_loss": 2.0,
         "rollout_seconds": 0.0, "train_seconds": 1.0} for i in (1, 2)
    ]  # fmt: skip
    assert len(plots.plots({"history": history})) == 2
    assert len(plots.plots({"history": history[:1]})) == 2
    assert plots.plots({"history": []}) == {}
    nothing = {"questions": 0, "left_out": 2, "samples": 100, "criterion": ""}
    empty = made_up()
    empty["after"] = empty["after"] | {"leakage": {"sets": {"forget": {"sampling": nothing}}}}
    ((row,), nothing) = render.leak_rows(empty), dict.fromkeys(("worst", "leak_at_1", "leak_at_n", "degenerate"), "-")
    assert (row["questions"], row["left_out"], row["after"]) == (0, 2, nothing)
    assert (
        "forget, sampling attack: largest recall of 100",
        "0.500 (0.250 to 0.750)",
        "- (2 rows with nothing left to find)",
    ) in (render.metric_rows(empty))
    plots.plots(empty)


def test_files_are_written_whole(tmp_path):
    write_file(str(tmp_path / "a"), "ü")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "ü"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    check_new_files({"json": str(tmp_path / "b"), "rows": None, "report": ""})
