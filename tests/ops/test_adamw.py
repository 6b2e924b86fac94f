"""A step of AdamW with masters, against torch's optimizer in float64."""

import pytest
import torch

from pmc_fast.errors import PMCError
from pmc_fast.kernels import adamw as kernels
from pmc_fast.ops.adamw import LOW, Settings, adamw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "cuda", *(["cpu"] if DEVICE == "cpu" else [])]  # cuda without a GPU: Triton's interpreter
SHAPES = [(1,), (7,), (0, 3), (33, 65), (2, 1024), (5, 1029)]


def made(low, shapes=SHAPES):
    """Return gradients, masters, both moments and weights."""
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=draw).to(DEVICE, low) for s in shapes]
    masters, moments = [w.float() for w in weights], [[torch.zeros(s, device=DEVICE) for s in shapes] for _ in "mv"]
    return [torch.zeros_like(w) for w in weights], masters, *moments, weights


def torchs(low, dtype, decoupled, steps, **how):
    """Return the parameters that torch's optimizer makes of the same gradients."""
    parameters = [torch.nn.Parameter(w.to(dtype)) for w in made(low)[-1]]
    optimizer = torch.optim.Adam(parameters, decoupled_weight_decay=decoupled, **how)
    for grads in gradients(low, steps):
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad.to(dtype)
        optimizer.step()
    return parameters


def gradients(low, steps):
    draw = torch.Generator().manual_seed(1)
    for n in range(steps):
        yield [(10.0**-n * torch.randn(s, generator=draw)).to(DEVICE, low) for s in SHAPES]


def apart(ours, exact):
    return max(
        float((x.double() - y.detach().double()).abs().max()) for x, y in zip(ours, exact, strict=True) if x.numel()
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("decoupled", [True, False], ids=["AdamW", "Adam"])
def test_steps_are_torchs(low, decoupled, backend, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 2)  # each takes several blocks
    how = {"lr": 0.01, "betas": (0.8, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    grads, masters, exp_avgs, exp_avg_sqs, weights = made(low)
    for n, new in enumerate(gradients(low, 6)):
        settings = Settings(n + 1, decoupled=decoupled, **how)
        versions = [w._version for w in weights]
        for grad, g in zip(grads, new, strict=True):
            grad.copy_(g)
        adamw(grads, masters, exp_avgs, exp_avg_sqs, weights, settings=settings, backend=backend)
        assert all(w._version > v for w, v in zip(weights, versions, strict=True))
    exact = torchs(low, torch.float64, decoupled, 6, **how)
    assert apart(masters, exact) <= 2 * apart(torchs(low, torch.float32, decoupled, 6, **how), exact) + 1e-7
    for master, weight in zip(masters, weights, strict=True):
        if backend == "cuda" and DEVICE == "cpu" and low == torch.bfloat16:  # the interpreter cuts, it does not round
            assert ((weight.float() - master).abs() <= torch.finfo(low).eps * master.abs()).all()
        else:
            assert torch.equal(weight, master.to(low))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_at_an_odd_address_and_what_is_no_number(backend):
    settings = Settings(1, 0.1, (0.9, 0.999), 1e-8, 0.0, True)
    ends = []
    for offset in (0, 1):
        _, *others = made(torch.float16, [(65,)])
        room = torch.arange(66, device=DEVICE, dtype=torch.float16) - 30
        room[offset : offset + 65] = torch.linspace(-1, 1, 65)
        room[offset + 3] = torch.nan
        adamw([room[offset : offset + 65]], *others, settings=settings, backend=backend)
        ends.append(others[-1][0])
    assert torch.equal(*(end.nan_to_num() for end in ends))
    assert ends[0].isnan().nonzero().flatten().tolist() == [3]


def test_refusals():
    settings = Settings(1, 0.1, (0.9, 0.999), 1e-8, 0.0, True)
    good = made(torch.bfloat16, [(4, 4)])
    adamw(*([] for _ in range(5)), settings=settings)
    for at, bad, match in (
        (0, [good[0][0].float()], "grads has torch.float32"),
        (1, [good[1][0].double()], "masters has torch.float64"),
        (2, [good[2][0][:2]], r"exp_avgs has torch.float32 \(2, 4\)"),
        (4, [good[4][0].T], "weights has a tensor that is not contiguous"),
        (3, [], "0 exp_avg_sqs"),
    ):
        with pytest.raises(PMCError, match=match):
            adamw(*(bad if n == at else t for n, t in enumerate(good)), settings=settings)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: 60 GB of it")
def test_more_numbers_than_int32_counts():
    size = 2**31 + 4099
    grads, weights = ([torch.ones(size, dtype=torch.bfloat16, device=DEVICE)] for _ in "gw")
    masters, *moments = ([torch.zeros(size, device=DEVICE)] for _ in "mab")
    masters[0] += 1
    adamw(grads, masters, *moments, weights, settings=Settings(1, 0.5, (0.9, 0.999), 1e-8, 0.0, True))
    assert all(bool((part == 0.5).all()) for part in weights[0].split(2**28))


@pytest.mark.skipif(DEVICE == "cpu", reason="what it does to the device's queue: needs a GPU")
def test_a_step_waits_for_nothing():
    tensors = made(torch.bfloat16)
    settings = Settings(1, 0.1, (0.9, 0.999), 1e-8, 0.0, True)
    adamw(*tensors, settings=settings)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        adamw(*tensors, settings=settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
