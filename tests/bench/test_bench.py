"""`pmc-fast bench` on the tiny model: what it measures, compares, leaves out and refuses."""

import copy
import json
import statistics

import pytest
import torch

from pmc_fast.bench import contests, measure, questions, results, run, table
from pmc_fast.config import QUICK, BenchConfig
from pmc_fast.data import Encoder
from pmc_fast.errors import PMCError
from pmc_fast.reference import Reference
from tests.command_line import SECRET
from tests.command_line import run as command

SMALL = {"batch_size": 3, "num_samples": 4, "max_length": 40, "rounds": 2, "device": "cpu", "prompt_format": "tags"}
QUICKER = [
    "--quick", "--rounds", "1", "--num-samples", "3", "--max-length", "40", "--prompt-format", "tags", "--device", "cpu"
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny_dir):
    return run.measure(run.check(BenchConfig(model=str(tiny_dir), **SMALL)))


@pytest.fixture
def work(tiny_dir):
    """What contests are made of."""
    plan = run.check(BenchConfig(model=str(tiny_dir), **SMALL))
    loaded = run.loading.load_model(plan.config.model, device=plan.device)
    return contests.Workload(loaded, plan.tokenizer, plan.config, plan.forget, plan.retain, pytest.fail)


def by_name(made):
    return {r["name"].split(",")[0]: r for r in made["results"]}


# --- what is measured


def test_every_contest_has_both_contestants_and_was_compared(made):
    found = by_name(made)
    assert list(found) == list(contests.CONTESTS)
    for name, baseline in (("rollouts", "generate"), ("training step", "published step"), ("weighted_nll", "torch")):
        assert list(found[name]["contestants"]) == ["pmc_fast", baseline]
        for c in found[name]["contestants"].values():
            assert len(c["rounds_s"]) == SMALL["rounds"]
            assert c["median_s"] > 0
            assert c["peak_bytes"] is None or c["peak_bytes"] >= 0
    assert found["rollouts"]["facts"]["equal"].startswith("greedy answers: 3 of 3 equal")
    assert all("within rounding" in found[n]["facts"]["equal"] for n in ("training step", "weighted_nll"))


def test_tokens_a_second_are_of_the_tokens_and_seconds_of_each_round(made):
    for c in by_name(made)["rollouts"]["contestants"].values():
        assert c["tokens_per_s"] == statistics.median(c["rounds_tokens_per_s"])
        for rate, seconds in zip(c["rounds_tokens_per_s"], c["rounds_s"], strict=True):
            assert 0 < rate * seconds <= 3 * 4 * 40 * (1 + 1e-9)  # tokens: of 12 samples
        assert c["rows_per_token"] > 0


def test_a_step_computes_packed_tokens_against_padded_ones(made, tiny_dir):
    c = by_name(made)["training step"]["contestants"]
    assert c["published step"]["computed_tokens"] == 2 * 3 * 40
    assert 0 < c["pmc_fast"]["computed_tokens"] < 2 * 3 * 40


def test_the_result_says_on_what_it_was_measured(made, tiny_dir):
    assert made["machine"]["threads"] == torch.get_num_threads()
    assert made["versions"]["torch"]
    assert made["facts"]["settings"] | SMALL == made["facts"]["settings"]
    assert made["facts"]["questions"]["forget"] == "built-in"
    assert made["facts"]["model"]["parameter_dtype"] == "float32"
    assert str(tiny_dir.parent) not in json.dumps(made)


def test_nothing_that_is_measured_changes_the_weights(work):
    before = copy.deepcopy(work.model.state_dict())
    for make in contests.CONTESTS.values():
        run.hold(make(work), 1, torch.device("cpu"), run.Silent())
    assert all(torch.equal(value, before[name]) for name, value in work.model.state_dict().items())
    assert all(p.grad is None for p in work.model.parameters())


def test_draws_differ_from_round_to_round(work):
    contest = contests.rollouts(work)
    asked = []
    engine = work.pmc.engine
    work.pmc.engine = lambda *a, **k: asked.append(k) or engine(*a, **k)
    for _ in range(2):
        contest.ways["pmc_fast"].run()
    assert [k["seed"] for k in asked] == [0, 1]
    assert "drafts" in asked[0]


def test_built_in_questions_share_none_with_the_pairs(tokenizer):
    forget, retain = ({row.question for row in rows} for rows in (questions.FORGET, questions.RETAIN))
    assert len(forget) == len(questions.FORGET) == len(retain) == len(questions.RETAIN)
    assert not forget & retain
    for format_ in ("chat", "tags"):
        encoder = Encoder(tokenizer, BenchConfig(prompt_format=format_, max_length=QUICK["max_length"]))
        assert not encoder.check_lengths("retain", [(r.question, r.answer) for r in questions.RETAIN])


