"""The CUDA kernel of decode_attention: on a GPU, and without one in an emulation of its threads."""

import ctypes
import importlib.util
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmc_fast.errors import PMCError
from pmc_fast.ops import native
from pmc_fast.ops.decode_attention import DTYPES, VARIANTS, StepIndex, decode_attention, kernel_name
from pmc_fast.rollout.inputs import DRAWS, ENTRIES, INDEX, Bucket
from tests.padded import padded

ROOT = Path(__file__).resolve().parents[2]
BUILT = importlib.util.find_spec("pmc_fast._cuda") is not None
needs_gpu = pytest.mark.skipif(
    not (BUILT and torch.cuda.is_available()),
    reason="needs a GPU and the CUDA module: PMC_FAST_CUDA=1 pip install -e '.[dev]' && pytest tests/ops/test_decode_cuda.py",
)


def random_step(seed, dtype, kv_heads, group, dim, questions, longest=12, rows=20, suffixes=40):
    """Questions that decode, whose rows see a few of this step's other rows, or that prefill."""
    generator = np.random.default_rng(seed)
    prefix_len, suffixes_of, prefixes, cu_rows, cu_prefix, own, at = [], [], [], [0], [0], [], 0
    for _ in range(questions):
        prompt = int(generator.integers(1, longest + 1))
        prefix, at = np.arange(at, at + prompt), at + prompt
        if generator.random() < 0.4:
            first = int(generator.integers(0, prompt))
            prefix_len += range(first + 1, prompt + 1)
            suffixes_of += [np.empty(0, int)] * (prompt - first)
            own += prefix[first:].tolist()
        else:
            for _ in range(int(generator.integers(1, rows + 1))):
                # a guess continues a row of the same step: it sees that row's own slot, and all before it
                parent = suffixes_of[-1] if len(prefix_len) > cu_rows[-1] and generator.random() < 0.4 else None
                if parent is None:
                    parent = np.arange(at, at + generator.integers(0, suffixes))
                    at += len(parent)
                suffixes_of.append(np.append(parent, at))
                own.append(at)
                prefix_len.append(prompt)
                at += 1
        cu_rows.append(len(prefix_len))
        cu_prefix.append(cu_prefix[-1] + prompt)
        prefixes.append(prefix)
    order = generator.permutation(at)  # slots in no order
    cu_suffix = np.cumsum([0, *map(len, suffixes_of)])
    arrays = (
        order[own],
        prefix_len,
        cu_suffix,
        order[np.concatenate(suffixes_of)],
        cu_rows,
        cu_prefix,
        order[np.concatenate(prefixes)],
    )
    index = StepIndex(*(torch.from_numpy(np.array(a, dtype=np.int32)) for a in arrays))
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    r = len(prefix_len)
    q, k = make(kv_heads * group, r, dim).transpose(0, 1), make(kv_heads, r, dim).transpose(0, 1)
    return index, q, k, make(r, kv_heads, dim), make(at, kv_heads, dim), make(at, kv_heads, dim)


def padded_step(index, q, k, v, k_pool, v_pool, rows, blocks):
    """The same step with more rows and more, also empty, blocks; q, k, v and the pool longer, by NaN where unused."""
    plan = {name: getattr(index, name).numpy() for name in INDEX}
    plan |= {name: np.arange(len(q)) for name in ("tokens", "positions", "logit_rows", "sources", *DRAWS)}
    bucket = Bucket(len(q) + rows, len(index.cu_rows) + blocks, len(q) + rows, len(q) + rows)
    arrays = padded(plan, bucket, len(k_pool))
    arrays |= {"suffix": arrays[ENTRIES], "prefix": arrays[ENTRIES]}
    longer = lambda t, fill: torch.cat([t, torch.full((rows, *t.shape[1:]), fill, dtype=t.dtype)])  # noqa: E731
    index = StepIndex(*(torch.from_numpy(arrays[name]) for name in INDEX))
    return index, *(longer(t, 1.0) for t in (q, k, v)), *(longer(t, torch.nan) for t in (k_pool, v_pool))


def exact_and_bound(index, q, k, v, k_pool, v_pool, how):
    """The reference in float64 of the same numbers, and how far off a result may be."""
    wide = [t.double() for t in (q, k, v, k_pool, v_pool)]
    exact = decode_attention(*wide, index, backend="reference", **how)
    # in bfloat16 the result alone is rounded
    bound = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2**-8 * exact.abs().max().item()}[q.dtype]
    return exact, wide[3:], bound


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    """Compile the kernel for the CPU."""
    target = tmp_path_factory.mktemp("emulation") / "emulation.so"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-shared", "-fPIC",
               f"-I{ROOT / 'csrc'}", str(ROOT / "tests/emulated_attention.cpp"), "-o", str(target)]  # fmt: skip
    subprocess.run(command, check=True, timeout=300)
    return ctypes.CDLL(str(target))


