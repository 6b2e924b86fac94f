"""The settings of each command."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from ..errors import PMCError
from .parts import (
    Count,
    EvaluationConfig,
    NotNegative,
    OptionalScore,
    OptionalShare,
    Path,
    Paths,
    PMCConfig,
    Positive,
    PositiveInt,
    Settings,
    Threshold,
    option,
    require,
)

# Published: arXiv 2507.04219, appendix, and its code's configurations. small: the demo's; request: its with --lora, for
# few and large steps, tuned on SmolLM2-135M alone.
PRESETS: dict[str, dict[str, Any]] = {
    "llama": {
        "num_samples": 20, "temperature": 0.9, "top_p": 0.95, "retain_weight": 1.25, "num_epochs": 30.0,
        "batch_size": 8, "gradient_accumulation_steps": 2, "learning_rate": 1e-5, "prompt_format": "chat",
    },
    "phi": {
        "num_samples": 5, "temperature": 1.25, "top_p": 0.95, "retain_weight": 1.5, "num_epochs": 40.0,
        "batch_size": 16, "gradient_accumulation_steps": 4, "learning_rate": 1e-5, "prompt_format": "tags",
    },
    "small": {
        "num_samples": 10, "temperature": 1.25, "top_p": 0.95, "retain_weight": 1.25, "num_epochs": 12.0,
        "batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 5e-5, "prompt_format": "tags",
    },
    "request": {
        "num_samples": 5, "temperature": 1.25, "top_p": 0.95, "retain_weight": 2.0, "num_epochs": 6.0,
        "batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 3.5e-3, "prompt_format": "tags",
        "stop_score": 0.05, "stop_retain_loss": 0.08,
    },
}  # fmt: skip


@dataclass(kw_only=True)
class UnlearnConfig(EvaluationConfig, PMCConfig):
    """Settings of one unlearning run: data, the algorithm, the optimizer, the evaluation, and what is written."""

    output: Path = option("", "directory to write, new or empty")
    num_epochs: Positive = option(30.0, "passes over the forget questions", aliases=["--epochs"])
    batch_size: PositiveInt = option(8, "forget questions (and retain pairs) in a micro-batch")
    gradient_accumulation_steps: PositiveInt = option(
        2, "micro-batches in an optimizer step", aliases=["--accumulation"]
    )
    learning_rate: Positive = option(1e-5, "peak of the learning rate", aliases=["--lr"])
    weight_decay: NotNegative = option(0.01, "the optimizer's weight decay")
    optimizer: str = option(
        "adamw_torch_fused", "one of transformers' optimizers by its name in TrainingArguments.optim"
    )
    param_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "what parameters are kept in; bfloat16: the optimizer keeps float32 masters of them"
    )
    allow_pure_bf16: bool = option(
        False, "bfloat16 parameters without masters: at small learning rates they hardly move"
    )
    checkpoint_steps: Count = option(0, "write a checkpoint into OUTPUT.checkpoints every so many steps (0: never)")
    resume: Path = option("", "go on from a checkpoint: its directory, or auto for the newest sound one of OUTPUT")
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "what is saved and evaluated (auto: as the model came)"
    )
    evaluate: bool = option(True, "answer the forget and retain questions before and after, and score them")
    skip_known_forgotten: bool = option(
        False,
        "leave out forget questions of which NUM_SAMPLES sampled answers never say the truth, report their rows; if "
        "none is left, nothing is written and the exit code is 0",
    )
    skip_threshold: Threshold = option(
        0.0,
        "skip_known_forgotten: the largest ROUGE-L recall of the truth at which a sample does not say it; at 0 not one "
        "word may be shared, which few whole sentences fulfil",
    )
    allow_relearn: bool = option(
        False, "accept rows of RETAIN and FORGET that an earlier run or request made MODEL forget"
    )
    profile: bool = option(False, "write a torch profiler trace of two optimizer steps beside the report")

    def validate(self) -> None:
        super().validate()
        for name in ("attack_samples", "side_effects_text", "min_quality", "min_utility"):
            value = getattr(self, name)
            require(
                self.evaluate or value == getattr(UnlearnConfig, name), name, value, "left out, or evaluate left on"
            )

    @classmethod
    def names(cls) -> dict[str, str]:
        """Return each field's name by every name that a file may use: its own, its flag's and the flag's aliases."""
        found = {}
        for f in dataclasses.fields(cls):
            for flag in ("--" + f.name, *f.metadata.get("aliases", ())):
                found[flag.removeprefix("--").replace("-", "_")] = f.name
        return found

    @classmethod
    def merge(cls, preset: str | None, *layers: Mapping[str, Any]) -> Self:
        """Build settings from a preset and then each layer; later values win.

        Raises
        ------
        PMCError
            An unknown preset or field, or a value out of its range.
        """
        if preset not in (None, *PRESETS):
            raise PMCError(f"preset {preset!r} is unknown: use one of {', '.join(PRESETS)}")
        values = PRESETS[preset].copy() if preset else {}
        for layer in layers:
            values |= layer
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), [*known, *cls.names()], n=1)
                hint = f"did you mean {near[0]}?" if near else "`pmc-fast unlearn --help` lists them"
                raise PMCError(f"setting {name!r} is unknown: {hint}")
        return cls(**values)


