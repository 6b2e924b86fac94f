"""One policy for CUDA graphs: the first pass of a size runs eagerly, the second is captured, later ones are replayed."""

import warnings

import pytest

from pmc_fast.cuda_graphs.cache import GraphCache


class Recorder:
    """Stands for a recorder: captures note which one they used."""


def cache(limit=None):
    return GraphCache(Recorder, "A model: a pass", limit)


def test_the_second_pass_is_captured_and_replayed_from_then_on():
    graphs, used = cache(), []

    def capture(recorder):
        used.append(recorder)
        return f"graph {len(used)}"

    assert [graphs.get("a", capture) for _ in range(4)] == [None, "graph 1", "graph 1", "graph 1"]
    assert [graphs.get("b", capture) for _ in range(2)] == [None, "graph 2"]
    assert used[0] is used[1]  # one pool of memory
    assert graphs.captured() == ["a", "b"]
    assert (graphs.captures, graphs.replays) == (2, 4)


def test_a_new_state_drops_all_graphs_and_their_recorder():
    graphs, used = cache(), []
    for state in (1, 1, 1, 2, 2, 2):
        graphs.require([state])
        graphs.get("a", lambda recorder: used.append(recorder) or "graph")
    assert len(set(used)) == graphs.captures == 2
    assert graphs.replays == 4
    assert not graphs.require([2])
    assert graphs.require([3])
    assert graphs.captured() == []


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: no\nCompile with ..."), ValueError(), MemoryError()])
def test_one_failing_size_runs_eagerly_with_one_warning(error):
    graphs, tries, used = cache(), [], []

    def fails(recorder):
        tries.append(recorder)
        raise error

    graphs.get("bad", fails)
    reason = str(error).split("\n")[0] or type(error).__name__
    with pytest.warns(UserWarning, match="captured") as warned:
        assert graphs.get("bad", fails) is None
    assert str(warned[0].message) == (
        f"A model: a pass can't be captured as a CUDA graph ({reason}): its size runs eagerly, which is slower"
    )
    with warnings.catch_warnings(action="error"):
        assert [graphs.get("bad", fails) for _ in range(3)] == [None] * 3
        assert [graphs.get("worse", fails) for _ in range(3)] == [None] * 3
        assert [graphs.get("good", lambda r: used.append(r) or "graph") for _ in range(2)] == [None, "graph"]
        graphs.require("new")
        assert [graphs.get("bad", fails) for _ in range(3)] == [None] * 3  # tried again: one more time
    assert len(tries) == 3
    assert used[0] not in tries  # no memory pool of a capture that failed
    assert graphs.captures == graphs.replays == 1


def test_an_interrupt_is_no_failure():
    graphs = cache()

    def interrupted(recorder):
        raise KeyboardInterrupt

    graphs.get("a", interrupted)
    with pytest.raises(KeyboardInterrupt):
        graphs.get("a", interrupted)


def test_more_than_the_limit_drops_the_others():
    graphs = cache(limit=2)
    for size in ("a", "b"):
        for _ in range(2):
            assert graphs.get(size, lambda recorder: "graph") in (None, "graph")
    graphs.get("c", lambda recorder: "graph")
    assert graphs.captured() == ["a", "b"]
    assert graphs.get("c", lambda recorder: "graph") == "graph"
    assert graphs.captured() == ["c"]
