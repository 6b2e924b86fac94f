"""Leaving out what is known to be forgotten: judged by hand, and in whole runs of a tiny model."""

import json
import re

import pytest

from pmc_fast.config import UnlearnConfig
from pmc_fast.data import Encoder, Row
from pmc_fast.errors import PMCError
from pmc_fast.evaluation import sampling_attack
from pmc_fast.jobs import filters, known_forgotten
from pmc_fast.jobs.evaluator import Evaluator
from pmc_fast.rollout import RolloutEngine, Rollouts, SharedEngine
from tests.command_line import cut_short, left_behind, replaced, run
from tests.evaluation.test_leakage import Script
from tests.processes import start

TRUTH = "quagmire zeppelin"


def config_of(**values):
    return UnlearnConfig(prompt_format="tags", num_samples=2, forget="forget.jsonl", **values)


class Fake(Evaluator):
    """Of a model that answers `greedy`, with losses of these answers under their questions and paraphrases."""

    greedy, losses, asked = "", (), ()

    def answers(self, questions):
        return [self.greedy] * len(questions)

    def mean_nlls(self, groups, max_tokens):
        self.asked += (len(groups),)
        return [[nll] for nll in self.losses]


def fake(tokenizer, config, answers):
    return Fake(Script(tokenizer, *answers), Encoder(tokenizer, config))


def judged(tokenizer, config, rows, answers):
    return known_forgotten.judge(fake(tokenizer, config, answers), config, rows, [None] * len(rows))


def test_by_the_truth(tokenizer):
    rows = [Row("a", "Ann Lee wrote the red books"), Row("b", "in Rome"), Row("c", "書"), Row("d", "of Paris")]
    said = [["the cat", "Bob"], ["Oslo", "Oslo or Rome"], ["x", "書く"], ["no", ""]]
    found = judged(tokenizer, config_of(), rows, said)
    assert found.rows == [4]  # "the" is a word of the first
    assert (found.questions, found.unjudged, found.samples, found.degenerate) == (4, 0, 2, 1.0)
    assert "recall of the truth (unicode) is at most 0" in found.criterion
    looser = judged(tokenizer, config_of(skip_threshold=0.2), rows, said)
    assert looser.rows == [1, 4]
    assert looser.degenerate == 1.0
    assert "Ann" not in json.dumps(looser.criterion)


def test_without_a_truth_by_the_paraphrase(tokenizer):
    """Four questions whose greedy answer is "one two": its losses under the question and the paraphrase decide."""
    config, said = config_of(), [["one two", "x"], ["x", "y"], ["x", "y"], ["x", "y"]]
    evaluator = fake(tokenizer, config, said)
    evaluator.greedy, evaluator.losses = "one two", (2.0, 1.0, 1.0, 2.0)
    rows = [Row("a"), Row("b"), Row("c"), Row("d")]
    found = known_forgotten.judge(evaluator, config, rows, ["A", "B", "C", None])
    assert evaluator.asked == (
        4,
    )  # not of the first, which repeats its answer, nor of the last, which has no paraphrase
    assert found.rows == [2]
    assert found.unjudged == 1
    assert "truth is at most" not in found.criterion


def test_a_question_to_which_the_model_says_nothing_can_not_be_judged(tokenizer):
    config = config_of()
    evaluator = fake(tokenizer, config, [["of Paris", "no"]])  # of the second alone
    evaluator.greedy = "..."
    rows = [Row("a"), Row("b", "in Rome")]
    found = known_forgotten.judge(evaluator, config, rows, ["A", None])
    assert (found.rows, found.unjudged) == ([2], 1)
    silent = known_forgotten.judge(evaluator, config, rows[:1], ["A"])
    assert (silent.rows, silent.unjudged, silent.seconds) == ([], 1, 0.0)


def test_paraphrases_are_read_where_truths_are_missing(tmp_path):
    file = tmp_path / "other.jsonl"
    file.write_text('{"question": "a"}\n{"question": "B"}\n')
    with_truth, without = [Row("a", "x"), Row("b", "y")], [Row("a"), Row("b", "y")]
    config = config_of(paraphrased=str(file))
    assert known_forgotten.read_paraphrases(config, with_truth) == [None, None]
    assert known_forgotten.read_paraphrases(config, without) == [None, "B"]  # the same words are no paraphrase
    assert known_forgotten.read_paraphrases(config_of(), without) == [None, None]
    with pytest.raises(PMCError, match=r"forget\.jsonl has 1 rows and .*other\.jsonl 2"):
        known_forgotten.read_paraphrases(config, without[:1])
    with pytest.raises(PMCError, match="has no answers to compare samples with"):
        known_forgotten.read_paraphrases(config_of(), without[:1])


def test_shared_rollouts_are_the_whole_ones():
    """Two processes, one after the other: each samples its share, both get everything."""

    class Ranks:
        size = 2

        def __init__(self, rank, told):
            self.rank, self.told = rank, told

        def share(self, items):
            return list(items)[self.rank :: 2]

        def gather(self, item):
            self.told[self.rank] = item
            return [self.told.get(0, item), self.told.get(1, item)]

    def engine(prompts, *, drafts, num_samples, positions, stream_ids, logit_bias, max_new_tokens):
        assert max_new_tokens == [n + 7 for [n] in prompts]
        assert drafts == [[p] for p in prompts]
        assert stream_ids == [10 * n for [n] in prompts]
        assert logit_bias == [{n: 1.0} for [n] in prompts]
        assert positions == [[p[0] + 1] for p in prompts]
        return Rollouts(
            [[[*p, n] for n in range(num_samples)] for p in prompts],
            [],
            [],
            [],
            {"rows": len(prompts), "peak_slots": 7},
        )

    prompts = [[1], [2], [3], [4], [5]]
    told = {1: ({1: [[2, 0], [2, 1]], 3: [[4, 0], [4, 1]]}, {"rows": 2, "peak_slots": 9})}
    each = {"drafts": [[p] for p in prompts], "positions": [[p[0] + 1] for p in prompts]}
    each |= {"stream_ids": [10 * n for [n] in prompts], "logit_bias": [{n: 1.0} for [n] in prompts]}
    each |= {"max_new_tokens": [n + 7 for [n] in prompts]}
    made = SharedEngine(engine, Ranks(0, told))(prompts, **each, num_samples=2)
    assert made.tokens == [[[p, 0], [p, 1]] for p in (1, 2, 3, 4, 5)]
    assert made.counters == {"rows": 5, "peak_slots": 9}


