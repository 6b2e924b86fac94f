"""weighted_nll on the CPU, SmolLM2-135M's head (V 49152, D 576), float32: time and peak memory.

Contestants: torch's padded cross-entropy as a trainer computes it, the same on the valid rows alone,
torch's own chunked linear_cross_entropy where it exists, and three bare GEMMs of the same size (the
floor: forward, d(hidden), d(head)).
"""

import pytest
import torch
from torch.nn import functional as F

from pmc_fast.ops import weighted_nll

VOCAB, WIDTH = 49152, 576


@pytest.fixture(scope="module")
def head():
    return (torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.05).requires_grad_()


def rows_of(count):
    g = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, WIDTH, generator=g).requires_grad_()
    return hidden, torch.randint(VOCAB, (count,), generator=g)


def clear(*tensors):
    for t in tensors:
        t.grad = None


def eager(hidden, head, targets):
    F.cross_entropy(hidden @ head.T, targets).backward()
    clear(hidden, head)


def ours(hidden, head, targets, scale=None):
    scale = torch.full(targets.shape, 1 / len(targets)) if scale is None else scale
    weighted_nll(hidden, head, targets, scale)[0].backward()
    clear(hidden, head)


def gemms(hidden, head, logits):
    with torch.no_grad():
        torch.mm(hidden, head.T, out=logits)
        logits @ head
        logits.T @ hidden


def chunked(hidden, head, targets):
    F.linear_cross_entropy(hidden, head, targets).backward()
    clear(hidden, head)


@pytest.mark.parametrize("count", [500, 1600])
def test_valid_rows(contest, head, count):
    hidden, targets = rows_of(count)
    logits = torch.empty(count, VOCAB)
    contestants = {
        "pmc_fast": lambda: ours(hidden, head, targets),
        "torch eager": lambda: eager(hidden, head, targets),
        "three GEMMs alone": lambda: gemms(hidden, head, logits),
    }
    if hasattr(F, "linear_cross_entropy"):
        contestants["torch linear_cross_entropy"] = lambda: chunked(hidden, head, targets)
    contest(f"M {count}, forward + backward", contestants, rounds=7 if count < 1000 else 5, warmup=1, M=count)


def test_padded_batch(contest, head):
    """8 x 200 positions of which 496 predict a target, as a padded trainer has them."""
    hidden, targets = rows_of(1600)
    count = torch.zeros(1600, dtype=torch.bool)
    for b in range(8):
        count[b * 200 + 20 : b * 200 + 82] = True
    padded = torch.where(count, targets, -100)
    scale = torch.full((1600,), 1 / 496)
    contest(
        "8 x 200 padded, 496 count, forward + backward",
        {
            "pmc_fast": lambda: ours(hidden, head, padded, scale),
            "torch eager": lambda: eager(hidden, head, padded),
        },
        rounds=5,
        warmup=1,
        M=496,
    )


def test_frozen_head(contest, head):
    hidden, targets = rows_of(500)
    frozen = head.detach()
    contest(
        "M 500, frozen head",
        {
            "pmc_fast, frozen": lambda: ours(hidden, frozen, targets),
            "pmc_fast, full": lambda: ours(hidden, head, targets),
        },
        rounds=7,
        warmup=1,
    )


def test_many_samples(contest, head):
    """8 questions x 20 samples with soft weights: one call against a padded pass for each sample number.

    Answers of 12 tokens; the 20 samples of a question share the row that predicts their first token.
    """
    questions, samples, length = 8, 20, 12
    used = questions * (1 + samples * (length - 1))
    hidden, _ = rows_of(used)
    g = torch.Generator().manual_seed(1)
    targets = torch.randint(VOCAB, (questions, samples, length), generator=g)
    weights = torch.randn(questions, samples, generator=g).softmax(1)
    rows = torch.empty(questions, samples, length, dtype=torch.int64)
    rows[:, :, 0] = torch.arange(questions)[:, None]
    rows[:, :, 1:] = questions + torch.arange(used - questions).view(questions, samples, length - 1)
    scale = (weights / (questions * length))[:, :, None].expand_as(targets).reshape(-1)

    def one_call():
        loss, _ = weighted_nll(hidden, head, targets.reshape(-1), scale, rows.reshape(-1))
        loss.backward()
        clear(hidden, head)
        return loss.item()

    def twenty_passes():
        total = 0.0
        for i in range(samples):
            logits = hidden[rows[:, i].reshape(-1)] @ head.T
            each = F.cross_entropy(logits, targets[:, i].reshape(-1), reduction="none").view(questions, length)
            loss = (each * weights[:, i, None]).sum() / (questions * length)
            loss.backward()
            total += loss.item()
        clear(hidden, head)
        return total

    assert one_call() == pytest.approx(twenty_passes(), rel=1e-5)
    contest(
        "8 questions x 20 samples, soft weights",
        {"pmc_fast, one call": one_call, "torch eager, 20 passes": twenty_passes},
        rounds=3,
        warmup=0,
    )
