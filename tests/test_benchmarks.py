"""The harness: fair order, right statistics, one schema, no mixing of machines. Tables of README and docs/. Compared methods."""

import itertools
import json
import multiprocessing
import os
import re
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks import (
    card,
    card_passes,
    card_probe,
    card_training,
    compare_methods,
    compare_report,
    gpu_page,
    gpu_runs,
    harness,
    readme,
    report,
    runs,
    settings,
    suites,
)  # fmt: skip
from pmc_fast.bench import measure
from pmc_fast.bench import results as result_files
from pmc_fast.data import Row
from pmc_fast.evaluation import EvalSet
from pmc_fast.pmc.algorithm import PMC
from pmc_fast.report.environment import commit
from tests.pages import ROOT


def test_rounds_interleave_and_rotate():
    order = []
    contestants = {name: (lambda name=name: order.append(name)) for name in "abc"}
    for number in range(3):
        assert set(measure.time_round(contestants, number)) == set("abc")
    assert "".join(order) == "abcbcacab"


def test_summary_is_medians_and_quartiles():
    summary = measure.summarize([{"a": float(i)} for i in (5, 1, 3, 2, 4)], {"a": 7})
    assert summary["a"]["median_s"] == 3
    assert summary["a"]["quartiles_s"] == [1.5, 4.5]
    assert summary["a"]["rounds_s"] == [5, 1, 3, 2, 4]
    assert summary["a"]["peak_bytes"] == 7


def test_peak_memory_sees_an_allocation():
    size = 64 << 20
    assert measure.peak_bytes(lambda: bytearray(size).find(b"x")) == pytest.approx(size, rel=0.2)


@pytest.fixture
def files(tmp_path):
    results = [
        {"name": "case", "facts": {}, "contestants": measure.summarize([{"a": 2.0, "b": 0.5}], {"a": 1 << 20})}
    ]
    first = harness.write(tmp_path / "one.json", "one", results)
    return [first, harness.write(tmp_path / "two.json", "two", results, seed=3)]


def test_report_prints_ratios(files, capsys):
    report.main([str(f) for f in files])
    shown = capsys.readouterr().out
    assert "| case | a | 2.00 s | 2.00 s - 2.00 s | 1.00 | 1.0 MiB |" in shown
    assert "|  | b | 500.00 ms | 500.00 ms - 500.00 ms | 0.25 | - |" in shown
    assert "### two" in shown


@pytest.mark.parametrize(("key", "field"), [("machine", "cpu"), ("versions", "torch")])
def test_report_refuses_to_mix(files, key, field):
    content = json.loads(files[1].read_text())
    content[key][field] = "another"
    files[1].write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=f"different {key} .{field}: "):
        report.main([str(f) for f in files])


def test_report_refuses_other_files(tmp_path):
    (tmp_path / "a.json").write_text('{"schema": 99}')
    with pytest.raises(SystemExit, match="no result file"):
        report.main([str(tmp_path / "a.json")])
    with pytest.raises(SystemExit, match="can't be read"):
        report.main([str(tmp_path / "b.json")])


def test_runs_end_to_end_are_compared_seed_by_seed(tmp_path, monkeypatch):
    from benchmarks import end_to_end

    def run(method, seed, seconds, quality):
        point = {"step": 60, "seconds": seconds, "unlearn_quality": quality, "utility": 50.0,
                 "sets": {"retain": {"rouge_l_recall": 0.9}, "forget": {"degenerate": 0.0}}}  # fmt: skip
        return {"method": method, "seed": seed, "seconds": seconds, "steps": 60, "curve": [point]}

    runs = [run("reference", 0, 1000.0, 80.0), run("reference", 1, 1200.0, 84.0), run("pmc_fast", 0, 200.0, 81.0)]
    lines = end_to_end.table(runs).splitlines()
    assert "| 0, 1 | 60 | 1100 | 1.00 | 82.0 | 50.0 | 0.900 |" in lines[2]
    assert "| 0 | 60 | 200 | 5.00 | 81.0 | 50.0 | 0.900 |" in lines[3]
    monkeypatch.setattr(end_to_end, "PLOT", tmp_path / "plot.svg")
    end_to_end.plot(runs)
    assert "<svg" in (tmp_path / "plot.svg").read_text()


