"""The public operations with tensors of any shape, dtype and layout: the reference's numbers, or one clear error."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmc_fast.ops import (
    gather_logps,
    weighted_nll,
)
from pmc_fast.ops.decode_attention import StepIndex, decode_attention
from pmc_fast.ops.layers import linear, rms_norm, rotary, silu_mul
from pmc_fast.ops.sample_nucleus import sample_nucleus

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OTHERS = [torch.int64, torch.int32, torch.bool, torch.complex64]
SIZES = st.sampled_from([0, 1, 2, 3, 5, 16, 33])
some = settings(
    max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@st.composite
def tensors(draw, *wanted, dtypes=(torch.float32,)):
    """A tensor of the wanted shape and dtype, mostly; otherwise of others, and often with gaps."""
    shape = draw(st.lists(SIZES, max_size=4)) if draw(st.integers(0, 7)) == 0 else list(wanted)
    dtype = draw(st.sampled_from(FLOATS + OTHERS)) if draw(st.integers(0, 7)) == 0 else draw(st.sampled_from(dtypes))
    layout = draw(st.sampled_from(["plain", "plain", "gaps", "turned", "expanded"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if layout == "expanded" and shape:
        made = torch.randn([1, *shape[1:]], generator=generator).expand(shape)
        return made.to(dtype) if dtype == torch.float32 else made.to(dtype).expand(shape)
    if layout == "gaps" and shape:
        return torch.randn([*shape[:-1], 2 * shape[-1]], generator=generator).to(dtype)[..., ::2]
    if layout == "turned" and len(shape) > 1:
        return torch.randn([*shape[:-2], shape[-1], shape[-2]], generator=generator).to(dtype).transpose(-1, -2)
    return torch.randn(shape, generator=generator).to(dtype)


@st.composite
def indices(draw, size, limit):
    dtype = draw(st.sampled_from([torch.int64] * 6 + [torch.int32, torch.float32]))
    values = st.integers(0, max(0, limit - 1)) | st.sampled_from([-1, -100, limit, 2**62, -(2**63)])
    return torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=torch.int64).to(dtype)


def outcome(call, expected=None):
    """Call; what is not refused by name must be as the reference says."""
    try:
        made = call()
    except (ValueError, TypeError):
        return None
    if expected is not None and made.numel():  # torch's own layers don't take rows of nothing
        torch.testing.assert_close(made.double(), expected().double(), atol=3e-2, rtol=3e-2, equal_nan=True)
    return made


@some
@given(st.data())
def test_losses(data):
    rows, size, vocab = data.draw(SIZES), data.draw(SIZES), data.draw(st.sampled_from([1, 2, 7, 40]))
    kinds = [data.draw(st.sampled_from(FLOATS))]
    hidden, head = data.draw(tensors(rows, size, dtypes=kinds)), data.draw(tensors(vocab, size, dtypes=kinds))
    targets, scale = data.draw(indices(rows, vocab)), data.draw(tensors(rows))
    bias = data.draw(st.none() | tensors(vocab))
    how = {"bias": bias, "softcap": data.draw(st.sampled_from([None, 5.0, 0.0, -1.0])),
           "temperature": data.draw(st.sampled_from([1.0, 0.5, 0.0, -1.0]))}  # fmt: skip
    reference = how | {"backend": "reference"}
    outcome(lambda: weighted_nll(hidden, head, targets, scale, **how)[1],
            lambda: weighted_nll(hidden, head, targets, scale, **reference)[1])  # fmt: skip
    outcome(
        lambda: gather_logps(hidden, head, targets, **how), lambda: gather_logps(hidden, head, targets, **reference)
    )


@some
@given(st.data())
def test_layers(data):
    rows, size, out = data.draw(SIZES), data.draw(SIZES), data.draw(SIZES)
    x, weight, bias = (
        data.draw(tensors(rows, size)),
        data.draw(tensors(out, size)),
        data.draw(st.none() | tensors(out)),
    )
    outcome(lambda: linear(x, weight, bias), lambda: torch.nn.functional.linear(x, weight, bias))
    scale, up = data.draw(tensors(size)), data.draw(tensors(rows, size))
    outcome(lambda: rms_norm(x, scale, 1e-5), lambda: torch.nn.functional.rms_norm(x, scale.shape, scale, 1e-5))
    outcome(lambda: silu_mul(x, up), lambda: torch.nn.functional.silu(x) * up)
    heads, dim = data.draw(SIZES), 2 * data.draw(SIZES)
    q, k = (data.draw(tensors(1, n, rows, dim)) for n in (heads, data.draw(SIZES)))
    cos, sin = (data.draw(tensors(1, rows, dim)) for _ in range(2))
    outcome(lambda: torch.cat(rotary(q, k, cos, sin), 1))


@some
@given(st.data())
def test_sampling(data):
    rows, vocab = data.draw(SIZES), data.draw(st.sampled_from([1, 5, 300]))
    logits = data.draw(tensors(rows, vocab, dtypes=(torch.float32, torch.float64)))
    ends = [0]
    for _ in range(rows):
        ends.append(ends[-1] + data.draw(st.integers(0, 2)))
    cu = torch.tensor(ends)
    if data.draw(st.integers(0, 3)) == 0:
        cu = data.draw(indices(rows + 1, 4))
    keys = [data.draw(indices(ends[-1] + (data.draw(st.integers(0, 9)) == 0), 9)) for _ in range(3)]
    how = {
        "temperature": data.draw(st.sampled_from([1.0, 0.0, -1.0, float("nan"), float("inf"), 1e-30])),
        "top_k": data.draw(st.sampled_from([0, 3, -1, 2**62])), "top_p": data.draw(st.sampled_from([1.0, 0.5, 0.0, 2.0])),
        "seed": data.draw(st.integers(-(2**70), 2**70)),
    }  # fmt: skip
    made = outcome(lambda: sample_nucleus(logits, cu, *keys, **how))
    if made is not None:
        assert bool(((made.tokens >= -1) & (made.tokens < vocab)).all())


@some
@given(st.data())
def test_attention(data):
    heads, kv, dim, slots = data.draw(st.sampled_from([1, 2, 4])), data.draw(SIZES), data.draw(SIZES), 9
    rows = data.draw(st.integers(0, 3))
    kinds = (data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),)
    q = data.draw(tensors(rows, heads, dim, dtypes=kinds))
    k, v = (data.draw(tensors(rows, kv, dim, dtypes=kinds)) for _ in range(2))
    pools = [data.draw(tensors(slots, kv, dim, dtypes=kinds)) for _ in range(2)]
    parts = [list(range(rows)), [2] * rows, list(range(rows + 1)), list(range(rows)), [0, rows], [0, 2], [5, 6]]
    spoilt = data.draw(st.integers(0, 20))
    if spoilt < len(parts) and parts[spoilt]:
        at = data.draw(st.integers(0, len(parts[spoilt]) - 1))
        parts[spoilt][at] = data.draw(st.sampled_from([-1, slots, 2**31 - 1, -(2**31)]))
    kind = data.draw(st.sampled_from([torch.int32] * 6 + [torch.int64]))
    index = StepIndex(*(torch.tensor(p, dtype=kind) for p in parts))
    made = outcome(
        lambda: decode_attention(q, k, v, *pools, index, scale=0.3, window=data.draw(st.sampled_from([None, 1, 2])))
    )
    if made is not None and spoilt < len(parts) and rows:
        assert kind == torch.int32
        assert all(0 <= n < slots for p in (parts[0], parts[3], parts[6]) for n in p)
