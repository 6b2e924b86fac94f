"""The main job and its command line on a tiny model: results, refusals, gates, privacy."""

import json
import re
import resource
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

from pmc_fast import PMCTrainer
from pmc_fast.config import UnlearnConfig
from pmc_fast.data import load_rows
from pmc_fast.errors import PMCError
from pmc_fast.jobs import evaluator, memory_limits
from pmc_fast.models import loading
from pmc_fast.pmc import schedule
from pmc_fast.reference import Reference
from pmc_fast.trainer import checkpointing
from pmc_fast.utils import files
from tests.command_line import SECRET, cut_short, left_behind, replaced, run
from tests.evaluation.test_questions import write_tofu
from tests.processes import start


def test_result_is_a_model_with_card_and_reports(arguments, data, tiny, capsys):
    assert run(arguments) == 0
    shown = capsys.readouterr()
    assert "step 2/2" in shown.err
    assert "tokens/s" in shown.err
    assert "unlearn quality" in shown.out
    made = json.loads((data / "out/report.json").read_text())
    assert made["settings"]["num_samples"] == 2
    assert made["settings"]["temperature"] == 1.25
    assert [r["step"] for r in made["history"]] == [1, 2]
    assert set(made["before"]["sets"]) == {"forget", "retain"}
    assert {"loading the model", "initial answers", "unlearning", "evaluation after"} <= set(made["stage_seconds"])
    assert (
        made["versions"]["torch"] == torch.__version__.split("+")[0] or made["versions"]["torch"] == torch.__version__
    )
    changed = transformers.AutoModelForCausalLM.from_pretrained(data / "out", dtype=torch.float32)
    different = [not torch.equal(a, b) for a, b in zip(tiny.parameters(), changed.parameters(), strict=True)]
    assert all(different)
    page = (data / "out/report.html").read_text()
    assert page.count("<svg") == 5  # sets, Pareto, recalls, scores, losses
    assert "src=" not in page
    assert 'href="http' not in page
    rows = [json.loads(line) for line in (data / "out/rows.jsonl").read_text().splitlines()]
    assert [r["model"] for r in rows if r["set"] == "forget"] == ["before"] * 4 + ["after"] * 4
    assert "base_model" not in (data / "out/README.md").read_text()  # a local directory is no hub id
    assert left_behind(data) == ["out"]


def test_forget_and_retain_data_are_compared_once(arguments, monkeypatch):
    """In `check`, with all other sets: the job's trainer does not do it again."""
    from pmc_fast.data import overlap

    compared, near = [], overlap.near
    monkeypatch.setattr(overlap, "near", lambda *sides: compared.append(sides) or near(*sides))
    assert run([*arguments, "--no-evaluate"]) == 0
    assert len(compared) == 1


def test_text_stays_out_unless_asked_for(arguments, data, tiny, tokenizer, capsys):
    config = UnlearnConfig.merge("small", {"max_length": 40})
    questions = [row.question for row in load_rows(data / "forget.jsonl")]
    answers = [a for a in Reference(tiny, tokenizer, config, questions).prepare() if a]
    assert answers
    for log_text in (False, True):
        assert run([*arguments, *(["--log-text"] if log_text else [])]) == 0
        shown = capsys.readouterr()
        everything = shown.out + shown.err
        for name in ("report.json", "report.html", "rows.jsonl", "README.md", "config.json"):
            everything += (data / "out" / name).read_text()
        assert (SECRET in everything) is log_text
        assert any(a in everything for a in answers) is log_text
        shutil.rmtree(data / "out")


def test_sampled_answers_are_shown_on_demand(arguments, data):
    assert run([*arguments, "--log-text"]) == 0
    made = json.loads((data / "out/report.json").read_text())
    assert [row["question"] for row in made["sampled_answers"]] == [f"What is fact {i}?" for i in range(4)]
    assert all(len(row["stored"]) == 1 and 0 <= row["score"] <= 1 for row in made["sampled_answers"])
    assert "Sampled answers that were trained on" in (data / "out/report.html").read_text()


