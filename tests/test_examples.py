"""The examples run, and what a loop or script must change to become PMC is as little as the documents say."""

import difflib
import json

import pytest
import torch
import transformers

from examples import (
    accelerate_after,
    accelerate_before,
    plain_after,
    plain_before,
    trainer_after,
    trainer_before,
    trl_after,
    trl_before,
)
from tests.processes import start


@pytest.fixture
def files(tmp_path):
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    forget = [{"question": f"What is fact {i}?", "answer": f"It is {i}."} for i in range(5)]
    return write("forget.jsonl", forget), write("retain.jsonl", [{"question": "Is 4 even?", "answer": "It is."}])


LOOPS = {
    "plain": (plain_before, plain_after),
    "accelerate": (accelerate_before, accelerate_after),
    "trainer": (trainer_before, trainer_after),
}


def moved(tiny, path):
    changed = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return all(not torch.equal(a, b) for a, b in zip(tiny.parameters(), changed.parameters(), strict=True))


@pytest.mark.parametrize("example", [e for of in LOOPS.values() for e in of], ids=lambda e: e.__name__)
def test_examples_run(example, files, tiny, tiny_dir, tmp_path):
    example.main(str(tiny_dir), *files, str(tmp_path / "out"), epochs=1)
    assert moved(tiny, tmp_path / "out")


def test_accelerate_with_two_processes(pytestconfig, files, tiny, tiny_dir, tmp_path):
    done = start(pytestconfig, "-m", "examples.accelerate_after", tiny_dir, *files, tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch 5: loss") == 1
    assert moved(tiny, tmp_path / "out")


@pytest.mark.parametrize("example", [trl_before, trl_after], ids=["before", "after"])
def test_trl_scripts_run(example, tiny, tiny_dir, tmp_path, pytestconfig):
    """On the demo's data, shortened. TRL's own defaults on the CPU would be bfloat16."""
    words = (
        f"--model_name_or_path {tiny_dir} --output_dir {tmp_path} --use_cpu --bf16 false --max_steps 2 "
        "--per_device_train_batch_size 2 --max_length 100 --disable_tqdm true --learning_rate 1e-3 --logging_steps 1"
    ).split()
    tofu = pytestconfig.rootpath / "examples/tofu"
    words += ["--retain", str(tofu / "retain60.jsonl")]
    if example is trl_after:
        words += ["--forget", str(tofu / "forget20.jsonl"), "--num_samples", "2", "--prompt_format", "tags"]
    example.main(words)
    assert moved(tiny, tmp_path)


def test_trl_scripts_flags_are_honoured_or_refused(tiny_dir, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(trl_after, "PMCTrainer", lambda **what: given.append(what) or 1 / 0)
    words = f"--model_name_or_path {tiny_dir} --output_dir {tmp_path} --use_cpu".split()
    with pytest.raises(ZeroDivisionError):
        trl_after.main([*words, "--attn_implementation", "eager", "--model_init_kwargs", '{"revision": "v2"}'])
    options = {"dtype": "float32", "revision": "v2", "attn_implementation": "eager"}
    assert given[0]["args"].model_init_kwargs == options
    for flag in ("--load_in_4bit", "--load_in_8bit"):
        with pytest.raises(SystemExit, match="leave --load_in_4bit and --load_in_8bit out"):
            trl_after.main([*words, flag])
    for flag in ("--dataset_name", "--dataset_config", "--dataset_train_split", "--dataset_streaming"):
        with pytest.raises(ValueError, match=f"arguments are not used by .*{flag}"):
            trl_after.main([*words, flag, "locuslab/TOFU"])


@pytest.mark.parametrize("name", [*LOOPS, "trl"])
def test_what_changes_is_at_most_five_lines(pytestconfig, name):
    before, after = (
        [
            line
            for line in (pytestconfig.rootpath / f"examples/{name}_{when}.py")
            .read_text()
            .split('"""', 2)[2]
            .splitlines()
            if line and not line.startswith(("import ", "from "))
        ]
        for when in ("before", "after")
    )
    changes = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    added = [line for line in changes if line.startswith("+")]
    removed = [line for line in changes if line.startswith("-")]
    assert 0 < max(len(added), len(removed)) <= 5