def emulate(
    library, index, q, k, v, k_pool, v_pool, *, scale, softcap=None, window=None, order=0, variant="fma", tile_rows=0
):
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    strided = [n for t in (q, k, v) for n in (t.data_ptr(), t.stride(0), t.stride(1))]
    numbers = [*strided, k_pool.data_ptr(), v_pool.data_ptr(), out.data_ptr(), q.shape[1], k.shape[1], q.shape[2],
               window or 0, *index.addresses]  # fmt: skip
    numbers = (ctypes.c_int64 * len(numbers))(*numbers)
    factors = (ctypes.c_double * 2)(scale, softcap or 0.0)
    if variant == "mma":
        assert q.dtype == torch.bfloat16
        library.emulate_mma(numbers, factors, ctypes.c_int64(tile_rows), ctypes.c_uint(order))
    else:
        library.emulate(list(DTYPES).index(q.dtype), numbers, factors, ctypes.c_uint(order))
    return out


SHAPES = [  # kv heads, group, dim, questions, longest prompt, rows, suffixes
    (3, 3, 64, 8, 60, 2, 40),  # SmolLM2, few rows: warps split the keys
    (1, 3, 128, 2, 300, 20, 50),  # Llama 3.2: a prompt of more keys than are staged at once
    (2, 1, 64, 2, 50, 40, 20),  # Phi: several rows a warp
    (1, 5, 80, 2, 20, 5, 40),  # a row over two warps
    (1, 16, 8, 2, 40, 6, 70),
    (1, 2, 256, 2, 40, 6, 40),
    (1, 1, 72, 300, 3, 1, 2),  # more questions than a block has threads
    (1, 8, 96, 2, 130, 5, 60),
    (1, 4, 128, 1, 400, 12, 30),
]
KERNELS = [*(("fma", dtype) for dtype in DTYPES), ("mma", torch.bfloat16)]
kernels = pytest.mark.parametrize(("variant", "dtype"), KERNELS, ids=str)


