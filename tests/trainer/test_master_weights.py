"""Masters: one step for gradient, moments and weight is the separate steps; its state is theirs."""

import copy

import pytest
import torch
import transformers

from pmc_fast.errors import PMCError
from pmc_fast.ops import adamw as op
from pmc_fast.trainer.master_weights import MasterWeights

ON_CPU = [{"fused": True}, {"foreach": True}, {}]


class Separate(torch.optim.AdamW):
    """torch's AdamW, as an optimizer that is not known: it steps float32 copies of the gradients."""


class SeparateAdam(torch.optim.Adam):
    """The same of Adam."""


SEPARATE = {torch.optim.AdamW: Separate, torch.optim.Adam: SeparateAdam}


def parameters():
    """Return low-precision parameters and one in float32; one is not contiguous."""
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=draw) for shape in ((9, 5), (40,), (3, 7), (8, 6), (11,))]
    low = [torch.nn.Parameter(w.bfloat16()) for w in made[:3]]
    return [*low, torch.nn.Parameter(made[3].bfloat16().T), torch.nn.Parameter(made[4])]


def optimizer_of(kind, parameters, **how):
    groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]
    return MasterWeights(kind(groups, lr=1e-2, betas=(0.9, 0.98), **how))


def run(optimizer, parameters, steps):
    """Step with a schedule; one parameter has no gradient in every third step, another is frozen."""
    for n in steps:
        draw = torch.Generator().manual_seed(n)
        for k, p in enumerate(parameters):
            grad = torch.randn(p.shape, generator=draw).to(p.dtype)
            p.grad = None if (k == 1 and n % 3 == 2) or k == 2 else grad
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + n)
        optimizer.step()


def ends(optimizer, parameters):
    masters = optimizer.state_dict()["masters"]
    return torch.cat([t.detach().double().flatten() for t in (*parameters, *masters)])


@pytest.fixture
def triton(monkeypatch):
    """Step as on CUDA, in Triton's interpreter."""
    monkeypatch.setattr(op, "resolve_backend", lambda backend, device: "cuda")


@pytest.mark.parametrize("kind", SEPARATE)
@pytest.mark.parametrize("how", ON_CPU, ids=str)
def test_on_the_cpu_numbers_are_torchs(kind, how, monkeypatch):
    steps = []
    monkeypatch.setattr("pmc_fast.trainer.master_weights.adamw", lambda *a, **k: steps.append(op.adamw(*a, **k)))
    ours, theirs = parameters(), parameters()
    one, other = optimizer_of(kind, ours, **how), optimizer_of(SEPARATE[kind], theirs, **how)
    run(one, ours, range(6))
    assert bool(steps) == ("fused" in how)
    run(other, theirs, range(6))
    assert torch.equal(ends(one, ours), ends(other, theirs))
    assert torch.equal(ours[2], parameters()[2])  # without gradient


def test_twenty_steps_in_one_pass_are_those_of_the_separate_way(triton):
    ours, theirs, exact = parameters(), parameters(), parameters()
    one, other = optimizer_of(torch.optim.AdamW, ours, fused=True), optimizer_of(Separate, theirs)
    run(one, ours, range(20))
    run(other, theirs, range(20))
    masters, expected = (torch.cat([m.flatten() for m in o.state_dict()["masters"]]) for o in (one, other))
    start = torch.cat([m.flatten() for m in optimizer_of(Separate, exact).state_dict()["masters"]])
    # 20 steps of 3 roundings each, of numbers up to 4; the steps themselves are 1e-2 and less
    assert (masters - expected).abs().max() <= 60 * torch.finfo(torch.float32).eps * 4
    assert (masters - start).abs().max() > 1e-2
    torch.testing.assert_close(ours[4], theirs[4])  # float32, stepped by torch