@dataclass(kw_only=True)
class RequestConfig(UnlearnConfig):
    """Settings of `pmc-fast unlearn`: a run's, and those of its adapter where that is what it trains."""

    lora: bool = option(False, "train a LoRA adapter on the frozen model, the next one of STACK, not its weights")
    stack: Path = option(
        "", "with --lora, in OUTPUT's place: directory of a model's adapters, one a request, in order"
    )
    lora_r: PositiveInt = option(16, "rank of the adapter")
    lora_alpha: PositiveInt = option(32, "the adapter is scaled by alpha / r")
    lora_target: list[str] = option(
        ["all-linear"], "layers that get an adapter, by name, such as q_proj; may be given again (all-linear: all)"
    )
    keep_private: bool = option(False, "with --lora: keep the questions and answers in private.jsonl, mode 0600")

    def validate(self) -> None:
        super().validate()
        require(bool(self.lora_target), "lora_target", self.lora_target, "all-linear, or names of layers")
        if self.lora:
            require(bool(self.stack), "stack", self.stack, "the directory of the model's adapters, with lora")
            require(not self.output, "output", self.output, "left out with lora: an adapter goes into stack")
            require(self.param_dtype == "float32", "param_dtype", self.param_dtype, "float32 with lora")
            require(self.save_dtype == "auto", "save_dtype", self.save_dtype, "left out with lora: see merge")
        else:
            require(not self.stack, "stack", self.stack, "left out, or lora given")
            require(not self.keep_private, "keep_private", self.keep_private, "left out, or lora given")


@dataclass(kw_only=True)
class EvaluateConfig(EvaluationConfig):
    """Settings of an evaluation: what is measured of a model, and what it is compared with."""

    suite: Literal["questions", "tofu"] = option(
        "questions", "ask FORGET, RETAIN, PARAPHRASED and GENERAL, or TOFU's sets, and measure its metrics too"
    )
    max_degenerate: OptionalShare = option(  # with nothing to compare with, a model may always have been so
        None, "exit 3 if more than this share (0 to 1) of a set's answers say nothing; see unlearn"
    )
    before: Path = option("", "a second model, evaluated first and shown beside MODEL: directory or hub id")
    tofu: Path = option("", "suite tofu: directory of TOFU's *_perturbed files, or its hub id locuslab/TOFU")
    split: Literal["forget01", "forget05", "forget10"] = option("forget10", "suite tofu: what was to be forgotten")
    tofu_rows: Count = option(0, "suite tofu: only the first so many rows of each set (0: all; TOFU's own code: 300)")
    truth_ratio: Literal["geometric", "arithmetic"] = option(
        "geometric", "suite tofu: mean over the perturbed answers, OpenUnlearning's or the TOFU paper's"
    )
    retain_log: Path = option(
        "", "suite tofu: what --rows wrote for a model that never saw the forget set; gives forget quality"
    )

    def validate(self) -> None:
        super().validate()
        if self.suite == "tofu":
            require(bool(self.tofu), "tofu", self.tofu, "a directory or hub id: suite tofu reads its sets there")
            for name in ("forget", "retain", "paraphrased", "general"):
                require(not getattr(self, name), name, getattr(self, name), "left out: suite tofu has its own sets")
        else:
            for name in ("tofu", "retain_log"):
                require(not getattr(self, name), name, getattr(self, name), "left out, or --suite tofu given")


@dataclass(kw_only=True)
class VerifyConfig(Settings):
    """Settings of a verification: what is asked again, and what must still hold."""

    stack: Path = option("", "directory of the model's adapters")
    requests: Paths = option([], "the requests' forget files, in any order; those kept private are found")
    model: Path = option("", "where the base model is now (unset: where the last record says)")
    retain: Path = option("", "where the last request's pairs to keep are now (unset: where its record says)")
    general: Paths = option([], "where its data of general knowledge is now; may be given again")
    min_quality: OptionalScore = option(
        None,
        "exit 3 if a request's unlearn quality is below this (unset: its record's gate, or what it was less slack)",
    )
    min_utility: OptionalScore = option(
        None, "exit 3 if utility is below this (unset: the last record's gate, or what it was less slack)"
    )
    slack: NotNegative = option(
        5.0, "points of 100 that quality and utility may have lost where nothing else is their bound"
    )
    attack_samples: Count = option(
        0,
        "leak attack: answers sampled for each forget question, in which the truth is looked for (0: off; without a "
        "number: 100)",
        flag_value=100,
    )
    max_leak: OptionalShare = option(
        None,
        "leak attack: exit 3 if of a request's questions a larger share (0 to 1) has a sample with half of the truth",
    )
    device: str = option("auto", "cpu, cuda, cuda:1, ... (auto: cuda where there is one)")

    def validate(self) -> None:
        super().validate()
        require(bool(self.stack), "stack", self.stack, "the directory of the model's adapters")
        given = self.max_leak is None or self.attack_samples > 0
        require(given, "max_leak", self.max_leak, "left out, or --attack-samples given")
