"""Steps of methods beside plain padded torch: both agree, a difference is found, tables show what was measured."""

import dataclasses
import json
from contextlib import nullcontext

import pytest
import torch

from benchmarks import harness, methods, suites
from pmc_fast.bench import results as result_files
from pmc_fast.errors import PMCError


@pytest.mark.parametrize("name", methods.NAMES)
def test_both_ways_compute_the_same(tiny, tokenizer, tiny_dir, name):
    step = methods.step_of(name, tiny, tokenizer, tiny_dir, 2)
    methods.move(tiny)
    found, _ = methods.agree(tiny.train(), step)
    assert found["gradients_apart"] < 1e-3  # 2e-5 was seen
    assert abs(found["loss"]) > 1e-3
    assert step.facts["targets"] < step.facts["tokens"] <= step.facts["padded_tokens"]


def test_bfloat16_agrees_within_its_own_rounding(tiny, tokenizer, tiny_dir):
    tiny.to(torch.bfloat16)
    step = methods.step_of("icu", tiny, tokenizer, tiny_dir, 2)
    methods.move(tiny)
    methods.agree(tiny.train(), step)


@pytest.mark.parametrize("name", ["npo", "eul", "mollm"])
def test_another_parameter_is_found(tiny, tokenizer, tiny_dir, name):
    step = methods.step_of(name, tiny, tokenizer, tiny_dir, 2)
    methods.move(tiny, 1.0)
    plain = step.plain.__self__
    other = {"npo": {"beta": 0.2}, "eul": {"alpha": 0.5}, "mollm": {"retain_weight": 2.0}}[name]
    plain.method = dataclasses.replace(plain.method, **other)
    with pytest.raises(PMCError, match="differ"):
        methods.agree(tiny.train(), step)


def test_a_contest_leaves_the_model_as_it_was(tiny, tokenizer, tiny_dir):
    before = {name: p.clone() for name, p in tiny.named_parameters()}
    made = methods.contest("icu", tiny, tokenizer, tiny_dir, 2, 2)
    assert all(torch.equal(p, before[name]) for name, p in tiny.named_parameters())
    assert all(p.grad is None for p in tiny.parameters())
    assert [len(c["rounds_s"]) for c in made["contestants"].values()] == [2, 2]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "alone", nullcontext)
    return tmp_path / "made.json"


def test_the_table_shows_each_method(here, tiny_dir, capsys):
    for name in ("flat", "pmc"):  # the first's result stays
        how = ["--short", "--methods", name, "--model", str(tiny_dir), "--json", str(here), "--device", "cpu"]
        methods.main(how)
    made = result_files.read(here)
    assert made["facts"] == {"dtype": "float32", "model": tiny_dir.name, "pairs": 2, "short": True}
    assert str(tiny_dir.parent) not in here.read_text()
    lines = methods.time_table(suites.Suites({"methods": made})).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| `pmc` (1 rounds)", "| `flat` (1 rounds)"]
    assert lines[-1].endswith(f"; short form, {torch.backends.cpu.get_cpu_capability()}.")
    assert "flat" in capsys.readouterr().out
    assert "Not measured yet" in methods.time_table(suites.Suites({}))
    made["machine"]["threads"] += 1  # peaks stay
    made["results"][0]["contestants"] = {who: {"peak_bytes": 1 << 20} for who in made["results"][0]["contestants"]}
    here.write_text(json.dumps(made))
    assert list(methods.earlier(here, made["facts"])) == ["pmc"]
    assert "| `pmc` |  |  |  | 1 MiB | 1 MiB | 1.00 x |" in methods.time_table(suites.Suites({"methods": made}))
    made["versions"]["torch"] = "another"
    here.write_text(json.dumps(made))
    assert methods.earlier(here, made["facts"]) == {}


def test_training_moves_each_objective(here, tiny_dir):
    names = ["npo", "memorize"]
    how = [
        "--train",
        "4",
        "--learning-rate",
        "2e-3",
        "--model",
        str(tiny_dir),
        "--json",
        str(here),
        "--device",
        "cpu",
    ]
    methods.main(["--short", "--methods", "pmc", *names, *how])
    made = json.loads(here.read_text())
    assert [r["name"] for r in made["results"]] == names  # PMC's run is another benchmark
    for r in made["results"]:
        assert r["after"]["objective"] < r["before"]["objective"]
    npo, memorised = made["results"]
    assert npo["after"]["forget"] > npo["before"]["forget"]
    assert memorised["after"]["forget"] < memorised["before"]["forget"]
    assert memorised["after"]["forget"] < memorised["extrapolated"]["forget"]  # the model knew nothing before
    lines = methods.train_table(suites.Suites({"methods_trained": made})).splitlines()
    assert lines[2].startswith("| `npo` | 4 | 0.002 | ")
    assert lines[-1].startswith("| then `extrapolate`, alpha 4 | | | | ")
    assert "Not measured yet" in methods.train_table(suites.Suites({}))