# --- tables of README and docs/


def test_pages_show_what_the_results_say():
    results, shown = suites.load(), set()
    for page in readme.pages():
        text = page.read_text()
        shown |= {match[1] for match in readme.BLOCK.findall(text)}
        assert readme.fill(text, results) == text, f"{page.name}: run `python -m benchmarks.report --pages`"
    assert shown == set(readme.BLOCKS)


def suite(contestants, facts=None):
    contestants = measure.summarize([contestants], {"ours": 1 << 20})
    return result_files.document(
        "reward", [{"name": "320 candidates", "facts": {}, "contestants": contestants}], 0, facts
    )


def test_readme_blocks_come_from_results():
    times = {"rouge_score": 3.0, "pmc_fast, new words": 2.0, "pmc_fast": 1.0}
    text = "before\n<!-- bench:cpu -->\nold\n<!-- /bench -->\nafter\n"
    made = readme.fill(text, suites.Suites({"reward": suite(times, {"short": True})}))
    assert "words seen before | rouge_score | 3.0 x less |  |" in made
    assert "no word seen before | rouge_score | 1.50 x less |  |" in made
    assert "weighted_nll" not in made  # nor any other row without its result
    assert "old" not in made
    assert "short form" in made
    assert made.startswith("before\n")
    assert made.endswith("\nafter\n")
    assert "Not measured yet: `make bench`." in readme.fill(text, suites.Suites({}))
    with pytest.raises(SystemExit, match="bench:nothing"):
        readme.fill(text.replace("cpu", "nothing"), suites.Suites({}))


# --- compared methods

ROWS = [
    Row("Who wrote it?", "Ann wrote it."),
    Row("Where?", "In a small town in the north."),
    Row("Why?", "For fun."),
]
KEPT = [Row("Is 4 even?", "It is."), Row("And 5?", "No, it is odd.")]


def result(method, setting, budget, quality, utility, *, seed=0, task="demo", silent=0.0, diverged=None):
    sets = {
        name: {
            "rouge_l_recall": 0.9, "mean_words": 9.0, "says_nothing": silent, "repeated": 0.1,
            "recalls": [0.0, 1 - quality / 50],
        } for name in ("forget", "forget_paraphrased", "retain")
    }  # fmt: skip
    leak = {"worst": {"value": 0.4}, "leaking_questions": 0.25, "per_question": [{"worst": 0.3}, {"worst": 0.5}]}
    point = {"step": 9, "seconds": budget, "unlearn_quality": quality, "utility": utility, "sets": sets,
             "perplexity": 7.0, "attacks": {"sampling": leak, "prefill": leak}}  # fmt: skip
    return {"task": task, "method": method, "setting": setting, "seed": seed, "budget_s": budget, "seconds": budget,
            "steps": 9, "curve": [point], "diverged": diverged}  # fmt: skip


