"""`pmc-fast compare`: a run for each method and seed, made once; its table and page; what is refused."""

import json
import shutil

import pytest

from pmc_fast.config import CompareConfig
from pmc_fast.errors import DivergedError, NotFiniteError, PMCError
from pmc_fast.jobs import unlearn
from pmc_fast.jobs.evaluator import Evaluator
from pmc_fast.jobs.progress import Stages
from pmc_fast.report import comparison
from tests.command_line import SECRET, left_behind, replaced, run


@pytest.fixture
def short(arguments, data):
    """Two methods, two seeds, two steps each."""
    given = replaced(arguments[1:], num_samples=None, epochs=None, output=data / "cmp", seeds="0,1", steps=2)
    return ["compare", *given, "--methods", "pmc,npo", "--set", "pmc.num_samples=2", "--set", "npo.lr=1e-4"]


def result(data):
    return json.loads((data / "cmp/compare.json").read_text())


def test_each_run_is_made_once(short, data, capsys, monkeypatch):
    assert run([*short, "--dry-run"]) == 0
    assert "npo, seed 1: to be made" in capsys.readouterr().out
    assert left_behind(data) == []
    assert run(short) == 0
    shown = capsys.readouterr()
    assert "run 4 of 4: npo, seed 1" in shown.err
    assert "method npo trains on the answers to be forgotten" in shown.err
    assert "compare.html and compare.json are in" in shown.out
    made = result(data)
    assert [(r["method"]["name"], r["seed"], r["steps"]) for r in made["runs"]] == [
        ("pmc", 0, 2), ("npo", 0, 2), ("pmc", 1, 2), ("npo", 1, 2),
    ]  # fmt: skip
    assert [r["learning_rate"] for r in made["runs"][:2]] == [5e-5, 1e-4]
    assert all(r["seconds"] > 0 for r in made["runs"])
    names = {"npo-seed0", "npo-seed1", "pmc-seed0", "pmc-seed1", "compare.html", "compare.json"}
    assert {p.name for p in (data / "cmp").iterdir()} == names
    assert not list((data / "cmp").rglob("*.safetensors"))
    page = (data / "cmp/compare.html").read_text()
    assert page.count("<svg") == 1
    assert SECRET not in page + (data / "cmp/compare.json").read_text()
    table = comparison.rows(made)
    assert [(row["method"], row["told"], row["runs"]) for row in table] == [
        ("before", "", ""), ("pmc", "no", "2"), ("npo", "yes", "2"),
    ]  # fmt: skip
    # made again: nothing but what is missing
    shutil.rmtree(data / "cmp/npo-seed1")
    trained, real = [], unlearn.unlearn
    monkeypatch.setattr(unlearn, "unlearn", lambda c, *more: trained.append(c.output) or real(c, *more))
    assert run(short) == 0
    assert trained == [f"{data}/cmp/npo-seed1"]
    again = result(data)
    assert [r["after"] for r in again["runs"]] == [r["after"] for r in made["runs"]]
    assert run(replaced(short, steps=3)) == 2
    assert "is of another run: its max_steps is 2, not 3; choose another output" in capsys.readouterr().err
    for path in (data / "cmp").glob("*/report.json"):  # of a version that did not have the setting: its default
        report = json.loads(path.read_text())
        del report["settings"]["retain_order"]
        path.write_text(json.dumps(report))
    assert run(short) == 0
    assert trained == [f"{data}/cmp/npo-seed1"]
    assert run([*short, "--retain-order", "shuffled"]) == 2
    assert "its retain_order is 'random', not 'shuffled'" in capsys.readouterr().err
    lines = (data / "forget.jsonl").read_text()
    (data / "forget.jsonl").write_text(lines.replace("fact 0", "fact 9"))
    assert run(short) == 2
    assert "is of other data: choose another output" in capsys.readouterr().err