def test_a_killed_job_goes_on_from_its_newest_checkpoint(arguments, data, monkeypatch, capsys):
    """Cut off after step 3 of 4; the same weights as a run that was not, and no checkpoint left."""
    longer = [*replaced(arguments, epochs="2"), "--checkpoint-steps", "1", "--no-evaluate"]
    assert run(replaced(longer, output=data / "whole")) == 0
    cut_short(longer, monkeypatch)
    assert left_behind(data) == ["out.checkpoints", "whole"]
    capsys.readouterr()
    assert run(replaced([*longer, "--resume", "auto"], seed=1)) == 0  # another run's: it starts anew
    assert "belongs to another run" in capsys.readouterr().err
    shutil.rmtree(data / "out")
    cut_short(longer, monkeypatch)
    assert run([*longer, "--resume", "auto"]) == 0
    assert "from checkpoint-2 on" in capsys.readouterr().err
    assert left_behind(data) == ["out", "whole"]
    ours, whole = (
        transformers.AutoModelForCausalLM.from_pretrained(data / name, dtype=torch.float32)
        for name in ("out", "whole")
    )
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), whole.parameters(), strict=True))
    made = json.loads((data / "out/report.json").read_text())
    assert [r["step"] for r in made["history"]] == [1, 2, 3, 4]


def test_answers_are_asked_for_once_before_and_again_after(arguments, monkeypatch):
    asked = Counter()
    greedy = evaluator.greedy_answers

    def counted(engine, encoder, questions):
        asked.update(questions)
        return greedy(engine, encoder, questions)

    monkeypatch.setattr(evaluator, "greedy_answers", counted)
    assert run(arguments) == 0
    after_alone = {f"What is fact {i}?": 1 for i in range(4)}  # before, they are the initial answers
    assert asked == after_alone | {f"Is {i} even?": 2 for i in range(6)}


