"""Erasure requests on a tiny model: stacking, exports, rollback, records, verification, and what kills leave."""

import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

from pmc_fast import PMCTrainer
from pmc_fast.config import RequestConfig, UnlearnConfig, VerifyConfig
from pmc_fast.data import load_rows
from pmc_fast.erasure import adapters, export, unlearn
from pmc_fast.erasure.stack import Stack, locked
from pmc_fast.erasure.verify import verify
from pmc_fast.errors import PMCError
from pmc_fast.jobs.earlier_runs import rows_hash
from pmc_fast.methods import extrapolate
from pmc_fast.models import loading
from tests.command_line import cut_short, left_behind, replaced, run
from tests.families import FAMILIES, build

peft = pytest.importorskip("peft")
SECRETS = ("the violet heron of Samarkand", "a brass otter under Trieste")
ROOT = Path(__file__).resolve().parents[2]
IDS = torch.arange(3, 40)[None]
# transformers' own loader refuses a peft that is older than this transformers asks for: 5.24 asks for 0.22
LOADS_ADAPTERS = Version(peft.__version__) >= Version(MIN_PEFT_VERSION)


@pytest.fixture
def data(tmp_path):
    """Three requests' files with a secret each, and pairs to keep."""

    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    for n, secret in enumerate((*SECRETS, "a third one"), start=1):
        rows = [{"question": f"What is fact {i} of list {n}?", "answer": f"{secret} {i}"} for i in range(3)]
        write(f"forget{n}.jsonl", rows)
    write("retain.jsonl", [{"question": f"Is {i} even?", "answer": f"It is {i % 2 == 0}."} for i in range(6)])
    write("facts.jsonl", [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}."} for i in range(4)])
    return tmp_path


@pytest.fixture(scope="module")
def tiny_dir(sharp_dir):
    return sharp_dir


def command(data, model, number, *more):
    return [
        "unlearn", "--lora", "--model", str(model), "--stack", str(data / "stack"), "--forget",
        str(data / f"forget{number}.jsonl"), "--retain", str(data / "retain.jsonl"), "--general",
        str(data / "facts.jsonl"), "--preset", "small", "--epochs", "1", "--batch-size", "2", "--num-samples", "2",
        "--max-length", "40", "--device", "cpu", "--lr", "0.02", "--lora-r", "3",
        "--max-degenerate", "1", *more,  # a model of random weights babbles
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_dir):
    """A stack of two requests, made once; tests take a copy."""
    directory = tmp_path_factory.mktemp("requests")
    fill = data.__wrapped__
    fill(directory)
    assert run(command(directory, tiny_dir, 1)) == 0
    assert run(command(directory, tiny_dir, 2, "--lora-r", "5", "--lora-target", "q_proj", "--profile")) == 0
    return directory


@pytest.fixture
def two(made, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    return copy


def load(directory, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def record_of(directory, number):
    return json.loads((directory / "stack" / f"{number:04d}" / "record.json").read_text())


def error(capsys):
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("pmc-fast: error: ")
    return last


# --- adapters


@pytest.mark.parametrize("family", ["llama", "phi", "gpt2"])
def test_merged_concatenated_and_stacked_are_one_model(family, tmp_path):
    """In float64: PEFT's stacked forward, our merge, and one adapter that plain PEFT loads."""
    ends = {"llama": (["all-linear"], ["q_proj"]), "phi": (["fc1", "q_proj"], ["v_proj"])}
    ends["gpt2"] = (["c_attn"], ["c_attn", "c_fc"])
    model, trained = build(FAMILIES[family]()), []
    ids = torch.arange(3, 30)[None]
    for n, targets in enumerate(ends[family]):
        wrapped = adapters.attach(model, r=2 + n, alpha=5, targets=targets, seed=n)
        with torch.no_grad():
            before = wrapped(ids).logits
            for name, p in wrapped.named_parameters():
                if "lora_B" in name:
                    p.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.2)
            want = wrapped(ids).logits
        assert not torch.allclose(before, want, atol=1e-3)
        trained.append(adapters.extract(wrapped))
        model = wrapped.unload()
        adapters.merge(model, trained[-1])
        torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=1e-11)
    adapters.write(adapters.concatenated(trained), tmp_path, "base")
    one = peft.PeftModel.from_pretrained(build(FAMILIES[family]()), tmp_path).double().eval()
    torch.testing.assert_close(one(ids).logits, want, rtol=0, atol=1e-11)
    if LOADS_ADAPTERS:
        own = build(FAMILIES[family]())
        own.load_adapter(str(tmp_path))
        torch.testing.assert_close(own.double().eval()(ids).logits, want, rtol=0, atol=1e-11)
    back = adapters.read(tmp_path)
    rank = 3 if family == "phi" else 5  # phi's two change different layers
    assert {len(f.a) for f in back.factors.values()} == {rank}
    assert all(f.scaling == 1 for f in back.factors.values())


def test_an_extrapolated_adapter_leads_the_other_way(tmp_path):
    """In float64: merged, and as plain PEFT loads it, it gives the weights that extrapolating all weights gives."""
    model = build(FAMILIES["llama"]())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapped = adapters.attach(model, r=3, alpha=6, targets=["all-linear"], seed=0)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.2)
    memorised = adapters.extract(wrapped)
    model = wrapped.unload()
    adapters.merge(model, memorised)
    extrapolate(model.requires_grad_(), before, 1.5)
    forgets = build(FAMILIES["llama"]())
    adapters.merge(forgets, adapters.extrapolated(memorised, 1.5))
    for (name, p), q in zip(model.named_parameters(), forgets.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-11, msg=name)
    adapters.write(adapters.extrapolated(memorised, 1.5), tmp_path, "base")
    loaded = peft.PeftModel.from_pretrained(build(FAMILIES["llama"]()), tmp_path).double().eval()
    ids = torch.arange(3, 30)[None]
    torch.testing.assert_close(loaded(ids).logits, forgets(ids).logits, rtol=0, atol=1e-11)
    with pytest.raises(PMCError, match="alpha is -1: it must be above 0"):
        adapters.extrapolated(memorised, -1)
    with pytest.raises(PMCError, match="the model has an adapter"):
        extrapolate(loaded, before)


