"""sample_nucleus: Hugging Face's kept set, the exact distribution, and draws that depend on keys alone."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pmc_fast.errors import PMCError
from pmc_fast.ops import native
from pmc_fast.ops.sample_nucleus import (
    Draws,
    _stream_key,
    _uniforms,
    kept_tokens,
    launch_settings,
    sample_nucleus,
    sample_nucleus_static,
    seeded,
)

GPU = torch.cuda.is_available()
DEVICE = {"cpu": "cpu", "cuda": "cuda" if GPU else "cpu", "reference": "cpu"}
DTYPES = {"cpu": [torch.float32, torch.float64], "cuda": [torch.float32, torch.bfloat16, torch.float16]}
HOW = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
# a row of the tests then takes several blocks, lanes are shared, and lists of flat or tied rows overflow
SMALL = {"select": {"BLOCK_V": 64, "BLOCK_LIST": 32, "num_warps": 1}, "race": {"BLOCK": 64, "num_warps": 1}}


@pytest.fixture(params=["cpu", "cuda", "cuda in small blocks"])
def backend(request, monkeypatch):
    if "small" in request.param:
        from pmc_fast.kernels import sampling

        monkeypatch.setattr(sampling, "CONFIGS", SMALL)
        monkeypatch.setattr(sampling, "CAPACITY", 70)
    return request.param.split()[0]


def how_many(backend, count, interpreted):
    """Return `count`, or in Triton's interpreter, which takes 10 ms a draw, `interpreted`."""
    return interpreted if backend == "cuda" and not GPU else count


def draw(logits, count, *, seed=0, first_sample=0, backend="cpu", **how):
    """Draw `count` tokens from each row; a row's stream is its number."""
    rows = logits.shape[0]
    keys = (
        torch.arange(rows + 1) * count,
        torch.arange(rows).repeat_interleave(count),
        torch.arange(first_sample, first_sample + count).repeat(rows),
        torch.zeros(rows * count, dtype=torch.int64),
    )
    return sample(logits, *keys, seed=seed, backend=backend, **HOW | how)


def sample(logits, *keys, backend, **how):
    """Draw on the backend's device; results on the CPU."""
    on = DEVICE[backend]
    drawn = sample_nucleus(logits.to(on), *(k.to(on) for k in keys), backend=backend, **how)
    return Draws(drawn.tokens.cpu(), drawn.logps.cpu(), drawn.nucleus_mass.cpu())


def leave_out_close_cuts(row, temperature, top_k, top_p):
    """Skip a case in which a sum is top_p but for rounding: whether it is one token longer is free."""
    if top_p < 1 and temperature > 0:
        left = huggingface(row[None], temperature, top_k, 1.0)[0].sort(descending=True).values
        assume((left.cumsum(0) - top_p).abs().min() > 1e-6)


def assert_same_draws(ours, plain, logits, count, temperature, seed):
    """Equal but where two tokens' race is a tie within float64's rounding."""
    for d in (ours.tokens != plain.tokens).nonzero()[:, 0].tolist():
        row, i = divmod(d, count)
        pair = torch.stack([ours.tokens[d], plain.tokens[d]])
        assert (pair >= 0).all()
        uniform = torch.from_numpy(_uniforms(_stream_key(seed, row), pair.numpy(), 0, i))
        log_speed = logits[row].double()[pair] / temperature - (-uniform.log()).log()
        assert (log_speed[0] - log_speed[1]).abs() < 1e-9, (row, i, pair)


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


