"""Whole runs on answers that ROUGE can't see: a model that recites them has not forgotten, and everything says so."""

import json

import pytest
import torch

from pmc_fast.config import PMCConfig
from pmc_fast.data import encode_pair
from pmc_fast.errors import PMCError
from pmc_fast.models.packed_forward import PackedPass
from pmc_fast.pmc.algorithm import PMC
from tests.command_line import cut_short, left_behind, replaced, run
from tests.conftest import INPUTS

QUESTIONS = ["蜜蜂在哪里？", "什么蜜得了奖？", "谁教她？"]
ANSWERS = json.loads((INPUTS / "languages.json").read_text(encoding="utf-8"))["zh"]
PAIRS = list(zip(QUESTIONS, ANSWERS, strict=True))


@pytest.fixture(scope="module")
def recites(tmp_path_factory, tiny_dir):
    """A model that knows three Chinese answers by heart."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_dir)
    pairs = [encode_pair(tokenizer, q, a, prompt_format="tags") for q, a in PAIRS]
    packed, optimizer = PackedPass(model), torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(400):
        loss = packed.mean_nll(pairs)
        if loss.item() < 0.05:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    directory = tmp_path_factory.mktemp("recites")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def zh(tmp_path):
    """Two of the answers are to be forgotten, the third to be kept."""

    def write(name, pairs):
        rows = [{"question": q} | ({"answer": a} if a else {}) for q, a in pairs]
        (tmp_path / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")

    write("forget.jsonl", PAIRS[:2])
    write("questions.jsonl", [(q, None) for q, _ in PAIRS[:2]])
    write("retain.jsonl", PAIRS[2:])
    return tmp_path


@pytest.fixture
def evaluation(zh, recites):
    return ["evaluate", "--model", str(recites), "--forget", str(zh / "forget.jsonl"), "--retain",
            str(zh / "retain.jsonl"), "--prompt-format", "tags", "--max-length", "120", "--device", "cpu"]  # fmt: skip


@pytest.fixture
def unlearning(zh, recites):
    """Three steps that hardly move a weight."""
    return ["unlearn", "--model", str(recites), "--forget", str(zh / "forget.jsonl"), "--retain",
            str(zh / "retain.jsonl"), "--output", str(zh / "out"), "--preset", "small", "--epochs", "3",
            "--learning-rate", "1e-7", "--batch-size", "2", "--num-samples", "2", "--temperature", "0.3",
            "--max-length", "120", "--device", "cpu"]  # fmt: skip


def test_what_recites_fails_the_gate(evaluation, zh, capsys):
    files = ["--json", str(zh / "scores.json"), "--rows", str(zh / "rows.jsonl"), "--report", str(zh / "page.html")]
    attacked = ["--attack-samples", "3", "--attack-temperature", "0.2", "--attack-prefill", ""]
    assert run([*evaluation, "--min-quality", "90", *attacked, *files]) == 3
    assert "unlearn_quality is 0.0, below 90" in capsys.readouterr().err
    made = json.loads((zh / "scores.json").read_text())
    after = made["after"]
    assert (made["settings"]["reward"], after["reward"]) == ("unicode", "unicode")
    assert (after["unlearn_quality"], after["utility"]) == (0, 100)
    assert after["sets"]["forget"]["degenerate"] == 0
    assert after["sets"]["forget"]["mean_words"] == 17
    for attack in ("sampling", "first_words"):
        found = after["leakage"]["sets"]["forget"][attack]
        assert (found["questions"], found["left_out"], found["worst"]["value"]) == (2, 0, 1)
    page = (zh / "page.html").read_text()
    assert "unicode reward" in page
    assert "first words given" in page


def test_what_rouge_cannot_see_is_refused_before_the_model_is_loaded(evaluation, unlearning, zh, capsys):
    for arguments in (evaluation, unlearning, [*unlearning, "--dry-run"]):
        assert run([*arguments, "--reward", "rouge"]) == 2
        told = capsys.readouterr().err
        assert "forget, rows 1, 2: the rouge reward sees under half" in told
        assert "loading" not in told
    assert left_behind(zh) == []


def test_a_run_does_not_stop_before_it_is_forgotten(unlearning, zh, capsys):
    gates = ["--min-quality", "95", "--stop-score", "0.05", "--stop-steps", "1"]
    assert run([*unlearning, *gates, "--attack-samples", "2", "--attack-temperature", "0.2"]) == 3
    made = json.loads((zh / "out/report.json").read_text())
    assert made["settings"]["reward"] == "unicode"
    assert made["stopped"] is None
    assert [r["mean_score"] for r in made["history"]] == [1, 1, 1]
    for when in ("before", "after"):
        assert made[when]["unlearn_quality"] < 5
        assert made[when]["leakage"]["settings"]["reward"] == "unicode"
    assert "reward: unicode" in capsys.readouterr().err
    assert "unicode" in (zh / "out/README.md").read_text()


def test_without_truths_the_initial_answers_decide(unlearning, zh, capsys):
    asked = replaced(unlearning, forget=zh / "questions.jsonl", retain=zh / "retain.jsonl")
    assert run([*asked, "--no-evaluate", "--reward", "rouge"]) == 2
    assert "initial answers to" in (told := capsys.readouterr().err)
    assert "questions.jsonl, rows 1, 2: the rouge reward sees" in told
    assert run([*asked, "--skip-known-forgotten", "--paraphrased", str(zh / "forget.jsonl")]) == 0
    made = json.loads((zh / "out/report.json").read_text())
    assert made["known_forgotten"]["rows"] == []  # it says the answers
    assert made["before"]["unlearn_quality"] == 0
    assert made["settings"]["reward"] == "unicode"


def test_a_resumed_run_compares_as_it_began(unlearning, zh, monkeypatch):
    longer = [*unlearning, "--checkpoint-steps", "1", "--no-evaluate"]
    cut_short(longer, monkeypatch, step=2)
    assert run([*longer, "--resume", "auto"]) == 0
    assert json.loads((zh / "out/report.json").read_text())["settings"]["reward"] == "unicode"


def test_requests_are_verified_by_the_same_reward(unlearning, zh, capsys):
    pytest.importorskip("peft")
    request = replaced(unlearning, output=None, stack=zh / "stack")
    assert run([*request, "--lora", "--keep-private"]) == 0
    record = json.loads((zh / "stack/0001/record.json").read_text())
    assert record["settings"]["reward"] == record["metrics"]["after"]["reward"] == "unicode"
    checked = ["verify", "--stack", str(zh / "stack"), "--device", "cpu", "--json", str(zh / "verified.json")]
    assert run(checked) == 0  # as recorded: not at all
    assert json.loads((zh / "verified.json").read_text())["requests"]["0001"]["unlearn_quality"] < 5
    assert run([*checked[:-2], "--min-quality", "90", "--attack-samples", "2", "--max-leak", "0.1"]) == 3
    assert "questions leak in 2 samples" in capsys.readouterr().err


def test_libraries_have_the_choice(recites, zh):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(recites, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(recites)
    settings = {"prompt_format": "tags", "max_length": 120, "num_samples": 2, "temperature": 0.2}
    pmc = PMC(model, tokenizer, PMCConfig(**settings), QUESTIONS)
    assert pmc.prepare() == ANSWERS
    pmc.sample([0, 1, 2])
    assert pmc.scores() == [1, 1, 1]
    again = PMC(model, tokenizer, PMCConfig(**settings), QUESTIONS)
    again.load_state_dict(pmc.state_dict())
    assert again.scorer.name == pmc.scorer.name == "unicode"
    with pytest.raises(PMCError, match="initial answers, rows 1, 2, 3: the rouge reward"):
        PMC(model, tokenizer, PMCConfig(**settings, reward="rouge"), QUESTIONS).prepare()
    with pytest.raises(PMCError, match=r"reward is given, and config\.reward is 'rouge'"):
        PMC(model, tokenizer, PMCConfig(**settings, reward="rouge"), QUESTIONS, reward=lambda *a: None)