def test_merging_rounds_each_weight_once():
    """Against exact rationals, and the same bits whatever the threads."""
    from fractions import Fraction

    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(3, 2, bias=False)
    a, b = torch.randn(4, 3, generator=generator), torch.randn(2, 4, generator=generator)
    start = layer.weight.detach().clone()
    model = torch.nn.Module()
    model.layer = layer
    adapters.merge(model, adapters.Adapter({"layer": adapters.Factors(a, b, 2.0)}, ["layer"]))
    for i in range(2):
        for j in range(3):
            change = sum(Fraction(b[i, k].item()) * Fraction(a[k, j].item()) for k in range(4))
            exact = Fraction(start[i, j].item()) + 2 * change
            assert layer.weight[i, j].item() == torch.tensor(float(exact), dtype=torch.float32).item()


def test_layers_that_can_not_have_an_adapter_are_refused():
    for family, targets in (("llama", ["lm_head"]), ("llama", ["embed_tokens"]), ("llama", ["no_such"])):
        with pytest.raises(PMCError, match=f"lora_target.*{targets[0]}"):
            adapters.attach(build(FAMILIES[family]()), r=2, alpha=2, targets=targets, seed=0)


def test_hash_is_of_all_weights(tiny):
    first = loading.weights_hash(tiny)
    assert loading.weights_hash(tiny) == first
    with torch.no_grad():
        tiny.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-7
    assert loading.weights_hash(tiny) != first


# --- the stack


def test_two_requests_are_one_adapter_and_one_model(two, tiny_dir, capsys):
    stack = str(two / "stack")
    assert run(["merge", "--stack", stack, "--output", str(two / "model")]) == 0
    made = two / "made.json"
    assert run(["merge", "--stack", stack, "--output", str(two / "adapter"), "--adapter", "--json", str(made)]) == 0
    shown = capsys.readouterr().out
    assert "one adapter of rank 8" in shown
    assert "vLLM needs --max-lora-rank 8" in shown
    written = json.loads((two / "adapter/requests.json").read_text())
    assert json.loads(made.read_text()) == written | {"output": str(two / "adapter")}
    merged = load(two / "model")
    recorded = record_of(two, 2)["model"]["after"]
    assert loading.weights_hash(merged) == recorded
    for contents in ("model", "adapter"):
        about = json.loads((two / contents / "requests.json").read_text())
        assert [r["request"] for r in about["requests"]] == ["0001", "0002"]
        assert about["weights"] == recorded
    transformers.AutoTokenizer.from_pretrained(two / "model")
    one = peft.PeftModel.from_pretrained(load(tiny_dir), two / "adapter").eval()
    base = logits(load(tiny_dir))
    assert not torch.allclose(base, logits(merged), atol=1e-2)
    torch.testing.assert_close(logits(one), logits(merged), rtol=0, atol=1e-5)
    wide = peft.PeftModel.from_pretrained(load(tiny_dir, torch.float64), two / "adapter").double().eval()
    # what is left in float64 is that merged weights were rounded to float32, once a request
    torch.testing.assert_close(logits(wide), logits(load(two / "model", torch.float64)), rtol=0, atol=1e-6)
    assert loading.weights_hash(load(tiny_dir)) == record_of(two, 1)["model"]["before"]


