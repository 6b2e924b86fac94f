"""The examples run, and what a plain loop must change to become PMC is as little as the README says."""

import difflib
import json

import pytest
import torch
import transformers

from examples import plain_after, plain_before


@pytest.fixture
def files(tmp_path):
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    forget = [{"question": f"What is fact {i}?", "answer": f"It is {i}."} for i in range(5)]
    return write("forget.jsonl", forget), write("retain.jsonl", [{"question": "Is 4 even?", "answer": "It is."}])


@pytest.mark.parametrize("example", [plain_before, plain_after], ids=["before", "after"])
def test_plain_loops_run(example, files, tiny, tiny_dir, tmp_path):
    example.main(str(tiny_dir), *files, str(tmp_path / "out"), epochs=1)
    changed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert all(not torch.equal(a, b) for a, b in zip(tiny.parameters(), changed.parameters(), strict=True))


def test_pmc_in_a_plain_loop_is_at_most_five_lines(pytestconfig):
    before, after = (
        [
            line
            for line in (pytestconfig.rootpath / f"examples/{name}.py").read_text().split('"""', 2)[2].splitlines()
            if not line.startswith(("import ", "from "))
        ]
        for name in ("plain_before", "plain_after")
    )
    changes = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    added = [line for line in changes if line.startswith("+")]
    removed = [line for line in changes if line.startswith("-")]
    assert 0 < max(len(added), len(removed)) <= 5
