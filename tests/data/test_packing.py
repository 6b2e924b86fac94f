"""Packing and packed attention: every token where it belongs, sequences isolated, kernels interchangeable."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmc_fast.data import Encoded, collate
from pmc_fast.data.packing import (
    Segments,
    num_targets,
    pack,
    unpad,
)
from pmc_fast.errors import PMCError
from pmc_fast.models import packed_attention as op

IGNORED = -100


@st.composite
def encoded(draw, prompt=None):
    ids = list(prompt) if prompt is not None else draw(st.lists(st.integers(0, 9), max_size=4))
    labels = [IGNORED] * len(ids)
    for token in draw(st.lists(st.integers(0, 9), max_size=5)):
        ids.append(token)
        labels.append(draw(st.sampled_from([token, token, IGNORED])))
    return Encoded(ids, labels)


@st.composite
def groups(draw):
    made = []
    for _ in range(draw(st.integers(0, 4))):
        prompt = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
        made.append([draw(encoded(prompt=prompt)) for _ in range(draw(st.integers(1, 3)))])
    return made + [[draw(encoded())] for _ in range(draw(st.integers(0, 2)))]


def visible(segments):
    """Which tokens each token sees, written out: {token: [tokens]}."""
    return {
        t: [*range(s.prefix_begin, s.prefix_end), *range(s.begin, t + 1)]
        for s in segments
        for t in range(s.begin, s.end)
    }


@st.composite
def alike(draw):
    """Groups of one sequence each, which all begin with the same prompt."""
    prompt = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    return [[draw(encoded(prompt=prompt))] for _ in range(draw(st.integers(0, 6)))]


@settings(max_examples=400, deadline=None)
@given(groups() | alike(), st.integers(1, 30), st.integers(0, 6))
def test_every_target_is_predicted_from_its_own_history(made, max_tokens, share_from):
    flat = [s for group in made for s in group]
    seen = []
    for p in pack(made, max_tokens, share_from=share_from):
        assert [s.begin for s in p.segments] == [0, *[s.end for s in p.segments]][:-1]
        assert p.segments[-1].end == len(p)
        sees = visible(p.segments)
        for i, number in enumerate(p.sequences):
            s = flat[number]
            expected = [t for t in range(1, len(s.labels)) if s.labels[t] != IGNORED]
            at = range(int(p.cu_targets[i]), int(p.cu_targets[i + 1]))
            assert p.targets[at.start : at.stop].tolist() == [s.labels[t] for t in expected]
            for m, t in zip(at, expected, strict=True):
                history = sees[int(p.hidden_rows[p.rows[m]])]
                assert p.input_ids[history].tolist() == s.input_ids[:t]
                assert p.positions[history].tolist() == list(range(t))
        assert sorted(set(p.rows.tolist())) == list(range(len(p.hidden_rows)))
        assert len(p) <= max_tokens or len(set(p.sequences)) <= 3
        seen += p.sequences
    assert seen == [n for n, s in enumerate(flat) if num_targets(s)]


def test_a_groups_prompt_is_computed_once():
    prompt = [1, 2, 3, 4]
    group = [Encoded([*prompt, *a], [IGNORED] * 4 + a) for a in ([5, 6], [7, 8, 9], [5])]
    (p,) = pack([group], 100)
    assert len(p) == 4 + 1 + 2  # an answer's last token predicts nothing
    assert len(p.hidden_rows) == 1 + 1 + 2  # the prompt's last row predicts all three first tokens
    assert p.targets.tolist() == [5, 6, 7, 8, 9, 5]


def test_what_all_begin_with_is_computed_once_a_pack():
    system, answers = [1, 2, 3, 4], ([5, 6, 7], [7, 8, 9], [5, 5, 5], [9])
    made = [[Encoded([*system, *a], [IGNORED] * 4 + a)] for a in answers]
    (p,) = pack(made, 100, share_from=4)
    assert len(p) == 4 + 2 + 2 + 2
    assert [len(p) for p in pack(made, 100, share_from=5)] == [6 + 6 + 6 + 4]
    assert [len(p) for p in pack(made, 8, share_from=4)] == [4 + 2 + 2, 4 + 2]
    assert [p.sequences for p in pack(made, 8, share_from=4)] == [[0, 1], [2, 3]]


@settings(max_examples=100, deadline=None)
@given(st.lists(encoded().filter(num_targets), min_size=1, max_size=4), st.sampled_from(["left", "right"]))
def test_unpad_takes_back_what_collate_did(sequences, side):
    back = unpad(collate(sequences, pad=3, side=side))
    for ours, s in zip(back, sequences, strict=True):
        used = max(t for t, label in enumerate(s.labels) if label != IGNORED) + 1
        assert ours == Encoded(s.input_ids[:used], s.labels[:used])


@pytest.mark.parametrize(
    ("mask", "ids", "positions"),
    [
        ([1, 1, 1, 1, 1, 0], [5, 2, 2, 6, 7, 2], None),  # the last eos, masked because it is also the pad, is trained
        ([1, 0, 1, 1, 1, 0], [5, 2, 6, 7, 2], [0, 2, 3, 4, 5]),  # one inside the prompt is not seen
        ([1, 1, 0, 1, 1, 0], [5, 2, 2, 6, 7, 2], None),  # but one that predicts a target is
        ([1, 0, 0, 1, 1, 0], [5, 2, 6, 7, 2], [0, 2, 3, 4, 5]),
        ([0, 1, 1, 1, 1, 0], [2, 2, 6, 7, 2], None),  # as padding on the left
    ],
)
def test_masked_tokens_inside_a_prompt_leave_gaps(mask, ids, positions):
    labels = torch.tensor([[IGNORED, IGNORED, IGNORED, 6, 7, 2, IGNORED]])
    batch = {"input_ids": torch.tensor([[5, 2, 2, 6, 7, 2, 2]]), "attention_mask": torch.tensor([[*mask, 0]]) == 1}
    (s,) = unpad(batch | {"labels": labels})
    assert (s.input_ids, s.positions) == (ids, positions)
    assert [x for x in s.labels if x != IGNORED] == [6, 7, 2]
    (p,) = pack([[s, s]], 100)
    assert p.positions.tolist() == [*(positions or range(len(ids)))[:-1], *(positions or range(len(ids)))[-3:-1]]
    (empty,) = unpad(batch | {"labels": torch.full_like(labels, IGNORED)})
    assert empty == Encoded([], [])


def test_prompts_in_other_places_are_not_shared():
    labels = [IGNORED, IGNORED, 4]
    (p,) = pack([[Encoded([1, 2, 4], labels), Encoded([1, 2, 4], labels, [0, 3, 4])]], 100)
    assert p.positions.tolist() == [0, 1, 3]
    assert p.input_ids.tolist() == [1, 2, 2]


GROUPS = [
    [Encoded([1, 2, 3, 4, 5, 6], [IGNORED] * 3 + [4, 5, 6])],
    [Encoded([1, 2, 3, *a], [IGNORED] * 3 + a) for a in ([4, 5, 6, 7, 8], [9, 1], [3])],
    [Encoded([7, 8], [IGNORED, 8])],
]


def inputs(kv_heads, dtype=torch.float64):
    segments = pack(GROUPS, 100)[0].segments
    g = torch.Generator().manual_seed(0)
    make = lambda heads: torch.randn(segments[-1].end, heads, 8, generator=g, dtype=dtype).requires_grad_()  # noqa: E731
    return segments, make(4), make(kv_heads), make(kv_heads)


def plainly(q, k, v, segments, scale, softcap, window):
    """Token by token, head by head."""
    out = []
    for t, keys in visible(segments).items():
        near = keys if window is None else keys[-window:]
        heads = []
        for h in range(q.shape[1]):
            kv = h * k.shape[1] // q.shape[1]
            x = k[near, kv] @ q[t, h] * scale
            x = x if softcap is None else softcap * torch.tanh(x / softcap)
            heads.append(x.softmax(0) @ v[near, kv])
        out.append(torch.stack(heads))
    return torch.stack(out)


def agree(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    ours, theirs = (torch.autograd.grad((out * weights).sum(), leaves) for out in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_sdpa_is_attention_written_out(kv_heads, softcap, window):
    segments, *qkv = inputs(kv_heads)
    ours = op.packed_attention(*qkv, segments, scale=0.4, softcap=softcap, window=window)
    agree(ours, plainly(*qkv, segments, 0.4, softcap, window), qkv)


def standing_in(query, key, value, cu_q, cu_k, scale, left):
    """What a varlen kernel computes, by torch: causal from the bottom right, as flash attention aligns it."""
    out = []
    for i in range(len(cu_q) - 1):
        q, k, v = (
            t[int(cu[i]) : int(cu[i + 1])].transpose(0, 1) for t, cu in ((query, cu_q), (key, cu_k), (value, cu_k))
        )
        k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
        lq, lk = q.shape[1], k.shape[1]
        mask = torch.ones(lq, lk, dtype=torch.bool).tril(lk - lq)
        mask = mask if left < 0 else mask.triu(lk - lq - left)
        made = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        out.append(made.transpose(0, 1))
    return torch.cat(out)


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    assert query.shape[1] == key.shape[1]
    return standing_in(query, key, value, cu_seq_q, cu_seq_k, query.shape[-1] ** -0.5, -1)


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert query.shape[1] == key.shape[1]
    assert window_size[1] == 0
    return standing_in(query, key, value, cu_seq_q, cu_seq_k, scale, window_size[0])


def torch_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert int(cu_seq_q.diff().max()) == max_q
    assert int(cu_seq_k.diff().max()) == max_k
    assert cu_seq_q.dtype == torch.int32
    return standing_in(query, key, value, cu_seq_q, cu_seq_k, scale, window_size[0])


def flash_attn(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert causal
    assert not softcap
    return standing_in(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size[0])


def flash_attn_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    assert causal
    assert not softcap
    assert seqused_q is seqused_k is None
    assert (int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max())) == (max_seqlen_q, max_seqlen_k)
    return standing_in(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size[0])


def flash_attn_3_early(
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
    causal=False, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), sink_token_length=0,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
):  # fmt: skip
    raise AssertionError("needs seqused_q and seqused_k, so it is not called")


def flash_attn_3_of_2025(*args, **how):
    made = flash_attn_3(*args, **how)
    return made, made.new_zeros(made.shape[1], len(made), dtype=torch.float32)


VARLEN = {
    "torch 2.10": ("varlen", torch_2_10),
    "torch 2.11": ("varlen", torch_2_11),
    "torch 2.12": ("varlen", torch_2_12),
    "flash_attn": ("flash_attn", flash_attn),
    "flash_attn_3": ("flash_attn_3", flash_attn_3),
    "flash_attn_3, with logsumexp": ("flash_attn_3", flash_attn_3_of_2025),
}


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", VARLEN)
def test_varlen_calls_are_the_same_attention(monkeypatch, name, window, kv_heads):
    """No GPU needed: the kernels' signatures with torch's attention behind them."""
    segments, *qkv = inputs(kv_heads)
    backend, function = VARLEN[name]
    if backend == "varlen":
        monkeypatch.setattr(op, "_varlen_attn", lambda: function)
    else:
        monkeypatch.setattr(op, "_flash_attn", {backend: function}.get)
    call = lambda: op.packed_attention(*qkv, segments, scale=0.4, window=window, backend=backend)  # noqa: E731
    if function is torch_2_10 and window:
        with pytest.raises(PMCError, match="no sliding window in varlen_attn: update it"):
            call()
        return
    agree(call(), op.packed_attention(*qkv, segments, scale=0.4, window=window, backend="sdpa"), qkv)


def test_signatures_are_read_once(monkeypatch):
    import inspect

    segments, *qkv = inputs(2)
    asked, real = [], inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda f: (asked.append(f), real(f))[1])
    monkeypatch.setattr(op, "_varlen_attn", lambda: torch_2_12)
    op._parameters.cache_clear()
    for _ in range(3):
        op.packed_attention(*qkv, segments, scale=0.4, backend="varlen")
    assert asked == [torch_2_12]


@pytest.fixture
def packages(monkeypatch):
    """Return what `import` finds, by name; nothing at first."""
    found = {}

    def imported(name):
        if name not in found:
            raise ImportError(name)
        return SimpleNamespace(flash_attn_varlen_func=found[name])

    monkeypatch.setattr(op.importlib, "import_module", imported)
    op._flash_attn.cache_clear()
    yield found
    op._flash_attn.cache_clear()


@pytest.mark.parametrize(
    ("installed", "chip", "how", "chosen"),
    [
        ("23", (9, 0), {}, "flash_attn_3"),
        ("23", (9, 0), {"softcap": 2.0}, "flash_attn_3"),
        ("23", (9, 0), {"dropout": 0.1}, "flash_attn"),
        ("23", (8, 0), {}, "flash_attn"),
        ("23", (10, 0), {}, "flash_attn"),
        ("23", (9, 0), {"size": 264}, "sdpa"),
        ("23", (9, 0), {"size": 36}, "sdpa"),
        ("23", (9, 0), {"dtype": torch.float32}, "sdpa"),
        ("23", (9, 0), {"ordered": True}, "flash_attn_3"),
        ("23", (9, 0), {"ordered": True, "size": 256}, "flash_attn"),
        ("3", (9, 0), {"dropout": 0.1}, "sdpa"),
        ("3", (8, 0), {}, "varlen"),
        ("early", (9, 0), {}, "varlen"),
        ("2", (9, 0), {}, "flash_attn"),
        ("", (9, 0), {}, "varlen"),
        ("", (9, 0), {"softcap": 2.0}, "sdpa"),
    ],
)
def test_the_card_and_what_is_installed_choose(monkeypatch, packages, installed, chip, how, chosen):
    of = {"2": ("flash_attn", flash_attn), "3": ("flash_attn_interface", flash_attn_3)}
    packages.update(
        [("flash_attn_interface", flash_attn_3_early)] if installed == "early" else map(of.get, installed)
    )
    monkeypatch.setattr(op, "_on_hopper", lambda device: chip == (9, 0))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: how.get("ordered", False))
    q = SimpleNamespace(  # as much of a tensor on CUDA as is asked
        device=torch.device("cuda"), dtype=how.get("dtype", torch.bfloat16), shape=(7, 4, how.get("size", 128))
    )
    assert op._resolve(None, q, how.get("softcap"), how.get("dropout", 0.0)) == chosen


def test_what_is_asked_for_and_missing_is_named(packages):
    segments, *qkv = inputs(2)
    packages["flash_attn_interface"] = flash_attn_3_early
    for name in ("flash_attn", "flash_attn_3"):
        with pytest.raises(PMCError, match=f"backend is '{name}', but it is not installed, or too old: p"):
            op.packed_attention(*qkv, segments, scale=0.4, backend=name)
    with pytest.raises(PMCError, match="'flash_attn_3' has no dropout"):
        op.packed_attention(*qkv, segments, scale=0.4, backend="flash_attn_3", dropout=0.1)


def test_this_torchs_varlen_has_a_signature_that_is_known():
    """Of the arguments that are passed; the kernel itself needs a GPU."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    knows = inspect.signature(varlen_attn).parameters
    assert list(knows)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert "window_size" in knows or "is_causal" in knows


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 3])
def test_varlen_on_the_gpu(window):
    segments, *qkv = inputs(2, torch.float32)
    half = [t.detach().cuda().bfloat16().requires_grad_() for t in qkv]
    wide = [t.detach().double().requires_grad_() for t in half]
    ours = op.packed_attention(*half, segments, scale=0.4, window=window)
    theirs = op.packed_attention(*wide, segments, scale=0.4, window=window, backend="sdpa")
    torch.testing.assert_close(ours.double(), theirs, atol=2e-2, rtol=2e-2)
    for a, b in zip(*(torch.autograd.grad(o.sum(), t) for o, t in ((ours, half), (theirs, wide))), strict=True):
        torch.testing.assert_close(a.double(), b, atol=5e-2, rtol=5e-2)


def test_dropout_keeps_the_mean():
    segments, q, k, v = inputs(2)
    torch.manual_seed(0)
    made = [
        op.packed_attention(q, k, v.abs() + 1, segments, scale=0.4, dropout=0.2).mean().item() for _ in range(200)
    ]
    plain = op.packed_attention(q, k, v.abs() + 1, segments, scale=0.4).mean()
    assert len(set(made)) == 200
    assert math.isclose(sum(made) / 200, plain.item(), rel_tol=0.02)


def test_backends_are_named():
    segments, *qkv = inputs(2)
    with pytest.raises(PMCError, match="backend is 'fast': use one of sdpa, varlen, flash_attn"):
        op.packed_attention(*qkv, segments, scale=1.0, backend="fast")
    with pytest.raises(PMCError, match="'varlen' has no softcap"):
        op.packed_attention(*qkv, segments, scale=1.0, softcap=2.0, backend="varlen")
    assert Segments([]) == ()