@pytest.fixture(scope="module")
def served(made, tmp_path_factory):
    """The adapters of the stack after one and after two requests, and the logits of the stacks themselves."""
    directory = tmp_path_factory.mktemp("served")
    shutil.copytree(made / "stack", directory / "stack")
    want = {}
    for name in ("0002", "0001"):
        for output, *how in ((name, "--adapter"), (f"{name}.model", "--save-dtype", "float32")):
            assert run(["merge", "--stack", str(directory / "stack"), "--output", str(directory / output), *how]) == 0
        want[name] = logits(load(directory / f"{name}.model"))
        assert run(["rollback", "--stack", str(directory / "stack")]) == 0
    assert not torch.allclose(want["0001"], want["0002"], atol=1e-2)
    return directory, want


def same(model, want):
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-5)


def test_peft_swaps_the_stacks_adapters(served, tiny_dir):
    directory, want = served
    model = peft.PeftModel.from_pretrained(load(tiny_dir), directory / "0001", adapter_name="0001")
    same(model, want["0001"])
    model.load_adapter(directory / "0002", adapter_name="0002")
    same(model, want["0001"])  # until it is switched
    model.set_adapter("0002")
    same(model, want["0002"])
    model.delete_adapter("0001")
    same(model, want["0002"])
    with model.disable_adapter():
        same(model, logits(load(tiny_dir)))


@pytest.mark.skipif(not LOADS_ADAPTERS, reason="this transformers asks for a newer peft")
def test_transformers_swaps_the_stacks_adapters(served, tiny_dir):
    directory, want = served
    model = load(tiny_dir)
    model.load_adapter(str(directory / "0001"), adapter_name="0001")
    same(model, want["0001"])
    model.load_adapter(str(directory / "0002"), adapter_name="0002")
    model.set_adapter("0002")
    same(model, want["0002"])
    model.delete_adapter("0001")
    same(model, want["0002"])
    model.disable_adapters()
    same(model, logits(load(tiny_dir)))
    model.enable_adapters()
    same(model, want["0002"])


def test_a_rank_that_vllm_does_not_take_is_said(two, monkeypatch, capsys):
    for ranks, needed in (((1, 5, 64), 64), ((1, 5), None)):
        monkeypatch.setattr(export, "VLLM_RANKS", ranks)
        output = two / f"for {needed}"
        assert run(["merge", "--stack", str(two / "stack"), "--output", str(output), "--adapter"]) == 0
        shown = capsys.readouterr()
        assert json.loads((output / "requests.json").read_text())["vllm_max_lora_rank"] == needed
        assert ("vLLM needs --max-lora-rank 64" in shown.out) == (needed == 64)
        assert ("rank 8 is above vLLM's largest" in shown.err) == (needed is None)


def test_the_second_request_is_trained_on_the_first(two, tiny_dir):
    first, second = record_of(two, 1), record_of(two, 2)
    assert first["model"]["after"] == second["model"]["before"]
    assert first["metrics"]["after"]["sets"]["retain"] == second["metrics"]["before"]["sets"]["retain"]
    (link,) = second["stack"]["before"]
    assert link["request"] == "0001"
    assert link["weights"] == first["model"]["after"]
    model = load(tiny_dir)
    for number in (1, 2):
        wrapped = peft.PeftModel.from_pretrained(load(tiny_dir), two / f"stack/{number:04d}")  # each alone loads too
        assert any("lora" in n for n, _ in wrapped.named_parameters())
        adapters.merge(model, adapters.read(two / f"stack/{number:04d}"))
    assert loading.weights_hash(model) == second["model"]["after"]


def test_rollback_is_last_in_first_out_and_its_hash_is_equal(two, tiny_dir, capsys):
    stack = str(two / "stack")
    hashes = [record_of(two, 1)["model"]["before"], record_of(two, 1)["model"]["after"]]
    assert run(["rollback", "--stack", stack, "--request", "0001"]) == 2
    assert "request 0001 can't be dropped: 0002 was trained upon it; roll back 0002 first" in error(capsys)
    assert run(["rollback", "--stack", stack, "--request", "0007"]) == 2
    assert "request '0007' is not in stack" in error(capsys)
    for name in ("0002", "0001"):
        made = two / f"{name}.json"
        assert run(["rollback", "--stack", stack, "--request", name, "--json", str(made)]) == 0
        assert json.loads(made.read_text()) == {
            "request": name, "kept": str(two / f"stack/rolled_back/{name}.1"), "weights": hashes[-1]
        }  # fmt: skip
        assert hashes.pop() in capsys.readouterr().out
    assert run(["rollback", "--stack", stack]) == 2
    assert "has no requests" in error(capsys)
    assert sorted(p.name for p in (two / "stack/rolled_back").iterdir()) == ["0001.1", "0002.1"]
    assert (two / "stack/rolled_back/0002.1/record.json").exists()
    assert run(command(two, tiny_dir, 2)) == 0  # the stack begins anew
    assert record_of(two, 1)["stack"]["before"] == []


