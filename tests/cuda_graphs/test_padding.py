"""Packs padded to the sizes of graphs: what each token sees stays as it was."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmc_fast.cuda_graphs.padding import Size, pad
from pmc_fast.data import Encoded
from pmc_fast.data.packing import pack

LENGTHS = st.lists(st.tuples(st.integers(0, 150), st.lists(st.integers(1, 150), min_size=1, max_size=4)), min_size=1)


def packed(groups, seed=0, system=0):
    """A pack of groups of answers, given by the lengths of their prompt, after a system prompt, and of what follows."""
    g = np.random.default_rng(seed)
    made = []
    for own, answers in groups:
        begin, prompt = [5] * system + g.integers(0, 9, own).tolist(), system + own
        made.append([])
        for n in answers:
            ids = begin + g.integers(0, 9, n + 1).tolist()
            made[-1].append(Encoded(ids, [-100] * prompt + ids[prompt:]))
    p = pack(made, 10**6, share_from=8)[0]
    return p, torch.from_numpy(g.normal(size=len(p.targets)))


@settings(max_examples=150, deadline=None)
@given(LENGTHS, LENGTHS, st.booleans(), st.integers(0, 150), st.integers(0, 10_000))
def test_every_token_sees_what_it_saw(groups, others, single, system, seed):
    if single:  # which share what they all begin with
        groups, others = ([(p, a[:1]) for p, a in made] for made in (groups, others))
    p, scale = packed(groups, seed, system)
    own = Size.of(p)
    assert own.fits(own.rounded())
    check(p, scale, own.rounded())
    room = Size.of(packed(others, seed + 1, system)[0]).rounded()
    if own.fits(room):
        check(p, scale, room)


def check(p, scale, room):
    out = pad(p, scale, room)
    assert len(out["input_ids"]) == len(out["positions"]) == room.tokens
    assert len(out["targets"]) == len(out["rows"]) == len(out["hidden_rows"]) == len(out["row_scale"]) == room.targets
    for name in ("input_ids", "positions", "targets", "rows", "hidden_rows"):
        real = getattr(p, name).numpy()
        np.testing.assert_array_equal(out[name][: len(real)], real)
    assert (out["targets"][len(p.targets) :] == -100).all()
    assert out["row_scale"][len(scale) :].sum() == 0
    # packs without shared prefixes have neither keys of their own nor room for them
    assert ("keys" in out) == ("cu_keys" in out) == p.segments.shared == bool(room.keys)
    cu_q, cu_k = out["cu_queries"], out.get("cu_keys", out["cu_queries"])
    keys = out.get("keys", np.arange(room.tokens))
    for cu, end, longest in ((cu_q, room.tokens, room.longest), (cu_k, len(keys), room.longest_keys)):
        assert cu.dtype == np.int32
        assert (len(cu), cu[0], cu[-1]) == (room.segments + 1, 0, end)  # every query and key is in a segment
        assert 0 <= np.diff(cu).min() <= np.diff(cu).max() <= longest
    queries, per = np.diff(cu_q), np.diff(cu_k)
    assert (per >= queries).all()  # the first query of a segment sees one key at least
    assert ((per > 0) == (queries > 0)).all()
    assert keys.dtype == np.int64
    assert len(keys) == (room.keys or room.tokens)
    for i, s in enumerate(p.segments):
        assert (cu_q[i], cu_q[i + 1]) == (s.begin, s.end)
        sees = [*range(s.prefix_begin, s.prefix_end), *range(s.begin, s.end)]
        assert keys[cu_k[i] : cu_k[i + 1]].tolist() == sees
    assert ((keys[cu_k[len(p.segments)] :] >= len(p)) & (keys[cu_k[len(p.segments)] :] < room.tokens)).all()


def test_a_size_with_keys_serves_only_packs_that_share():
    shared, _ = packed([(20, [5, 6, 7])])
    apart, _ = packed([(16, [20])])
    assert not Size.of(apart).fits(Size.of(shared).rounded())
    assert not Size.of(shared).fits(Size.of(apart).rounded())


def test_packs_of_a_run_share_a_size():
    """Steps of as many questions with one system prompt, and answers of other lengths."""
    sizes = set()
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(20, 60, 16).tolist()
        own = Size.of(packed([(5, [n]) for n in lengths], seed, system=40)[0])
        assert own.keys
        if not any(own.fits(size) for size in sizes):
            sizes.add(own.rounded())
    assert len(sizes) <= 3
