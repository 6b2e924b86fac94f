"""Replayed passes with shared prefixes: the loss, log-probs and gradients of sequences computed apart."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch

from pmc_fast import PMC, PMCConfig
from pmc_fast.cuda_graphs.training import PassGraphs
from pmc_fast.data import Encoded, Row
from pmc_fast.data.packing import pack
from pmc_fast.models.context import tolerance
from pmc_fast.models.packed_forward import PackedPass
from tests.cuda_graphs.test_training import VARLEN, agree, gradients, needs_gpu, on_cpu, replaying  # noqa: F401
from tests.families import FAMILIES, SIZES, build
from tests.tape import Tape


def groups(seed, kind):
    """Sequences of the same lengths in another order: that begin alike, or answers to one question each."""
    g = np.random.default_rng(seed)
    lengths, ids = g.permutation(np.arange(2, 16, 2)), lambda n: g.integers(3, SIZES["vocab_size"], n).tolist()
    system = ids(12)
    single = [Encoded([*system, *(own := ids(n))], [-100] * 13 + own[1:]) for n in lengths]
    if kind == "system":
        return [[s] for s in single]
    several = [Encoded([*system, *(own := ids(n))], [-100] * 12 + own) for n in (3, 5, 1)]
    return [several, *([s] for s in single)]


def weighted(groups, **how):
    made = pack(groups, 10_000, **how)[0]
    g = torch.Generator().manual_seed(len(made.targets))
    return made, torch.randn(len(made.targets), generator=g, dtype=torch.float64)


def measured(model, packed, made, scale):
    model.zero_grad()
    loss, logps = packed(made, scale, model=model)
    loss.backward()
    return loss.item(), logps.tolist(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("family", VARLEN)
def test_a_replay_with_shared_prefixes_is_the_pass_without(family):
    model = build(FAMILIES[family]())
    packed, plain = replaying(model), PackedPass(model)
    bound = 1e-10 if family in ("phi", "gpt2", "gpt_neox") else 1e-5
    for kind in ("system", "answers"):
        for seed in range(3):
            made, apart = groups(seed, kind), [[s] for group in groups(seed, kind) for s in group]
            shared, scale = weighted(made, share_from=8)
            assert shared.segments.shared
            ours = measured(model, packed, shared, scale)
            theirs = measured(model, plain, *weighted(apart))
            agree([ours], [theirs], bound)
    assert packed.graphs.cache.replays == 4
    assert packed.graphs.cache.captures == 2


@pytest.mark.usefixtures("on_cpu")
def test_keys_are_gathered_only_where_they_are_shared():
    operations = []

    class Counted(Tape):
        def record(self, *parts):
            tapes = []
            self.watch = lambda tape: tapes.append(tape) or pytest.MonkeyPatch()
            replays = super().record(*parts)
            operations.append(Counter(str(func) for tape in tapes for func, *_ in tape.calls))
            return replays

    model = build(FAMILIES["llama"]())
    packed = replaying(model, Counted)
    made = groups(0, "system")
    for how in ({}, {"share_from": 8}):
        for _ in range(2):
            packed(*weighted(made, **how), model=model)[0].backward()
    apart, shared = operations
    twice = 2 * SIZES["num_hidden_layers"]  # keys and values
    assert shared - apart == {"aten.index.Tensor": twice, "aten.new_zeros.default": twice} | {
        name: twice for name in shared if name.startswith("aten.index_put") or "_index_put" in name
    }
    assert not apart - shared


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("selection", ["argmin", "soft"])
def test_the_losses_passes_share_and_replay(tiny, tokenizer, selection):
    """Chats, whose system prompt all sequences share, and several answers to one question."""
    retain = [Row("Is 4 even?", "It is, as its last digit says."), Row("Is 3?", "No.")]
    made = []
    for replays in (True, False):
        model = copy.deepcopy(tiny).double()
        config = PMCConfig(
            prompt_format="chat", selection=selection, num_samples=3, max_length=90, cuda_graphs=replays
        )
        pmc = PMC(model, tokenizer, config, ["Who was here?", "And who was not?"], reward=half)
        if replays:
            pmc.packed.graphs = PassGraphs(model, Tape, tolerance)
        pmc.prepare()
        step, kept = pmc.sample([0, 1]), pmc.encode_retain(retain)
        for _ in range(3):
            model.zero_grad()
            out = pmc.loss(step, kept)
            out.loss.backward()
        made.append((out.loss.item(), [out.collapse.item(), out.retain.item()], gradients(model)))
        assert out.counters["packs"] == 1
        if replays:
            assert pmc.packed.graphs.cache.replays == 2
            (size,) = pmc.packed.graphs.cache.captured()
            assert size.keys
    agree(made[:1], made[1:])


def half(initial, candidates, min_len):
    return np.full((len(initial), len(candidates[0])), 0.5)


@needs_gpu
@pytest.mark.parametrize("family", ["llama", "qwen2 sliding", "gpt2"])
def test_gpu_replays_with_shared_prefixes(family):
    """Replayed gradients are as near to float64's as those of plain passes over sequences apart."""
    model = build(FAMILIES[family](), torch.bfloat16).to("cuda")
    wide, packed = copy.deepcopy(model).cpu().double(), PackedPass(model, cuda_graphs=True)
    for kind in ("system", "answers"):
        made = groups(0, kind)
        apart = weighted([[s] for group in made for s in group])
        *_, exact = measured(wide, PackedPass(wide), *apart)
        *_, plain = measured(model, PackedPass(model), *apart)
        for _ in range(3):
            *_, ours = measured(model, packed, *weighted(made, share_from=8))
            for name, g in ours.items():
                error = (g.cpu().double() - exact[name]).norm()
                bound = 3 * (plain[name].cpu().double() - exact[name]).norm() + 1e-2 * exact[name].norm()
                assert error <= bound, name
    assert packed.graphs.cache.replays == 4