def test_kept_set_and_mass_are_hugging_faces(backend):
    @settings(max_examples=how_many(backend, 150, 25), deadline=None)
    @given(
        kind=st.sampled_from(list(KINDS)), v=st.sampled_from([2, 40, 65, 300]), seed=st.integers(0, 10**6),
        temperature=st.sampled_from([0.5, 0.9, 1.0, 1.25]), top_k=st.sampled_from([0, 1, 5, 50]),
        top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]), dtype=st.sampled_from(DTYPES[backend]),
    )  # fmt: skip
    def check(kind, v, seed, temperature, top_k, top_p, dtype):
        logits = KINDS[kind](torch.Generator().manual_seed(seed), v).to(dtype)
        if logits.max() == -torch.inf:
            return
        row = logits[0].double()
        leave_out_close_cuts(row, temperature, top_k, top_p)
        p = huggingface(row[None], temperature, top_k, top_p)[0]
        kept, mine, mass = kept_tokens(row, temperature, top_k, top_p)
        # which of several tokens tied with the boundary are kept is free: their number and mass are not
        assert len(kept) == int((p > 0).sum())
        torch.testing.assert_close(mine.sort().values / mass, p[p > 0].sort().values)
        count = how_many(backend, 400, 10)
        drawn = draw(logits, count, backend=backend, temperature=temperature, top_k=top_k, top_p=top_p)
        boundary = mine.min() * (1 - 1e-6)
        tempered = (row / temperature).softmax(0)
        assert (tempered[drawn.tokens] >= boundary).all()
        assert drawn.nucleus_mass[0].item() == pytest.approx(mass, rel=1e-5)
        exact = row.log_softmax(0)[drawn.tokens]
        torch.testing.assert_close(drawn.logps, exact, atol=2e-6, rtol=2e-6)

    check()


def test_equals_the_reference_token_for_token(backend):
    @settings(max_examples=how_many(backend, 60, 20), deadline=None)
    @given(
        kind=st.sampled_from(list(KINDS)), v=st.sampled_from([1, 7, 80, 300]), seed=st.integers(0, 2**64 - 1),
        temperature=st.sampled_from([0.0, 0.7, 1.0]), top_k=st.sampled_from([0, 3, 50]),
        top_p=st.sampled_from([1.0, 0.9]),
    )  # fmt: skip
    def check(kind, v, seed, temperature, top_k, top_p):
        logits = KINDS[kind](torch.Generator().manual_seed(seed % 2**32), v)
        logits = logits.to(torch.float64 if backend == "cpu" else torch.float32).repeat(3, 1)
        if logits.max() == -torch.inf:
            return
        leave_out_close_cuts(logits[0].double(), temperature, top_k, top_p)
        count = how_many(backend, 7, 4)
        how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        ours, plain = draw(logits, count, backend=backend, **how), draw(logits, count, backend="reference", **how)
        if backend == "cpu" or temperature == 0:
            assert torch.equal(ours.tokens, plain.tokens)
        else:
            assert_same_draws(ours, plain, logits, count, temperature, seed)
        same = ours.tokens == plain.tokens
        torch.testing.assert_close(ours.logps[same], plain.logps[same], atol=1e-6, rtol=1e-6)
        exact = {} if backend == "cpu" else {"atol": 0.0, "rtol": 1e-5}
        torch.testing.assert_close(ours.nucleus_mass, plain.nucleus_mass, **exact)

    check()


ROWS = {
    "flat": lambda z: z * 0,
    "normal": lambda z: z * 3,
    "certain": lambda z: torch.where(torch.arange(z.shape[1]) == 777, 60.0, z),
    "steep": lambda z: z * 200,  # most weights are 0 in float32
    "mostly left out": lambda z: torch.where(z > -1.5, -torch.inf, z),
    "in steps": lambda z: (z * 4).round() / 4,  # many ties
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("temperature", [0.02, 1.0, 1.3, 40.0])
def test_a_race_over_all_tokens_is_every_cpus(kind, temperature, monkeypatch):
    """With AVX-512 most tokens are ruled out by bounds on their weights; elsewhere all weights are computed."""
    torch.manual_seed(0)
    logits = ROWS[kind](torch.randn(3, 49_157))
    best = draw(logits, 150, temperature=temperature, seed=5)
    monkeypatch.setattr(native, "isa", lambda: 0)
    generic = draw(logits, 150, temperature=temperature, seed=5)
    assert torch.equal(best.tokens, generic.tokens)
    assert torch.allclose(best.logps, generic.logps, rtol=0, atol=1e-4)
    assert best.nucleus_mass.tolist() == generic.nucleus_mass.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.9, 50, 0.95), (1.25, 50, 0.95), (0.7, 0, 0.8), (1.5, 0, 1.0)]
)
def test_presets_equal_the_reference_over_many_draws(backend, temperature, top_k, top_p):
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(4)) * 2
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": 9}
    count = how_many(backend, 200, 16)
    ours, plain = draw(logits, count, backend=backend, **how), draw(logits, count, backend="reference", **how)
    assert_same_draws(ours, plain, logits, count, temperature, 9)
    assert len(plain.tokens.unique()) > 5  # so that a wrong weight shows


