"""What the host asks of the device in a decode step: launches, copies and waits, counted on the recorder for the CPU.

docs/kernels.md has the table; `python -m pytest -s tests/rollout/test_launches.py` prints it.
"""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pmc_fast.rollout import drawn, engine, logits_processors
from tests.families import FAMILIES, HOW, PROMPTS, build
from tests.rollout.test_rollout_graphs import Tape, taped

# operations that launch nothing
VIEWS = {
    "view",
    "slice",
    "split_with_sizes",
    "split",
    "select",
    "detach",
    "alias",
    "t",
    "empty",
    "empty_like",
    "unbind",
}
EXPECTED = {
    "draws launched apart": {"graph": 1, "sampler": 2, "launch": 2, "upload": 1, "download": 1, "idle wait": 1},
    "draws in the graph": {"graph": 1, "upload": 1, "download": 1, "idle wait": 1},
    "and one step ahead": {"graph": 1, "launch": 2, "upload": 1, "download": 1, "wait": 1},
}
SETTINGS = {
    "draws launched apart": {"graph_draws": False},
    "draws in the graph": {"run_ahead": False},
    "and one step ahead": {},
}


class Count(TorchDispatchMode):
    """Counts operations outside of replays, and the steps that the host has asked for and not waited for."""

    def __init__(self):
        super().__init__()
        self.counts, self.replaying, self.asked = Counter(), False, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        if not self.replaying and name not in VIEWS:
            bytes_ = name == "copy_" and args[0].dtype == torch.uint8
            self.counts["upload" if bytes_ else "download" if name == "copy_" else "launch"] += 1
        return func(*args, **(kwargs or {}))

    def waited(self):
        self.asked -= 1
        self.counts["wait" if self.asked else "idle wait"] += 1  # idle: the device has nothing left to do


def counted(count):
    class Counted(Tape):
        def record(self, *parts):
            def replayed(replay):
                count.counts["graph"] += 1
                count.replaying = True
                replay()
                count.replaying = False

            made = super().record(*parts)
            return [lambda replay=replay: replayed(replay) for replay in made]

    return Counted


@pytest.mark.parametrize("mode", EXPECTED)
def test_a_decode_step_asks_the_device_for(mode, monkeypatch):
    count, steps = Count(), []
    rolled = taped(build(FAMILIES["llama"]()), counted(count), **SETTINGS[mode])
    how = HOW | {
        "ngram_drafts": False,
        "stop_ids": [],
        "temperature": 1.5,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": 16,
    }
    for _ in range(2):
        rolled(PROMPTS, **how)

    def noting(ask):
        def run(step, *more):
            steps.append((step.bucket, count.counts.copy()))
            count.asked += 1
            return ask(step, *more)

        return run

    for name in ("draw", "logits"):
        monkeypatch.setattr(rolled._step, name, noting(getattr(rolled._step, name)))
    read, to_host, sample = drawn.Pending.read, engine._to_host, logits_processors.sample_nucleus

    def reading(pending):
        count.waited()
        return read(pending)

    def fetching(found):
        made = to_host(found)  # concatenates
        count.counts["download"] += 1  # which is no operation where the device is the host
        count.waited()
        return made

    def sampling(*args, **kwargs):
        count.counts["sampler"] += 2  # kernels
        count.replaying = True
        made = sample(*args, **kwargs)
        count.replaying = False
        return made

    monkeypatch.setattr(drawn.Pending, "read", reading)
    monkeypatch.setattr(engine, "_to_host", fetching)
    monkeypatch.setattr(logits_processors, "sample_nucleus", sampling)
    with count:
        rolled(PROMPTS, **how)
    between = [
        tuple(sorted((after - before).items()))
        for (bucket, before), (_, after) in pairwise(steps)
        if bucket is not None
    ]
    (usual, times), *_ = Counter(between).most_common(1)
    print(f"\n{mode}: {dict(usual)}, {times} of {len(between)} steps")
    assert dict(usual) == EXPECTED[mode]
    assert times > 0.8 * len(between)
