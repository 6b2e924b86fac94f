"""What `benchmarks.compare_methods` compares, behind one signature: `prepare()`, once and on the clock, and `backward(indices,
kept)`, an optimizer step's gradients on some forget questions and some retain pairs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pmc_fast import PMC
from pmc_fast.config import PMCConfig, UnlearnConfig
from pmc_fast.data import Encoded, Row
from pmc_fast.methods import METHODS, Unlearner
from pmc_fast.rollout import RolloutEngine

Setting = dict[str, float]
PMC_METHODS = ("pmc_fast", "pmc")  # with extensions, and as published
COMPARED = (*PMC_METHODS, "npo", "simnpo", "grad_diff", "idk", "retain_only", "flat", "mollm", "icu", "eul")


class Collapse:
    """PMC: CE(the model's own answers that are unlike its first) + lambda CE(retain)."""

    def __init__(self, model: Any, tokenizer: Any, config: UnlearnConfig, forget: Sequence[Row]) -> None:
        self.pmc = PMC(model, tokenizer, PMCConfig(**config.algorithm()), [row.question for row in forget])
        self.encoder, self.engine = self.pmc.encoder, self.pmc.engine

    def prepare(self) -> None:
        self.pmc.prepare()

    def backward(self, indices: Sequence[int], kept: Sequence[Encoded]) -> float:
        step = self.pmc.sample(indices)
        self.pmc.model.train()
        loss = self.pmc.loss(step, kept).loss
        loss.backward()
        return float(loss.detach())


class Baseline(Unlearner):
    """A method of `pmc_fast.methods`, with an engine for its evaluation."""

    def __init__(
        self, name: str, setting: Setting, model: Any, tokenizer: Any, config: UnlearnConfig, forget: Sequence[Row]
    ) -> None:
        method = METHODS[name]
        own = {field.name for field in dataclasses.fields(method)}
        parameters: dict[str, Any] = {key: value for key, value in setting.items() if key in own}
        super().__init__(model, tokenizer, config, method(**parameters), forget)
        self.engine = RolloutEngine(model)


def make(
    name: str, setting: Setting, model: Any, tokenizer: Any, config: UnlearnConfig, forget: Sequence[Row]
) -> Collapse | Baseline:
    """Return a method with a setting of its own."""
    if name in PMC_METHODS:
        return Collapse(model, tokenizer, config, forget)
    return Baseline(name, setting, model, tokenizer, config, forget)
