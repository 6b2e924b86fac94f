"""MOLLM: its loss and direction against plain torch and a search, and that gradients add up as any other method's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from pmc_fast.methods import MOLLM
from tests.methods.test_methods import CHOSEN, KEPT, LAMBDA, ROWS, answer_logps, made, mean_ce


def flat(gradients):
    return torch.cat([g.flatten().double() for g in gradients])


def shortest(f, r):
    """The shortest vector between two, found by a search."""
    at = minimize_scalar(
        lambda s: float((s * f + (1 - s) * r).norm()), bounds=(0, 1), method="bounded", options={"xatol": 1e-9}
    )
    return min((s * f + (1 - s) * r for s in (0.0, float(at.x), 1.0)), key=lambda v: float(v.norm()))


def plain(taught, tokenizer):
    """The two losses by the model's own forward, and their gradients."""

    def every(rows):
        return [answer_logps(taught, tokenizer, row.question, row.answer) for row in rows]

    forget = -(1 - torch.cat(every([ROWS[i] for i in CHOSEN])).exp() / 2).log().mean()
    retain = LAMBDA * mean_ce(every(KEPT))
    parameters = list(taught.parameters())
    gradients = [flat(torch.autograd.grad(loss, parameters)) for loss in (forget, retain)]
    return float(forget.detach() + retain.detach()), *gradients


@pytest.mark.parametrize("max_tokens", [8192, 40])  # one pack, and several
def test_the_gradient_is_the_shortest_mixture_of_two(taught, tokenizer, max_tokens):
    task = made(taught, tokenizer, "mollm", max_tokens=max_tokens)
    task.prepare()
    kept = [task.encoder.pair(row.question, row.answer) for row in KEPT]
    loss, forget, retain = plain(taught, tokenizer)
    expected = shortest(forget, retain)
    assert task.backward(CHOSEN, kept) == pytest.approx(loss, rel=1e-4)
    ours = flat(p.grad for p in taught.parameters())
    assert float((ours - expected).norm()) < 1e-3 * float(expected.norm())
    assert float(expected.norm()) < 0.99 * min(float(forget.norm()), float(retain.norm()))  # neither end of the range
    assert float(ours @ forget) > 0  # neither loss rises
    assert float(ours @ retain) > 0
    task.backward(CHOSEN, kept)
    torch.testing.assert_close(flat(p.grad for p in taught.parameters()), 2 * ours, rtol=1e-3, atol=1e-6)


def test_without_retain_pairs_it_is_the_bounded_loss_alone(taught, tokenizer):
    task = made(taught, tokenizer, "mollm")
    task.prepare()
    loss, forget, _ = plain(taught, tokenizer)
    alone = task.backward(CHOSEN)
    assert 0 < alone < math.log(2)
    assert alone < loss
    ours = flat(p.grad for p in taught.parameters())
    assert float((ours - forget).norm()) < 1e-3 * float(forget.norm())


def test_training_lowers_both_losses(taught, tokenizer):
    task = made(taught, tokenizer, "mollm")
    kept = [task.encoder.pair(row.question, row.answer) for row in KEPT]
    optimizer = torch.optim.SGD(taught.parameters(), lr=0.01)
    found = []
    for _ in range(6):
        found.append(task.backward([0, 1, 2], kept))
        optimizer.step()
        optimizer.zero_grad()
    assert found[-1] < found[0]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=4))
def test_the_mixture_is_the_closed_form_of_a_search(pairs):
    f, r = torch.tensor(pairs, dtype=torch.float64).T
    share, rest = MOLLM().mixture(float(f @ f), float(f @ r), float(r @ r))
    assert share + rest == 1
    assert 0 <= share <= 1
    assert float((share * f + rest * r).norm()) <= float(shortest(f, r).norm()) + 1e-6
