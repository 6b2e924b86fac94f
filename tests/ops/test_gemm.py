"""Matrix products of any size, as matrices are stored, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmc_fast.errors import PMCError
from pmc_fast.ops.gemm import gemm, gemm_serves
from pmc_fast.ops.nll_cpu import GEMM_ROWS, VOCAB_BLOCK, Cpu

pytestmark = pytest.mark.skipif(not gemm_serves(torch.zeros(1, 1)), reason="gemm needs AVX-512")


def matrix(generator, rows, columns, turned, apart):
    """Random numbers, stored in rows or in columns that are longer than the matrix."""
    if turned:
        return matrix(generator, columns, rows, False, apart).T
    return torch.randn(rows, columns + apart, generator=generator)[:, :columns]


def bound(a, b, more):
    # K products in a row at the worst: each sum rounds once
    return 2**-24 * (a.shape[1] + 8) * (a.abs().double() @ b.abs().double() + more.abs())


sizes = st.one_of(st.integers(1, 40), st.sampled_from([83, 84, 85, 168, 255, 289, 321, 577]))


@settings(max_examples=250, deadline=None)
@given(
    m=sizes, n=sizes, k=st.one_of(st.integers(0, 40), st.sampled_from([511, 512, 513, 1100])),
    a_turned=st.booleans(), b_turned=st.booleans(), apart=st.sampled_from([0, 3]),
    start=st.sampled_from(["", "bias", "add"]), threads=st.sampled_from([1, 2, 3, 6]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_gemm(m, n, k, a_turned, b_turned, apart, start, threads, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = matrix(g, m, k, a_turned, apart), matrix(g, k, n, b_turned, apart)
    room = torch.randn(m + 2, n + 5, generator=g)
    before, out = room.clone(), room[1 : m + 1, 2 : n + 2]
    bias = torch.randn(n, generator=g) if start == "bias" else None
    more = (torch.zeros(n) if bias is None else bias).double() + (out.double() if start == "add" else 0)
    exact = a.double() @ b.double() + more
    with_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert gemm(a, b, bias, out=out, add=start == "add") is out
    finally:
        torch.set_num_threads(with_threads)
    assert ((out.double() - exact).abs() <= bound(a, b, more)).all()
    room[1 : m + 1, 2 : n + 2] = before[1 : m + 1, 2 : n + 2]
    assert torch.equal(room, before)  # nothing is written beside out


@pytest.mark.parametrize("apart", [1024, 2048, 4096])  # rows that share sets of the cache are packed
def test_gemm_with_rows_pages_apart(apart):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(37, apart, generator=g)[:, :700], torch.randn(apart, 70, generator=g)[:700]
    exact = a.double() @ b.double()
    assert ((gemm(a, b).double() - exact).abs() <= bound(a, b, torch.zeros(1))).all()


@pytest.mark.parametrize("turned", [(False, True), (False, False), (True, False)], ids=["y", "dx", "dW"])
def test_gemm_rounds_no_worse_than_torchs(turned):
    g = torch.Generator().manual_seed(0)
    a, b = matrix(g, 300, 1391, turned[0], 0), matrix(g, 1391, 200, turned[1], 0)
    exact = a.double() @ b.double()
    ours, torchs = ((y - exact).abs().mean() for y in (gemm(a, b), a @ b))
    assert ours <= 2 * torchs


def test_gemm_takes_any_strides():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 2, 9, generator=g)[:, 0, ::2], torch.randn(1, 1, generator=g).expand(5, 7)
    torch.testing.assert_close(gemm(a, b), a @ b)
    torch.testing.assert_close(gemm(a[:1], b), a[:1] @ b)
    assert gemm(torch.empty(0, 5), b).shape == (0, 7)


def test_gemm_hands_on_what_is_not_a_number():
    a, b = torch.zeros(3, 20), torch.zeros(20, 40)
    a[1, 7] = torch.nan
    assert torch.equal(gemm(a, b).isnan(), (a @ b).isnan())


@pytest.mark.parametrize(
    "call",
    [
        lambda x: gemm(x.double(), x), lambda x: gemm(x, x.half()), lambda x: gemm(x, x[:3]),
        lambda x: gemm(x, x, out=x[:3]), lambda x: gemm(x, x, out=torch.zeros(4, 8)[:, ::2]),
        lambda x: gemm(x, x, add=True), lambda x: gemm(x, x, x[0], out=x.clone(), add=True),
        lambda x: gemm(x, x, out=torch.zeros(1, 4).expand(4, 4)),
    ],
)  # fmt: skip
def test_gemm_refuses(call):
    with pytest.raises(PMCError, match="gemm: "):
        call(torch.ones(4, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # a bfloat16 head is read in blocks
@pytest.mark.parametrize("rows", [3, GEMM_ROWS + 1])
def test_the_heads_three_products(rows, dtype):
    g = torch.Generator().manual_seed(0)
    vocab, device = VOCAB_BLOCK + 77, Cpu()
    hidden, head = (torch.randn(n, 40, generator=g).to(dtype) for n in (rows, vocab))
    logits, d_logits = torch.empty(rows, vocab), torch.randn(rows, vocab, generator=g)
    device.logits(hidden, head, logits)
    first = device.d_head(d_logits, hidden, None, torch.float32).clone()
    total = torch.randn(vocab, 40, generator=g)
    both = device.d_head(d_logits, hidden, total.clone(), torch.float32)
    hidden, head, d_logits = hidden.double(), head.double(), d_logits.double()
    for ours, a, b, more in [
        (logits, hidden, head.T, 0), (device.d_hidden(d_logits.float(), head.to(dtype)), d_logits, head, 0),
        (first, d_logits.T, hidden, 0), (both, d_logits.T, hidden, total.double()),
    ]:  # fmt: skip
        assert ((ours - (a @ b + more)).abs() <= bound(a, b, torch.as_tensor(more))).all()
