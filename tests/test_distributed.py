"""Several processes are one: the same gradients, the same store (gloo on the CPU; DDP and FSDP2)."""

import pytest
import torch

from pmc_fast import PMC, PMCConfig
from pmc_fast.errors import PMCError
from pmc_fast.models.fsdp import is_sharded
from tests.processes import start
from tests.ranks_worker import run
from tests.trainer_worker import evaluation, result, trainer_of

CASES = ["ddp", "ddp-before", "ddp-lora", "ddp-groups", "ddp-kl", "ddp-cut", "fsdp", "fsdp-cut", "fsdp-untied", "fsdp-before", "fsdp-lora",
         "fsdp-checkpointing"]  # fmt: skip
REFUSED = {
    "ddp-differ": "the PMC settings of process 1 are not those of process 0",
    "fsdp-kl": "retain_loss is 'kl' and the model is sharded",
    "fsdp-before-kl": "retain_loss is 'kl' and the model is sharded",
}


@pytest.fixture(scope="module")
def two(pytestconfig, tiny_dir, tmp_path_factory):
    """What two processes made of every case."""
    out = tmp_path_factory.mktemp("ranks") / "out.pt"
    done = start(pytestconfig, "tests/ranks_worker.py", tiny_dir, out, *CASES, *REFUSED)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def one(tiny_dir):
    """What one process makes of a case, with other parts."""
    return {kind: run(str(tiny_dir), kind, 3) for kind in ("", "untied", "lora", "groups", "kl", "cut")}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(one, two, case):
    ours, theirs = two[case], one[case.split("-")[-1] if case.split("-")[-1] in one else ""]
    states = [made["state"] | {"untouched_logps": None} for made in (ours, theirs)]  # equal up to rounding
    assert states[0] == states[1]
    assert (ours["state"]["untouched_logps"] is None) == (case != "ddp-kl")
    for made, expected in zip(ours["gradients"], theirs["gradients"], strict=True):
        assert made.keys() == expected.keys()
        for name, g in expected.items():
            assert (made[name] - g).norm() <= 1e-5 * g.norm(), name
    for name in ("sampled_tokens", "cut_samples"):
        assert [c.get(name, 0) for c in ours["counters"]] == [c.get(name, 0) for c in theirs["counters"]]
    if case.endswith("cut"):  # which changes what is sampled
        plain = [c["sampled_tokens"] for c in one[""]["counters"]]
        assert [c["sampled_tokens"] for c in ours["counters"]] != plain
        # the initial answers, a rollout a step, and where all samples of a question were cut, on any process, another one
        assert ours["rollouts"] == theirs["rollouts"] > one[""]["rollouts"]


@pytest.mark.parametrize("normalization", ["step", "micro_batch"])
def test_the_trainer_on_two_processes(pytestconfig, tiny_dir, tmp_path, normalization):
    """Two micro-batches a step on each, in packs of both, of which one process may have more."""
    how = ("--batch", "1", "--accumulation", "2", "--normalization", normalization)
    done = start(pytestconfig, "tests/trainer_worker.py", tiny_dir, tmp_path, *how)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = torch.load(tmp_path / "result.pt", weights_only=False)
    alone = trainer_of(tiny_dir, tmp_path, 1, 4, normalization)  # the groups that all processes had
    alone.train()
    same(ours, result(alone))
    assert ours["evaluated"] == pytest.approx(evaluation(alone), rel=1e-6)


@pytest.mark.parametrize("case", REFUSED)
def test_what_several_processes_can_not_do_is_refused(two, case):
    assert REFUSED[case] in two[case]


def same(ours, theirs):
    assert ours["state"] == theirs["state"]
    for name, p in theirs["parameters"].items():
        assert torch.allclose(ours["parameters"][name], p, rtol=1e-9, atol=1e-12), name
    for made, expected in zip(ours["logs"], theirs["logs"], strict=True):
        assert made == pytest.approx(expected, rel=1e-6)


def test_a_killed_process_ends_the_run_and_one_goes_on(pytestconfig, tiny_dir, tmp_path):
    run_to = tmp_path / "run"
    arguments = ("tests/trainer_worker.py", tiny_dir, run_to, "--save", "1", "--kill", "3")
    # a launcher that looks often may end the other process before that has noticed and said so
    done = start(pytestconfig, *arguments, timeout=120, monitor_interval=5)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "another process of this run is gone" in line]
    assert told
    assert "checkpoint-3 is sound" in told[-1]
    ours = trainer_of(tiny_dir, run_to, 4, save=1)
    ours.train(resume_from_checkpoint="auto")
    whole = trainer_of(tiny_dir, tmp_path / "whole", 4)
    whole.train()
    same({**result(ours), "logs": []}, {**result(whole), "logs": []})


def test_processes_that_do_not_know_each_other_are_refused(tiny, tokenizer, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PMCError, match="WORLD_SIZE is 2"):
        PMC(tiny, tokenizer, PMCConfig(prompt_format="tags"), ["Who?"]).prepare()


@pytest.mark.parametrize("name", ["FSDP1", "ZeRO-3"])
def test_other_sharding_is_refused_by_name(tiny, tokenizer, monkeypatch, name):
    from torch.distributed.fsdp import FullyShardedDataParallel

    if name == "FSDP1":
        tiny.model.layers[0] = wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
        torch.nn.Module.__init__(wrapper)
    else:
        next(tiny.parameters()).ds_id = 0
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(PMCError, match=f"sharded by .*{name}"):
        is_sharded(tiny)
