"""CUDA graphs by size, with one policy for rollouts and training: warm up, capture, replay, drop, fall back."""

import warnings
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from .recorder import Recorder

Graph = TypeVar("Graph")


class GraphCache(Generic[Graph]):
    """Graphs of one model's passes.

    The first pass of a size runs eagerly, so that libraries set themselves up. The second is captured, and replayed
    from then on. If the capture of a size fails, passes of that size run eagerly; other sizes are not affected.

    Parameters
    ----------
    recorder : callable
        Makes a Recorder. Another one is made after all graphs were dropped, since their memory pool ends with the
        last of them, and after a capture that failed.
    name : str
        What is captured, for the warning, which is given once.
    limit : int, optional
        Graphs to keep. When a further one is captured, all others are dropped.
    """

    def __init__(self, recorder: Callable[[], Recorder], name: str, limit: int | None = None) -> None:
        self._new_recorder, self._name, self._limit = recorder, name, limit
        self._state: Any = None
        self._warned = False
        self.captures = self.replays = 0
        self.drop()

    def drop(self) -> None:
        """Drop all graphs and release their memory."""
        self._graphs: dict[Hashable, Graph | None] = {}  # None: its capture failed
        self._seen: set[Hashable] = set()
        self._recorder: Recorder | None = None

    def require(self, state: Any) -> bool:
        """Drop all graphs if `state`, what they rely on (see `fingerprint`), has changed; return whether it has."""
        if changed := state != self._state:
            self.drop()
            self._state = state
        return changed

    def captured(self) -> list[Any]:
        """Return the sizes that can be replayed."""
        return [size for size, graph in self._graphs.items() if graph is not None]

    def graphs(self) -> list[Graph]:
        """Return the graphs that there are."""
        return [graph for graph in self._graphs.values() if graph is not None]

    def get(self, size: Hashable, capture: Callable[[Recorder], Graph]) -> Graph | None:
        """Return the graph to replay for a pass, or None if the pass is to run eagerly.

        Parameters
        ----------
        size : hashable
            Passes of one size launch the same kernels on the same memory.
        capture : callable
            Captures such a pass. Whatever it raises, the pass can run eagerly.
        """
        if size not in self._seen:
            self._seen.add(size)
            return None
        if size not in self._graphs:
            if len(self.captured()) == self._limit:
                self.drop()
                self._seen.add(size)
            self._graphs[size] = self._capture(capture)
        graph = self._graphs[size]
        self.replays += graph is not None
        return graph

    def _capture(self, capture: Callable[[Recorder], Graph]) -> Graph | None:
        if self._recorder is None:
            self._recorder = self._new_recorder()
        try:
            graph = capture(self._recorder)
        except Exception as error:
            self._recorder = None
            if not self._warned:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                warnings.warn(
                    f"{self._name} can't be captured as a CUDA graph ({reason}): its size runs eagerly, which is slower",
                    stacklevel=2,
                )
            self._warned = True
            return None
        self.captures += 1
        return graph