# --- what is compared first


def test_answers_that_rounding_explains_are_equal(work):
    prompts, n = work.pmc.prompts, work.model.config.vocab_size
    logits = work.model(torch.tensor([prompts[0]])).logits[0, -1]
    ours = [[int(t)] for t in torch.randint(n, (3,))]
    assert contests.same_answers(work, ours, ours) == "greedy answers: 3 of 3 equal"
    best, worst = int(logits.argmax()), int(logits.argmin())
    assert logits[best] - logits[worst] > 1e-3
    with pytest.raises(PMCError, match="part at tokens whose log-probs differ by"):
        contests.same_answers(work, [[best], *ours[1:]], [[worst], *ours[1:]])
    with pytest.raises(PMCError, match="of 1 and 2 tokens"):
        contests.same_answers(work, [[best], *ours[1:]], [[best, 5], *ours[1:]])
    with torch.no_grad():  # two tokens that are equally likely
        head = work.model.get_output_embeddings().weight
        head[worst] = head[best]
    assert "2 of 3 equal; the others part" in contests.same_answers(work, [[best], *ours[1:]], [[worst], *ours[1:]])


def test_answers_under_a_penalty_are_not_judged(work):
    work.model.generation_config.repetition_penalty = 1.5
    said = contests.same_answers(work, [[5], [6], [7]], [[5], [6], [8]])
    assert (
        said
        == "greedy answers: 2 of 3 equal; the others were not judged, since generation_config sets repetition_penalty"
    )


@pytest.mark.parametrize("theirs", [1.1, float("nan")])
def test_losses_that_differ_are_refused(theirs):
    assert "within rounding" in contests.same_numbers("losses", 1.0, 1.00001, 1e-4)
    with pytest.raises(PMCError, match="losses of pmc_fast and the baseline are 1 and"):
        contests.same_numbers("losses", 1.0, theirs, 1e-4)


def test_a_wrong_step_is_not_timed(tiny_dir, monkeypatch):
    wrong = lambda self, indices, retain: {"loss": self.cross_entropy([("Who?", "Ann.")])}  # noqa: E731
    monkeypatch.setattr(Reference, "loss", wrong)
    with pytest.raises(PMCError, match="losses of pmc_fast and the baseline"):
        run.measure(run.check(BenchConfig(model=str(tiny_dir), **SMALL)))


# --- what is left out