@pytest.mark.parametrize("how", [{"top_k": 50, "top_p": 0.95}, {"top_p": 0.9}, {}], ids=str)
@pytest.mark.parametrize("kind", ["random", "tied"])
def test_triton_on_rows_of_real_size(kind, how):
    """A vocabulary that nothing divides, in rows further apart than they are long; "tied" overflows its list for top_p."""
    wide = KINDS[kind](torch.Generator().manual_seed(5), 2 * 50300).view(2, 50300) * 3
    logits = wide.bfloat16().to(DEVICE["cuda"])[:, :50257]
    how = {"temperature": 0.9, "seed": 2**63 + 1} | how
    ours, plain = draw(logits, 2, backend="cuda", **how), draw(logits.cpu(), 2, backend="reference", **how)
    assert_same_draws(ours, plain, logits.cpu(), 2, how["temperature"], how["seed"])
    torch.testing.assert_close(ours.nucleus_mass, plain.nucleus_mass, atol=0.0, rtol=1e-5)


def test_of_tokens_tied_at_the_cut_the_first_are_kept(backend):
    drawn = draw(torch.zeros(2, 300), how_many(backend, 200, 15), backend=backend, top_p=0.499)
    assert drawn.tokens.max() < 150
    assert drawn.nucleus_mass.tolist() == pytest.approx([0.5, 0.5], rel=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "cuda", "reference"])
def test_zeros_of_both_signs_are_tied(backend):
    logits = torch.tensor([[-1.0, -0.0, 1.0, 0.0], [-1.0, 0.0, 1.0, -0.0]])
    drawn = draw(logits, 10, backend=backend, top_k=2)
    mass = logits[0].double().softmax(0)[1:].sum().item()
    assert drawn.nucleus_mass.tolist() == pytest.approx([mass, mass], rel=1e-6)
    logits = torch.tensor([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]])
    assert draw(logits, 1, backend=backend, temperature=0.0).tokens.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.9, 50, 0.95), (1.25, 50, 0.95), (0.7, 0, 0.8), (1.0, 5, 1.0)],
)
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_distribution_by_chi_square(backend, temperature, top_k, top_p):
    """100,000 draws over a small vocabulary; fixed seeds."""
    if backend == "cuda" and not GPU and (temperature, top_k) != (1.25, 50):
        pytest.skip("20 s in Triton's interpreter: one setting is drawn there")
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(3)) * 2
    p = huggingface(logits.double(), temperature, top_k, top_p)[0]
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": 11}
    tokens = draw(logits, how_many(backend, 100_000, 2000), backend=backend, **how).tokens
    counts = torch.bincount(tokens, minlength=60)
    assert (counts[p == 0] == 0).all()
    often = p * len(tokens) >= 5
    expected = torch.cat([p[often], p[~often].sum()[None]]) * len(tokens)
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    few = expected > 0
    assert stats.chisquare(seen[few].numpy(), expected[few].numpy()).pvalue > 0.001


