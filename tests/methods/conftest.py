"""A model that has something to forget."""

import pytest
import torch

from tests.methods.test_methods import KEPT, ROWS, answer_logps, mean_ce


@pytest.fixture
def taught(tiny, tokenizer):
    """The tiny model after it has learned the answers, halfway: untaught, it has next to nothing to forget."""
    optimizer = torch.optim.Adam(tiny.parameters(), lr=5e-3)
    for _ in range(80):
        loss = mean_ce([answer_logps(tiny, tokenizer, row.question, row.answer) for row in [*ROWS, *KEPT]])
        if float(loss.detach()) < 0.7:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return tiny