@pytest.mark.parametrize("back", [False, True])
def test_its_state_is_the_separate_ways(back, triton):
    """Eight steps, the last four by the other way, from the first one's state."""
    kinds = [torch.optim.AdamW, Separate]
    ours, theirs = parameters(), parameters()
    first = optimizer_of(kinds[back], ours, fused=True)
    run(first, ours, range(4))
    state = copy.deepcopy(first.state_dict())
    assert set(state["optimizer"]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    second = optimizer_of(kinds[not back], theirs, fused=True)
    second.load_state_dict(state)
    for p, q in zip(theirs, ours, strict=True):
        p.data = q.detach().clone() if p.dtype == torch.float32 else p.data  # it has no master
    for optimizer, of in ((first, ours), (second, theirs)):
        run(optimizer, of, range(4, 8))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=torch.finfo(p.dtype).eps, atol=1e-7)
    steps = [float(s["step"]) for s in second.state_dict()["optimizer"]["state"].values()]
    assert sorted(steps) == [6, 8, 8, 8]


@pytest.mark.parametrize("odd", ["amsgrad", "maximize", "lr"])
def test_other_settings_go_the_general_way(odd):
    ends_of = []
    for kind in (torch.optim.AdamW, Separate):
        low = [torch.nn.Parameter(torch.linspace(-1, 1, 9).bfloat16())]
        how = {"lr": torch.tensor(0.1)} if odd == "lr" else {odd: True, "lr": 0.1}
        optimizer = MasterWeights(kind(low, **how))
        for n in range(3):
            low[0].grad = torch.linspace(-n, 1, 9).bfloat16()
            optimizer.step()
        ends_of.append(low[0].detach().clone())
    assert torch.equal(*ends_of)
    assert not torch.equal(ends_of[0], torch.linspace(-1, 1, 9).bfloat16())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, Separate])
def test_a_gradient_that_lies_otherwise_in_memory(kind):
    """torch's fused kernels take equal strides for granted."""
    ends_of = []
    for transposed in (False, True):
        weight = torch.linspace(-1, 1, 12).bfloat16().view(4, 3)
        low = torch.nn.Parameter(weight.T.contiguous().T if transposed else weight)
        optimizer = MasterWeights(kind([low], lr=0.1, fused=True))
        for n in range(3):
            low.grad = torch.linspace(-n, 2, 12).bfloat16().view(4, 3)
            optimizer.step()
        ends_of.append(low.detach().clone())
    assert torch.equal(*ends_of)


def test_any_other_optimizer_steps_the_masters():
    for kind in (torch.optim.SGD, transformers.Adafactor):
        how = (
            {"lr": 1e-3}
            if kind is torch.optim.SGD
            else {"lr": 1e-3, "relative_step": False, "scale_parameter": False}
        )
        wide = torch.nn.Parameter(torch.linspace(-1, 1, 24).bfloat16().float().view(4, 6))
        low = torch.nn.Parameter(wide.detach().bfloat16())
        plain, ours = kind([wide], **how), MasterWeights(kind([low], **how))
        for n in range(4):
            low.grad = torch.linspace(-n, 3, 24).bfloat16().view(4, 6)
            wide.grad = low.grad.float()
            plain.step()
            ours.step()
        assert torch.equal(low, wide.bfloat16())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_closures_gradients_are_stepped_with(kind):
    low = torch.nn.Parameter(torch.ones(4).bfloat16())
    optimizer = MasterWeights(kind([low], lr=0.5))

    def closure():
        loss = (low * low).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 4
    assert float(low.max()) < 1


@pytest.mark.parametrize("triton_step", [False, True])
def test_masters_of_other_weights_are_refused(triton_step, request):
    """As after load_best_model_at_end: the masters are the last step's, the weights an earlier one's."""
    if triton_step:
        request.getfixturevalue("triton")
    weights = parameters()
    optimizer = optimizer_of(torch.optim.AdamW, weights)
    run(optimizer, weights, range(2))
    best = [p.detach().clone() for p in weights]
    run(optimizer, weights, range(2, 4))
    last, masters = [p.detach().clone() for p in weights], optimizer.state_dict()["masters"]
    for p, value in zip(weights, best, strict=True):
        p.data.copy_(value)
    with pytest.raises(PMCError, match="load_best_model_at_end"):
        optimizer.unround()
    assert all(torch.equal(p, value) for p, value in zip(weights, best, strict=True))
    for p, value in zip(weights, last, strict=True):
        p.data.copy_(value)
    optimizer.unround()
    assert all(torch.equal(p, m) for p, m in zip(weights, masters, strict=False))