def test_settings_are_chosen_among_runs_that_say_something_and_shown_on_other_questions(tmp_path):
    good, wild, lost, mute = ({"learning_rate": lr, "retain_weight": 1.0} for lr in (1e-5, 1e-4, 1e-3, 1e-2))
    tuning, final = compare_report.TUNING, 480.0
    made = [
        result("retain_only", {}, 0.0, 30.0, 50.0), result("retain_only", {}, 0.0, 31.0, 51.0, task="heldout"),
        result("pmc_fast", good, tuning, 60.0, 60.0), result("pmc_fast", wild, tuning, 99.0, 20.0),
        result("pmc_fast", lost, tuning, 99.0, 99.0, diverged="NaN"),
        result("pmc_fast", mute, tuning, 99.0, 99.0, silent=0.1),
        result("pmc_fast", good | {"answer_penalty": 0.0}, tuning, 98.0, 98.0),
        result("grad_diff", wild, tuning, 90.0, 90.0, silent=0.2), result("grad_diff", mute, tuning, 99.0, 99.0, silent=0.5),
        result("pmc_fast", good, final, 20.0, 50.0, task="heldout"),
        result("pmc_fast", good, final, 30.0, 52.0, task="heldout", seed=1),
        result("pmc_fast", wild, final, 65.0, 55.0, task="heldout"),
    ]  # fmt: skip
    assert compare_report.harmonic(made[3]) == pytest.approx(2 * 99 * 20 / 119)
    assert compare_report.chosen(made, "pmc_fast", tuning) == good
    assert compare_report.chosen(made, "grad_diff", tuning) == wild
    assert compare_report.chosen(made, "npo", tuning) is None
    assert compare_report.chosen(made, "pmc_fast", final) == good
    longer = [*made, result("pmc_fast", wild, final, 70.0, 70.0)]  # tuned at that budget, too
    assert compare_report.chosen(longer, "pmc_fast", final) == wild
    assert compare_report.chosen(longer, "pmc_fast", tuning) == good
    assert [r["curve"][-1]["utility"] for r in compare_report.final_runs(longer, "pmc_fast", final)] == [55.0]
    assert "| 480 | PMC with extensions | **lr 0.0001, lambda 1** | 9 | 70.0 |" in compare_report.tuning_table(longer)
    table = compare_report.final_table(made)
    assert "| before |  | 9 | 31.0 | 51.0 | 0.900 | 0.400 | 25 % | 25 % | 0 % | 10 % | 9.0 | 7.0 |" in table
    assert "| PMC with extensions | 0, 1 | 9 | 25.0 (20.0 - 30.0) | 51.0 (50.0 - 52.0) | 0.900 |" in table
    tuned = compare_report.tuning_table(made)
    assert "| 240 | PMC with extensions | **lr 1e-05, lambda 1** | 9 | 60.0 |" in tuned
    assert "| 240 | PMC with extensions | lr 0.001, lambda 1 | 9 | diverged |" in tuned
    assert "answer_penalty" not in tuned
    [chosen, ablated] = compare_report.ablation_table(made).splitlines()[2:]
    assert chosen.startswith("| all, as chosen | 9 | 60.0 |")
    assert ablated.startswith("| answer_penalty 0 | 9 | 98.0 |")
    # two questions: always forgotten, and half: a mean of 25 over the seeds, of each question 100 and 50
    assert "| 50.0 - 100.0 | 0.300 - 0.500 |" in compare_report.interval_table(made)
    alike = [result("npo", good, final, 0.1, 0.1, task="heldout", seed=seed) for seed in range(3)]
    compare_report.draw(alike, tmp_path / "alike.svg")  # their mean is above all of them by rounding
    for name in ("a.svg", "b.svg"):
        compare_report.draw(made, tmp_path / name)
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_plans_name_each_run_once():
    made = [result("npo", setting, compare_report.TUNING, 60.0, 60.0) for setting in compare_methods.GRIDS["npo"]]
    tuning = list(compare_methods.tuning_plans(["npo", "idk"]))
    assert [p.method for p in tuning[:3]] == ["npo", "idk", "npo"]
    assert [p.setting for p in tuning if p.method == "npo"] == compare_methods.GRIDS["npo"]
    assert all(p.find(made) is not None for p in tuning if p.method == "npo")
    longer = [p for p in compare_methods.tuning_plans(["npo", "idk"], [480.0]) if p not in tuning]
    assert [(p.method, p.budget) for p in longer] == [("npo", 480.0)] * 2  # no method of another grid
    final = list(compare_methods.final_plans(["npo", "idk"], [0, 1], [240.0, 480.0], made))
    assert [(p.seed, p.budget) for p in final] == [
        (0, 240.0),
        (1, 240.0),
        (0, 480.0),
        (1, 480.0),
    ]  # idk: not tuned yet
    assert {(p.method, p.task) for p in final} == {("npo", "heldout")}
    assert not any(p.find(made) for p in final)
    assert compare_methods.distinct([*final, *final]) == final
    given = list(compare_methods.final_plans(["npo", "idk"], [0], [240.0], [], made))  # --settings-of
    assert [(p.method, p.setting) for p in given] == [("npo", final[0].setting)]
    with pytest.raises(SystemExit, match="no setting of pmc_fast was chosen yet"):
        next(compare_methods.ablation_plans(made))
    setting = compare_methods.GRIDS["pmc_fast"][0]
    whole, *without = compare_methods.ablation_plans([result("pmc_fast", setting, compare_report.TUNING, 60.0, 60.0)])
    assert whole.setting == setting
    assert [p.setting for p in without] == [setting | change for change in compare_methods.ABLATED]
    mixed = [result("npo", {"beta": b}, 240.0, 60.0, 60.0, task="heldout") for b in (0.1, 0.5)]
    with pytest.raises(SystemExit, match="npo, 240 s: runs with several settings"):
        compare_report.final_runs(mixed, "npo", 240.0)


