"""The training loop: forget questions and retain pairs in order, AdamW, one record a step."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .config import UnlearnConfig
from .data import Row
from .errors import PMCError
from .reference import Reference


@dataclass(frozen=True, slots=True)
class Schedule:
    """How many optimizer steps a run takes."""

    steps_per_epoch: int
    steps: int

    @classmethod
    def plan(cls, config: UnlearnConfig, num_questions: int) -> "Schedule":
        """Count the steps of `config` over `num_questions`, an epoch's last step being a smaller one."""
        per_step = config.batch_size * config.gradient_accumulation_steps
        steps_per_epoch = math.ceil(num_questions / per_step)
        return cls(steps_per_epoch, max(1, round(config.num_epochs * steps_per_epoch)))


def micro_batches(config: UnlearnConfig, num_questions: int) -> Iterator[list[list[int]]]:
    """Yield each optimizer step's micro-batches of question indices, in a new order every epoch."""
    order = torch.Generator().manual_seed(config.seed)
    while True:
        batches = [b.tolist() for b in torch.randperm(num_questions, generator=order).split(config.batch_size)]
        for i in range(0, len(batches), config.gradient_accumulation_steps):
            yield batches[i : i + config.gradient_accumulation_steps]


def train(
    pmc: Reference,
    retain: Sequence[Row],
    config: UnlearnConfig,
    on_step: Callable[[dict[str, Any]], None] = lambda record: None,
) -> list[dict[str, Any]]:
    """Unlearn: sample, keep the best answers, and train on them beside retain pairs drawn at random.

    Parameters
    ----------
    pmc : Reference
        Prepared: it knows the initial answers. Its model is trained in place.
    retain : Sequence[Row]
        Pairs to keep.
    config : UnlearnConfig
        Optimizer and schedule: AdamW, linear decay after one epoch of warm-up, no clipping.
    on_step : callable
        Gets each step's record as it is made.

    Returns
    -------
    list of dict
        One record a step: losses, mean stored score, questions pending, tokens sampled, seconds.

    Raises
    ------
    PMCError
        The loss or the weights are no longer finite; its text names the step.
    """
    model, count = pmc.model, len(pmc.questions)
    schedule = Schedule.plan(config, count)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    warmup = schedule.steps_per_epoch
    decay = max(1, schedule.steps - warmup)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / warmup if step < warmup else max(0.0, (schedule.steps - step) / decay)
    )

    def diverged(step: int) -> PMCError:
        return PMCError(
            f"training diverged at step {step} of {schedule.steps} (NaN or infinite loss): nothing was written; "
            f"try a learning_rate below {config.learning_rate:g}"
        )

    retain_order = torch.Generator().manual_seed(config.seed + 1)
    model.train()
    history: list[dict[str, Any]] = []
    for step, batches in zip(range(1, schedule.steps + 1), micro_batches(config, count), strict=False):
        record: dict[str, Any] = {"step": step, "learning_rate": rate.get_last_lr()[0]}
        sampled_before, seconds = pmc.sampled_tokens, {"rollout": 0.0, "train": 0.0}
        losses: list[dict[str, float]] = []
        for indices in batches:
            start = time.perf_counter()
            try:
                pmc.sample(indices)
            except RuntimeError as error:  # torch.multinomial refuses the logits of weights that overflowed
                if "probability tensor contains" in str(error):
                    raise diverged(step) from error
                raise
            drawn = time.perf_counter()
            draws = torch.randint(len(retain), (len(indices),), generator=retain_order)
            parts = pmc.loss(indices, [retain[i] for i in draws.tolist()])
            (parts["loss"] / len(batches)).backward()
            losses.append({name: value.item() for name, value in parts.items()})
            if not math.isfinite(losses[-1]["loss"]):
                raise diverged(step)
            seconds["rollout"] += drawn - start
            seconds["train"] += time.perf_counter() - drawn
        start = time.perf_counter()
        optimizer.step()
        if not torch.isfinite(torch.stack([p.detach().sum() for p in trained]).sum()):
            raise diverged(step)  # now: on CUDA the next samples would end in a device-side assert
        rate.step()
        optimizer.zero_grad()
        seconds["train"] += time.perf_counter() - start
        record |= {name: sum(part[name] for part in losses) / len(losses) for name in losses[0]}
        scores = [entry["score"] for entry in pmc.sampled_data.values()]
        record |= {
            "mean_score": sum(scores) / len(scores),
            "pending": count - sum(score == 0 for score in scores),
            "sampled_tokens": pmc.sampled_tokens - sampled_before,
            "rollout_seconds": seconds["rollout"],
            "train_seconds": seconds["train"],
        }
        history.append(record)
        on_step(record)
    model.eval()
    return history