def served(variant, dim):
    """The next head size that a variant serves."""
    return -(-dim // 16) * 16 if variant == "mma" else dim


@kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated_kernel(emulation, shape, variant, dtype):
    kv_heads, group, dim, *rest = shape
    step = random_step(1, dtype, kv_heads, group, served(variant, dim), *rest)
    how = {"scale": dim**-0.5}
    exact, pools, bound = exact_and_bound(*step, how)
    index, q, k, v, *ours = step
    out = emulate(emulation, index, q, k, v, *ours, variant=variant, **how)
    assert (out.double() - exact).abs().max().item() <= bound
    assert all(torch.equal(a.double(), b) for a, b in zip(ours, pools, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), dtype=st.sampled_from(list(DTYPES)), kv_heads=st.sampled_from([1, 2]),
    group=st.sampled_from([1, 2, 3, 4, 7, 9]), dim=st.sampled_from([8, 16, 72, 136]), questions=st.integers(1, 4),
    softcap=st.sampled_from([None, 2.0]), window=st.sampled_from([None, 1, 5, 13, 1000]),
    order=st.integers(0, 5),
)  # fmt: skip
def test_emulated_kernel_in_any_order(
    emulation, seed, dtype, kv_heads, group, dim, questions, softcap, window, order
):
    step = random_step(seed, dtype, kv_heads, group, dim, questions, rows=7)
    how = {"scale": dim**-0.5, "softcap": softcap, "window": window}
    exact, pools, bound = exact_and_bound(*step, how)
    index, q, k, v, *ours = step
    out = emulate(emulation, index, q, k, v, *ours, order=order, **how)
    assert (out.double() - exact).abs().max().item() <= bound
    assert all(torch.equal(a.double(), b) for a, b in zip(ours, pools, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), kv_heads=st.sampled_from([1, 2]), group=st.sampled_from([1, 2, 3, 4, 7, 8, 9, 17, 33]),
    dim=st.sampled_from([16, 48, 64, 80, 144, 256]), questions=st.integers(1, 4), longest=st.sampled_from([12, 70]),
    softcap=st.sampled_from([None, 2.0]), window=st.sampled_from([None, 1, 5, 13, 37, 1000]),
    tile_rows=st.integers(0, 16), order=st.integers(0, 5),
)  # fmt: skip
def test_emulated_mma_in_any_order(
    emulation, seed, kv_heads, group, dim, questions, longest, softcap, window, tile_rows, order
):
    step = random_step(seed, torch.bfloat16, kv_heads, group, dim, questions, longest, rows=7)
    how = {"scale": dim**-0.5, "softcap": softcap, "window": window}
    exact, pools, bound = exact_and_bound(*step, how)
    index, q, k, v, *ours = step
    out = emulate(emulation, index, q, k, v, *ours, order=order, variant="mma", tile_rows=tile_rows, **how)
    assert (out.double() - exact).abs().max().item() <= bound
    assert all(torch.equal(a.double(), b) for a, b in zip(ours, pools, strict=True))


def test_emulated_mma_is_the_same_for_all_tiles(emulation):
    step = random_step(11, torch.bfloat16, 1, 3, 32, 3, 60, rows=9)
    for window in (None, 30):
        first, *others = (
            emulate(emulation, *step, scale=0.2, window=window, variant="mma", tile_rows=n) for n in (1, 2, 3, 5)
        )
        assert all(torch.equal(first, other) for other in others)  # digit by digit


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), kernel=st.sampled_from(KERNELS), group=st.sampled_from([1, 3, 5]),
    questions=st.integers(1, 4), rows=st.integers(0, 19), blocks=st.integers(0, 9),
    window=st.sampled_from([None, 1, 5]), order=st.integers(0, 3),
)  # fmt: skip
def test_emulated_kernel_of_a_padded_step(emulation, seed, kernel, group, questions, rows, blocks, window, order):
    variant, dtype = kernel
    step = random_step(seed, dtype, 2, group, 16, questions, rows=7)
    wide = padded_step(*step, rows, blocks)
    how = {"scale": 0.25, "window": window, "order": order, "variant": variant}
    expected = emulate(emulation, *step, **how)
    out = emulate(emulation, *wide, **how)
    real = len(expected)
    assert torch.equal(out[:real], expected)  # digit by digit
    assert torch.equal(out[real:], torch.ones_like(out[real:]))  # they see their own value alone
    for pool, longer in zip(step[4:], wide[4:], strict=True):
        assert torch.equal(longer[: len(pool)], pool)


def rows_of(index):
    """Each row with its block."""
    ends = index.cu_rows.tolist()
    return [(row, block) for block, end in enumerate(ends[1:]) for row in range(ends[block], end)]


@kernels
def test_emulated_kernel_gives_a_row_alone_the_same(emulation, variant, dtype):
    index, q, k, v, k_pool, v_pool = random_step(7, dtype, 2, 4, served(variant, 40), 3, 40, rows=5)
    together = emulate(emulation, index, q, k, v, k_pool, v_pool, scale=0.2, variant=variant)
    for row, block in rows_of(index):
        prefix = index.prefix[int(index.cu_prefix[block]) : int(index.cu_prefix[block + 1])]
        suffix = index.suffix[int(index.cu_suffix[row]) : int(index.cu_suffix[row + 1])]
        ends = [torch.tensor([0, end], dtype=torch.int32) for end in (len(suffix), 1, len(prefix))]
        one = slice(row, row + 1)
        alone = StepIndex(index.slots[one], index.prefix_len[one], ends[0], suffix, *ends[1:], prefix)
        out = emulate(emulation, alone, q[one], k[one], v[one], k_pool, v_pool, scale=0.2, variant=variant)
        assert torch.equal(out, together[one])  # digit by digit


@kernels
@pytest.mark.parametrize("window", [None, 20])
def test_emulated_kernel_shows_a_row_nothing_else(emulation, window, variant, dtype):
    index, q, k, v, k_pool, v_pool = random_step(9, dtype, 1, 3, 16, 2, 40, rows=4)
    how = {"scale": 0.3, "window": window, "variant": variant}
    before = emulate(emulation, index, q, k, v, k_pool.clone(), v_pool.clone(), **how)
    for row, block in rows_of(index):
        hidden = torch.ones(len(k_pool), dtype=torch.bool)
        hidden[index.visible(row, block, window)] = False
        theirs = hidden[index.slots.long()][:, None, None]
        spoiled = [t.masked_fill(hidden[:, None, None], torch.nan) for t in (k_pool, v_pool)]
        spoiled_rows = [t.masked_fill(theirs, torch.nan) for t in (k, v)]
        after = emulate(emulation, index, q, *spoiled_rows, *spoiled, **how)
        assert torch.equal(after[row], before[row])  # digit by digit


