"""A worker's answers are the cold command's; what a request can't have is refused; its memory follows the stack."""

import json
import subprocess
import sys

import pytest
import torch

from pmc_fast.config import RequestConfig, VerifyConfig
from pmc_fast.cuda_graphs.recorder import fingerprint
from pmc_fast.data import load_rows
from pmc_fast.erasure import adapters, record, stacked
from pmc_fast.erasure.spool import Spool
from pmc_fast.erasure.stack import locked
from pmc_fast.erasure.unlearn import unlearn_request
from pmc_fast.erasure.verify import verify
from pmc_fast.erasure.worker import Worker
from pmc_fast.errors import PMCError
from pmc_fast.jobs import unlearn as job
from pmc_fast.models import loading
from pmc_fast.rollout.self_check import SelfCheck
from tests.command_line import run
from tests.erasure.test_erasure import SECRETS, data
from tests.families import FAMILIES, build

pytest.importorskip("peft")
ASKED = {"attack_samples": 2, "slack": 100.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("worker")
    data.__wrapped__(directory)
    return directory


def settings(files, model, stack, **more):
    values = {
        "lora": True, "model": str(model), "stack": str(files / stack), "retain": str(files / "retain.jsonl"),
        "num_epochs": 1.0, "batch_size": 2, "num_samples": 2, "max_length": 40, "device": "cpu", "learning_rate": 0.02,
        "lora_r": 3, "max_degenerate": 1.0,
    }  # fmt: skip
    return RequestConfig.merge("small", values, more)


def forget(files, number):
    return str(files / f"forget{number}.jsonl")


def cold(config, **more):
    unlearn_request(RequestConfig.merge(None, vars(config), more))


def record_of(config, number):
    with open(f"{config.stack}/{number:04d}/record.json", encoding="utf-8") as file:
        return json.load(file)


def require_same(ours, theirs, numbers):
    """The same adapters and weights, of the same requests."""
    for number in numbers:
        a, b = record_of(ours, number), record_of(theirs, number)
        assert a["files"]["adapter_model.safetensors"] == b["files"]["adapter_model.safetensors"]
        assert {k: a["model"][k] for k in ("before", "after")} == {k: b["model"][k] for k in ("before", "after")}
        assert a["steps"] == b["steps"] == 2


@pytest.fixture(scope="module")
def made(files, sharp_dir):
    """The settings of a stack of two cold requests, and what `verify` said after each."""
    config = settings(files, sharp_dir, "cold")
    found = {}
    for number in (1, 2):
        cold(config, forget=forget(files, number), seed=number)
        how = VerifyConfig(stack=config.stack, requests=[forget(files, number)], device="cpu", **ASKED)
        found[number] = without_times(verify(how))
    return config, found


def without_times(found):
    kept = {name: found[name] for name in ("requests", "keep", "weights", "not_verified", "failed_gates")}
    for request in kept["requests"].values():
        request["sampling"].pop("seconds", None)
    return kept


def test_two_requests_in_a_row_are_the_cold_commands_and_nothing_is_loaded_twice(files, sharp_dir, made, monkeypatch):
    (theirs, found), ours, calls = made, settings(files, sharp_dir, "warm"), []

    def counted(of, name):
        function = getattr(of, name)
        monkeypatch.setattr(of, name, lambda *a, **k: calls.append(name) or function(*a, **k))

    counted(loading, "load_model")
    counted(loading, "load_tokenizer")
    counted(SelfCheck, "_exact")
    counted(stacked.adapters, "attach")
    with Worker(ours) as worker:
        for number in (1, 2):
            report = worker.unlearn(f"id{number}", forget=forget(files, number), seed=number)
            assert report["request"] == f"{ours.stack}/{number:04d}"
            assert without_times(worker.verify(requests=[forget(files, number)], **ASKED)) == found[number]
            assert worker.find(f"id{number}")["request"] == f"{number:04d}"
        assert worker.find("id3") is None
    require_same(ours, theirs, (1, 2))
    assert [record_of(ours, n)["metrics"] for n in (1, 2)] == [record_of(theirs, n)["metrics"] for n in (1, 2)]
    assert sorted(calls) == ["_exact", "attach", "load_model", "load_tokenizer"]
    assert record_of(ours, 2)["name"] == "id2"
    assert "name" not in record_of(theirs, 2)


def test_in_bfloat16_and_with_another_rank_too(files, sharp_dir):
    theirs, ours = (
        settings(files, sharp_dir, name, param_dtype="bfloat16", evaluate=False) for name in ("cold16", "warm16")
    )
    more = {1: {}, 2: {"lora_r": 2, "lora_target": ["q_proj"]}}
    with Worker(ours) as worker:
        for number, other in more.items():
            cold(theirs, forget=forget(files, number), **other)
            worker.unlearn(forget=forget(files, number), **other)
    require_same(ours, theirs, more)


def test_after_a_run_that_failed_the_weights_are_the_stacks(files, sharp_dir, made, monkeypatch):
    """It failed when its adapter was in the weights, and again while it was trained."""
    theirs, ours = made[0], settings(files, sharp_dir, "failing", evaluate=False, seed=1)

    def fails(*args, **kwargs):
        raise PMCError("the disk is full")

    with Worker(ours) as worker:
        for of, name in ((record, "record_of"), (job, "_train")):
            with monkeypatch.context() as patched:
                patched.setattr(of, name, fails)
                with pytest.raises(PMCError, match="the disk is full"):
                    worker.unlearn(forget=forget(files, 1))
        worker.unlearn(forget=forget(files, 1))
    require_same(ours, theirs, [1])


def test_a_request_without_answers_is_verified_with_the_models_own(files, sharp_dir):
    path = files / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": r.question}) + "\n" for r in load_rows(forget(files, 3))))
    with Worker(settings(files, sharp_dir, "answerless")) as worker:
        worker.unlearn(forget=str(path))
        found = worker.verify(requests=[str(path)], slack=100.0)["requests"]["0001"]
    assert found["unlearn_quality"] == pytest.approx(found["recorded_unlearn_quality"])


def test_what_is_the_workers_is_refused_and_the_stack_is_its_own(files, sharp_dir):
    config = settings(files, sharp_dir, "own")
    with Worker(config) as worker:
        for name, value in (("model", "other"), ("device", "cuda"), ("log_text", True), ("stack", "x")):
            with pytest.raises(PMCError, match=f"{name} is the worker's: leave it out"):
                worker.request(**{name: value})
        with pytest.raises(PMCError, match="setting 'epoch' is unknown"):
            worker.unlearn(epoch=1)
        with pytest.raises(PMCError, match="num_samples is 0"):
            worker.request(num_samples=0)
        with pytest.raises(PMCError, match="stack is the worker's"):
            worker.verify(stack="x")
        with pytest.raises(PMCError, match="is in use by another process"):
            Worker(config)
        with pytest.raises(PMCError, match="forget is not given"):
            worker.unlearn()
    Worker(config).close()
    with pytest.raises(PMCError, match="lora is False"):
        Worker(RequestConfig(model="m"))


def test_the_command_answers_what_waits_and_two_workers_exclude_each_other(files, sharp_dir, made, capsys):
    words = [
        "serve", "--model", str(sharp_dir), "--stack", str(files / "served"), "--spool", str(files / "spool"),
        "--retain", str(files / "retain.jsonl"), "--preset", "small", "--epochs", "1", "--batch-size", "2",
        "--num-samples", "2", "--max-length", "40", "--lora-r", "3", "--device", "cpu", "--max-degenerate",
        "1", "--no-evaluate", "--drain", "--slack", "100",
    ]  # fmt: skip
    spool = Spool(files / "spool")
    for number in (1, 2):
        rows = [{"question": row.question, "answer": row.answer} for row in load_rows(forget(files, number))]
        spool.submit(f"r{number}", {"forget": rows}, {"seed": number, "lr": 0.02})
    spool.submit("bad", {"forget": [{"question": "?"}]}, {"epoch": 1})
    with spool.locked():
        assert run(words) == 2
    assert "is in use by another worker" in capsys.readouterr().err
    with locked(files / "served"):
        assert run(words) == 2
    assert "is in use by another process" in capsys.readouterr().err
    assert run([*words, "--http", "0.0.0.0:0"]) == 2
    assert "token is not given" in capsys.readouterr().err
    assert run(words) == 0
    shown = capsys.readouterr()
    assert [spool.state(id)["state"] for id in ("r1", "r2", "bad")] == ["done", "done", "failed"]
    assert "setting 'epoch' is unknown: did you mean epochs?" in spool.state("bad")["error"]
    require_same(settings(files, sharp_dir, "served"), made[0], (1, 2))
    written = shown.out + shown.err + "".join(p.read_text() for p in (files / "spool").rglob("*.json"))
    assert not any(secret in written for secret in SECRETS)


def test_killed_at_random_moments(pytestconfig):
    """A few kills of the loop that `python -m tests.worker_loop kill` runs at length; in a process that may fork."""
    done = loop(pytestconfig, "kill", "--times", "5", "--seed", "1", "--requests", "2")
    assert done.startswith("killed 5 times")


def test_two_clients_at_once(pytestconfig):
    """As `python -m tests.worker_loop load --requests 200`."""
    pytest.importorskip("fastapi")
    assert loop(pytestconfig, "load", "--requests", "4").startswith("4 requests answered once")


def loop(pytestconfig, *words):
    done = subprocess.run(
        [sys.executable, "-m", "tests.worker_loop", *words], cwd=pytestconfig.rootpath, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_is_renewed_in_its_memory_and_captures_stay_valid(family):
    """The numbers of a new one; all that captures rely on is as it was, also after accelerate has wrapped the forward."""
    made = [adapters.attach(build(FAMILIES[family]()), r=2, alpha=4, targets=["all-linear"], seed=n) for n in (5, 1)]
    new, old = made
    with torch.no_grad():
        for name, p in old.named_parameters():
            if "lora_" in name:
                p.normal_()
    was = fingerprint(old, {}), [id(p) for p in old.parameters()]
    old._original_forward, old.forward = old.forward, old.forward
    assert (fingerprint(old, {}), [id(p) for p in old.parameters()]) == was
    adapters.renew(old, seed=5)
    assert (fingerprint(old, {}), [id(p) for p in old.parameters()]) == was
    ours, theirs = (adapters.extract(model).factors for model in (old, new))
    assert ours.keys() == theirs.keys()
    for name, f in theirs.items():
        assert torch.equal(ours[name].a, f.a)
        assert torch.equal(ours[name].b, f.b)
    assert adapters.bare_hash(old.get_base_model()) == loading.weights_hash(build(FAMILIES[family]()))
