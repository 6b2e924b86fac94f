"""The processes that train one model together: collective calls, and how work is divided."""

import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed

from .errors import LostProcessError, PMCError

T = TypeVar("T")
LOST = "another process of this run is gone: its own error, or the launcher's, says why"
GONE = re.compile(r"gloo|nccl|connection|peer|timed? ?out", re.IGNORECASE)  # in what torch.distributed raises


class Ranks:
    """This process's place in a torch.distributed group, or a single process.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        By default the default group, once it is initialised.

    Notes
    -----
    `gather`, `any` and `require_equal` are collective calls: all processes make them, in the same order.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group

    @property
    def size(self) -> int:
        """Number of processes."""
        return distributed.get_world_size(self._group) if _initialised() else 1

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return distributed.get_rank(self._group) if _initialised() else 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this process's part of `items`, which is the same list on all processes."""
        return list(items[self.rank :: self.size])

    def gather(self, item: T) -> list[T]:
        """Return all processes' `item`, in the order of their ranks."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        with self.watched():
            distributed.all_gather_object(items, item, group=self._group)
        return items

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether `flag` is true on any process; cheaper than `gather`."""
        if self.size == 1:
            return flag
        count = torch.tensor([int(flag)], device=device)
        with self.watched():
            distributed.all_reduce(count, group=self._group)
            return bool(count.item())

    def require_equal(self, what: dict[str, Any]) -> None:
        """Refuse processes whose values in `what` differ, and ones whose process group is not initialised."""
        _, size = launched()
        if size > 1 and not _initialised():
            raise PMCError(
                f"WORLD_SIZE is {size} but torch.distributed is not initialised: each process would train alone; "
                "initialise it first (accelerate on CPUs: ACCELERATE_USE_CPU=true)"
            )
        for rank, theirs in enumerate(self.gather(what)):
            for name, value in what.items():
                if theirs[name] != value:
                    raise PMCError(
                        f"the {name} of process {rank} are not those of process {self.rank}: start all processes with "
                        "the same"
                    )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise LostProcessError where a collective call fails because another process has ended."""
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and GONE.search(str(error)):
                raise LostProcessError(LOST) from error
            raise

    @contextmanager
    def sigterm_raises(self) -> Iterator[None]:
        """Raise LostProcessError on SIGTERM: launchers send it to all processes when one of them has failed."""
        if self.size == 1 or threading.current_thread() is not threading.main_thread():
            yield
            return

        def end(signum: int, frame: Any) -> None:
            raise LostProcessError(LOST)

        before = signal.signal(signal.SIGTERM, end)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def launched() -> tuple[int, int]:
    """Return this process's rank and the number of processes from the launcher's environment variables.

    Raises
    ------
    PMCError
        There is no launcher: only WORLD_SIZE is set, as by a scheduler.
    """
    try:
        rank, ranks = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
    except ValueError as error:
        raise PMCError("RANK and WORLD_SIZE must be whole numbers: unset them") from error
    if ranks > 1 and not os.environ.get("MASTER_ADDR"):
        raise PMCError(
            f"WORLD_SIZE is {ranks} but MASTER_ADDR is not set, so no launcher started this: unset WORLD_SIZE and RANK "
            "for one process, or start with accelerate launch"
        )
    return rank, ranks


def leave() -> None:
    """Destroy the process group before the program ends: gloo's threads abort a process that exits with them running."""
    if _initialised():
        distributed.destroy_process_group()


def _initialised() -> bool:
    return distributed.is_available() and distributed.is_initialized()