@kernels
def test_emulated_kernel_keeps_what_is_not_finite(emulation, variant, dtype):
    index, q, k, v, k_pool, v_pool = random_step(4, dtype, 1, 2, 16, 1)
    row = int(index.cu_rows[1]) - 1
    how = {"scale": 0.3, "variant": variant}
    infinite = v.clone()
    infinite[row] = torch.inf
    out = emulate(emulation, index, q, k, infinite, k_pool.clone(), v_pool.clone(), **how)
    assert (out[row] == torch.inf).all()
    for value, spoiled in ((torch.nan, k), (torch.inf, k), (torch.nan, v)):
        changed = spoiled.clone()
        changed[row] = value
        out = emulate(
            emulation, index, q, changed if spoiled is k else k, changed if spoiled is v else v, k_pool.clone(),
            v_pool.clone(), **how,
        )  # fmt: skip
        assert out[row].isnan().all()


@given(group=st.integers(1, 40), rows=st.integers(0, 9))
def test_units_hold_every_query_once(emulation, group, rows):
    emulation.units_of.restype = ctypes.c_int64
    arrays = [(ctypes.c_int64 * emulation.units_of(group, rows, None, None, None))() for _ in range(3)]
    emulation.units_of(group, rows, *arrays)
    queries = [(row, head + i) for row, head, heads in zip(*arrays, strict=True) for i in range(heads)]
    assert queries == [(row, head) for row in range(rows) for head in range(group)]
    assert max(arrays[2], default=1) <= 3


@pytest.mark.skipif(not BUILT, reason="needs the CUDA module: PMC_FAST_CUDA=1 pip install -e .")
@pytest.mark.parametrize("dim", [0, 12, 264])
def test_sizes_that_the_kernel_does_not_serve_are_refused(dim):
    with pytest.raises(ValueError, match="multiples of 8 up to 256"):
        native.cuda().decode_attention_f32(
            (0, 0, 0), (0, 0, 0), (0, 0, 0), 0, 0, 0, (1, 1, dim), 1.0, 0.0, 0, (0,) * 7 + (1, 1), 0
        )


@pytest.mark.skipif(not BUILT, reason="needs the CUDA module: PMC_FAST_CUDA=1 pip install -e .")
@pytest.mark.parametrize(("dim", "tile_rows"), [(24, 0), (264, 0), (32, -1)])
def test_sizes_that_mma_does_not_serve_are_refused(dim, tile_rows):
    with pytest.raises(ValueError, match=r"decode_attention on CUDA.*: a head of .* it serves multiples of"):
        native.cuda().decode_attention_mma_bf16(
            (0, 0, 0), (0, 0, 0), (0, 0, 0), 0, 0, 0, (1, 1, dim), 1.0, 0.0, 0, (0,) * 7 + (1, 1), 0, tile_rows
        )


def test_mma_serves_what_it_can_and_fma_the_rest():
    chosen = {
        (variant, dtype, dim): kernel_name("cuda", variant, dtype, dim)
        for variant in VARIANTS for dtype in DTYPES for dim in (8, 24, 64, 80, 256)
    }  # fmt: skip
    mma = {key for key, name in chosen.items() if name == "decode_attention_mma_bf16"}
    assert mma == {("mma", torch.bfloat16, dim) for dim in (64, 80, 256)}
    assert all(name == f"decode_attention_{DTYPES[key[1]]}" for key, name in chosen.items() if key not in mma)
    assert kernel_name("cpu", "mma", torch.bfloat16, 64) == "decode_attention_bf16"
    if BUILT:
        assert all(hasattr(native.cuda(), name) for name in chosen.values())
    step = random_step(1, torch.bfloat16, 1, 2, 16, 1)
    with pytest.raises(PMCError, match="decode_attention: variant 'wmma': use one of fma, mma"):
        decode_attention(*step[1:], step[0], scale=1.0, variant="wmma")


@pytest.mark.skipif(not BUILT, reason="needs the CUDA module: PMC_FAST_CUDA=1 pip install -e .")
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize(("name", "tiles"), [("f32", ()), ("mma_bf16", (0,))])
def test_without_a_gpu_the_module_imports_and_a_call_says_why_it_fails(name, tiles):
    with pytest.raises(RuntimeError, match="decode_attention on CUDA: ") as caught:
        getattr(native.cuda(), f"decode_attention_{name}")(
            (0, 0, 0), (0, 0, 0), (0, 0, 0), 0, 0, 0, (1, 1, 64), 1.0, 0.0, 0, (0,) * 7 + (1, 1), 0, *tiles
        )
    assert "\n" not in str(caught.value)


