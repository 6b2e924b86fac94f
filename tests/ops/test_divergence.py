"""The chunked KL divergence against torch's own on all logits at once."""

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

import pmc_fast.ops.divergence as module
from pmc_fast.ops.divergence import divergence

OPTIONS = {"bias": True, "softcap": 3.0, "logit_scale": 0.7}


def inputs(dtype=torch.float64, seed=0, rows=11, vocab=13):
    g = torch.Generator().manual_seed(seed)
    shapes = [(rows, 5), (vocab, 5), (rows, 3), (vocab, 3), (rows,), (vocab,), (vocab,)]
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def log_probs(hidden, head, bias=None, softcap=None, logit_scale=1.0):
    z = (hidden @ head.T + (0 if bias is None else bias)) * logit_scale
    return log_softmax(z if softcap is None else softcap * torch.tanh(z / softcap), 1)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 100])  # a chunk
def test_value_and_gradients_are_torchs(plain, rows):
    hidden, head, teacher_hidden, teacher_head, scale, bias, teacher_bias = inputs()
    hidden.requires_grad_()
    head.requires_grad_()
    bias.requires_grad_(not plain)
    how = {} if plain else OPTIONS | {"bias": bias}
    teacher_how = {} if plain else OPTIONS | {"bias": teacher_bias}
    ours, each = divergence(
        hidden, head, teacher_hidden, teacher_head, scale, options=how, teacher_options=teacher_how,
        workspace=rows * 6 * 4 * len(head),
    )  # fmt: skip
    student, teacher = log_probs(hidden, head, **how), log_probs(teacher_hidden, teacher_head, **teacher_how)
    rows_of = kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    expected = (scale * rows_of).sum()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(each, rows_of.detach())
    leaves = [hidden, head] if plain else [hidden, head, bias]
    for mine, theirs in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_equal_distributions_have_none_in_any_precision():
    hidden, head, *_, scale, _, _ = inputs(torch.bfloat16)
    same, _ = divergence(hidden, head, hidden, head, scale)
    assert same.dtype == torch.float32
    assert float(same) == 0


@pytest.mark.parametrize(("rows", "times"), [(100, 1), (64, 1), (63, 4)])  # of a chunk, for 64 in all
def test_backward_computes_the_logits_again_only_where_they_do_not_fit(monkeypatch, rows, times):
    hidden, head, teacher_hidden, teacher_head, scale, *_ = inputs(rows=64, vocab=200)
    hidden.requires_grad_()
    sizes, computed = [], []
    log_probs = module._log_probs
    monkeypatch.setattr(module, "_log_probs", lambda *of, **how: computed.append(of) or log_probs(*of, **how))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        total, _ = divergence(hidden, head, teacher_hidden, teacher_head, scale, workspace=rows * 6 * 4 * 200)
    total.backward()
    assert len(computed) == 2 * times  # the student's and the teacher's
    assert (max(sizes) < 64 * 200) == (times > 1)