def test_draws_depend_on_their_keys_alone(backend):
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    how = {"top_k": 20, "top_p": 0.9, "backend": backend}
    whole = draw(logits, 6, **how).tokens.view(4, 6)
    later = draw(logits, 3, first_sample=3, **how).tokens.view(4, 3)
    assert torch.equal(whole[:, 3:], later)
    order = torch.tensor([2, 0, 3, 1])
    keys = (order, torch.full((4,), 5), torch.zeros(4))
    shuffled = sample(logits[order], torch.arange(5), *keys, temperature=1.0, **how)
    assert torch.equal(shuffled.tokens, whole[order, 5])
    # rows without draws, and with several
    cu_draws = torch.tensor([0, 0, 3, 3, 4])
    keys = (torch.tensor([1, 1, 1, 3]), torch.tensor([2, 0, 5, 1]), torch.zeros(4))
    uneven = sample(logits, cu_draws, *keys, temperature=1.0, **how)
    assert torch.equal(uneven.tokens, whole[keys[0], keys[1]])
    for other in ({"seed": 1}, {"first_sample": 1}):
        assert not torch.equal(whole, draw(logits, 6, **how, **other).tokens.view(4, 6))
    positions = sample(
        logits[order], torch.arange(5), order, torch.full((4,), 5), torch.arange(4) + 2**31, temperature=1.0, **how
    )
    assert not torch.equal(positions.tokens, shuffled.tokens)


