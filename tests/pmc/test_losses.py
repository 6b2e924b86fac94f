"""row_scales, sequence_logps and every objective against plain torch."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, logsigmoid

from pmc_fast.errors import PMCError
from pmc_fast.ops import (
    gather_logps,
    row_scales,
    sequence_logps,
    weighted_nll,
)
from pmc_fast.pmc import losses

LENGTHS = [3, 5, 1, 4, 6]


@pytest.fixture
def batch():
    """Five sequences of random hidden rows; one target of the second is ignored."""
    g = torch.Generator().manual_seed(0)
    size = sum(LENGTHS)
    targets = torch.randint(23, (size,), generator=g)
    targets[4] = -100
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    hidden = torch.randn(size, 6, generator=g, requires_grad=True)
    head = torch.randn(23, 6, generator=g, requires_grad=True)
    return hidden, head, targets, cu_seqlens


def ce(batch, sequences):
    """Mean cross-entropy over the tokens of some sequences, by torch."""
    hidden, head, targets, cu = batch
    at = torch.cat([torch.arange(cu[s], cu[s + 1]) for s in sequences])
    return cross_entropy(hidden[at] @ head.T, targets[at])


def sums(batch):
    """Log-prob of each sequence, by torch."""
    hidden, head, targets, cu = batch
    each = -cross_entropy(hidden @ head.T, targets, reduction="none")
    return torch.stack([each[cu[s] : cu[s + 1]].sum() for s in range(len(LENGTHS))])


def same(batch, ours, theirs):
    """Values and gradients of two losses agree."""
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, batch[:2]), torch.autograd.grad(theirs, batch[:2]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def weighted(batch, scales):
    hidden, head, targets, _ = batch
    return weighted_nll(hidden, head, targets, scales)[0]


def test_pmc_with_picked_answers(batch):
    ours = weighted(batch, losses.pmc(batch[3], batch[2], torch.ones(3), lambda_=1.25))
    same(batch, ours, ce(batch, [0, 1, 2]) + 1.25 * ce(batch, [3, 4]))


def test_pmc_with_one_hot_weights_over_all_samples_is_pmc_with_picks(batch):
    weights = torch.tensor([0.0, 1.0, 1.0])
    ours = weighted(batch, losses.pmc(batch[3], batch[2], weights, lambda_=0.5))
    same(batch, ours, ce(batch, [1, 2]) + 0.5 * ce(batch, [3, 4]))


def test_pmc_with_soft_weights(batch):
    w = torch.tensor([0.2, 0.8, 1.0])
    tokens = torch.tensor([3.0, 4.0, 1.0])
    theirs = -(w * sums(batch)[:3]).sum() / (w * tokens).sum() + 2 * ce(batch, [3, 4])
    same(batch, weighted(batch, losses.pmc(batch[3], batch[2], w, lambda_=2.0)), theirs)


def test_pmc_without_retain_or_with_all_weights_0_stays_finite(batch):
    alone = weighted(batch, losses.pmc(batch[3], batch[2], torch.ones(5), lambda_=1.0))
    same(batch, alone, ce(batch, range(5)))
    assert losses.pmc(batch[3], batch[2], torch.zeros(3), lambda_=1.0).isfinite().all()


def test_gradient_ascent_grad_diff_and_idk(batch):
    _, _, targets, cu = batch
    same(batch, weighted(batch, losses.gradient_ascent(cu, targets)), -ce(batch, range(5)))
    theirs = -ce(batch, [0, 1]) + 0.7 * ce(batch, [2, 3, 4])
    same(batch, weighted(batch, losses.grad_diff(cu, targets, 2, lambda_=0.7)), theirs)
    theirs = ce(batch, [0, 1]) + ce(batch, [2, 3, 4])
    same(batch, weighted(batch, losses.idk(cu, targets, 2)), theirs)


def test_npo_simnpo_and_dpo(batch):
    hidden, head, targets, cu = batch
    ref, tokens = torch.linspace(-9, -3, 5), torch.tensor([3.0, 4.0, 1.0, 4.0, 6.0])

    def ours():  # a fresh graph for each comparison
        return sequence_logps(gather_logps(hidden, head, targets), cu)

    npo = (2 / 0.3) * torch.log1p(torch.exp(sums(batch) - ref) ** 0.3).mean()
    same(batch, losses.npo(ours(), ref, beta=0.3), npo)
    simnpo = -(2 / 2.5) * logsigmoid(-(2.5 / tokens) * sums(batch) - 0.1).mean()
    same(batch, losses.simnpo(ours(), tokens, beta=2.5, gamma=0.1), simnpo)
    plain, fused = sums(batch), ours()
    margin = (plain[:2] - ref[:2]) - (plain[2:4] - ref[2:4])
    dpo = losses.dpo(fused[:2], fused[2:4], ref[:2], ref[2:4], beta=0.2)
    same(batch, dpo, -torch.log(torch.sigmoid(0.2 * margin)).mean())


sequences = st.lists(
    st.tuples(st.lists(st.sampled_from([-100, 0, 1, 2]), max_size=5), st.floats(-2, 2), st.integers(0, 2)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(sequences, st.sampled_from(["token_mean", "sequence_mean", "sum"]))
def test_row_scales_are_the_reduction_written_out(rows, reduction):
    targets = torch.tensor([t for tokens, _, _ in rows for t in tokens], dtype=torch.int64)
    cu = torch.tensor([0, *(len(tokens) for tokens, _, _ in rows)]).cumsum(0)
    weights = torch.tensor([w for _, w, _ in rows], dtype=torch.float64)
    groups = torch.tensor([g for _, _, g in rows]).clamp(max=len(rows) - 1)
    scales = row_scales(weights, cu, targets, reduction=reduction, groups=groups)
    expected = []
    counts = [sum(t != -100 for t in tokens) for tokens, _, _ in rows]
    for s, (tokens, weight, _) in enumerate(rows):
        peers = [p for p in range(len(rows)) if groups[p] == groups[s]]
        divisor = {
            "token_mean": sum(counts[p] for p in peers),
            "sequence_mean": sum(counts[p] > 0 for p in peers) * counts[s],
            "sum": 1,
        }[reduction]
        expected += [weight / divisor if t != -100 else 0.0 for t in tokens]
    torch.testing.assert_close(scales, torch.tensor(expected, dtype=torch.float64))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_sequence_logps_sum_each_sequence(lengths):
    cu = torch.tensor([0, *lengths]).cumsum(0)
    logps = torch.arange(float(cu[-1])).requires_grad_()
    ours = sequence_logps(logps, cu)
    assert ours.tolist() == [sum(range(int(a), int(b))) for a, b in itertools.pairwise(cu)]
    if len(logps):
        ours.sum().backward()
        assert (logps.grad == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_are_exact_whatever_the_weights_type(dtype):
    cu, targets = torch.tensor([0, 3000]), torch.ones(3000, dtype=torch.int64)
    scales = row_scales(torch.ones(1, dtype=dtype), cu, targets)
    torch.testing.assert_close(scales.sum(), torch.tensor(1.0))
    assert losses.pmc(cu, targets, torch.ones(1, dtype=dtype), 1.0).sum() == pytest.approx(1.0, rel=1e-5)


def test_mistakes_are_named():
    cu, targets = torch.tensor([0, 2]), torch.tensor([1, 2])
    with pytest.raises(PMCError, match="reduction is 'mean'"):
        row_scales(torch.ones(1), cu, targets, reduction="mean")
    with pytest.raises(PMCError, match=r"cu_seqlens \(3,\)"):
        row_scales(torch.ones(2), cu, targets)