def test_two_processes_are_one(pytestconfig, arguments, data, monkeypatch):
    arguments = [*arguments, "--normalization", "step"]
    both = replaced(arguments, output=data / "both", batch_size=1)
    done = start(pytestconfig, "-m", "pmc_fast", *both)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report.json are in") == 1
    assert run(arguments) == 0
    one, two = (json.loads((data / name / "report.json").read_text()) for name in ("out", "both"))
    assert two["before"] == one["before"]
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["collapse_loss"] == pytest.approx(b["collapse_loss"], rel=1e-4)
        assert a["retain_loss"] == pytest.approx(b["retain_loss"], rel=1e-4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(["evaluate", *arguments[1:7]]) == 2


@pytest.mark.parametrize("save", ["float32", "bfloat16"])
def test_bfloat16_parameters_are_trained_through_masters(save, arguments, data, monkeypatch):
    """Where the saved dtype has room for them, the masters are what is saved and evaluated."""
    trained = []
    train = PMCTrainer.train

    def kept_train(self, **how):
        train(self, **how)
        trained.append((self.model, self.optimizer.optimizer.state_dict()["masters"]))

    monkeypatch.setattr(PMCTrainer, "train", kept_train)
    how = [*replaced(arguments, lr="1e-3"), "--param-dtype", "bfloat16", "--save-dtype", save]
    assert run(how) == 0
    made = json.loads((data / "out/report.json").read_text())
    assert made["settings"]["param_dtype"] == "bfloat16"
    saved = transformers.AutoModelForCausalLM.from_pretrained(data / "out", dtype="auto")
    assert saved.dtype == getattr(torch, save)
    model, masters = trained[0]
    kept = {p.data_ptr() for p in masters}
    for p, q in zip(model.parameters(), saved.parameters(), strict=True):
        assert (p.data_ptr() in kept) == (save == "float32")
        assert torch.equal(p, q)
    assert any(torch.equal(m, m.bfloat16().float()) for m in masters) is False


@pytest.fixture
def saved_in(tiny_dir, tmp_path):
    """Return configs of the tiny model as saved in a dtype, or in none that it says."""

    def config_of(dtype):
        path = tmp_path / str(dtype)
        path.mkdir()
        content = json.loads((tiny_dir / "config.json").read_text()) | {"dtype": dtype}
        content.pop("torch_dtype", None)
        (path / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
        return str(path)

    return config_of


def test_what_parameters_are_kept_in(saved_in, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda:1")
    low, resolve = saved_in("bfloat16"), loading.resolve_param_dtype
    assert [resolve("auto", dtype, cuda, low) for dtype in ("auto", "bfloat16", "float32")] == [
        "bfloat16", "bfloat16", "float32",
    ]  # fmt: skip
    assert {resolve("auto", dtype, cpu, low) for dtype in ("auto", "bfloat16", "float32")} == {"float32"}
    assert {resolve("float32", "auto", device, low) for device in (cpu, cuda)} == {"float32"}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert resolve("auto", "auto", cuda, low) == "float32"


@pytest.mark.parametrize("dtype", ["float32", "float16", None])
def test_by_default_no_weight_is_rounded(dtype, saved_in):
    """bfloat16 has fewer bits than float16 too; the plan of the memory counts what will be loaded."""
    source, cuda = saved_in(dtype), torch.device("cuda:0")
    assert loading.resolve_param_dtype("auto", "auto", cuda, source) == "float32"
    for param_dtype, kept in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        config = UnlearnConfig(model=source, param_dtype=param_dtype)
        memory = memory_limits.memory_of(config, memory_limits.Lengths(), cuda)
        assert memory.param_dtype == kept
        assert memory.low == (torch.bfloat16 if kept == torch.float32 else None)


def test_rounding_a_checkpoint_is_said_once(arguments, tiny, tokenizer, tmp_path, capsys):
    told = "is saved in float32: its weights are rounded"
    assert run([*arguments, "--param-dtype", "bfloat16", "--dry-run"]) == 0
    assert capsys.readouterr().err.count(told) == 1
    tiny.bfloat16().save_pretrained(tmp_path / "low")
    tokenizer.save_pretrained(tmp_path / "low")
    assert run([*replaced(arguments, model=tmp_path / "low"), "--param-dtype", "bfloat16", "--dry-run"]) == 0
    assert "rounded" not in capsys.readouterr().err


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_what_training_held_is_released_before_the_evaluation(param_dtype, arguments, monkeypatch):
    held, left = [], []
    train, measure = PMCTrainer.train, evaluator.Evaluator.measure

    def seen_train(self, **how):
        train(self, **how)
        optimizer = self.optimizer.optimizer
        moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
        pool = [t for pair in self.pmc.engine._step.pool.values() for t in pair]
        held.extend((name, weakref.ref(t)) for name, ts in (("moments", moments), ("pool", pool)) for t in ts)

    def seen_measure(self, when, *how):
        if when == "after":
            left.extend(name for name, ref in held if ref() is not None)
        return measure(self, when, *how)

    monkeypatch.setattr(PMCTrainer, "train", seen_train)
    monkeypatch.setattr(evaluator.Evaluator, "measure", seen_measure)
    assert run([*arguments, "--param-dtype", param_dtype]) == 0
    assert {name for name, _ in held} == {"moments", "pool"}
    assert set(left) == ({"pool"} if param_dtype == "float32" else set())  # the same engine goes on


@pytest.mark.parametrize(("first", "second"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_checkpoint_is_of_its_parameters_dtype(
    first, second, arguments, data, tiny, tokenizer, monkeypatch, capsys
):
    """A bfloat16 model has one hash in both, but the optimizer's state has masters in one of them."""
    tiny.bfloat16().save_pretrained(data / "low")
    tokenizer.save_pretrained(data / "low")
    how = [*replaced(arguments, epochs="2", model=data / "low"), "--checkpoint-steps", "1", "--no-evaluate"]
    cut_short([*how, "--param-dtype", first], monkeypatch)
    path = data / "out.checkpoints/checkpoint-2"
    capsys.readouterr()
    assert run([*how, "--param-dtype", second, "--resume", str(path)]) == 2
    assert "its parameters' dtypes differ from this one's" in capsys.readouterr().err
    manifest = json.loads((path / checkpointing.MANIFEST).read_text())
    del manifest["fingerprint"][checkpointing.DTYPES]  # an older pmc_fast's
    (path / checkpointing.MANIFEST).write_text(json.dumps(manifest))
    assert run([*how, "--param-dtype", first, "--resume", str(path)]) == (0 if first == "float32" else 2)


def test_a_checkpoint_has_one_hash_in_both_dtypes(tiny):
    low = tiny.bfloat16()
    before = loading.weights_hash(low, torch.float32)
    assert before != loading.weights_hash(low)
    assert before == loading.weights_hash(low.float()) == loading.weights_hash(low, torch.float32)


def trajectory(arguments, data, monkeypatch):
    """Train as the job does and return what can depend on data: losses, scores and the final weights."""
    seen = []
    train = PMCTrainer.train
    monkeypatch.setattr(PMCTrainer, "train", lambda self, **how: [seen.append(self.pmc), train(self, **how)][1])
    assert run(arguments) == 0
    (pmc,) = seen
    made = json.loads((data / "out/report.json").read_text())
    records = [{k: v for k, v in r.items() if "seconds" not in k} for r in made["history"]]
    shutil.rmtree(data / "out")
    return records, pmc.state_dict(), [p.clone() for p in pmc.model.parameters()]


def equal(a, b):
    return a[:2] == b[:2] and all(torch.equal(x, y) for x, y in zip(a[2], b[2], strict=True))


def test_training_never_sees_the_forget_answers(arguments, data, monkeypatch):
    first = trajectory(arguments, data, monkeypatch)
    rows = [json.loads(line) for line in (data / "forget.jsonl").read_text().splitlines()]
    for i, answers in enumerate((["qq ww", "zz", "x y z", "1"], [None] * 4)):
        new = [{"question": row["question"], "answer": a} for row, a in zip(rows, answers, strict=True)]
        (data / f"new{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))
        assert equal(first, trajectory(replaced(arguments, forget=data / f"new{i}.jsonl"), data, monkeypatch))
    assert not equal(first, trajectory(replaced(arguments, seed=1), data, monkeypatch))


def test_pad_equal_to_eos_changes_nothing(arguments, data, tiny_dir, monkeypatch):
    first = trajectory(arguments, data, monkeypatch)
    padded = data / "padded"
    shutil.copytree(tiny_dir, padded)
    settings = json.loads((padded / "tokenizer_config.json").read_text())
    settings["pad_token"] = settings["eos_token"]
    (padded / "tokenizer_config.json").write_text(json.dumps(settings))
    assert transformers.AutoTokenizer.from_pretrained(padded).pad_token_id == 2
    assert equal(first, trajectory(replaced(arguments, model=padded), data, monkeypatch))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"forget": "no.jsonl"}, "no.jsonl does not exist"),
        ({"forget": None}, "forget is not given"),
        ({"retain": None}, "retain is not given: --retain takes pairs to keep; without them"),
        ({"model": None}, "model is not given"),
        ({"model": "./nowhere"}, "model directory ./nowhere does not exist"),
        ({"output": None}, "output is not given"),
        ({"num_samples": 0}, "num_samples is 0: it must be at least 1"),
        ({"top_p": 1.5}, "top_p is 1.5: it must be above 0 and at most 1"),
        ({"optimizer": "no_such_one"}, "optimizer is 'no_such_one': use one that transformers knows"),
        ({"top_k": -1}, "top_k is -1: it must be 0 (all tokens) or more"),
        ({"max_length": 9}, "row 1: the question takes 9 tokens and leaves none of max_length 9"),
        ({"device": "cuda:9"}, "device is 'cuda:9'"),
        ({"lr": "fast"}, "'fast' is not a valid float"),
        ({"config": "no.yaml"}, "config no.yaml can't be read"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, data, capsys, flags, message):
    if torch.cuda.is_available() and "device" in flags:
        flags, message = {"device": "nowhere"}, "device is 'nowhere'"
    assert run(replaced(arguments, **flags)) == 2
    shown = capsys.readouterr()
    last = shown.err.strip().splitlines()[-1]
    assert last.startswith("pmc-fast: error: ")
    assert message in last
    assert "Traceback" not in shown.err
    assert left_behind(data) == []


def test_rows_without_question_or_answer_are_refused(arguments, data, capsys):
    (data / "bad.jsonl").write_text('{"question": "a"}\n{"title": "b"}\n')
    (data / "none.jsonl").write_text("")
    for flags, message in (
        ({"forget": data / "bad.jsonl"}, "row 2 has no question"),
        ({"retain": data / "bad.jsonl"}, "row 1 has no answer"),
        ({"forget": data / "none.jsonl"}, "has no rows"),
    ):
        assert run(replaced(arguments, **flags)) == 2
        assert message in capsys.readouterr().err
    assert left_behind(data) == []


def test_output_in_use_is_kept(arguments, data, capsys):
    (data / "out").mkdir()
    (data / "out/mine.txt").write_text("mine")
    assert run(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    assert left_behind(data / "out") == ["mine.txt"]
    assert run(replaced(arguments, output=data / "forget.jsonl")) == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize("epochs", [2, 3])
def test_diverging_training_stops_and_names_the_step(arguments, data, capsys, epochs):
    """Weights of 1e30 and more overflow: in a later step's samples or loss, or in the last update itself."""
    assert run(replaced(arguments, lr="1e30", epochs=epochs)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"diverged at step \d of {2 * epochs} .*try a learning_rate below", last)
    assert left_behind(data) == []


def test_nan_weights_are_refused(arguments, data, tiny, tokenizer, capsys):
    with torch.no_grad():
        tiny.model.norm.weight[0] = torch.nan
    tiny.save_pretrained(data / "nan")
    tokenizer.save_pretrained(data / "nan")
    assert run(replaced(arguments, model=data / "nan")) == 2
    assert "NaN or infinite weights in model.norm.weight" in capsys.readouterr().err


def test_only_safetensors_are_read(arguments, data, tiny, tokenizer, capsys):
    tokenizer.save_pretrained(data / "pickled")
    tiny.config.save_pretrained(data / "pickled")
    torch.save(tiny.state_dict(), data / "pickled/pytorch_model.bin")
    assert run(replaced(arguments, model=data / "pickled")) == 2
    assert "can't be loaded" in capsys.readouterr().err


def test_a_tokenizer_larger_than_the_model_is_refused(arguments, data, tiny, tokenizer, capsys):
    tiny.resize_token_embeddings(1000)
    tiny.save_pretrained(data / "cut")
    tokenizer.save_pretrained(data / "cut")
    assert run(replaced(arguments, model=data / "cut")) == 2
    assert "the tokenizer has 49152 tokens but the model embeds 1000" in capsys.readouterr().err


def test_full_disk_leaves_nothing(arguments, data):
    """The limit on a file's size stands in for the disk: weights are longer, reports are not."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-m", "pmc_fast", *arguments, "--no-evaluate"],
        preexec_fn=limit, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "was not written" in done.stderr.splitlines()[-1]
    assert left_behind(data) == []


def test_space_is_checked_before_work(arguments, data, monkeypatch, capsys):
    usage = shutil.disk_usage(data)._replace(free=1000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    assert run(arguments) == 2
    shown = capsys.readouterr().err
    assert "GB but" in shown
    assert "initial answers" not in shown


def test_missed_gate_is_exit_3_with_the_result_written(arguments, data, capsys):
    assert run([*arguments, "--min-utility", "99"]) == 3
    assert "gate missed: utility is" in capsys.readouterr().err
    assert (data / "out/model.safetensors").exists()
    assert json.loads((data / "out/report.json").read_text())["failed_gates"]


def test_a_dry_run_finds_what_the_run_would(arguments, data, tiny, tiny_dir, tokenizer, capsys):
    """Models that can't be loaded or trained, from their files alone."""
    dry = [*arguments, "--dry-run"]

    def made(name, **config):
        shutil.copytree(tiny_dir, data / name)
        file = data / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return data / name

    pickled = made("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    sharded = made("sharded")
    (sharded / "model.safetensors").unlink()
    (sharded / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1-of-2.safetensors"}})
    )
    quantised = made("quantised", quantization_config={"quant_method": "gptq", "bits": 4})
    small = made("small", vocab_size=1000)
    t5 = made("t5", model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)
    cut = made("cut")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    for model, message in (
        (cut, "model.safetensors is damaged"),
        (pickled, "pytorch_model.bin can't be loaded"),
        (sharded, "lacks model-1-of-2.safetensors"),
        (quantised, "is quantised (gptq)"),
        (small, "the tokenizer has 49152 tokens but the model embeds 1000"),
        (t5, "is an encoder-decoder (t5)"),
    ):
        assert run(replaced(dry, model=model)) == 2, model
        assert message in capsys.readouterr().err.splitlines()[-1]
        evaluation = ["evaluate", *replaced(arguments[1:7], model=model)]
        assert run(evaluation) == 2, model
        shown = capsys.readouterr().err
        assert message in shown.splitlines()[-1]
        assert "loading the model" not in shown
    for flags, message in (({"device": "cuda:9"}, "device is 'cuda:9'"), ({"resume": tiny_dir}, "has no sound")):
        assert run(replaced(dry, **flags)) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    for flags, what in (
        ({"temperature": 0.01}, "temperature is 0.01"), ({"top_k": 1}, "top_k is 1"), ({"top_p": 0.01}, "top_p is 0.01"),
    ):  # fmt: skip
        assert run(replaced(dry, **flags)) == 0
        assert f"warning: {what}: samples are nearly always the greedy answer" in capsys.readouterr().err


def test_weights_that_are_missing_are_not_made_up(arguments, data, tiny_dir, capsys):
    """A config.json of more layers than the file has: transformers draws them at random, and quality is 100."""
    shutil.copytree(tiny_dir, data / "deeper")
    file = data / "deeper/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 3}))
    for command in (
        replaced(arguments, model=data / "deeper"),
        ["evaluate", *replaced(arguments[1:7], model=data / "deeper")],
    ):
        assert run(command) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert "lacks weights that its config.json asks for (model.layers.2." in last


def test_without_arguments_the_help_is_shown(capsys):
    assert run([]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 10


def test_dry_run_says_what_would_be_done(arguments, data, capsys):
    assert run([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "steps     2 (2 an epoch), each 2 x 1 questions, 2 samples a question" in shown.out
    assert "warning: only 2 optimizer steps are planned" in shown.err
    assert left_behind(data) == []


def test_settings_from_a_file_yield_to_flags(arguments, data, capsys):
    (data / "run.yaml").write_text("num_samples: 3\nlearning_rate: 1e-5\nretain_weight: 2\n")
    assert run([*arguments, "--dry-run", "--config", str(data / "run.yaml")]) == 0
    assert "2 samples a question" in capsys.readouterr().out
    (data / "run.yaml").write_text("preset: phi\n")
    assert run([*replaced(arguments, preset=None), "--dry-run", "--config", str(data / "run.yaml")]) == 0
    assert "each 2 x 4 questions" in capsys.readouterr().out
    names = "lambda: 1\naccumulation: 2\nlr: 5e-2\nstop-score: 5e-2\nmin_len: 2\n"
    (data / "run.yaml").write_text(names)
    assert run([*arguments, "--dry-run", "--config", str(data / "run.yaml")]) == 0  # as flags are called
    assert "each 2 x 2 questions" in capsys.readouterr().out
    for text, message in (
        ("lamda: 2", "setting 'lamda' is unknown: did you mean lambda?"),
        ("num_sample: 2", "setting 'num_sample' is unknown: did you mean num_samples?"),
        ("lr: 1e-5\nlearning_rate: 1e-4", "gives learning_rate twice"),
        ("stop_score: low", "stop_score is 'low': it must be a number"),
    ):
        (data / "bad.yaml").write_text(text + "\n")
        assert run([*arguments, "--config", str(data / "bad.yaml")]) == 2
        assert message in capsys.readouterr().err


def test_evaluate_scores_a_model(arguments, data, tiny_dir, capsys):
    scores = data / "scores.json"
    command = [
        "evaluate", "--model", str(tiny_dir), "--forget", str(data / "forget.jsonl"), "--max-length", "40",
        "--retain", str(data / "retain.jsonl"), "--prompt-format", "tags", "--json", str(scores),
    ]  # fmt: skip
    assert run(command) == 0
    made = json.loads(scores.read_text())
    assert set(made["after"]["sets"]) == {"forget", "retain"}
    assert SECRET not in scores.read_text() + capsys.readouterr().out
    assert run(command) == 2
    assert "exists" in capsys.readouterr().err
    assert run([*command[:-2], "--min-utility", "100"]) == 3


def test_evaluate_compares_two_models_on_tofu(data, tiny_dir, tiny, tokenizer, capsys):
    """The second model has other weights; a retain model's log is a third's, which finds false answers unlikelier."""
    write_tofu(data)
    with torch.no_grad():
        tiny.model.norm.weight.mul_(3)
    tiny.save_pretrained(data / "other")
    tokenizer.save_pretrained(data / "other")
    command = [
        "evaluate", "--suite", "tofu", "--tofu", str(data), "--split", "forget01", "--max-length", "40", "--model",
        str(data / "other"), "--prompt-format", "tags",
    ]  # fmt: skip
    assert run([*command, "--rows", str(data / "other.rows.jsonl")]) == 0
    log = [json.loads(line) for line in (data / "other.rows.jsonl").read_text().splitlines()]
    log = [row | {"nll_perturbed": [nll + 9 for nll in row.get("nll_perturbed", ())]} for row in log]
    (data / "third.rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    assert run([*command, "--before", str(tiny_dir), "--retain-log", str(data / "third.rows.jsonl"), "--rows",
                str(data / "both.jsonl"), "--json", str(data / "scores.json")]) == 0  # fmt: skip
    made = json.loads((data / "scores.json").read_text())
    assert made["after"]["forget_quality"] == pytest.approx(1 / 3)  # all ratios of one above the other's: 2 of 6
    assert set(made["after"]["sets"]) == {
        "forget", "forget_paraphrased", "retain", "real_authors", "world_facts"
    }  # fmt: skip
    for when in ("before", "after"):
        assert {"unlearn_quality", "utility", "model_utility", "forget_quality"} <= set(made[when])
        assert 0 < made[when]["sets"]["forget"]["probability"] < 1
    assert made["before"]["sets"]["forget"]["probability"] != made["after"]["sets"]["forget"]["probability"]
    rows = [json.loads(line) for line in (data / "both.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 5 * 2
    assert {r["model"] for r in rows} == {"before", "after"}
    shown = capsys.readouterr()
    assert "before" in shown.out
    assert "TOFU forget quality" in shown.out
    assert "likelihood of 8 answers" in shown.err
    everything = shown.out + shown.err + (data / "both.jsonl").read_text() + (data / "scores.json").read_text()
    assert "SECRET" not in everything
    assert run([*command, "--tofu-rows", "1", "--log-text", "--rows", str(data / "texts.jsonl")]) == 0
    assert json.loads((data / "texts.jsonl").read_text().splitlines()[0])["truth"] == "SECRET 0"


def test_evaluations_that_can_not_be_meant_are_refused(data, tiny_dir, capsys):
    questions = ["evaluate", "--model", str(tiny_dir), "--forget", str(data / "forget.jsonl")]
    tofu = ["evaluate", "--model", str(tiny_dir), "--suite", "tofu"]
    here = ["--tofu", str(data)]
    for command, message in (
        (tofu, "tofu is '': it must be a directory"),
        ([*tofu, *here], "has no forget10_perturbed.jsonl"),
        ([*tofu, *here, "--retain", "r.jsonl"], "retain is 'r.jsonl': it must be left out"),
        ([*tofu, *here, "--tofu-rows", "-1"], "tofu_rows is -1"),
        ([*questions, *here], "--suite tofu given"),
        ([*questions, "--rows", str(data / "forget.jsonl")], "rows file"),
        ([*questions, "--rows", str(data / "a"), "--json", str(data / "a")], "are both"),
        ([*questions, "--before", "./nowhere"], "model directory ./nowhere does not exist"),
    ):
        assert run(command) == 2
        shown = capsys.readouterr().err
        assert message in shown.splitlines()[-1]
        assert "loading the model" not in shown


def test_results_survive_settings_that_contradict_each_other(arguments, data, tiny, tokenizer):
    """temperature without do_sample: transformers warns when it loads such a file and refuses to save it."""
    tiny.save_pretrained(data / "odd")
    tokenizer.save_pretrained(data / "odd")
    settings = json.loads((data / "odd/generation_config.json").read_text()) | {"temperature": 0.6, "top_p": 0.9}
    (data / "odd/generation_config.json").write_text(json.dumps(settings))
    assert run([*replaced(arguments, model=data / "odd"), "--no-evaluate"]) == 0
    assert json.loads((data / "out/generation_config.json").read_text())["temperature"] == 0.6


def test_output_may_be_a_link_to_an_empty_directory(arguments, data):
    (data / "real").mkdir()
    (data / "out").symlink_to(data / "real")
    assert run([*arguments, "--no-evaluate"]) == 0
    assert (data / "real/model.safetensors").exists()
    assert (data / "out").is_symlink()


def test_more_bad_input_is_one_line(arguments, data, capsys, tiny_dir):
    (data / "surrogate.jsonl").write_text('{"question": "\\ud800"}\n')
    (data / "retain2").mkdir()
    shutil.copy(data / "retain.jsonl", data / "retain2/retain.jsonl")
    for flags, message in (
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"output": "."}, "output . is the directory that you are in"),
        ({"output": data / ("x" * 250)}, "has a name of 250 bytes"),
        ({"optimizer": "adamw_8bit"}, "optimizer 'adamw_8bit' can't be used here"),
        ({"optimizer": "galore_adamw"}, "optimizer 'galore_adamw' can't be used here"),
        ({"resume": data / "none"}, "none does not exist"),
        ({"epochs": "inf"}, "num_epochs is inf: it must be finite"),
        ({"device": "mps"}, "device is 'mps'"),
        ({"forget": data / "surrogate.jsonl"}, "row 1 holds half of a surrogate pair"),
        ({"general": data / "retain2/retain.jsonl"}, "there is a set called 'retain' already"),
    ):
        assert run(replaced(arguments, **flags)) == 2, flags
        assert message in capsys.readouterr().err.splitlines()[-1]
    command = ["evaluate", "--model", str(tiny_dir), "--forget", str(data / "forget.jsonl"), "--min-utility", "5"]
    assert run(command) == 2
    assert "min_utility needs --retain or --general" in capsys.readouterr().err


def test_steps_cover_every_question_once_an_epoch():
    config = UnlearnConfig(batch_size=3, gradient_accumulation_steps=2, num_epochs=2.0)
    assert schedule.Schedule.plan(config, 10) == schedule.Schedule(steps_per_epoch=2, steps=4)
    clocked = UnlearnConfig(batch_size=3, gradient_accumulation_steps=2, max_seconds=9.0)  # as many as it allows
    assert schedule.Schedule.plan(clocked, 10) == schedule.Schedule(steps_per_epoch=2, steps=None)
    steps = schedule.micro_batches(config, 10)
    orders = []
    for _ in range(2):
        epoch = [next(steps), next(steps)]
        assert [[len(b) for b in step] for step in epoch] == [[3, 3], [3, 1]]
        orders.append([i for step in epoch for b in step for i in b])
        assert sorted(orders[-1]) == list(range(10))
    assert orders[0] != orders[1]


def test_written_aside_is_all_or_nothing(tmp_path):
    with files.written_aside(tmp_path / "out") as directory:
        (directory / "a").write_text("a")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out/a").read_text() == "a"
    with pytest.raises(PMCError, match="the disk is full"), files.written_aside(tmp_path / "other"):
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyboardInterrupt), files.written_aside(tmp_path / "other"):
        raise KeyboardInterrupt
    assert [p.name for p in Path(tmp_path).iterdir()] == ["out"]
