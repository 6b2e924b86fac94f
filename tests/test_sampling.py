"""sample_nucleus: Hugging Face's kept set, the exact distribution, and draws that depend on keys alone."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pmc_fast.errors import PMCError
from pmc_fast.ops.sample_nucleus import _uniforms, kept_tokens, sample_nucleus


def draw(logits, count, *, seed=0, first_sample=0, backend=None, **how):
    """Draw `count` tokens from each row; a row's stream is its number."""
    rows = logits.shape[0]
    how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | how
    return sample_nucleus(
        logits,
        torch.arange(rows + 1) * count,
        torch.arange(rows).repeat_interleave(count),
        torch.arange(first_sample, first_sample + count).repeat(rows),
        torch.zeros(rows * count, dtype=torch.int64),
        seed=seed,
        backend=backend,
        **how,
    )


def huggingface(logits, temperature, top_k, top_p):
    """Probabilities that Hugging Face generate draws from: [R, V]."""
    scores = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    return scores.softmax(-1)


KINDS = {
    "random": lambda g, v: torch.randn(1, v, generator=g),
    "peaked": lambda g, v: torch.randn(1, v, generator=g) * 12,
    "flat": lambda g, v: torch.randn(1, v, generator=g) * 1e-3,
    "tied": lambda g, v: torch.randint(4, (1, v), generator=g).float(),
    "masked": lambda g, v: torch.randn(1, v, generator=g).masked_fill(
        torch.rand(1, v, generator=g) < 0.5, -torch.inf
    ),
}


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)), v=st.sampled_from([2, 40, 65, 300]), seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.5, 0.9, 1.0, 1.25]), top_k=st.sampled_from([0, 1, 5, 50]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]), wide=st.booleans(),
)  # fmt: skip
def test_kept_set_and_mass_are_hugging_faces(kind, v, seed, temperature, top_k, top_p, wide):
    logits = KINDS[kind](torch.Generator().manual_seed(seed), v).to(torch.float64 if wide else torch.float32)
    if logits.max() == -torch.inf:
        return
    if top_p < 1:  # whether a sum that is top_p but for rounding is one token longer is free: leave these out
        left = huggingface(logits.double(), temperature, top_k, 1.0)[0].sort(descending=True).values
        assume((left.cumsum(0) - top_p).abs().min() > 1e-6)
    p = huggingface(logits.double(), temperature, top_k, top_p)[0]
    kept, mine, mass = kept_tokens(logits[0].double(), temperature, top_k, top_p)
    # which of several tokens tied with the boundary are kept is free: their number and mass are not
    assert len(kept) == int((p > 0).sum())
    torch.testing.assert_close(mine.sort().values / mass, p[p > 0].sort().values)
    drawn = draw(logits, 400, temperature=temperature, top_k=top_k, top_p=top_p)
    boundary = mine.min() * (1 - 1e-6)
    tempered = (logits[0].double() / temperature).softmax(0)
    assert (tempered[drawn.tokens] >= boundary).all()
    assert drawn.nucleus_mass[0].item() == pytest.approx(mass, rel=1e-5)
    exact = logits[0].double().log_softmax(0)[drawn.tokens]
    torch.testing.assert_close(drawn.logps, exact, atol=2e-6, rtol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)), v=st.sampled_from([1, 7, 80, 300]), seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.0, 0.7, 1.0]), top_k=st.sampled_from([0, 3, 50]), top_p=st.sampled_from([1.0, 0.9]),
)  # fmt: skip
def test_equals_the_reference_token_for_token(kind, v, seed, temperature, top_k, top_p):
    logits = KINDS[kind](torch.Generator().manual_seed(seed), v).double().repeat(3, 1)
    if logits.max() == -torch.inf:
        return
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    ours, plain = draw(logits, 7, **how), draw(logits, 7, backend="reference", **how)
    assert torch.equal(ours.tokens, plain.tokens)
    torch.testing.assert_close(ours.logps, plain.logps, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.nucleus_mass, plain.nucleus_mass)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.9, 50, 0.95), (1.25, 50, 0.95), (0.7, 0, 0.8), (1.0, 5, 1.0)],
)
def test_distribution_by_chi_square(temperature, top_k, top_p):
    """100,000 draws over a small vocabulary; fixed seeds."""
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(3)) * 2
    p = huggingface(logits.double(), temperature, top_k, top_p)[0]
    tokens = draw(logits, 100_000, temperature=temperature, top_k=top_k, top_p=top_p, seed=11).tokens
    counts = torch.bincount(tokens, minlength=60)
    assert (counts[p == 0] == 0).all()
    often = p * len(tokens) >= 5
    expected = torch.cat([p[often], p[~often].sum()[None]]) * len(tokens)
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    few = expected > 0
    assert stats.chisquare(seen[few].numpy(), expected[few].numpy()).pvalue > 0.001


def test_draws_depend_on_their_keys_alone():
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    whole = draw(logits, 6, top_k=20, top_p=0.9).tokens.view(4, 6)
    later = draw(logits, 3, top_k=20, top_p=0.9, first_sample=3).tokens.view(4, 3)
    assert torch.equal(whole[:, 3:], later)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = sample_nucleus(
        logits[order],
        torch.arange(5),
        order,
        torch.full((4,), 5),
        torch.zeros(4),
        temperature=1.0,
        top_k=20,
        top_p=0.9,
    )
    assert torch.equal(shuffled.tokens, whole[order, 5])
    assert not torch.equal(whole, draw(logits, 6, top_k=20, top_p=0.9, seed=1).tokens.view(4, 6))


def test_keys_differ_in_every_part():
    u = [
        float(_uniforms(key, np.array([token]), position, sample)[0])
        for key in (1, 2) for token in (0, 1) for position in (0, 1) for sample in (0, 1)
    ]  # fmt: skip
    assert len(set(u)) == 16


def test_greedy_is_the_first_arg_max():
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0]])
    assert draw(logits, 2, temperature=0.0, top_k=1, top_p=0.1).tokens.tolist() == [1, 1]


def test_broken_rows_show():
    logits = torch.zeros(4, 9)
    logits[0, 3], logits[1, 8], logits[2] = torch.nan, torch.inf, -torch.inf
    for backend in (None, "reference"):
        drawn = draw(logits, 2, top_k=3, top_p=0.9, backend=backend)
        assert drawn.tokens.view(4, 2)[:3].eq(-1).all()
        assert drawn.logps.view(4, 2)[:3].isnan().all()
        assert drawn.nucleus_mass[:3].isnan().all()
        assert drawn.tokens[-1] >= 0


def test_mistakes_are_named():
    logits = torch.zeros(2, 5)
    for how in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(PMCError, match="need temperature >= 0"):
            draw(logits, 1, **how)
    with pytest.raises(PMCError, match="need float32 or float64"):
        draw(logits.bfloat16(), 1)
    with pytest.raises(PMCError, match="none of reference, cpu"):
        draw(logits, 1, backend="cuda")
    zeros = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(PMCError, match="cu_draws must rise"):
        sample_nucleus(logits, torch.tensor([0, 2, 1]), zeros, zeros, zeros, temperature=1.0)