def test_a_run_that_diverges_is_a_result(short, data, monkeypatch, capsys):
    real = unlearn.unlearn

    def diverges(c, monitor, target, held):
        if c.method == "npo" and c.seed == 0:
            held.load(c.model, c.device, c.dtype, c.param_dtype, Stages(monitor))
            raise DivergedError("training diverged at step 1")
        return real(c, monitor, target, held)

    monkeypatch.setattr(unlearn, "unlearn", diverges)
    at = short.index("--methods")
    npo = [*short[:at], "--methods", "npo"]
    assert run(npo) == 0
    assert "npo, seed 0: training diverged at step 1" in capsys.readouterr().out
    made = result(data)
    assert comparison.rows(made)[-1]["runs"] == "1 of 2"
    assert [r["diverged"] for r in made["runs"]] == ["training diverged at step 1", None]
    assert "npo, seed 0: training diverged at step 1" in (data / "cmp/compare.html").read_text()
    monkeypatch.setattr(unlearn, "unlearn", lambda *given: pytest.fail("all runs are finished"))
    assert run(npo) == 0
    capsys.readouterr()
    found = data / "cmp/npo-seed0.diverged.json"
    other = json.loads(found.read_text())
    other["models"]["before"]["sha256"] = "0"
    found.write_text(json.dumps(other))
    assert run(npo) == 2
    assert "cmp has runs of different weights of" in capsys.readouterr().err
    other["data"]["retain"]["sha256"] = "0"
    found.write_text(json.dumps(other))
    assert run(npo) == 2
    assert "npo-seed0.diverged.json is of other data" in capsys.readouterr().err


def test_logits_that_overflow_after_the_last_step_are_a_divergence_too(short, data, monkeypatch, capsys):
    measure = Evaluator.measure

    def broken(self, when, *more):
        if when == "after":
            raise NotFiniteError("the model's logits are NaN or infinite")
        return measure(self, when, *more)

    monkeypatch.setattr(Evaluator, "measure", broken)
    at = short.index("--methods")
    assert run([*replaced(short[:at], seeds="0"), "--methods", "npo"]) == 0
    assert "npo, seed 0: training diverged at step 2 of 2" in capsys.readouterr().out
    [made] = result(data)["runs"]
    assert made["after"] is None
    assert json.loads((data / "cmp/npo-seed0.diverged.json").read_text())["data"]["forget"]["rows"] == 4


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"methods": "pmc,nop"}, "methods is 'nop': it must be of pmc, ga, "),
        ({"methods": "pmc,pmc"}, "methods is 'pmc,pmc': it must be a list without repetition"),
        ({"seeds": "0,x"}, "seeds is '0,x': it must be numbers, separated by commas"),
        ({"seconds": 5.0, "steps": 3}, "steps is 3: it must be left out with seconds"),
        ({"settings": ["idk.learning_rate=1"], "methods": "npo"}, "settings has 'idk.learning_rate=1': write METHOD"),
        ({"settings": ["npo.beta=x"]}, "beta is 'x': it must be a number"),
        ({"settings": ["npo.num_samples=3"]}, "num_samples is 3: it must be left out with method npo"),
        ({"settings": ["npo.betta=3"]}, "setting 'betta' is unknown: did you mean beta?"),
        ({"settings": ["npo.seed=3"]}, "settings has npo.seed: use --seeds"),
        ({"settings": ["npo.max_steps=3"], "seconds": 5.0}, "settings has npo.max_steps: use --steps"),
        ({"settings": ["npo.evaluate=false"]}, "settings has npo.evaluate: it must be the same for all methods"),
        ({"settings": ["npo.lr=1", "npo.lr=2"]}, "settings has npo.lr twice: give it once"),
        ({"settings": ["npo.lr=1", "npo.learning_rate=2"]}, "npo gives learning_rate twice, under two names"),
    ],
)
def test_settings_that_are_refused(given, error):
    with pytest.raises(PMCError) as refused:
        CompareConfig(output="o", **given).runs(None, {})
    assert str(refused.value).startswith(error)


def test_runs_share_all_but_what_is_a_methods_own():
    config = CompareConfig(
        output="o", methods="pmc,npo,flat", seeds="3", seconds=9.0,
        settings=["npo.beta=0.5", "npo.lambda=2", "pmc.cuda_graphs=false", "flat.divergence=pearson"],
    )  # fmt: skip
    pmc, npo, flat = config.runs("phi", {"batch_size": 3})
    assert (pmc.num_samples, pmc.retain_weight, pmc.cuda_graphs) == (5, 1.5, False)
    assert (npo.beta, npo.retain_weight, flat.divergence, flat.retain_weight) == (0.5, 2.0, "pearson", None)
    assert {c.batch_size for c in (pmc, npo, flat)} == {3}
    assert {(c.max_seconds, c.seed) for c in (pmc, npo, flat)} == {(9.0, 3)}
    assert npo.output == "o/npo-seed3"
