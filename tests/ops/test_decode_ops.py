"""What a decode step computes with: attention over the shared pool, linear layers, RMS norms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmc_fast.errors import PMCError
from pmc_fast.ops import native
from pmc_fast.ops.decode_attention import StepIndex, decode_attention
from pmc_fast.ops.layers import FEW_ROWS, fast_linear_serves, few_rows, linear, rms_norm, rotary, silu_mul


def random_index(generator, blocks):
    """Rows that decode (with a suffix) or prefill (without); slots in no order."""
    prefix_len, suffix_len, cu_rows, cu_prefix = [], [], [0], [0]
    for _ in range(blocks):
        prompt = int(generator.integers(1, 12))
        if generator.random() < 0.5:
            first = int(generator.integers(0, prompt))  # a part of a prompt, the last part of what is there
            prefix_len += range(first + 1, prompt + 1)
            suffix_len += [0] * (prompt - first)
        else:
            rows = int(generator.integers(1, 20))
            prefix_len += [prompt] * rows
            suffix_len += generator.integers(1, 40, rows).tolist()
        cu_rows.append(len(prefix_len))
        cu_prefix.append(cu_prefix[-1] + prompt)
    slots = cu_prefix[-1] + sum(suffix_len)
    order = generator.permutation(slots)
    prefix, suffix, cu_suffix = order[: cu_prefix[-1]], order[cu_prefix[-1] :], np.cumsum([0, *suffix_len])
    own = [
        suffix[cu_suffix[r + 1] - 1] if suffix_len[r] else prefix[cu_prefix[b] + prefix_len[r] - 1]
        for b in range(blocks) for r in range(cu_rows[b], cu_rows[b + 1])
    ]  # fmt: skip
    arrays = (own, prefix_len, cu_suffix, suffix, cu_rows, cu_prefix, prefix)
    return StepIndex(*(torch.from_numpy(np.array(a, dtype=np.int32)) for a in arrays)), slots


def random_step(seed, dtype, heads, group, dim, blocks):
    index, slots = random_index(np.random.default_rng(seed), blocks)
    g = torch.Generator().manual_seed(seed)
    rows = index.slots.shape[0]
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    q = make(heads * group, rows, dim).transpose(0, 1)  # strided, as models hand them over
    k, v = make(heads, rows, dim).transpose(0, 1), make(rows, heads, dim)
    return index, q, k, v, make(slots, heads, dim), make(slots, heads, dim)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    heads=st.sampled_from([1, 3]), group=st.sampled_from([1, 3, 4]), dim=st.sampled_from([8, 17, 64, 80, 128]),
    softcap=st.sampled_from([None, 2.0]), window=st.sampled_from([None, 1, 5, 13, 1000]), blocks=st.integers(1, 4),
)  # fmt: skip
def test_attention_is_the_references(seed, dtype, heads, group, dim, softcap, window, blocks):
    index, q, k, v, k_pool, v_pool = random_step(seed, dtype, heads, group, dim, blocks)
    how = {"scale": dim**-0.5, "softcap": softcap, "window": window}
    pools = [(k_pool.clone(), v_pool.clone()) for _ in range(2)]
    ours = decode_attention(q, k, v, *pools[0], index, **how)
    exact = decode_attention(
        q.double(),
        k.double(),
        v.double(),
        pools[1][0].double(),
        pools[1][1].double(),
        index,
        backend="reference",
        **how,
    )
    # in bfloat16 the result alone is rounded
    allowed = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2**-8 * exact.abs().max().item()}[dtype]
    assert (ours.double() - exact).abs().max().item() <= allowed
    assert ours.is_contiguous()
    expected = (k_pool.index_copy(0, index.slots.long(), k), v_pool.index_copy(0, index.slots.long(), v))
    assert all(torch.equal(a, b) for a, b in zip(pools[0], expected, strict=True))


def test_attention_on_every_instruction_set():
    index, q, k, v, k_pool, v_pool = random_step(5, torch.float32, 3, 3, 72, 3)
    exact = decode_attention(q, k, v, k_pool.clone(), v_pool.clone(), index, scale=0.1, backend="reference")
    module = native.cpu()
    for isa in range(module.best_isa() + 1):
        for threads in (1, 2):
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
            strided = [(t.data_ptr(), t.stride(0), t.stride(1)) for t in (q, k, v)]
            module.decode_attention_f32(
                *strided, k_pool.data_ptr(), v_pool.data_ptr(), out.data_ptr(), (9, 3, 72), 0.1, 0.0, 0,
                index.addresses, len(k_pool), isa, threads,
            )  # fmt: skip
            torch.testing.assert_close(out, exact, atol=5e-6, rtol=1e-5)


def test_a_row_sees_nothing_else():
    index, q, k, v, k_pool, v_pool = random_step(3, torch.float32, 1, 2, 16, 3)
    seen = [index.visible(r, b) for b in range(3) for r in range(int(index.cu_rows[b]), int(index.cu_rows[b + 1]))]
    before = decode_attention(q, k, v, k_pool.clone(), v_pool.clone(), index, scale=0.3)
    for row, slots in enumerate(seen):
        mask = torch.ones(len(k_pool), dtype=torch.bool).index_fill(0, slots, False)
        noisy = k_pool.masked_fill(mask[:, None, None], 1e30), v_pool.masked_fill(mask[:, None, None], torch.nan)
        others = torch.arange(len(seen)) != row
        unseen = (others & mask[index.slots.long()])[:, None, None]
        after = decode_attention(q, k.masked_fill(unseen, 1e30), v, *noisy, index, scale=0.3)
        torch.testing.assert_close(after[row], before[row])


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, kp: (q.half(), k.half(), kp.half()),
        lambda q, k, kp: (q, k.double(), kp),
        lambda q, k, kp: (q[:, :3], k, kp),
        lambda q, k, kp: (q[..., :8], k, kp),
        lambda q, k, kp: (q, k, kp.transpose(0, 1)),
    ],
    ids=["half", "mixed", "heads", "sizes", "strided pool"],
)
def test_attention_refuses(change):
    index, q, k, _, k_pool, _ = random_step(1, torch.float32, 2, 2, 16, 1)
    q, k, k_pool = change(q, k, k_pool)
    with pytest.raises(PMCError, match="decode_attention: q is"):
        decode_attention(q, k, k, k_pool, k_pool.clone() if k_pool.is_contiguous() else k_pool, index, scale=1.0)


needs_avx2 = pytest.mark.skipif(not fast_linear_serves(torch.zeros(1, 1)), reason="linear needs AVX2")
MANY_ROWS = few_rows().stop
LANES = {"avx2": 8, "avx512": 16}


@needs_avx2
@pytest.mark.parametrize("isa", [name for name, rows in FEW_ROWS.items() if rows])
@settings(max_examples=120, deadline=None)
@given(
    data=st.data(), inner=st.integers(1, 1100), outer=st.integers(1, 75), bias=st.booleans(), wide=st.booleans(),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_linear(isa, data, inner, outer, bias, wide, seed):
    if native.ISAS.index(isa) > native.cpu().best_isa():
        pytest.skip(f"this machine has no {isa}")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(native, "isa", lambda: native.ISAS.index(isa))
        _linear_is_exact(LANES[isa], data.draw(st.sampled_from(few_rows())), inner, outer, bias, wide, seed)


def _linear_is_exact(lanes, rows, inner, outer, bias, wide, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inner + 5 * wide, generator=g)[:, :inner]  # rows further apart than they are long
    weight = torch.randn(outer, inner, generator=g)
    b = torch.randn(outer, generator=g) if bias else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    # n products of size 1 in a tree of as many sums as there are lanes, at the worst in a row of n / lanes
    bound = 2**-24 * (inner / lanes + 8) * (x.abs().double() @ weight.abs().double().T + 3)
    assert ((linear(x, weight, b).double() - exact).abs() <= bound).all()


@needs_avx2
@pytest.mark.parametrize("rows", [5, 20])
def test_linear_rounds_no_worse_than_torchs(rows):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 1536, generator=g), torch.randn(1000, 1536, generator=g)
    exact = x.double() @ weight.double().T
    ours, torchs = ((y - exact).abs().mean() for y in (linear(x, weight), x @ weight.T))
    assert ours <= 2 * torchs


@needs_avx2
def test_linear_keeps_leading_dimensions_and_takes_no_rows():
    x, weight = torch.randn(2, 3, 4, 8), torch.randn(5, 8)
    torch.testing.assert_close(linear(x, weight), x @ weight.T)
    assert linear(torch.empty(1, 0, 8), weight).shape == (1, 0, 5)


@needs_avx2
@pytest.mark.parametrize("rows", [1, 2, MANY_ROWS])
def test_linear_of_other_rows_is_torchs(rows):
    if rows in few_rows():
        pytest.skip("computed here")
    x, weight, bias = torch.randn(rows, 40), torch.randn(9, 40), torch.randn(9)
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 6, 576), (3, 4, 5, 17), (1, 200, 700), (1, 1, 1)])
def test_rms_norm(shape, offset):
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(shape, generator=g).transpose(0, 1), torch.randn(shape[-1], generator=g)
    exact = torch.nn.functional.rms_norm(x.double(), shape[-1:], weight.double() + offset, eps=1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, offset).double(), exact, atol=1e-6, rtol=2e-6)


def test_silu_mul():
    g = torch.Generator().manual_seed(1)
    gate, up = torch.randn(7, 333, generator=g) * 30, torch.randn(7, 333, generator=g)
    gate[0, :4] = torch.tensor([0.0, 1e4, -1e4, -80.0])
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(silu_mul(gate, up).double(), exact, atol=1e-6, rtol=1e-6)
    assert silu_mul(torch.tensor([torch.nan]), torch.ones(1)).isnan().all()


@pytest.mark.parametrize(("heads", "rows", "dim"), [(9, 5, 64), (1, 1, 2), (3, 200, 96)])
def test_rotary(heads, rows, dim):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, rows, heads, dim, generator=g).transpose(1, 2)
    cos, sin = torch.randn(1, rows, dim, generator=g), torch.randn(1, rows, dim, generator=g)
    turned = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
    q, k = rotary(x, x[:, :1], cos, sin)
    torch.testing.assert_close(q, x * cos[:, None] + turned * sin[:, None])
    assert torch.equal(k, q[:, :1])


@pytest.mark.parametrize(
    "call",
    [
        lambda x: linear(x.double(), x), lambda x: linear(x, x.half()), lambda x: linear(x, x[:, :3].contiguous()),
        lambda x: linear(x, x, x), lambda x: linear(x, x.T[:3]), lambda x: linear(x, x, x[:, 0]),
        lambda x: linear(x.requires_grad_(), x),
        lambda x: rms_norm(x, x[0].bfloat16(), 1e-6),
        lambda x: silu_mul(x, x[:1]), lambda x: silu_mul(x, x.double()), lambda x: rotary(*[x[None, None]] * 2, x, x),
        lambda x: rotary(*[x[None, None]] * 2, x[None].double(), x[None]),
    ],
)  # fmt: skip
def test_layers_refuse_what_they_would_misread(call):
    with pytest.raises(PMCError, match=r"(linear|rms_norm|silu_mul|rotary): "):
        call(torch.ones(4, 4))


@needs_avx2
@pytest.mark.parametrize("rows", [0, 1, 3, MANY_ROWS])
def test_linear_of_nothing_is_its_bias(rows):
    bias = torch.randn(5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear(torch.empty(rows, 0), torch.empty(5, 0), bias), bias.expand(rows, 5))