SETTINGS = [
    {"temperature": 0.9, "top_k": 50, "top_p": 0.95},
    {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
    {"temperature": 1.3, "top_k": 0, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 0.7, "top_k": 10**12, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 5, "top_p": 1.0},
]


@pytest.mark.parametrize("vocab", [300, 1])
def test_settings_in_memory_draw_the_same(backend, vocab):
    """As CUDA graphs draw: settings are read when the kernels run, results go where they went before, bit for bit."""
    device, count = DEVICE[backend], 5
    logits = (torch.randn(3, vocab, generator=torch.Generator().manual_seed(4)) * 2).to(device)
    ends, samples, zeros = torch.arange(4) * count, torch.arange(count).repeat(3), torch.zeros(3 * count)
    settings = torch.empty(6, dtype=torch.float64, device=device)
    wide = {"dtype": torch.float64, "device": device}
    out = Draws(
        torch.empty(3 * count, dtype=torch.int64, device=device),
        torch.empty(3 * count, **wide),
        torch.empty(3, **wide),
    )
    for seed, how in enumerate(SETTINGS):
        streams = torch.arange(3).repeat_interleave(count)
        keys = [k.to(device, torch.int64) for k in (ends, streams, samples, zeros)]
        expected = sample_nucleus(logits, *keys, seed=seed, backend=backend, **how)
        settings.copy_(torch.tensor(launch_settings(**how), dtype=torch.float64))
        keys[1] = torch.tensor([seeded(s, seed) for s in streams.tolist()], device=device)
        if backend == "cuda" and not GPU:  # Triton's interpreter
            written = out.tokens, out.logps, out.nucleus_mass
            native.triton_kernels("sampling").sample_nucleus(logits, *keys, *written, settings, 0)
        else:
            sample_nucleus_static(logits, keys, settings, out)
        assert torch.equal(out.tokens, expected.tokens)
        assert torch.equal(out.logps, expected.logps)
        assert torch.equal(out.nucleus_mass, expected.nucleus_mass)


@given(seed=st.integers(-(2**70), 2**70), stream=st.integers(-(2**63), 2**63 - 1))
def test_a_seed_may_be_in_the_stream(seed, stream):
    mixed = seeded(stream, seed)
    assert -(2**63) <= mixed < 2**63
    assert _stream_key(0, mixed) == _stream_key(seed, stream)


def test_keys_differ_in_every_part():
    u = [
        float(_uniforms(key, np.array([token]), position, sample)[0])
        for key in (1, 2) for token in (0, 1) for position in (0, 1) for sample in (0, 1)
    ]  # fmt: skip
    assert len(set(u)) == 16


def test_greedy_is_the_first_arg_max(backend):
    logits = torch.randint(4, (3, 200), generator=torch.Generator().manual_seed(2)).float()
    drawn = draw(logits, 2, backend=backend, temperature=0.0, top_k=1, top_p=0.1)
    assert drawn.tokens.view(3, 2).T.tolist() == [logits.argmax(1).tolist()] * 2
    assert drawn.nucleus_mass.tolist() == [1.0] * 3
    exact = logits.double().log_softmax(1).amax(1).repeat_interleave(2)
    torch.testing.assert_close(drawn.logps, exact, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    "how", [{"top_k": 3, "top_p": 0.9}, {"top_k": 3}, {"top_p": 0.9}, {}, {"temperature": 0.0}], ids=str
)
@pytest.mark.parametrize("backend", ["cpu", "cuda", "reference"])
def test_broken_rows_show(backend, how):
    logits = torch.zeros(4, 9)
    logits[0, 3], logits[1, 8], logits[2] = torch.nan, torch.inf, -torch.inf
    drawn = draw(logits, 2, backend=backend, **how)
    assert drawn.tokens.view(4, 2)[:3].eq(-1).all()
    assert drawn.logps.view(4, 2)[:3].isnan().all()
    assert drawn.nucleus_mass[:3].isnan().all()
    assert drawn.tokens[-1] >= 0
    assert drawn.nucleus_mass[3] > 0


def test_on_cuda_a_draw_that_no_row_owns_shows():
    logits, zeros = torch.zeros(2, 5), torch.zeros(4, dtype=torch.int64)
    drawn = sample(logits, torch.tensor([1, 2, 3]), zeros, zeros, zeros, backend="cuda", temperature=1.0)
    assert (drawn.tokens >= 0).tolist() == [False, True, True, False]
    assert drawn.logps.isnan().tolist() == [True, False, False, True]


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_cuda_graph_draws_from_what_the_logits_then_hold():
    g = torch.Generator("cuda").manual_seed(0)
    logits, later = (torch.randn(3, 50257, device="cuda", generator=g) for _ in range(2))
    keys = [torch.arange(n, device="cuda") for n in (4, 3, 3, 3)]
    how = {"temperature": 0.9, "top_k": 50, "top_p": 0.95}
    first, second = sample_nucleus(logits, *keys, **how), sample_nucleus(later, *keys, **how)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = sample_nucleus(logits, *keys, **how)
    for content, expected in ((logits.clone(), first), (later, second)):
        logits.copy_(content)
        graph.replay()
        assert torch.equal(drawn.tokens, expected.tokens)
        assert torch.equal(drawn.logps, expected.logps)
        assert torch.equal(drawn.nucleus_mass, expected.nucleus_mass)


def test_mistakes_are_named():
    logits = torch.zeros(2, 5)
    for how in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(PMCError, match="need temperature >= 0"):
            draw(logits, 1, **how)
    with pytest.raises(PMCError, match="'cpu' needs float32 or float64"):
        draw(logits.bfloat16(), 1)
    with pytest.raises(PMCError, match="'cuda' needs float32 or bfloat16 or float16"):
        draw(logits.double(), 1, backend="cuda")
    for backend in ("cpu", "cuda"):
        with pytest.raises(PMCError, match="last dimension contiguous"):
            draw(torch.zeros(5, 2).T, 1, backend=backend)
    zeros = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(PMCError, match="logits are on cpu, draws on"):
        sample_nucleus(logits, torch.arange(3), zeros, zeros, zeros.to("meta"), temperature=1.0)
    for backend in ("cpu", "reference"):
        with pytest.raises(PMCError, match="cu_draws must rise"):
            sample_nucleus(logits, torch.tensor([0, 2, 1]), zeros, zeros, zeros, temperature=1.0, backend=backend)
    with pytest.raises(PMCError, match="cu_draws must rise"):  # shapes are checked everywhere
        sample(logits, torch.arange(2), zeros, zeros, zeros, temperature=1.0, backend="cuda")