@pytest.fixture
def small_task(tiny_dir, monkeypatch):
    """The demo's task with the tiny model, few questions to evaluate, and no lock."""
    whole = runs.load_sets
    monkeypatch.setattr(runs, "finetuned_model", lambda task="demo": tiny_dir)
    monkeypatch.setattr(compare_methods, "finetuned_model", lambda task: tiny_dir)
    monkeypatch.setattr(runs, "load_sets", lambda *of: [EvalSet(s.name, s.role, s.rows[:2]) for s in whole(*of)])
    monkeypatch.setattr(harness, "alone", nullcontext)


def test_methods_are_compared_and_what_is_there_is_not_repeated(small_task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_methods, "ATTACK", compare_methods.ATTACK | {"num_samples": 2})
    for module in (compare_methods, compare_report):
        monkeypatch.setattr(module, "TUNING", 0.2)
    json_file = tmp_path / "made.json"
    asked = ["--methods", "grad_diff", "retain_only", "--seeds", "0", "--budgets", "0.4", "--workers", "1",
             "--json", str(json_file)]  # fmt: skip
    grids = {m: grid[:1] for m, grid in compare_methods.GRIDS.items()}
    monkeypatch.setattr(compare_methods, "GRIDS", grids)
    compare_methods.main(asked)
    made = json.loads(json_file.read_text())
    runs_made = [(r["task"], r["method"], r["setting"], r["budget_s"]) for r in made["results"]]
    own = [
        (task, m, grids[m][0], budget)
        for task, budget in (("demo", 0.2), ("heldout", 0.4))
        for m in ("grad_diff", "retain_only")
    ]
    assert runs_made == [("demo", "retain_only", {}, 0.0), ("heldout", "retain_only", {}, 0.0), *own]
    assert made["facts"]["grids"] == grids
    for run in made["results"]:
        assert run["diverged"] is None
        assert run["curve"][-1]["step"] == run["steps"]
        assert len(run["curve"][-1]["sets"]["forget"]["recalls"]) == 2
        assert run["curve"][-1]["perplexity"] >= 1
        assert ("attacks" in run["curve"][-1]) == (run["budget_s"] != 0.2)
    assert "2 runs to make" in capsys.readouterr().out
    monkeypatch.setattr(compare_methods, "in_process", lambda plan: pytest.fail(f"{plan} again"))
    compare_methods.main(asked)
    assert json.loads(json_file.read_text()) == made
    monkeypatch.setattr(compare_methods, "EXTENSIONS", {"num_samples": 3})
    with pytest.raises(SystemExit, match=r"made\.json has runs with extensions .*, now \{'num_samples': 3\}: use"):
        compare_methods.main(asked)


def test_extensions_are_left_out_of_a_setting_that_was_chosen_elsewhere(small_task, tmp_path, monkeypatch):
    for module in (compare_methods, compare_report):
        monkeypatch.setattr(module, "TUNING", 0.2)
    monkeypatch.setattr(compare_methods, "ABLATED", [{"question_dropout": 0.0}])
    setting = compare_methods.GRIDS["pmc_fast"][1]
    files = [tmp_path / name for name in ("others.json", "chosen.json")]
    for file, of in zip(files, ("npo", "pmc_fast"), strict=True):
        file.write_text(json.dumps({"results": [result(of, setting, 0.2, 60.0, 60.0)]}))
    made = tmp_path / "made.json"
    asked = ["--ablate", "--workers", "1", "--json", str(made), "--settings-of"]
    with pytest.raises(SystemExit, match="no setting of pmc_fast was chosen yet"):
        compare_methods.main([*asked, str(files[0])])
    compare_methods.main([*asked, *map(str, files)])
    ablated = [r["setting"] for r in json.loads(made.read_text())["results"] if r["method"] == "pmc_fast"]
    assert ablated == [setting, setting | {"question_dropout": 0.0}]
    assert not made.with_suffix(".svg").exists()  # nothing on other questions to draw