def test_rollback_to_other_weights_is_refused(two, tiny, tokenizer, capsys):
    with torch.no_grad():
        tiny.model.norm.weight[0] += 1
    tiny.save_pretrained(two / "other")
    tokenizer.save_pretrained(two / "other")
    for words in (
        ["rollback"], ["merge", "--output", str(two / "out")], ["verify", "--requests", str(two / "forget1.jsonl")]
    ):  # fmt: skip
        assert run([words[0], "--stack", str(two / "stack"), "--model", str(two / "other"), *words[1:]]) == 2
        assert "is of another model" in error(capsys)
    assert run(command(two, two / "other", 3)) == 2
    assert "is of another model" in error(capsys)
    assert sorted(p.name for p in (two / "stack").iterdir()) == ["0001", "0002"]


def test_missing_changed_and_foreign_requests_are_named(two, tiny_dir, tmp_path, capsys):
    def state(name, change, message):
        copy = tmp_path / name
        shutil.copytree(two / "stack", copy)
        change(copy)
        for words in (["merge", "--output", str(tmp_path / "out")], ["rollback"], ["verify"]):
            assert run([words[0], "--stack", str(copy), *words[1:]]) == 2
            assert message in error(capsys)
        assert run([*replaced(command(two, tiny_dir, 3), stack=copy)]) == 2
        assert message in error(capsys)

    def flip(file):
        def change(copy):
            content = bytearray((copy / file).read_bytes())
            content[-1] ^= 1
            (copy / file).write_bytes(content)

        return change

    def swap(copy):
        (copy / "0001").rename(copy / "x")
        (copy / "0002").rename(copy / "0001")
        (copy / "x").rename(copy / "0002")

    def edit(copy):
        content = (copy / "0001/record.json").read_text()
        (copy / "0001/record.json").write_text(content.replace('"steps"', '"Steps"'))

    state("dropped", lambda copy: shutil.rmtree(copy / "0001"), "request 0001 is missing but 0002 was trained upon")
    state("damaged", flip("0001/adapter_model.safetensors"), "0001 is damaged: adapter_model.safetensors is not")
    state("unrecorded", lambda copy: (copy / "0002/record.json").unlink(), "0002 has no sound record.json")
    state("torn", lambda copy: (copy / "0002/record.json").write_text("{"), "0002 has no sound record.json")
    state("swapped", swap, "0001 was made upon other requests")
    state("edited", edit, "0002 was made upon other requests")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    assert run(replaced(command(two, tiny_dir, 3), stack=tmp_path / "mine")) == 2
    assert "holds other things" in error(capsys)
    assert not (tmp_path / "out").exists()


def test_what_a_kill_leaves_is_ignored_and_cleared(two, tiny_dir):
    for name in (".0003.4711", "rolled_back"):
        (two / "stack" / name).mkdir()
    (two / "stack/.0003.4711/adapter_model.safetensors").write_text("half")
    assert [r.name for r in Stack(two / "stack").requests] == ["0001", "0002"]
    assert run(command(two, tiny_dir, 3)) == 0
    assert sorted(p.name for p in (two / "stack").iterdir()) == ["0001", "0002", "0003", "rolled_back"]


