"""A run that was checked: its data read, and all that can be refused before the model's weights are loaded."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import UPCORE, RewardName, UnlearnConfig
from ..data import Encoder, Question, Row, load_rows
from ..distributed import launched
from ..errors import PMCError
from ..evaluation import (
    EvalSet,
    UnrelatedText,
    check_attacks,
    check_sets,
    check_texts,
    check_truths,
    load_sets,
    truths_of,
)
from ..methods import Method
from ..methods.coreset import check_upcore
from ..models import loading
from ..pmc.algorithm import check_store
from ..pmc.reward import choose_scorer
from ..pmc.schedule import Schedule
from ..trainer import checkpointing
from ..trainer.arguments import check_optimizer_name
from . import earlier_runs, known_forgotten, trackers
from .held import Held
from .memory import Choice
from .methods import checked_method
from .progress import Monitor

FEW_STEPS = 50
COLD = 0.1


@dataclass(slots=True)
class Plan:
    """A checked run: nothing was computed or written yet."""

    config: UnlearnConfig  # prompt_format and param_dtype are resolved
    encoder: Encoder
    forget: list[Row]
    retain: list[Row]
    sets: list[EvalSet]
    schedule: Schedule
    paraphrases: list[Question | None]  # of the forget questions, for the filter known_forgotten
    text: UnrelatedText | None  # for side effects
    kept: list[int]  # the forget questions that are trained on, from 0
    earlier: Sequence[Mapping[str, Any]]  # what earlier runs made the model forget
    cut: dict[str, list[int]]  # rows whose answers max_length cuts, by their source
    parameters: int  # of the model
    dtype: torch.dtype  # of its checkpoint
    warnings: list[str] = field(default_factory=list)
    method: Method | None = None  # None: PMC
    choice: Choice | None = None  # how its memory is bounded, where that is not as the settings say

    @property
    def tokenizer(self) -> Any:
        return self.encoder.tokenizer

    @property
    def rows(self) -> dict[str, list[Row]]:
        """All rows of the run by the name of their set, the forget questions first."""
        others = {s.name: s.rows for s in self.sets if s.name not in ("forget", "retain")}
        return {"forget": self.forget, "retain": self.retain, **others}

    def keep(self, kept: list[int], monitor: Monitor) -> None:
        """Leave out all other forget questions and count the steps again."""
        if kept != self.kept:
            few = _few_steps(self.schedule)
            self.kept, self.schedule = kept, Schedule.plan(self.config, len(kept), launched()[1])
            self.warnings = [text for text in self.warnings if text not in few]
            self.warn(_few_steps(self.schedule), monitor)

    def judge_by(self, reward: RewardName, monitor: Monitor) -> None:
        """Note how answers are compared, now that all of them are known."""
        self.config = dataclasses.replace(self.config, reward=reward)
        monitor.stage(f"  reward: {reward}")

    def warn(self, texts: Sequence[str], monitor: Monitor) -> None:
        """Show warnings that are new, and keep them for the report."""
        for text in texts:
            if text not in self.warnings:
                monitor.warn(text)
                self.warnings.append(text)


def require_inputs(config: UnlearnConfig) -> None:
    """Refuse a run without a model or data."""
    if not config.model:
        raise PMCError("model is not given: --model takes a directory or a hub id")
    if not config.forget:
        raise PMCError("forget is not given: --forget takes a file of questions to forget")
    if not config.retain:
        raise PMCError(
            "retain is not given: --retain takes pairs to keep; without them forgetting takes all else along"
        )


def make_plan(config: UnlearnConfig, earlier: Sequence[Mapping[str, Any]], held: Held) -> Plan:
    """Read the data and refuse, before any work, what can't succeed.

    `earlier` has an entry for each run that the model came from; see `earlier_runs.check`. `held` reads the tokenizer.
    """
    check_optimizer_name(config.optimizer)
    trackers.check(config.report_to)
    forget = load_rows(config.forget, **config.reading("forget"))
    retain = load_rows(config.retain, answers=True, **config.reading("retain"))
    check_store(config, [row.question for row in forget])
    if config.chosen_filter.name == UPCORE:
        check_upcore(len(forget), config.forget)
    method, warnings = checked_method(config, forget, launched()[1])
    warnings += earlier_runs.check(
        earlier, (config.forget, forget), (config.retain, retain), allow=config.allow_relearn
    )
    source = held.read(config.model, config.device)
    tokenizer, parameters, dtype = source.tokenizer, source.parameters, source.dtype
    if config.resume not in ("", "auto"):
        checkpointing.load(Path(config.resume), {})
    warnings += loading.check_config(config.model, tokenizer, config.max_length)
    generation_config = None if config.accidents else loading.load_generation_config(config.model)
    encoder = Encoder(tokenizer, config, generation_config)
    warnings += encoder.warnings + (encoder.text_warnings() if method is None and config.store != "ids" else [])
    param_dtype = loading.resolve_param_dtype(
        config.param_dtype, config.dtype, loading.resolve_device(config.device), config.model
    )
    warnings += loading.rounding_warning(param_dtype, config.model, dtype)
    config = dataclasses.replace(config, prompt_format=encoder.format, param_dtype=param_dtype)
    warnings += earlier_runs.check_prompts(config.model, config)
    # the evaluation alone sees the forget answers, and methods that are told them: PMC gets the questions
    sets = load_sets(config, forget, retain) if config.evaluate else []
    cut, found = _check_rows(config, encoder, forget, retain, sets)
    text = None
    if config.side_effects_text:
        text = UnrelatedText.read(config.side_effects_text, tokenizer, loading.max_positions(config.model))
    paraphrases: list[Question | None] = [None] * len(forget)
    if config.chosen_filter.samples:
        paraphrases = known_forgotten.read_paraphrases(config, forget)
    encoder.check_lengths(config.paraphrased, [(q or "", None) for q in paraphrases])
    schedule = Schedule.plan(config, len(forget), launched()[1])
    warnings += [*found, *_few_samples(config), *_few_steps(schedule)]
    kept = list(range(len(forget)))
    return Plan(
        config, encoder, forget, retain, sets, schedule, paraphrases, text, kept, earlier, cut, parameters, dtype, warnings,
        method,
    )  # fmt: skip


def _check_rows(
    config: UnlearnConfig, encoder: Encoder, forget: list[Row], retain: list[Row], sets: list[EvalSet]
) -> tuple[dict[str, list[int]], list[str]]:
    """Check every row that is trained on or asked; return those whose answers are cut, and warnings."""
    every = [EvalSet(config.forget, "forget", forget), EvalSet(config.retain, "keep", retain)]
    every += [s for s in sets if s.name not in ("forget", "retain")]
    cut = {s.name: rows for s in every if (rows := encoder.check_lengths(s.name, s.pairs))}
    warnings = [encoder.cut_warning(s.name, cut[s.name], len(s.rows)) for s in every if s.name in cut]
    warnings += check_sets(every, allow_overlap=config.allow_overlap) + check_texts(config, every)
    judged = sets or ([EvalSet("forget", "forget", forget)] if config.chosen_filter.samples else [])
    check_truths(choose_scorer(config.reward, truths_of(judged)), judged, known=True)
    check_attacks(encoder, sets, config)
    return cut, warnings


def _few_samples(config: UnlearnConfig) -> list[str]:
    """Warn of each setting with which hardly anything but the greedy answer is sampled."""
    cold = {
        f"temperature is {config.temperature:g}": config.temperature < COLD,
        f"top_k is {config.top_k}": config.top_k == 1,
        f"top_p is {config.top_p:g}": config.top_p < COLD,
    }
    return [
        f"{what}: samples are nearly always the greedy answer then, and none is found that is unlike it; published are "
        "temperatures of 0.9 and 1.25, top_k 50, top_p 0.95"
        for what, is_cold in cold.items()
        if is_cold
    ]


def _few_steps(schedule: Schedule) -> list[str]:
    if schedule.steps is None or schedule.steps >= FEW_STEPS:
        return []
    return [
        f"only {schedule.steps} optimizer steps are planned: under {FEW_STEPS} little may be forgotten; "
        "raise --epochs or lower --batch-size"
    ]
