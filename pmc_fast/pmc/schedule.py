"""How many optimizer steps a run takes, and in what order it visits the forget questions."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..config import PMCConfig, UnlearnConfig
from ..errors import PMCError


@dataclass(frozen=True, slots=True)
class Schedule:
    """How many optimizer steps a run takes."""

    steps_per_epoch: int
    steps: int | None  # None: as many as max_seconds allow

    @classmethod
    def plan(cls, config: UnlearnConfig, num_questions: int, processes: int = 1) -> "Schedule":
        """Count the steps of `config` over `num_questions`, an epoch's last step being a smaller one."""
        per_step = config.batch_size * config.gradient_accumulation_steps * processes
        steps_per_epoch = math.ceil(num_questions / per_step)
        if config.max_seconds:
            return cls(steps_per_epoch, None)
        return cls(steps_per_epoch, config.max_steps or max(1, math.ceil(config.num_epochs * steps_per_epoch)))


class EpochOrder(torch.utils.data.Sampler[int]):
    """Each epoch's order of `count` questions: the epoch-th permutation drawn with `seed`."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epoch):
            torch.randperm(self.count, generator=generator)
        yield from torch.randperm(self.count, generator=generator).tolist()


class RetainDraws:
    """Draws the retain pairs of forget questions, as indices.

    Parameters
    ----------
    count : int
        Of the pairs.
    seed : int
    order : {"random", "shuffled"}
        Each from all pairs, as published; or every pair once before any comes again.
    per_question : int
        Pairs for each forget question.
    """

    def __init__(
        self, count: int, seed: int, order: Literal["random", "shuffled"] = "random", per_question: int = 1
    ) -> None:
        self.count, self.shuffled, self.per_question = count, order == "shuffled", per_question
        self._generator = torch.Generator().manual_seed(seed)
        self._left: list[int] = []  # of a shuffled order

    @classmethod
    def of(cls, config: PMCConfig, count: int) -> "RetainDraws":
        """Return the draws that trainers make with these settings."""
        return cls(count, config.seed + 1, config.retain_order, config.retain_per_question)

    def __call__(self, questions: int) -> list[list[int]]:
        """Draw each question's next pairs."""
        number = questions * self.per_question
        if not number:
            return []
        if not self.count:
            raise PMCError("there are no retain pairs to draw from: give some")
        if self.shuffled:
            while len(self._left) < number:
                self._left += torch.randperm(self.count, generator=self._generator).tolist()
            drawn, self._left = self._left[:number], self._left[number:]
        else:
            drawn = torch.randint(self.count, (number,), generator=self._generator).tolist()
        return [drawn[i : i + self.per_question] for i in range(0, number, self.per_question)]

    def state_dict(self) -> dict[str, Any]:
        """Return what the next draws depend on, JSON-ready."""
        return {"generator": self._generator.get_state().tolist(), "left": list(self._left)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the draws whose state it is."""
        self._generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
        self._left = list(state["left"])


def micro_batches(config: UnlearnConfig, num_questions: int) -> Iterator[list[list[int]]]:
    """Yield each optimizer step's micro-batches of question indices, in a new order every epoch."""
    order, epoch = EpochOrder(num_questions, config.seed), 0
    while True:
        order.set_epoch(epoch)
        indices = list(order)
        batches = [indices[i : i + config.batch_size] for i in range(0, num_questions, config.batch_size)]
        for i in range(0, len(batches), config.gradient_accumulation_steps):
            yield batches[i : i + config.gradient_accumulation_steps]
        epoch += 1
