"""The draws of retain pairs."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmc_fast import PMCConfig, PMCError
from pmc_fast.pmc.schedule import RetainDraws


def test_random_draws_are_the_published_ones():
    draws, generator = RetainDraws.of(PMCConfig(seed=6), 5), torch.Generator().manual_seed(7)
    for count in (4, 3, 1):
        assert draws(count) == [[i] for i in torch.randint(5, (count,), generator=generator).tolist()]


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.lists(st.integers(0, 5), max_size=12), st.integers(0, 3))
def test_shuffled_draws_take_every_pair_before_any_comes_again(count, per_question, steps, seed):
    config = PMCConfig(seed=seed, retain_order="shuffled", retain_per_question=per_question)
    draws = RetainDraws.of(config, count)
    made = [draws(questions) for questions in steps]
    assert [len(drawn) for drawn in made] == steps
    assert {len(pairs) for drawn in made for pairs in drawn} <= {per_question}
    flat = [i for drawn in made for pairs in drawn for i in pairs]
    for start in range(0, len(flat), count):
        epoch = flat[start : start + count]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(count))


@pytest.mark.parametrize("order", ["random", "shuffled"])
def test_draws_go_on_from_their_state(order):
    config = PMCConfig(seed=3, retain_order=order, retain_per_question=2)
    whole, first, second = (RetainDraws.of(config, 7) for _ in range(3))
    wanted = [whole(2) for _ in range(9)]
    made = [first(2) for _ in range(4)]
    state = first.state_dict()
    first(3)
    second.load_state_dict(json.loads(json.dumps(state)))  # of when it was taken
    assert made + [second(2) for _ in range(5)] == wanted


@pytest.mark.parametrize("order", ["random", "shuffled"])
def test_no_pairs(order):
    draws = RetainDraws.of(PMCConfig(retain_order=order), 0)
    assert draws(0) == []
    with pytest.raises(PMCError, match="there are no retain pairs to draw from"):
        draws(1)


def test_shuffled_epochs_differ():
    draws = RetainDraws.of(PMCConfig(retain_order="shuffled"), 20)
    assert draws(20) != draws(20)