def test_compared_settings_are_valid(small_task):
    """Before hours of runs: each one's settings, and PMC's with each extension left out."""
    changes = [{}, *compare_methods.ABLATED]
    grids = [*compare_methods.GRIDS.items(), *(i for of in compare_methods.LONGER_GRIDS.values() for i in of.items())]
    plans = [compare_methods.Plan(method, own, 0, 1.0) for method, grid in grids for own in grid]
    plans += [compare_methods.Plan("pmc_fast", change, 0, 1.0) for change in changes]
    for plan in plans:
        config = compare_methods.config_of(plan)
        own = {name: value for name, value in plan.setting.items() if name not in compare_report.METHOD_ALONE}
        assert {name: getattr(config, name) for name in own} == own
    assert all(set(change) <= {*compare_methods.EXTENSIONS, "retain_order"} for change in changes)


def test_a_run_ends_with_its_budget_and_its_rate(small_task, monkeypatch):
    """The clock is the loop's own here: two seconds a step."""
    plan = compare_methods.Plan("retain_only", {"learning_rate": 1e-3}, 0, 9.0, attack=False)
    run = compare_methods.TimedRun(plan)
    rates = []
    run.stop = lambda: setattr(run, "seconds", run.seconds + (2.0 if rates else 0.0))
    optimizer = compare_methods.optimizer_of(run)
    step = optimizer.step
    optimizer.step = lambda: (rates.append(optimizer.param_groups[0]["lr"]), step())
    monkeypatch.setattr(compare_methods, "optimizer_of", lambda run: optimizer)
    made = run.run()
    assert made["steps"] == 4  # a fifth would end at 10 s
    assert rates == pytest.approx([1e-3 * (i + 1) / 5 * (1 - 2 * i / 9) for i in range(4)])
    assert made["curve"][-1]["step"] == 4


def test_the_cards_table():
    run = {"method": "pmc_fast", "seconds": 12.0, "steps": 10, "curve": [{"unlearn_quality": 90.0, "utility": 50.0}]}
    contest = {"name": "a", "facts": {"counters": {"sampled_tokens": 1000}},
               "contestants": {"generate": {"median_s": 4.0}, "pmc_fast": {"median_s": 0.5}}}  # fmt: skip
    results = [contest, run | {"steps": 60, "seconds": 50.0}, run, run | {"method": "reference", "seconds": 60.0}]
    document = {"results": results, "machine": {"gpu": "G"}, "versions": {"torch": "1", "transformers": "2"}}
    lines = gpu_page.table(document).splitlines()
    assert lines[2:5] == [
        "| a | 500 ms, 2,000 tokens/s | 4.00 s | 8.0 |",
        "| the demo's task, 60 steps: quality 90.0, utility 50.0 | 50 s | not run | |",
        "| the demo's task, 10 steps | 12 s | 60 s | 5.0 |",
    ]
    assert "Not measured yet" in gpu_page.table(None)


@pytest.mark.parametrize(
    ("rounds", "name"), [([0.3, 0.1, 0.2], "a (3 rounds)"), ([0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.3], "a")]
)
def test_a_median_on_a_card_has_its_range_and_few_rounds_are_said(rounds, name):
    seconds = measure.summarize([{"pmc_fast": s, "generate": 3.0} for s in rounds], {})
    contest = {"name": "a", "facts": {}, "contestants": seconds}
    document = {"results": [contest], "machine": {"gpu": "NVIDIA G"}, "versions": {"torch": "1", "transformers": "2"}}
    shown = "200 ms (100 ms - 300 ms) | 3.00 s | 15.0"
    assert gpu_page.table(document).splitlines()[2] == f"| {name} | {shown} |"
    contest["name"] = "Llama-3.2-3B: rollouts, T 0.9"
    line = readme.summary_table(suites.Suites({"gpu": document})).splitlines()[2]
    assert line == f"| {name.replace('a', readme.SUMMARY[0][0], 1)} | G | {shown} x |"


