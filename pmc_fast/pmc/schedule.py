"""How many optimizer steps a run takes, and in what order it visits the forget questions."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..config import UnlearnConfig


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
