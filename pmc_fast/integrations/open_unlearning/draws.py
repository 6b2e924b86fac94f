"""A resumed run's retain rows, which OpenUnlearning draws from torch's generator a micro-batch ahead of training."""

from collections.abc import Sequence
from typing import Any

import torch


class Draws(torch.utils.data.Dataset[Any]):
    """A data set that draws retain rows as it is indexed, and repeats a draw when a run is resumed.

    A loader fetches one micro-batch ahead. When the Trainer saves the generator's state, that micro-batch is already
    drawn, so a resumed run would draw it again from a later state.

    Parameters
    ----------
    rows : dataset
        Indexed in the training process.
    state : dict, optional
        Of `state_dict`: the first micro-batch is drawn as the one that had been fetched ahead.
    """

    def __init__(self, rows: Any, state: dict[str, str] | None = None) -> None:
        self.rows = rows
        self.state = state  # None once the first micro-batch is drawn
        self._before = torch.get_rng_state()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Fetch a micro-batch."""
        state, self.state = self.state, None
        if state is not None:
            torch.set_rng_state(_tensor(state["before"]))
        self._before = torch.get_rng_state()
        rows = [self.rows[i] for i in indices]
        if state is not None:
            torch.set_rng_state(_tensor(state["after"]))
        return rows

    def state_dict(self) -> dict[str, str]:
        """Return the generator's state before the last micro-batch was drawn and its present one; JSON-ready."""
        states = {"before": self._before, "after": torch.get_rng_state()}
        return {name: bytes(state.tolist()).hex() for name, state in states.items()}


def _tensor(state: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8)