def test_repeated_words_are_counted():
    assert compare_methods.repeated_share(["a b a B", "one two", ""]) == pytest.approx(0.5 / 3)


# --- what runs on a card, on the CPU


def test_gpu_runs_on_the_cpu(tiny_dir, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "alone", nullcontext)
    for name, value in (("MAX_LENGTH", 60), ("SAMPLES", 2)):
        monkeypatch.setattr(settings, name, value)
    monkeypatch.setattr(gpu_runs, "COUNT", 2)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    with torch.no_grad():  # it would end each answer before it begins
        model.get_input_embeddings().weight[tokenizer.eos_token_id] = 0
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for name in ("forget10", "retain90", "forget10_perturbed", "real_authors", "world_facts"):
        of = name.removesuffix("_perturbed")
        rows = [{"question": f"{of}: {r.question}", "answer": r.answer, "paraphrased_question": f"{of}: {r.question}",
                 "paraphrased_answer": r.answer} for r in ROWS + KEPT]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = {"vocab_size": len(tokenizer) + 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    gpu_runs.run_all(
        tmp_path / "made.json", str(tmp_path), "cpu", base=str(tmp_path / "base"), taught=tmp_path / "taught",
        teaching={"epochs": 1}, shape=shape, shape_settings={"rounds": 1, "max_length": 60},
        num_epochs=1.0, num_samples=2, batch_size=2, gradient_accumulation_steps=1, max_length=100, min_len=0,
    )  # fmt: skip
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["facts"]["device"] == "cpu"
    assert [r.get("method") for r in made["results"]] == ["pmc_fast", "reference", None, None]
    for run in made["results"][:2]:
        assert run["steps"] == 3
        assert [p["step"] for p in run["curve"]] == [0, 3]
    for contest in made["results"][2:]:
        assert contest["facts"]["shape"] == shape
        assert all(c["median_s"] > 0 for c in contest["contestants"].values())
    with pytest.raises(SystemExit, match="has no forget10"):
        gpu_runs.task("m", str(tmp_path / "base"), "cpu")
    # the short form, on the same models
    monkeypatch.setattr(gpu_runs, "base_model", lambda: tmp_path / "base")
    monkeypatch.setattr(runs, "finetuned_model", lambda task="demo": tmp_path / "base")
    monkeypatch.setattr(gpu_runs, "SHORT_EPOCHS", 1)
    small = runs.demo_config
    few = {"num_samples": 2, "max_length": 60, "batch_size": 10}
    monkeypatch.setattr(gpu_runs, "demo_config", lambda seed, **more: small(seed, **{"num_epochs": 2.0} | few | more))
    gpu_runs.run_short(tmp_path / "short.json", "cpu", {"tiny": shape}, rounds=1, max_length=60)
    made = json.loads((tmp_path / "short.json").read_text())["results"]
    assert [r.get("name") or r["steps"] for r in made] == [
        "tiny: rollouts, T 0.9",
        "tiny: loss and backward, 8 + 8",
        4,
        2,
        2,
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a card, benchmarks/card.sh runs it in full")
def test_the_cards_probe_runs_on_the_cpu(tmp_path, monkeypatch, capsys):
    found = tmp_path / "card.json"
    monkeypatch.setattr(card_probe, "BLOCKS", card_probe.BLOCKS | {"peers": lambda probe: 1 / 0})
    monkeypatch.setattr(card, "QUICK_ROUNDS", 2)
    monkeypatch.setattr(card_training, "WARM_UP", 1)
    monkeypatch.setattr(card_passes, "ROW_KERNELS", card_passes.ROW_KERNELS[-2:])
    blocks = [name for name in card_probe.BLOCKS if name not in ("trainer", "profile")]  # minutes of what others test
    asked = [*blocks, "--shape", "tiny", "--quick", "--epochs", "1", "--json", str(found)]
    assert card_probe.main(asked) == 1  # a block that fails is named, and the others run
    document = json.loads(found.read_text())
    by_name = {r["name"]: r for r in document["results"]}
    assert {name.split(":")[0] for name in by_name} == set(blocks)
    assert [name for name in by_name if "FAILED" in name] == ["peers: FAILED: ZeroDivisionError"]
    assert capsys.readouterr().out.count("-- ") == len(blocks)
    assert (document["facts"], document["commit"], document["versions"]["torch"]) == (
        {"card": "cpu", "shape": "tiny"}, commit(), torch.__version__
    )  # fmt: skip
    for part in ("step", "rollout", "forward", "backward", "optimizer"):
        times = by_name[f"step: {part}"]
        assert times["rounds"] == 2
        assert times["range"][0] <= round(times["ms"], 3) <= times["range"][1]
    whole = by_name["step: steps without a wait"]
    assert whole["steps"] == 2
    assert whole["ms"] > 0
    assert "waits" in by_name["step: step"]
    assert {by_name[f"memory: float32, graphs False: {part}"]["graph_replays"] for part in ("step", "all")} == {0}
    assert sum("shipped" in name for name in by_name) == 1  # of the row kernel's sizes
    assert sum(name.endswith((" fma (default)", " mma")) for name in by_name) == 2
    assert sum("rows a tile" in name for name in by_name) == 6
    whole = by_name["run: whole, 1 epochs"]
    assert whole["s_of_30_epochs_estimated"] > whole["s"]
    assert (whole["steps"], whole["answers"]) == (1, 16 * 3)
    script = ROOT / "benchmarks/card.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    wrong = subprocess.run(["bash", str(script), "7"], check=False, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr) == (2, "usage: bash benchmarks/card.sh 10|25|45\n")
    echoed = {**os.environ, "PYTHON": "echo", "OUT": str(tmp_path)}
    said = subprocess.run(["bash", str(script), "45"], check=True, capture_output=True, text=True, env=echoed).stdout
    files = re.findall(r"^-m benchmarks.card_probe .*--json (\S+)", said, flags=re.M)
    assert tmp_path / "card-run-3b-epochs-30.json" in map(Path, files)
    assert len(files) == len(set(files)) > 10  # a run that fails writes over no other
    named = {word for line in script.read_text().splitlines() for word in line.split() if word.startswith("tests/")}
    assert named
    assert all((ROOT / path).exists() for path in named)


@pytest.mark.parametrize("always", [True, False])
def test_the_cards_probe_says_what_ran_out_of_memory(always, monkeypatch):
    """A step made again in half packs is told from one that was not; one that fails again does not end the others."""
    computes, calls = PMC.step_losses, itertools.count()

    def short(self, *args, **how):
        if always or not next(calls):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return computes(self, *args, **how)

    monkeypatch.setattr(PMC, "step_losses", short)
    monkeypatch.setattr(card_training, "WARM_UP", 1)
    monkeypatch.setattr(card.Probe, "modes", lambda self: dict.fromkeys("ab", (torch.float32, None)))
    probe = card.Probe("tiny", quick=True)
    card_training.memory(probe)
    by_name = {r["name"]: r for r in probe.results}
    if always:
        assert list(by_name) == [f"memory: {mode}, graphs False: OUT OF MEMORY" for mode in "ab"]
        assert all("ran out of memory in a training pass" in r["why"] for r in probe.results)
    else:
        rows = {mode: by_name[f"memory: {mode}, graphs False: step"] for mode in "ab"}
        assert rows["a"]["pack_limit"] > 0
        assert rows["b"]["pack_limit"] is None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone binds processes to cores")
def test_runs_that_are_made_together_take_turns_on_the_cores():
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=time.sleep, args=(20,)) for _ in range(min(2, len(cores)))]
    seen, places = set(), range(len(children))
    for child in children:
        child.start()
    try:
        with harness.taking_turns(0.05):
            end = time.monotonic() + 15
            while time.monotonic() < end and not all(
                {core for of in seen for core in of[n]} == set(cores) for n in places
            ):
                time.sleep(0.02)
                bound = tuple(tuple(os.sched_getaffinity(child.pid)) for child in children)
                seen |= {bound} if all(len(core) == 1 for core in bound) else set()
    finally:
        for child in children:
            child.kill()
            child.join()
    assert seen
    assert all({core for of in seen for core in of[n]} == set(cores) for n in places)  # each has had every core