def test_a_contestant_without_memory_is_left_out_by_name(tiny_dir, tmp_path, monkeypatch, capsys):
    """In the comparison (generate), and not before it is warmed up (the step)."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    loss, calls = Reference.loss, []
    monkeypatch.setattr(Reference, "generate", full)
    monkeypatch.setattr(Reference, "loss", lambda *a: full() if calls else (calls.append(1), loss(*a))[1])
    file = tmp_path / "out.json"
    assert not command(["bench", "--model", str(tiny_dir), *QUICKER, "--json", str(file)])
    captured = capsys.readouterr()
    assert captured.out.count("left out, out of memory") == 2
    assert "generate is left out: out of memory" in captured.err
    found = by_name(json.loads(file.read_text()))
    assert found["rollouts"]["facts"] == {"equal": "not compared", "left_out": {"generate": "out of memory"}}
    assert list(found["rollouts"]["contestants"]) == ["pmc_fast"]
    assert found["training step"]["facts"]["left_out"] == {"published step": "out of memory"}
    assert len(found["weighted_nll"]["contestants"]) == 2


def test_running_out_of_memory_later_is_an_error():
    calls = []

    def run_once():
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    way = contests.Way(lambda: 1.0, run_once)
    with pytest.raises(PMCError, match="something ran out of memory in round 2"):
        run.hold(contests.Contest("something", {"pmc_fast": way}, lambda a: ""), 3, torch.device("cpu"), run.Silent())


# --- the command


def test_the_command_prints_writes_and_compares(tiny_dir, data, capsys):
    files = [data / "one.json", data / "two.json"]
    arguments = ["bench", "--model", str(tiny_dir), *QUICKER]
    arguments += ["--forget", str(data / "forget.jsonl"), "--retain", str(data / "retain.jsonl")]
    assert not command([*arguments, "--json", str(files[0])])
    shown = capsys.readouterr().out
    assert "2 questions (forget.jsonl) x 3 samples" in shown
    assert "of 1 round (few:" in shown
    assert "greedy answers: 2 of 2 equal" in shown
    assert SECRET not in shown + files[0].read_text()
    assert "What is fact" not in shown + files[0].read_text()
    assert not command([*arguments, "--json", str(files[1]), "--compare", str(files[0])])
    assert "this run" in capsys.readouterr().out
    assert not command(["bench", "--compare", str(files[0]), "--compare", str(files[1])])
    beside = capsys.readouterr().out
    assert "one.json" in beside
    assert "rollouts, tokens/s: generate" in beside
    assert not command(["bench", "--compare", str(files[0])])
    assert "tokens/s" in capsys.readouterr().out


def changed(file, to, *path, value):
    content = json.loads(file.read_text())
    part = content
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    to.write_text(json.dumps(content))
    return str(to)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("machine", "cpu"), "another", "different machine (cpu: "),
        (("machine", "threads"), 99, "different machine (threads: "),
        (("facts", "settings", "num_samples"), 99, "different settings (num_samples: "),
        (("facts", "questions", "forget"), "other.jsonl", "different questions (forget: "),
        (("suite",), "reward", "is of the suite 'reward'"),
        (("schema",), 99, "is no result file of schema 1"),
    ],
)
def test_results_of_other_conditions_are_refused(made, tiny_dir, tmp_path, capsys, monkeypatch, path, value, words):
    file = tmp_path / "one.json"
    file.write_text(results.dumps(made))
    other = changed(file, tmp_path / "two.json", *path, value=value)
    assert command(["bench", "--compare", str(file), "--compare", other]) == 2
    assert words in capsys.readouterr().err
    monkeypatch.setattr(run.loading, "load_model", lambda *a, **k: pytest.fail("loaded"))
    flags = [w for name, v in SMALL.items() for w in ("--" + name.replace("_", "-"), str(v))]
    assert command(["bench", "--model", str(tiny_dir), *flags, "--compare", other]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "model is not given"),
        (
            ["--model", "TINY", "--batch-size", "17"],
            "batch_size is 17: it needs as many rows of forget, and there are 16",
        ),
        (["--model", "TINY", "--forget", "FORGET", "--batch-size", "5"], "forget.jsonl has 4"),
        (["--model", "TINY", "--max-length", "20"], "raise --max-length"),
        (["--model", "TINY", "--rounds", "0"], "rounds is 0: it must be at least 1"),
        (["--model", "TINY", "--json", "FORGET"], "exists"),
        (["--model", "TINY", "--compare", "nothing.json"], "nothing.json can't be read"),
        (["--model", "TINY", "--device", "gpu"], "device is 'gpu'"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(tiny_dir, data, capsys, monkeypatch, flags, words):
    monkeypatch.setattr(run.loading, "load_model", lambda *a, **k: pytest.fail("loaded"))
    names = {"TINY": str(tiny_dir), "FORGET": str(data / "forget.jsonl")}
    assert command(["bench", *(names.get(f, f) for f in flags)]) == 2
    assert words in capsys.readouterr().err


def test_several_processes_are_refused(tiny_dir, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PMCError, match="WORLD_SIZE is 2"):
        run.check(BenchConfig(model=str(tiny_dir)))


def test_quick_is_smaller_and_given_flags_win():
    full, quick = BenchConfig(), BenchConfig.merge(True, {"rounds": 5})
    assert all(
        getattr(quick, name) == value < getattr(full, name) for name, value in QUICK.items() if name != "rounds"
    )
    assert quick.rounds == 5
    assert BenchConfig.merge(False, {}) == full
    assert full.rounds == measure.ROUNDS


# --- the table


def test_ratios_are_how_many_times_better_pmc_fast_is():
    ours = {"median_s": 2.0, "rounds_s": [1.0, 2.0, 3.0], "peak_bytes": 1 << 20, "tokens": 10.0, "tokens_per_s": 30.0,
            "rounds_tokens_per_s": [20.0, 30.0, 40.0], "rows_per_token": 0.5}  # fmt: skip
    theirs = ours | {
        "median_s": 3.0,
        "rounds_s": [3.0] * 3,
        "peak_bytes": 3 << 30,
        "tokens_per_s": 10.0,
        "rows_per_token": 2.0,
    }
    lines = table.lines({"name": "rollouts", "facts": {}, "contestants": {"pmc_fast": ours, "generate": theirs}})
    shown = {line.name: (*line.values.values(), line.ratio) for line in lines}
    assert shown["rollouts"] == ("generate", "")
    assert shown["seconds"] == ("2.00 s (1.00 s - 3.00 s)", "3.00 s", "1.50 x")
    assert shown["tokens/s"] == ("30 (20 - 40)", "10 (20 - 40)", "3.0 x")
    assert shown["tokens sampled"] == ("10", "10", "")
    assert shown["rows a token"] == ("0.50", "2.00", "4.0 x")
    assert shown["peak memory"] == ("1 MiB", "3.00 GiB", "3072.0 x")