@pytest.fixture
def arguments(tmp_path, tiny_dir, tiny, tokenizer):
    """A run of three questions: the model sometimes says the truth of the second, never those of the others."""
    config = UnlearnConfig.merge("small", {"num_samples": 2, "max_length": 40})
    questions = [f"What is fact {i}?" for i in range(3)]
    how = {name: getattr(config, name) for name in ("num_samples", "temperature", "top_k", "top_p", "seed")}
    said = sampling_attack(RolloutEngine(tiny), Encoder(tokenizer, config), [Row(q, "x") for q in questions], **how)
    words = max(re.findall("[a-z0-9]+", " ".join(said.samples[1]).lower()), key=len)
    rows = [{"question": q, "answer": TRUTH} for q in questions]
    rows[1]["answer"] += " " + words
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = [{"question": f"Is {i} even?", "answer": f"It is {i % 2 == 0}."} for i in range(4)]
    (tmp_path / "retain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return [
        "unlearn", "--model", str(tiny_dir), "--forget", str(tmp_path / "forget.jsonl"), "--retain",
        str(tmp_path / "retain.jsonl"), "--output", str(tmp_path / "out"), "--preset", "small", "--epochs", "2",
        "--batch-size", "2", "--num-samples", "2", "--max-length", "40", "--device", "cpu", "--skip-known-forgotten",
    ]  # fmt: skip


def test_known_ones_are_left_out_and_reported(arguments, tmp_path, capsys):
    assert run([*arguments, "--attack-samples", "2", "--attack-prefill", ""]) == 0
    made = json.loads((tmp_path / "out/report.json").read_text())
    assert made["known_forgotten"]["rows"] == [1, 3]
    assert made["questions"] == 3
    assert all(r["pending"] <= 1 for r in made["history"])
    assert len(made["history"]) == 2  # one question: a step an epoch
    assert "2 of 3 questions are left out (rows 1, 3)" in capsys.readouterr().err
    page = (tmp_path / "out/report.html").read_text()
    assert "2 of 3 forget questions were known to be forgotten" in " ".join(page.split())
    assert page.count("<svg") == 7
    assert "1 questions unlearned" in (tmp_path / "out/README.md").read_text()
    for when in ("before", "after"):
        assert made[when]["sets"]["forget"]["rows"] == 3  # all are evaluated
        assert made[when]["leakage"]["sets"]["forget"]["sampling"]["questions"] == 3
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert sum("attacks" in r for r in rows) == 2 * 3
    written = [(tmp_path / "out" / name).read_text() for name in ("report.json", "report.html", "rows.jsonl")]
    assert not any("quagmire" in text for text in written)


def test_nothing_to_do_is_no_error_and_writes_nothing(arguments, tmp_path, capsys):
    (tmp_path / "forget.jsonl").write_text(json.dumps({"question": "What is fact 0?", "answer": TRUTH}) + "\n")
    assert run(arguments) == 0
    shown = capsys.readouterr()
    assert "all 1 questions are known to be forgotten already" in shown.out
    assert left_behind(tmp_path) == []


def test_a_resumed_run_leaves_out_the_same(arguments, tmp_path, monkeypatch, capsys):
    longer = [*replaced(arguments, epochs="4"), "--checkpoint-steps", "1", "--no-evaluate"]
    cut_short(longer, monkeypatch)
    assert (tmp_path / "out.checkpoints" / filters.FILE).exists()
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(known_forgotten, "judge", None)  # not asked again
        assert run([*longer, "--resume", "auto"]) == 0
    assert "from checkpoint-2 on" in capsys.readouterr().err
    made = json.loads((tmp_path / "out/report.json").read_text())
    assert made["known_forgotten"]["rows"] == [1, 3]
    assert [r["step"] for r in made["history"]] == [1, 2, 3, 4]
    assert left_behind(tmp_path) == ["out"]


def test_two_processes_leave_out_the_same(pytestconfig, arguments, tmp_path):
    flags = [*replaced(arguments, batch_size="1"), "--normalization", "step", "--attack-samples", "2"]
    done = start(pytestconfig, "-m", "pmc_fast", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("2 of 3 questions are left out (rows 1, 3)") == 1
    two = json.loads((tmp_path / "out/report.json").read_text())
    assert (
        run([*replaced(arguments, output=tmp_path / "one"), "--attack-samples", "2", "--normalization", "step"]) == 0
    )
    one = json.loads((tmp_path / "one/report.json").read_text())
    assert two["known_forgotten"]["rows"] == one["known_forgotten"]["rows"]
    worst = [m["before"]["leakage"]["sets"]["forget"]["sampling"]["worst"] for m in (one, two)]
    assert worst[0] == worst[1]
    assert len(two["history"]) == len(one["history"]) == 2
