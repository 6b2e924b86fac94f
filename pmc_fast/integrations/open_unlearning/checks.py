"""Settings that the handler refuses when it is constructed: unknown, ignored or unsupported ones."""

import inspect
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from ...config import PMCConfig
from ...errors import PMCError
from ...trainer.arguments import REFUSED

ELSEWHERE = {
    "retain_weight": "alpha weighs the retain loss",
    "prompt_format": "prompts come from OpenUnlearning's dataset",
    "system_prompt": "prompts come from OpenUnlearning's dataset",
    "date_string": "prompts come from OpenUnlearning's dataset",
    "store": "it keeps token ids",
    "question_dropout": "questions are token ids, whose words are not known",
    "retain_loss": "retain_loss_type is GradDiff's name of it",
    "retain_order": "OpenUnlearning's dataset draws retain rows",
    "retain_per_question": "OpenUnlearning's dataset draws retain rows, one for each forget row",
    "stop_score": "the stopping rule is PMCTrainer's",
    "stop_retain_loss": "the stopping rule is PMCTrainer's",
    "stop_steps": "the stopping rule is PMCTrainer's",
}
_AS_TRAINER = (
    "label_smoothing_factor", "neftune_noise_alpha", "use_liger_kernel", "optim", "auto_find_batch_size",
    "enable_jit_checkpoint", "parallelism_config", "ignore_data_skip",
)  # fmt: skip
UNMET = {name: REFUSED[name] for name in _AS_TRAINER} | {  # of trainer.args: which values are refused, and why
    "remove_unused_columns": (bool, "it would drop the forget and retain parts of a batch: set it to false"),
    "train_sampling_strategy": (lambda x: x == "group_by_length", "rows are pairs of a forget and a retain row"),
}


def check_names(handler: type, settings: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Refuse settings of PMCConfig that have no effect here, and names that no constructor takes."""
    for name in settings:
        if name in ELSEWHERE:
            raise PMCError(f"method_args.{name} is not a setting here: {ELSEWHERE[name]}")
    constructors = [vars(base)["__init__"] for base in handler.__mro__[1:] if "__init__" in vars(base)]
    known = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
    own = [field.name for field in fields(PMCConfig) if field.name not in ELSEWHERE]
    for name in others:
        if name not in known:
            near = get_close_matches(name, ["gamma", "alpha", "retain_loss_type", *own], 1)
            hint = f"did you mean {near[0]}?" if near else "there are GradDiff's and those of PMCConfig"
            raise PMCError(f"method_args.{name} is not a setting: {hint}")


def check_arguments(args: Any) -> None:
    """Refuse settings of trainer.args that would be ignored, or fail only after the initial answers."""
    for name, (refuses, why) in UNMET.items():
        value = getattr(args, name, None)
        if value is not None and refuses(value):
            raise PMCError(f"trainer.args.{name} is {getattr(value, 'value', value)!r}: {why}")


def check_weights(gamma: Any, alpha: Any) -> None:
    """Refuse weights of the losses that are not numbers in their range."""
    for name, value, least in (("gamma", gamma, "above 0"), ("alpha", alpha, "0 or more")):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise PMCError(f"method_args.{name} is {value!r}: it must be a number")
        if not 0 <= value < float("inf") or (name == "gamma" and not value):
            raise PMCError(f"method_args.{name} is {value!r}: it must be {least}")