def on_gpu(index, *tensors):
    return index.to(torch.device("cuda")), *(t.cuda() for t in tensors)


@needs_gpu
@kernels
@pytest.mark.parametrize("how", [{}, {"softcap": 2.0}, {"window": 5}, {"window": 45, "softcap": 20.0}], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (8, 3, 128, 8, 200, 20, 100), (3, 3, 64, 9, 300, 40, 60)], ids=str)
def test_gpu(shape, how, variant, dtype):
    kv_heads, group, dim, *rest = shape
    step = random_step(2, dtype, kv_heads, group, served(variant, dim), *rest)
    how = {"scale": dim**-0.5} | how
    exact, pools, bound = exact_and_bound(*step, how)
    index, q, k, v, *ours = on_gpu(*step)
    out = decode_attention(q, k, v, *ours, index, variant=variant, **how)
    assert (out.double().cpu() - exact).abs().max().item() <= bound
    assert all(torch.equal(a.double().cpu(), b) for a, b in zip(ours, pools, strict=True))


@needs_gpu
@kernels
@pytest.mark.parametrize(("rows", "blocks"), [(0, 0), (0, 5), (1, 0), (37, 60)])
def test_gpu_padded_step(rows, blocks, variant, dtype):
    step = random_step(6, dtype, 3, 3, 64, 8, 100, 20, 60)
    index, *tensors = on_gpu(*step)
    expected = decode_attention(*tensors, index, scale=0.1, variant=variant)
    index, *tensors = on_gpu(*padded_step(*step, rows, blocks))
    out = decode_attention(*tensors, index, scale=0.1, variant=variant)
    assert torch.equal(out[: len(expected)], expected)
    assert out.isfinite().all()


@needs_gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_gpu_repeats_digit_by_digit(variant, monkeypatch):
    step = random_step(3, torch.bfloat16, 3, 3, 64, 8, 100, 20, 60)
    index, q, k, v, *pools = on_gpu(*step)
    again = lambda: decode_attention(q, k, v, *pools, index, scale=0.1, variant=variant)  # noqa: E731
    first = again()
    assert all(torch.equal(first, again()) for _ in range(20))
    for rows in (1, 2, 5):  # of a tile of mma
        monkeypatch.setattr("pmc_fast.ops.decode_attention.MMA_TILE_ROWS", rows)
        assert torch.equal(first, again())


@needs_gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_gpu_graph_and_stream(variant, monkeypatch):
    monkeypatch.setattr("pmc_fast.ops.decode_attention.VARIANT", variant)
    index, q, k, v, k_pool, v_pool = on_gpu(*random_step(5, torch.bfloat16, 2, 3, 128, 4, 100, 20, 60))
    index.addresses  # noqa: B018
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        decode_attention(q, k, v, k_pool, v_pool, index, scale=0.1)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, k_pool, v_pool, index, scale=0.1)
    g = torch.Generator("cuda").manual_seed(0)
    for t in (q, k, v, k_pool, v_pool):
        t.copy_(torch.randn(t.shape, device="cuda", generator=g))
    expected = decode_attention(q, k, v, k_pool.clone(), v_pool.clone(), index, scale=0.1)
    graph.replay()
    assert torch.equal(out, expected)


@needs_gpu
def test_gpu_refuses_other_head_sizes_and_takes_no_rows():
    index, q, k, v, k_pool, v_pool = on_gpu(*random_step(1, torch.float32, 1, 2, 12, 1))
    with pytest.raises(PMCError, match="multiples of 8"):
        decode_attention(q, k, v, k_pool, v_pool, index, scale=1.0)
    empty = StepIndex(*(torch.zeros(n, dtype=torch.int32, device="cuda") for n in (0, 0, 1, 0, 1, 1, 0)))
    q = torch.empty(0, 2, 16, device="cuda")
    pool = torch.empty(4, 1, 16, device="cuda")
    assert decode_attention(q, q[:, :1], q[:, :1], pool, pool.clone(), empty, scale=1.0).shape == (0, 2, 16)
    q, pool = q.bfloat16(), pool.bfloat16()
    assert decode_attention(
        q, q[:, :1], q[:, :1], pool, pool.clone(), empty, scale=1.0, variant="mma"
    ).shape == (0, 2, 16)  # fmt: skip
