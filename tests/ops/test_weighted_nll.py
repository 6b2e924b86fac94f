"""weighted_nll and gather_logps, every implementation against the oracle in float64.

Low precision is judged by what torch reaches in it: |ours - fp64| <= 3 |torch - fp64| + a little for
the last bit. On machines without a GPU the Triton path runs in Triton's interpreter.
"""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pmc_fast.errors import PMCError
from pmc_fast.ops import gather_logps, native, weighted_nll
from pmc_fast.ops.nll_chunked import Logits
from pmc_fast.ops.nll_cpu import Cpu

GPU = torch.cuda.is_available()
DEVICE = {"cpu": "cpu", "cuda": "cuda" if GPU else "cpu", "reference": "cpu"}
BACKENDS = ["cpu", "cuda"]
LAST_BIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
WITH_GRAD = ("hidden", "head", "bias")


def make(r=5, d=7, v=31, m=None, dtype=torch.float32, seed=0, bias=False, scale="mixed", sharp=1.0):
    """Random inputs; scales of both signs and 0, some targets ignored."""
    g = torch.Generator().manual_seed(seed)
    m = r if m is None else m
    x = {
        "hidden": torch.randn(r, d, generator=g) * sharp,
        "head": torch.randn(v, d, generator=g),
        "bias": torch.randn(v, generator=g) if bias else None,
        "targets": torch.randint(v, (m,), generator=g),
        "row_scale": torch.randn(m, generator=g) if scale == "mixed" else torch.full((m,), 1.0 / max(m, 1)),
    }
    if scale == "mixed" and m > 2:
        x["row_scale"][m // 2] = 0
        x["targets"][m // 3] = -100
    return {k: t.to(dtype) if k in WITH_GRAD and t is not None else t for k, t in x.items()}


def run(x, backend, *, upstream=1.0, needs=WITH_GRAD, dtype=None, rows=None, **options):
    """Return loss, logps and gradients (None where not needed)."""
    device = DEVICE[backend]
    x = {k: None if t is None else t.detach().to(device, copy=False) for k, t in x.items()}
    for k in WITH_GRAD:
        if x[k] is not None:
            x[k] = x[k].to(dtype or x[k].dtype).requires_grad_(k in needs)
    options = {"backend": backend, "bias": x["bias"]} | options
    rows = None if rows is None else rows.to(device)
    loss, logps = weighted_nll(x["hidden"], x["head"], x["targets"], x["row_scale"], rows, **options)
    assert not logps.requires_grad
    if loss.requires_grad:
        (loss * upstream).backward()
    return loss.detach(), logps, *[None if x[k] is None else x[k].grad for k in WITH_GRAD]


def torch_low(x, *, upstream=1.0, rows=None, temperature=1.0, softcap=None, logit_scale=1.0):
    """Compute as a torch user would in the inputs' precision: the yardstick."""
    x = {k: None if t is None else t.clone().requires_grad_(k in WITH_GRAD) for k, t in x.items()}
    z = torch.nn.functional.linear(x["hidden"], x["head"], x["bias"]) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logps = torch.log_softmax(z.float() / temperature, -1)
    logps = logps if rows is None else logps[rows]
    counted = x["targets"] != -100
    logps = torch.where(counted, logps.gather(1, x["targets"].clamp(min=0)[:, None])[:, 0], 0.0)
    loss = -(x["row_scale"] * logps).sum()
    (loss * upstream).backward()
    return loss.detach(), logps.detach(), *[None if x[k] is None else x[k].grad for k in WITH_GRAD]


def largest_term(x, *, rows=None, temperature=1.0, logit_scale=1.0, **_):
    """Bound the terms whose sums are the results: a row's scales times logits or the factor beside them."""
    if not x["row_scale"].numel():
        return {"logps": 0.0, "gradient": 0.0}
    rows = torch.arange(len(x["row_scale"])) if rows is None else rows
    scale = torch.zeros(len(x["hidden"])).index_add_(0, rows, x["row_scale"].abs()).max()
    hidden, head = x["hidden"].float(), x["head"].float()
    slope = max(1.0, logit_scale / temperature)
    largest_z = float((hidden @ head.T).abs().max()) * slope
    factor = max(1.0, float(hidden.abs().max()), float(head.abs().max()))
    # half a last bit of a logit moves its softmax by as much
    return {"logps": max(1.0, largest_z), "gradient": float(scale) * slope * factor * (1 + largest_z / 16)}


def check(x, backend, **options):
    """Compare with float64 by the rule above."""
    exact = run(x, "reference", dtype=torch.float64, **options)
    ours = run(x, backend, **options)
    yard = torch_low(x, **options)
    terms = largest_term(x, **options)
    # the loss is the sum of what is judged next: one number's error against another's would be luck
    summed = -(x["row_scale"].double() * ours[1].cpu().double()).sum()
    torch.testing.assert_close(
        ours[0].cpu().double(), summed, atol=1e-6 * float(x["row_scale"].abs().sum() + 1), rtol=1e-5
    )
    for name, o, e, t in zip(("logps", *WITH_GRAD), ours[1:], exact[1:], yard[1:], strict=True):
        if e is None:
            assert o is None
            continue
        error, theirs, tiny = 0.0, 0.0, 0.0
        if e.numel() and x["row_scale"].numel():
            # the last bit of the result, and of the float32 terms that cancel in it
            tiny = LAST_BIT[o.dtype] * float(e.abs().max()) + 5e-7 * terms["logps" if name == "logps" else "gradient"]
            error, theirs = float((o.cpu().double() - e).abs().max()), float((t.double() - e).abs().max())
        assert error <= 3 * theirs + tiny, f"{name}: {error:.2e} against torch's {theirs:.2e}, tiny {tiny:.2e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.7},
        {"softcap": 3.0},
        {"logit_scale": 0.25},
        {"softcap": 2.0, "temperature": 1.3, "logit_scale": 1.5, "upstream": -2.5},
        {"upstream": 1 / 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True])
def test_accuracy(backend, dtype, how, bias):
    check(make(r=80, d=24, v=150, dtype=dtype, bias=bias), backend, **how)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape",
    [
        {"m": 1, "r": 1}, {"m": 0, "r": 0}, {"v": 1}, {"d": 1}, {"v": 64}, {"v": 65}, {"v": 4097, "sharp": 30.0},
        {"v": 9000, "r": 3, "d": 33}, {"r": 67, "d": 13, "v": 129},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_odd_shapes(backend, shape, dtype):
    check(make(**shape, dtype=dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_scaling_reaches_float16_gradients_before_they_are_rounded(backend):
    """GradScaler's first factor, on a mean over many rows: nothing overflows on the way, nothing is lost."""
    x = make(r=300, v=40, dtype=torch.float16, scale="mean")
    exact = run(x, "reference", dtype=torch.float64, upstream=65536.0)
    ours = run(x, backend, upstream=65536.0)
    for o, e in zip(ours[2:4], exact[2:4], strict=True):
        assert o.isfinite().all()
        torch.testing.assert_close(o.cpu().double(), e, atol=3e-3 * float(e.abs().max()), rtol=3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_gradients_of_the_head_do_not_overflow(backend):
    x = make(r=2000, d=2, v=9, dtype=torch.float16, scale="mean")
    x["hidden"][:] = 50
    x["targets"][:] = 4
    assert run(x, backend)[3].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_ignored(backend):
    x = make()
    x["targets"][:] = -100
    loss, logps, d_hidden, d_head, _ = run(x, backend)
    assert loss == 0
    assert (logps == 0).all()
    assert (d_hidden == 0).all()
    assert (d_head == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_0_still_gives_its_log_prob(backend):
    x = make()
    x["row_scale"][:] = 0
    loss, logps, d_hidden, d_head, _ = run(x, backend)
    exact = run(x, "reference", dtype=torch.float64)
    assert loss == 0
    torch.testing.assert_close(logps.cpu().double(), exact[1], atol=1e-5, rtol=1e-5)
    assert (logps[x["targets"] != -100] != 0).all()
    assert (d_hidden == 0).all()
    assert (d_head == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [("hidden",), ("head",), ("bias",), ("hidden", "bias"), ()])
def test_only_what_is_needed_is_computed(backend, needs, monkeypatch):
    from pmc_fast.ops import nll_cpu, nll_cuda

    device = nll_cpu if backend == "cpu" else nll_cuda
    called = []
    front = importlib.import_module("pmc_fast.ops.weighted_nll")
    places = ((device.Cpu if backend == "cpu" else device.Cuda, "d_hidden", "hidden"),
              (device, "weight_gradient", "head"), (front, "weight_gradient", "head"))  # fmt: skip
    for place, product, name in places:
        real = getattr(place, product)
        monkeypatch.setattr(place, product, lambda *a, real=real, name=name: [called.append(name), real(*a)][1])
    x = make(bias=True)
    full = run(x, "reference", dtype=torch.float64)
    for workspace in (1 << 30, 31 * 4 * 2):  # d(head) in backward, or chunk by chunk
        called.clear()
        some = run(x, backend, needs=needs, workspace=workspace)
        assert set(called) == set(needs) - {"bias"}
        for k, f, s in zip(WITH_GRAD, full[2:], some[2:], strict=True):
            if k in needs:
                torch.testing.assert_close(s.cpu().double(), f, atol=1e-5, rtol=1e-5)
            else:
                assert s is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # a bfloat16 head is read in blocks
def test_the_heads_three_products_on_the_cpu(dtype):
    from pmc_fast.ops.nll_cpu import VOCAB_BLOCK, Cpu

    g = torch.Generator().manual_seed(0)
    rows, vocab, device = 3, VOCAB_BLOCK + 77, Cpu()
    hidden, head = (torch.randn(n, 40, generator=g).to(dtype) for n in (rows, vocab))
    logits, d_logits, total = (torch.randn(n, m, generator=g) for n, m in ((rows, vocab), (rows, vocab), (vocab, 40)))
    device.logits(hidden, head, logits)
    first, both = (device.d_head(d_logits, hidden, t, torch.float32) for t in (None, total.clone()))
    d_hidden = device.d_hidden(d_logits, head)
    hidden, head, d_logits = hidden.double(), head.double(), d_logits.double()
    for ours, a, b, more in [
        (logits, hidden, head.T, 0), (d_hidden, d_logits, head, 0), (first, d_logits.T, hidden, 0),
        (both, d_logits.T, hidden, total.double()),
    ]:  # fmt: skip
        bound = 2**-24 * (a.shape[1] + 8) * (a.abs() @ b.abs() + abs(more))  # K products in a row at the worst
        assert ((ours - (a @ b + more)).abs() <= bound).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_rows_stay_out_of_the_gemms(backend, monkeypatch):
    from pmc_fast.ops import nll_cpu, nll_cuda

    device = nll_cpu.Cpu if backend == "cpu" else nll_cuda.Cuda
    seen = {"logits": 0, "d_hidden": 0}
    for product, at in (("logits", 1), ("d_hidden", 1)):
        real = getattr(device, product)

        def counting(*a, real=real, product=product, at=at):
            seen[product] += a[at].shape[0]
            return real(*a)

        monkeypatch.setattr(device, product, counting)
    x = make(r=40)
    x["targets"][::2] = -100
    x["row_scale"][1::4] = 0
    run(x, backend)
    counted = x["targets"] != -100
    assert seen["logits"] == int(counted.sum())
    assert seen["d_hidden"] == int((counted & (x["row_scale"] != 0)).sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_share_hidden_rows(backend):
    """One row, one normaliser, several targets: equal to the row given once for each."""
    x = make(r=6, m=17)
    rows = torch.randint(6, (17,), generator=torch.Generator().manual_seed(1))
    rows[rows == 4] = 2  # a row that predicts nothing
    check(x, backend, rows=rows)
    spread = x | {"hidden": x["hidden"][rows]}
    ours, plain = run(x, backend, rows=rows), run(spread, backend)
    torch.testing.assert_close(ours[1], plain[1])
    torch.testing.assert_close(ours[3], plain[3], atol=1e-5, rtol=1e-5)
    summed = torch.zeros_like(x["hidden"]).index_add_(0, rows, plain[2].cpu())
    torch.testing.assert_close(ours[2].cpu(), summed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_duplicate_targets_on_one_row_add_up(backend):
    x = make(r=1, m=4, scale="mean")
    x["targets"][:] = 3
    check(x, backend, rows=torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows_a_chunk", [1, 2, 7])
def test_chunks_do_not_change_the_result(backend, rows_a_chunk):
    x = make(r=11, bias=True)
    whole = run(x, backend)
    parts = run(x, backend, workspace=31 * 4 * rows_a_chunk)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_input_same_bits(backend):
    x = make(r=33, v=500, bias=True)
    first, second = run(x, backend), run(x, backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_row_has_the_same_bits_whichever_program_walks_it(monkeypatch, softcap):
    """Of the Triton kernel: one program a row, one for all rows, and rows that programs share unevenly."""
    from pmc_fast.kernels import nll_rows

    x = make(r=7, v=67, m=9, bias=True)
    rows = torch.tensor([0, 1, 1, 2, 3, 4, 5, 6, 6])
    kept, launched = nll_rows.nll_rows_kernel, []
    counting = type("Counting", (), {"__getitem__": lambda self, grid: (launched.append(grid), kept[grid])[1]})
    monkeypatch.setattr(nll_rows, "nll_rows_kernel", counting())
    made = []
    for programs, processors in ((0, 4), (1, 1), (1, 4), (2, 4)):
        small = {name: config | {"BLOCK_V": 16, "programs": programs} for name, config in nll_rows.CONFIGS.items()}
        monkeypatch.setattr(nll_rows, "CONFIGS", small)
        monkeypatch.setattr(nll_rows, "processors", lambda device, count=processors: count)
        made.append(run(x, "cuda", rows=rows, softcap=softcap))
    assert launched == [(7,), (1,), (4,), (7,)]
    for others in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], others, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_very_large_logits(backend):
    x = make(sharp=1e4)
    check(x, backend)
    check(x, backend, softcap=30.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_finite_shows(backend):
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = make(scale="mean")
        x["hidden"][2, 0] = bad
        loss, logps, *_ = run(x, backend)
        assert loss.isnan()
        assert logps.isnan().tolist() == [i == 2 for i in range(5)]


def test_targets_out_of_range(monkeypatch):
    for bad in (31, -1, 2**40):
        x = make(scale="mean")
        x["targets"][3] = bad
        for backend in ("cpu", "reference"):
            with pytest.raises(PMCError, match=f"target {bad} at 3 is outside the head's 31 rows"):
                run(x, backend)
        loss, logps, d_hidden, *_ = run(x, "cuda")  # no sync to raise with: NaN instead
        assert loss.isnan()
        assert logps.isnan().tolist() == [i == 3 for i in range(5)]
        assert d_hidden[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_need_not_be_contiguous(backend):
    x = make(r=6, d=8, v=20, scale="mean")
    spread = {
        "hidden": torch.randn(12, 16)[::2, ::2].copy_(x["hidden"]),
        "head": torch.randn(8, 20).T.copy_(x["head"]),
        "bias": None,
        "targets": torch.zeros(12, dtype=torch.int64)[::2].copy_(x["targets"]),
        "row_scale": torch.zeros(12)[::2].copy_(x["row_scale"]),
    }
    assert not spread["head"].is_contiguous()
    for a, b in zip(run(x, backend), run(spread, backend), strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    r=st.integers(1, 9), d=st.integers(1, 9), v=st.integers(1, 140), m=st.integers(0, 14), bias=st.booleans(),
    shared=st.booleans(), seed=st.integers(0, 99), temperature=st.sampled_from([1.0, 0.5, 1.7]),
    softcap=st.sampled_from([None, 1.0, 30.0]), logit_scale=st.sampled_from([1.0, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), sharp=st.sampled_from([0.1, 1.0, 20.0]),
)  # fmt: skip
def test_any_combination_on_the_cpu(r, d, v, m, bias, shared, seed, temperature, softcap, logit_scale, dtype, sharp):
    x = make(r=r, d=d, v=v, m=m if shared else r, bias=bias, seed=seed, dtype=dtype, sharp=sharp)
    rows = torch.randint(r, (m,), generator=torch.Generator().manual_seed(seed)) if shared else None
    check(x, "cpu", rows=rows, temperature=temperature, softcap=softcap, logit_scale=logit_scale)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_in_float64(backend, softcap):
    x = make(r=4, m=6, d=3, v=9, dtype=torch.float64, bias=True)
    rows = torch.tensor([0, 1, 1, 3, 0, 2])
    tensors = [x[k].requires_grad_() for k in WITH_GRAD]
    how = {"temperature": 0.8, "softcap": softcap, "logit_scale": 1.2, "backend": backend}

    def loss(hidden, head, bias):
        return weighted_nll(hidden, head, x["targets"], x["row_scale"].double(), rows, bias=bias, **how)[0]

    def logps(hidden, head, bias):
        return gather_logps(hidden, head, x["targets"], rows, bias=bias, **how)

    assert torch.autograd.gradcheck(loss, tensors)
    assert torch.autograd.gradcheck(logps, tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_logps_differentiates_any_loss(backend, dtype):
    x = make(r=4, m=9, bias=True, dtype=dtype)
    rows = torch.tensor([0, 1, 1, 3, 0, 2, 2, 2, 3])
    results = {}
    for which in ("reference", backend):
        wide = torch.float64 if which == "reference" else dtype
        t = {k: v.to(DEVICE[which], wide if k in WITH_GRAD else v.dtype, copy=True) for k, v in x.items()}
        for k in WITH_GRAD:
            t[k].requires_grad_()
        logps = gather_logps(
            t["hidden"], t["head"], t["targets"], rows.to(DEVICE[which]), bias=t["bias"], softcap=5.0, backend=which
        )
        torch.sigmoid(logps * 0.7).square().sum().backward()
        results[which] = [logps.detach(), *[t[k].grad for k in WITH_GRAD]]
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    for a, b in zip(results["reference"], results[backend], strict=True):
        torch.testing.assert_close(b.cpu().double(), a, **tolerance)


def test_a_second_backward_is_right_and_a_second_derivative_is_refused():
    x = make()
    hidden = x["hidden"].requires_grad_()
    loss, _ = weighted_nll(hidden, x["head"], x["targets"], x["row_scale"])
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(2 * loss, hidden, retain_graph=True)
    torch.testing.assert_close(second, 2 * kept)
    for product in (loss * hidden.sum(), gather_logps(hidden, x["head"], x["targets"]).square().sum()):
        with pytest.raises(PMCError, match="second derivatives"):
            torch.autograd.grad(product, hidden, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", [1 << 30, 31 * 4 * 2])  # d(head) in backward, or chunk by chunk
def test_a_second_backward_of_the_head_is_right(backend, workspace):
    x = make(scale="mean")
    exact = run(x, "reference", dtype=torch.float64)[3]
    head = x["head"].to(DEVICE[backend]).requires_grad_()
    rest = [x[k].to(DEVICE[backend]) for k in ("hidden", "targets", "row_scale")]
    loss, _ = weighted_nll(rest[0], head, *rest[1:], backend=backend, workspace=workspace)
    (first,) = torch.autograd.grad(loss, head, retain_graph=True)
    first.mul_(5)  # it is the caller's
    (second,) = torch.autograd.grad(loss * 2, head)
    torch.testing.assert_close(first.cpu().double(), 5 * exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second.cpu().double(), 2 * exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", [1 << 30, 31 * 4 * 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", [("hidden", "head"), ("head",)])
def test_d_head_is_added_to_a_total(backend, workspace, dtype, needs):
    """One that is float32 also where the head is not: then d(head) is not rounded on the way."""
    x = make(dtype=dtype, scale="mean")
    want = run(x, "reference", dtype=torch.float64, upstream=-0.4)
    total = torch.full(x["head"].shape, 2.0, device=DEVICE[backend])
    ours = run(x, backend, upstream=-0.4, needs=needs, workspace=workspace, head_total=total)
    assert ours[3] is None
    bound = 1e-5 if dtype == torch.float32 else 2e-2 * float(want[3].abs().max())
    torch.testing.assert_close(total.cpu().double() - 2, want[3], atol=bound, rtol=1e-5)
    assert ("hidden" in needs) == (ours[2] is not None)
    with pytest.raises(PMCError, match=r"head_total must be \(31, 7\)"):
        run(x, backend, head_total=total[1:])
    with pytest.raises(PMCError, match="the backend cpu or cuda"):
        run(x, "reference", head_total=total)


def test_gradients_accumulate_and_do_not_alias():
    x = make(scale="mean")
    hidden, head = x["hidden"].requires_grad_(), x["head"].requires_grad_()
    for _ in range(2):
        weighted_nll(hidden, head, x["targets"], x["row_scale"])[0].backward()
    twice = run(make(scale="mean"), "cpu", upstream=2.0)
    torch.testing.assert_close(hidden.grad, twice[2])
    torch.testing.assert_close(head.grad, twice[3])


def test_autocast_casts_as_for_a_linear_layer():
    x = make()
    with torch.autocast("cpu", torch.bfloat16):
        _, logps = weighted_nll(x["hidden"], x["head"], x["targets"], x["row_scale"])
    low = {k: x[k].bfloat16() for k in ("hidden", "head")}
    _, expected = weighted_nll(low["hidden"], low["head"], x["targets"], x["row_scale"])
    assert torch.equal(logps, expected)


@pytest.mark.parametrize("isa", range(3))
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 1000])
def test_every_instruction_set_agrees(isa, softcap, vocab):
    if isa > native.cpu().best_isa():
        pytest.skip("this processor has no such instructions")
    how = Logits(0.9, softcap, 1.1)
    g = torch.Generator().manual_seed(vocab)
    logits, bias = torch.randn(5, vocab, generator=g) * 8, torch.randn(vocab, generator=g)
    targets, cu = torch.randint(vocab, (8,), generator=g), torch.tensor([0, 1, 1, 4, 7, 8])
    scale = torch.randn(8, generator=g)
    results = []
    for wide in (torch.float64, torch.float32):
        z, logps = logits.to(wide), torch.zeros(8, dtype=wide)
        Cpu().nll_rows(
            z, cu, targets, scale.to(wide), logps, bias, how, True, isa=0 if wide == torch.float64 else isa
        )
        results.append((z, logps))
    for exact, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=3e-6, rtol=3e-6)


def test_mistakes_are_named():
    x = make()
    call = lambda **new: weighted_nll(*[(x | new)[k] for k in ("hidden", "head", "targets", "row_scale")])  # noqa: E731
    for new, message in (
        ({"hidden": x["hidden"][:, :3]}, r"hidden \(5, 3\) and head \(31, 7\)"),
        ({"head": x["head"].bfloat16()}, "hidden is torch.float32 and head torch.bfloat16"),
        ({"targets": x["targets"].int()}, "targets must be int64"),
        ({"targets": x["targets"][:3]}, "3 targets for 5 hidden rows"),
        ({"row_scale": x["row_scale"][:3]}, r"row_scale must be \(5,\)"),
        ({"row_scale": x["row_scale"].requires_grad_()}, "use gather_logps"),
        ({"head": x["head"].to("meta")}, "head is on meta but hidden on cpu"),
    ):
        with pytest.raises(PMCError, match=message):
            call(**new)
    fine = [x[k].detach() for k in ("hidden", "head", "targets", "row_scale")]
    for options, message in (
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"bias": torch.zeros(3)}, r"bias must be floating \[31\]"),
        ({"rows": torch.zeros(5)}, "rows must be int64"),
        ({"rows": torch.full((5,), 9)}, "rows 9 to 9 do not fit 5 hidden rows"),
        ({"backend": "tpu"}, "backend is 'tpu'"),
    ):
        with pytest.raises(PMCError, match=message):
            weighted_nll(*fine, **options)


@pytest.mark.parametrize("op", ["weighted_nll", "gather_logps"])
def test_opcheck(op):
    from pmc_fast.ops.gather_logps import gather_logps_op
    from pmc_fast.ops.weighted_nll import weighted_nll_op

    x = make(r=4, m=6, bias=True, scale="mean")
    rows = torch.tensor([0, 1, 1, 3, 0, 2])
    for needs in ((True, True, True), (True, False, False)):
        tensors = [x[k].clone().requires_grad_(n) for k, n in zip(WITH_GRAD, needs, strict=True)]
        how = (0.8, 2.0, 1.1)
        if op == "weighted_nll":
            arguments = (*tensors, x["targets"], x["row_scale"], rows, *how, *needs, 1 << 30, "cpu")
            torch.library.opcheck(weighted_nll_op, arguments)
        else:
            torch.library.opcheck(gather_logps_op, (*tensors, x["targets"], rows, *how, 1 << 30, "cpu"))


def test_torch_compile_sees_through():
    x = make(scale="mean")
    compiled = torch.compile(
        lambda h, w: weighted_nll(torch.tanh(h), w, x["targets"], x["row_scale"])[0] * 3,
        fullgraph=True,
        backend="aot_eager",
    )
    grads = []
    for function in (
        compiled,
        lambda h, w: weighted_nll(torch.tanh(h), w, x["targets"], x["row_scale"])[0] * 3,
    ):
        h, w = x["hidden"].clone().requires_grad_(), x["head"].clone().requires_grad_()
        function(h, w).backward()
        grads.append((h.grad, w.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def on_identity(z, targets, backend, scale=None):
    """Return loss, logps and d(logits) of logits that the head leaves as they are."""
    width = z.shape[1]
    x = {"hidden": z, "head": torch.eye(width, dtype=z.dtype), "bias": None, "targets": targets}
    x["row_scale"] = torch.ones(len(targets)) if scale is None else scale
    return run(x, backend, needs=("hidden",))[:3]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6, -1e6, 1e8])
def test_an_offset_that_logits_share_changes_nothing(backend, offset):
    """Where a normaliser of offset + log(sum) is rounded, the loss is."""
    z = torch.tensor([[3.0, 0.0], [0.0, 3.0], [-40.0, 8.0]]) * (8 if offset == 1e8 else 1) + offset
    assert ((z - offset)[:, 0] - (z - offset)[:, 1]).abs().min() >= 3  # what float32 keeps of the differences
    targets = torch.tensor([0, 0, 1])
    _, logps, d_z = on_identity(z, targets, backend)
    moved = z.double() - offset
    own = torch.nn.functional.one_hot(targets, 2).bool()
    exact = -torch.nn.functional.softplus(moved[~own] - moved[own])
    torch.testing.assert_close(logps.cpu().double(), exact, atol=1e-30, rtol=2e-6)
    other = torch.sigmoid(moved[~own] - moved[own])[:, None]  # its probability, which the target lacks
    expected = torch.where(own, -other, other)
    torch.testing.assert_close(d_z.cpu().double(), expected, atol=1e-30, rtol=3e-6)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("gap", [0.0, 5.0, 12.0, 20.0, 40.0])
def test_targets_with_nearly_all_mass_keep_their_digits(backend, gap):
    """log p and 1 - p of what a model recites: far below float32's last bit of 1."""
    z = torch.randn(6, 3000, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(6) * 7
    z[torch.arange(6), targets] = z.amax(1) + gap
    _, logps, d_z = on_identity(z, targets, backend)
    others = (z.double() - z.double().gather(1, targets[:, None])).exp().scatter(1, targets[:, None], 0.0)
    rest = others.sum(1)
    torch.testing.assert_close(logps.cpu().double(), -rest.log1p(), atol=1e-30, rtol=1e-5)
    expected = (others / (1 + rest)[:, None]).scatter(1, targets[:, None], -(rest / (1 + rest))[:, None])
    torch.testing.assert_close(d_z.cpu().double(), expected, atol=1e-30, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [[2, 2, 2], [2, 5, 2, 7], [5, 7]], ids=str)
def test_a_row_of_several_targets_keeps_its_digits(backend, tokens):
    """Also where scales nearly cancel, and whether or not one of them holds the maximum."""
    z = torch.randn(1, 40, generator=torch.Generator().manual_seed(2))
    z[0, 2] = 15.0
    z[0, 11] = 14.5 if 2 not in tokens else 0.0
    targets, scale = torch.tensor(tokens), torch.tensor([0.3, 1e-6, -0.7, 0.11])[: len(tokens)]
    x = {"hidden": z, "head": torch.eye(40), "bias": None, "targets": targets, "row_scale": scale}
    rows = torch.zeros(len(tokens), dtype=torch.int64)
    exact = run(x, "reference", needs=("hidden",), rows=rows, dtype=torch.float64)
    ours = run(x, backend, needs=("hidden",), rows=rows)
    for o, e in zip(ours[1:3], exact[1:3], strict=True):
        torch.testing.assert_close(o.cpu().double(), e, atol=1e-12, rtol=1e-5)


@pytest.mark.parametrize("isa", range(3))
def test_every_instruction_set_keeps_the_digits(isa):
    if isa > native.cpu().best_isa():
        pytest.skip("this processor has no such instructions")
    z = torch.randn(1, 1000, generator=torch.Generator().manual_seed(3))
    z[0, 70] = 17.0
    cu, target, scale, logps = torch.tensor([0, 1]), torch.tensor([70]), torch.ones(1), torch.zeros(1)
    rest = (z.double() - 17.0).exp()[0, torch.arange(1000) != 70].sum()
    Cpu().nll_rows(z, cu, target, scale, logps, None, Logits(1.0, 0.0, 1.0), True, isa=isa)
    torch.testing.assert_close(logps[0].double(), -rest.log1p(), atol=0.0, rtol=3e-6)
    torch.testing.assert_close(z[0, 70].double(), -rest / (1 + rest), atol=0.0, rtol=3e-6)


def test_two_gradients_of_one_loss_are_two_tensors():
    x = make(scale="mean")
    inputs = [x[k].requires_grad_() for k in ("hidden", "head")]
    loss, _ = weighted_nll(*inputs, x["targets"], x["row_scale"])
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [g.clone() for g in second]
    for g in first:
        g.zero_()
    third = torch.autograd.grad(loss, inputs)
    for a, b, c in zip(second, kept, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, b)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("op", ["weighted_nll", "gather_logps"])
def test_autocast_ends_at_the_door_of_an_op(backend, low, dtype, chunks, op):
    """Inside it everything is as without autocast, on inputs that were cast; forward and backward."""
    if backend == "cuda" and dtype == torch.float64:
        pytest.skip("the cuda backend has no float64")
    x = make(r=12, d=9, v=40, scale="mean")
    device, kind = DEVICE[backend], torch.device(DEVICE[backend]).type
    cast = dtype if dtype == torch.float64 else low
    how = {"backend": backend, "workspace": (12 // chunks) * 40 * (8 if dtype == torch.float64 else 4)}

    def gradients(autocast):
        leaves = [x[k].to(device, dtype, copy=True).requires_grad_() for k in ("hidden", "head")]
        tensors = leaves if autocast else [t.to(cast) for t in leaves]
        targets, scale = x["targets"].to(device), x["row_scale"].to(device)
        with torch.autocast(kind, low, enabled=autocast):
            if op == "weighted_nll":
                loss = weighted_nll(*tensors, targets, scale, **how)[0]
            else:
                loss = -(scale * gather_logps(*tensors, targets, **how)).sum()
            if backend != "reference":  # torch's own backward
                loss.backward()
        if backend == "reference":
            loss.backward()
        return loss.detach(), *[t.grad for t in leaves]

    for ours, plain in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, plain, atol=0.0, rtol=0.0)


def in_process(isa, code):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PMC_FAST_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_instruction_set_can_be_chosen():
    code = "from pmc_fast.ops import native; print(native.isa())"
    for i, name in enumerate(native.ISAS):
        done = in_process(name, code)
        if i <= native.cpu().best_isa():
            assert done.stdout.strip() == str(i), done.stderr
        else:
            assert f"this machine has no more than {native.ISAS[native.cpu().best_isa()]}" in done.stderr
    assert "PMC_FAST_ISA is 'sse9': use one of generic, avx2, avx512" in in_process("sse9", code).stderr
    code = "from pmc_fast.report.environment import capabilities; print(capabilities()['C++ module'])"
    assert "generic" in in_process("generic", code).stdout