@pytest.mark.parametrize("moment", ["adapters.write", "record.record_of", "sync"])
def test_a_cut_while_writing_leaves_the_old_stack(two, tiny_dir, monkeypatch, moment):
    """KeyboardInterrupt cleans up; a kill at the same place leaves an aside directory, which the test before has."""

    def cut(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"pmc_fast.erasure.unlearn.{moment}", cut)
    assert run(command(two, tiny_dir, 3)) == 130
    done = moment == "sync"  # after the rename: the request is whole
    assert [r.name for r in Stack(two / "stack").requests] == ["0001", "0002", *(["0003"] if done else [])]
    assert [p.name for p in (two / "stack").iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("stage", "words"),
    [("saving", None), ("unlearning", None), ("loading", ["rollback"]), ("", ["merge", "--output", "copy"])],
)
def test_sigkill_leaves_the_old_or_the_new_stack(two, tiny_dir, stage, words):
    """Killed as a stage begins; nothing is torn, and the next run goes through."""
    words = [words[0], "--stack", str(two / "stack"), *words[1:]] if words else command(two, tiny_dir, 3)
    child = subprocess.Popen(
        [sys.executable, "-m", "pmc_fast", *words], cwd=two, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    for line in child.stderr:
        if stage in line.lower():
            break
    child.kill()
    child.communicate()
    names = [r.name for r in Stack(two / "stack").requests]
    assert names in (["0001"], ["0001", "0002"], ["0001", "0002", "0003"])
    if (two / "copy").exists():
        assert loading.weights_hash(load(two / "copy")) == record_of(two, 2)["model"]["after"]
    assert run(command(two, tiny_dir, 3)) == 0
    assert len(Stack(two / "stack").requests) == len(names) + 1
    assert [p.name for p in (two / "stack").iterdir() if p.name.startswith(".")] == []


def test_one_run_at_a_time(two, tiny_dir, capsys):
    handle = os.open(two / "stack", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    for words in (command(two, tiny_dir, 3), ["rollback", "--stack", str(two / "stack")]):
        assert run(words) == 2
        assert "is in use by another process" in error(capsys)
    os.close(handle)
    with pytest.raises(PMCError, match="can't be used"), locked(two / "forget1.jsonl"):
        pass
    with locked(two / "new"):
        assert (two / "new").is_dir()
    assert not (two / "new").exists()


def test_a_killed_request_goes_on_from_its_checkpoint(data, tiny_dir, monkeypatch, capsys):
    """The same adapter, bit for bit, as a run that was not cut; never upon another state of the stack."""
    words = [*replaced(command(data, tiny_dir, 1), epochs=2), "--checkpoint-steps", "1", "--no-evaluate"]
    assert run(replaced(words, stack=data / "whole")) == 0
    cut_short(words, monkeypatch)
    (kept,) = (n for n in left_behind(data) if n != "whole")
    assert kept.startswith("stack.checkpoints.")
    assert stat.S_IMODE((data / kept / "checkpoint-2/pmc_state.json").stat().st_mode) == 0o600
    shutil.copytree(data / kept / "checkpoint-2", data / "elsewhere/checkpoint-2")
    assert run([*words, "--resume", str(data / "elsewhere/checkpoint-2")]) == 2
    assert "is not of this state of the stack" in error(capsys)
    shutil.rmtree(data / "elsewhere")
    assert run([*words, "--resume", "auto"]) == 0
    assert "from checkpoint-2 on" in capsys.readouterr().err
    assert left_behind(data) == ["stack", "whole"]
    ours, whole = (adapters.read(data / name / "0001") for name in ("stack", "whole"))
    assert all(
        torch.equal(getattr(f, x), getattr(whole.factors[n], x)) for n, f in ours.factors.items() for x in "ab"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"stack": None}, "stack is '': it must be the directory"),
        ({"output": "out"}, "output is 'out': it must be left out with lora"),
        ({"param_dtype": "bfloat16", "dtype": "float32"}, "param_dtype is 'bfloat16': it must be float32, or dtype"),
        ({"lora_r": 0}, "lora_r is 0"),
        ({"lora_target": "no_proj"}, "lora_target is no_proj"),
        ({"lora_target": "lm_head"}, "lora_target lm_head"),
        ({"stack": "forget1.jsonl"}, "stack"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(data, tiny_dir, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(data)
    assert run(replaced(command(data, tiny_dir, 1), **flags)) == 2
    assert message in error(capsys)
    assert left_behind(data) == []
    assert run([w for w in command(data, tiny_dir, 1) if w != "--lora"]) == 2
    assert "it must be left out, or lora given" in error(capsys)


def test_without_peft_one_line_says_so(data, tiny_dir, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    assert run(command(data, tiny_dir, 1)) == 2
    assert "adapters need peft: pip install 'pmc_fast[lora]'" in error(capsys)
    assert left_behind(data) == []


def test_dry_run_writes_nothing(data, tiny_dir, capsys):
    assert run([*command(data, tiny_dir, 1), "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert left_behind(data) == []


# --- a base in bfloat16


@pytest.fixture(scope="module")
def low(tmp_path_factory, tiny_dir):
    """A stack of two requests on frozen bfloat16 weights; the second one's dtype is the first one's."""
    directory = tmp_path_factory.mktemp("low")
    data.__wrapped__(directory)
    assert run(command(directory, tiny_dir, 1, "--param-dtype", "bfloat16")) == 0
    assert run(command(directory, tiny_dir, 2, "--lora-target", "q_proj")) == 0
    return directory


def test_a_bfloat16_base_has_float32_adapters_and_exact_weights(low, made, tmp_path):
    records = [record_of(low, n) for n in (1, 2)]
    assert [r["settings"]["param_dtype"] for r in records] == ["bfloat16"] * 2
    assert records[0]["model"]["before"] == record_of(made, 1)["model"]["before"]  # whatever computes
    assert records[1]["model"]["before"] == records[0]["model"]["after"]
    for n in (1, 2):
        factors = adapters.read(low / "stack" / f"{n:04d}").factors.values()
        assert all(f.a.dtype == f.b.dtype == torch.float32 and f.b.any() for f in factors)
        assert not all(torch.equal(f.b, f.b.bfloat16().float()) for f in factors)
    assert (
        run(["merge", "--stack", str(low / "stack"), "--output", str(tmp_path / "m"), "--save-dtype", "float32"]) == 0
    )
    contents = json.loads((tmp_path / "m/requests.json").read_text())
    assert contents["saved"] == contents["weights"] == records[1]["model"]["after"]


def test_verification_computes_as_the_request_did(low, capsys):
    """The same scores of the same weights in the same dtype."""
    forget = [str(low / f"forget{n}.jsonl") for n in (1, 2)]
    found = verify(VerifyConfig(stack=str(low / "stack"), requests=forget, device="cpu", slack=100.0))
    last = found["requests"]["0002"]
    assert last["unlearn_quality"] == pytest.approx(last["recorded_unlearn_quality"], abs=1e-9)
    assert found["keep"]["utility"] == pytest.approx(found["keep"]["recorded_utility"], abs=1e-9)
    assert found["weights"] == record_of(low, 2)["model"]["after"]


def test_a_stack_has_one_dtype(low, two, tiny_dir, capsys):
    for directory, other, theirs in ((low, "float32", "bfloat16"), (two, "bfloat16", "float32")):
        assert run(command(directory, tiny_dir, 3, "--param-dtype", other)) == 2
        assert f"param_dtype is '{other}' but the requests in {directory}/stack were made with {theirs}" in error(
            capsys
        )
    assert run(command(low, tiny_dir, 3, "--dtype", "float32")) == 2
    told = f"dtype is 'float32' but the requests in {low}/stack were made with bfloat16 parameters"
    assert error(capsys).startswith(f"pmc-fast: error: {told}")


def test_what_a_request_on_a_bfloat16_base_computes_with(data, tiny_dir, monkeypatch):
    """bfloat16 products of weights that are the exact ones rounded; adapters and their gradients in float32."""
    seen = []

    def train(self, **how):
        seen.append(({n: p.detach().clone() for n, p in self.model.named_parameters()}, self.pmc.autocast_dtype))
        out = training(self, **how)
        seen.append({n: (p.dtype, p.requires_grad) for n, p in self.model.named_parameters()})
        return out

    training = PMCTrainer.train
    monkeypatch.setattr(PMCTrainer, "train", train)
    assert run(command(data, tiny_dir, 1, "--param-dtype", "bfloat16", "--no-evaluate")) == 0
    (start, autocast), end = seen
    assert autocast == torch.bfloat16
    base = dict(load(tiny_dir).named_parameters())
    frozen = {n: p for n, p in start.items() if "lora_" not in n}
    assert len(frozen) == len(base)
    for name, p in frozen.items():
        own = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(p, base[own].bfloat16())
    assert {d for n, d in end.items() if "lora_" in n} == {(torch.float32, True)}
    assert {d for n, d in end.items() if "lora_" not in n} == {(torch.bfloat16, False)}


# --- records


def test_a_record_says_what_was_done_and_no_text(two, tiny, tokenizer):
    record = record_of(two, 2)
    assert record["claim"].startswith("output-level evidence")
    assert "clean" not in record["claim"]
    assert {"before", "after"} <= set(record["metrics"])
    assert record["data"]["forget"]["rows"] == 3
    assert record["data"]["forget"]["sha256"] == rows_hash(load_rows(two / "forget2.jsonl"), record["data"]["salt"])
    assert {"retain", "facts", "forget"} <= set(record["data"])
    assert record["seeds"] == {"seed": 0}
    assert record["adapter"]["r"] == 5
    assert record["adapter"]["targets"] == ["q_proj"]
    assert {"stacking", "unlearning", "merging", "evaluation after"} <= set(record["stage_seconds"])
    assert record["versions"]["torch"]
    assert len(record["code"]["sha256"]) == 64
    assert record["stopped"] is None
    assert record["steps"] == 2
    for when in ("before", "after"):
        assert 0 <= record["metrics"][when]["unlearn_quality"] <= 100
    directory = two / "stack/0002"
    names = {p.name for p in directory.iterdir()}
    assert names == {
        "adapter_model.safetensors", "adapter_config.json", "record.json", "report.json", "report.html", "README.md",
        "trace.json.gz", "rows.jsonl",
    }  # fmt: skip


def texts_of(directory):
    import gzip

    return {
        p.name: (gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes())
        for p in directory.rglob("*")
        if p.is_file()
    }


@pytest.mark.parametrize("private", [False, True])
def test_no_text_of_the_request_is_in_its_directory(data, tiny_dir, private):
    assert run([*command(data, tiny_dir, 1, "--profile"), *(["--keep-private"] if private else [])]) == 0
    rows = load_rows(data / "forget1.jsonl")
    secrets = [SECRETS[0], *(t for row in rows for t in (row.question, row.answer))]
    found = {
        name for name, content in texts_of(data / "stack").items() for text in secrets if text.encode() in content
    }
    assert found == ({"private.jsonl"} if private else set())
    if private:
        file = data / "stack/0001/private.jsonl"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert [json.loads(line)["answer"] for line in file.read_text().splitlines()] == [r.answer for r in rows]


def test_log_text_stays_out_of_the_record(data, tiny_dir):
    assert run(command(data, tiny_dir, 1, "--log-text")) == 0
    found = {name for name, content in texts_of(data / "stack").items() if SECRETS[0].encode() in content}
    assert found == {"report.json", "report.html", "rows.jsonl"}


# --- verification


def test_earlier_requests_are_asked_again(two, capsys):
    words = ["verify", "--stack", str(two / "stack"), "--requests"]
    files = [str(two / "forget2.jsonl"), str(two / "forget1.jsonl")]
    assert run([*words, *files, "--json", str(two / "verified.json"), "--attack-samples", "3"]) == 0
    shown = capsys.readouterr()
    made = json.loads((two / "verified.json").read_text())
    assert set(made["requests"]) == {"0001", "0002"}
    assert made["not_verified"] == []
    assert made["weights"] == record_of(two, 2)["model"]["after"]
    last = made["requests"]["0002"]
    # the same weights are asked the same questions
    assert last["unlearn_quality"] == pytest.approx(record_of(two, 2)["metrics"]["after"]["unlearn_quality"])
    assert last["bound"] == pytest.approx(last["recorded_unlearn_quality"] - 5)
    assert made["keep"]["utility"] == pytest.approx(record_of(two, 2)["metrics"]["after"]["utility"])
    assert last["sampling"]["samples"] == 3
    everything = shown.out + shown.err + (two / "verified.json").read_text()
    assert not any(s in everything for s in SECRETS)
    assert run([*words, files[0]]) == 0
    shown = capsys.readouterr()
    assert "not kept: request 0001" in shown.err
    assert "0001: not verified" in shown.out


def test_missed_gates_are_exit_3(two, capsys, monkeypatch):
    words = ["verify", "--stack", str(two / "stack"), str(two / "forget1.jsonl"), str(two / "forget2.jsonl")]
    assert run([*words, "--min-utility", "100"]) == 3
    assert "gate missed: utility is" in capsys.readouterr().err
    file = two / "stack/0002/record.json"
    record = json.loads(file.read_text())
    record["metrics"]["after"]["sets"]["forget"]["rouge_l_recall"] = -0.5  # better than can be
    record["gates"]["min_utility"] = 0
    file.write_text(json.dumps(record))
    assert run(words) == 3
    shown = capsys.readouterr().err
    assert "gate missed: request 0002: unlearn quality is" in shown
    assert "0001" not in shown.splitlines()[-1]
    attack = [*words, "--attack-samples", "4", "--slack", "100", "--max-leak", "0"]
    found = {"sets": {"forget": {"sampling": {"leaking_questions": 0.25}}}}
    monkeypatch.setattr("pmc_fast.jobs.evaluator.Evaluator.leakage", lambda self, suite: found)
    assert run(attack) == 3
    assert "request 0001: 0.25 of its questions leak in 4 samples, above 0" in capsys.readouterr().err
    assert run([*attack[:-1], "0.25"]) == 0


def test_files_that_are_not_the_requests_are_refused_by_name(two, capsys):
    lines = (two / "forget1.jsonl").read_text()
    (two / "changed.jsonl").write_text(lines.replace("heron", "egret"))
    (two / "shorter.jsonl").write_text(lines.splitlines()[0])
    for name in ("changed", "shorter", "retain"):
        assert run(["verify", "--stack", str(two / "stack"), "--requests", str(two / f"{name}.jsonl")]) == 2
        shown = error(capsys)
        assert f"{name}.jsonl is that of no request" in shown
        assert "heron" not in shown
    assert run(["verify", "--stack", str(two / "stack")]) == 2
    assert "requests is not given" in error(capsys)
    rows = [json.loads(line) for line in lines.splitlines()]
    (two / "again.json").write_text(json.dumps(rows, indent=1))  # the same rows in another format
    assert run(["verify", "--stack", str(two / "stack"), str(two / "again.json")]) == 0
    capsys.readouterr()
    (two / "retain.jsonl").write_text('{"question": "Is 1 even?", "answer": "no"}\n')
    words = ["verify", "--stack", str(two / "stack"), str(two / "forget1.jsonl")]
    assert run([*words, "--retain", str(two / "retain.jsonl")]) == 2
    assert "retain data differ from those of request 0002" in error(capsys)


def test_an_error_names_the_record_whose_path_is_not_here(data, tiny_dir, capsys, monkeypatch):
    """Records hold paths as they were typed, and verify may be called from elsewhere."""
    monkeypatch.chdir(data)
    words = replaced(command(data, os.path.relpath(tiny_dir), 1), retain="retain.jsonl", general="facts.jsonl")
    assert run(words) == 0
    (data / "elsewhere").mkdir()
    monkeypatch.chdir(data / "elsewhere")
    words = ["verify", "--stack", "../stack", "../forget1.jsonl"]
    assert run(words) == 2
    shown = error(capsys)
    assert "retain.jsonl does not exist" in shown
    assert "what request 0001's record says, 'retain.jsonl'" in shown
    assert "with --retain" in shown
    words += ["--retain", "../retain.jsonl"]
    assert run(words) == 2
    assert "'facts.jsonl', typed in" in (shown := error(capsys))
    assert "with --general" in shown
    words += ["--general", "../facts.jsonl"]
    for start in (words, ["merge", "--stack", "../stack", "--output", "served"], ["rollback", "--stack", "../stack"]):
        assert run(start) == 2
        assert "where it is now with --model" in error(capsys)
    assert run([*words, "--model", str(tiny_dir)]) == 0


def test_private_files_are_found_and_checked(data, tiny_dir, capsys):
    rows = [json.loads(line) for line in (data / "forget1.jsonl").read_text().splitlines()]
    # without answers the truth is what the model said before the request
    (data / "forget1.jsonl").write_text("".join(json.dumps({"question": r["question"]}) + "\n" for r in rows))
    assert run(command(data, tiny_dir, 1, "--keep-private")) == 0
    assert run(command(data, tiny_dir, 2, "--paraphrased", str(data / "forget2.jsonl"), "--keep-private")) == 0
    capsys.readouterr()
    (data / "forget1.jsonl").unlink()
    (data / "forget2.jsonl").unlink()
    assert run(["verify", "--stack", str(data / "stack"), "--json", str(data / "v.json"), "--slack", "100"]) == 0
    made = json.loads((data / "v.json").read_text())
    assert set(made["requests"]["0002"]["sets"]) == {"forget", "forget_paraphrased"}
    assert made["requests"]["0002"]["recorded_unlearn_quality"] == pytest.approx(
        record_of(data, 2)["metrics"]["after"]["unlearn_quality"]
    )
    assert record_of(data, 1)["truth_of_forget"] == "initial answers"
    file = data / "stack/0001/private.jsonl"
    file.write_text(file.read_text().replace("fact 1", "fact 7"))
    assert run(["verify", "--stack", str(data / "stack")]) == 2
    assert "0001/private.jsonl was changed" in error(capsys)


def test_an_interrupted_sum_is_not_what_was_recorded(two, monkeypatch):
    """The hash after stacking is computed and not copied: leaving an adapter out is found."""
    stack, model = Stack(two / "stack"), load(record_of(two, 1)["model"]["source"])
    merge = adapters.merge
    skipped = iter([False, True])
    monkeypatch.setattr(adapters, "merge", lambda *a: None if next(skipped) else merge(*a))
    with pytest.raises(PMCError, match="its record says"):
        stack.apply(model)


def test_unlearn_request_returns_where_it_wrote(two, tiny_dir):
    config = RequestConfig.merge(
        "small",
        {"lora": True, "model": str(tiny_dir), "stack": str(two / "stack"), "forget": str(two / "forget1.jsonl"),
         "retain": str(two / "retain.jsonl"), "num_epochs": 1.0, "num_samples": 2, "max_length": 40,
         "evaluate": False, "device": "cpu", "allow_relearn": True},
    )  # fmt: skip
    assert unlearn.unlearn_request(config)["request"].endswith("stack/0003")
    assert "after" not in record_of(two, 3)["metrics"]


def test_leaks_are_recorded_and_what_is_known_to_be_forgotten_is_no_request(data, tiny_dir, capsys):
    assert run(command(data, tiny_dir, 1, "--skip-known-forgotten")) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert left_behind(data) == []
    words = command(data, tiny_dir, 1, "--attack-samples", "3", "--skip-known-forgotten")
    (data / "forget1.jsonl").write_text(  # one that the model says a word of, whatever it says
        (data / "forget1.jsonl").read_text() + json.dumps({"question": "What is 1?", "answer": said(tiny_dir)}) + "\n"
    )
    assert run(words) == 0
    record = record_of(data, 1)
    assert record["known_forgotten"]["rows"] == [1, 2, 3]
    assert record["data"]["forget"]["rows"] == 4
    assert {"sampling", "prefill"} <= set(record["metrics"]["after"]["leakage"]["sets"]["forget"])
    assert not any(SECRETS[0].encode() in content for content in texts_of(data / "stack").values())


def said(tiny_dir):
    """Return what the model says to 'What is 1?', and all else it may say in two samples."""
    from pmc_fast.data import Encoder
    from pmc_fast.rollout import RolloutEngine

    encoder = Encoder(transformers.AutoTokenizer.from_pretrained(tiny_dir), UnlearnConfig.merge("small"), None)
    prompt = encoder.prompt("What is 1?")
    made = RolloutEngine(load(tiny_dir))(
        [prompt], num_samples=20, temperature=1.25, top_p=0.95, max_length=40, stop_ids=encoder.stops
    )
    return " ".join(encoder.answers(made.tokens[0]))
