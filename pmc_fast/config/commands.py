"""The settings of each command."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from ..errors import PMCError
from .filters import CHOICES, UPCORE, Filter, filter_of, parse_filter
from .methods import PARAMETERS, MethodConfig, OptionalNotNegative, of_pmc, require_without_pmc, without_pmc

from .parts import (  # isort: skip
    Count, EvaluationConfig, ModelConfig, NotNegative, OptionalPositive, OptionalScore, OptionalShare, Path, Paths, PMCConfig, Positive,
    PositiveInt, PassConfig, SamplingConfig, Settings, Threshold, option, require,
)  # fmt: skip

# llama and phi: arXiv 2507.04219, appendix, and the published configurations. small: the demo. request: for --lora, few
# large steps, tuned on SmolLM2-135M only.
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
    "fast": {
        "num_samples": 10, "temperature": 0.7, "top_p": 0.95, "answer_penalty": 8.0, "resample_above": 0.05,
        "selection": "likeliest", "rollout_batch_size": 20, "question_dropout": 0.3, "max_length_ratio": 1.5, "retain_loss": "kl",
        "retain_order": "shuffled", "retain_weight": 5.0, "num_epochs": 12.0, "batch_size": 4, "gradient_accumulation_steps": 1,
        "learning_rate": 1.5e-4, "prompt_format": "tags",
    },
    "request": {
        "num_samples": 5, "temperature": 1.0, "top_p": 0.95, "answer_penalty": 3.0, "resample_above": 0.1,
        "retain_weight": 3.0, "num_epochs": 5.0, "batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 2e-3,
        "prompt_format": "tags",
    },
}  # fmt: skip

# `pmc-fast bench --quick`: a minute for 135M parameters on two CPU cores with AVX-512, twice that without
QUICK: dict[str, Any] = {"batch_size": 2, "num_samples": 8, "max_length": 80, "rounds": 2}


@dataclass(kw_only=True)
class UnlearnConfig(EvaluationConfig, PMCConfig, MethodConfig):
    """Settings of an unlearning run: data, method, optimizer, evaluation, output."""

    retain_weight: OptionalNotNegative = option(  # type: ignore[assignment]  # a number once the method is known
        None,
        "weight of the retain loss, lambda in the paper (unset: 1.25 for pmc, else the method's own)",
        aliases=["--lambda"],
    )
    output: Path = option("", "output directory, new or empty")
    num_epochs: Positive = option(30.0, "passes over the forget questions", aliases=["--epochs"])
    max_steps: Count = option(0, "optimizer steps, whatever NUM_EPOCHS says (0: as many as these take)")
    max_seconds: OptionalPositive = option(
        None,
        "train for so many seconds, whatever NUM_EPOCHS says: no step begins that would end after them, and the learning rate falls "
        "to 0 with the clock (unset: off)",
    )
    batch_size: PositiveInt = option(
        8, "forget questions of a micro-batch, and retain pairs unless RETAIN_PER_QUESTION says more"
    )
    gradient_accumulation_steps: PositiveInt = option(
        2, "micro-batches per optimizer step", aliases=["--accumulation"]
    )
    learning_rate: Positive = option(1e-5, "peak learning rate", aliases=["--lr"])
    weight_decay: NotNegative = option(0.01, "weight decay of the optimizer")
    optimizer: str = option("adamw_torch_fused", "a transformers optimizer, by its name in TrainingArguments.optim")
    param_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "dtype of the parameters; with bfloat16 the optimizer keeps float32 masters (auto: bfloat16 on cuda if MODEL is "
        "saved in it and DTYPE is not float32; else float32)",
    )
    allow_pure_bf16: bool = option(False, "bfloat16 parameters without masters: small updates are rounded away")
    checkpoint_steps: Count = option(0, "write a checkpoint into OUTPUT.checkpoints every this many steps (0: never)")
    resume: Path = option("", "resume from a checkpoint directory, or auto: the newest complete one of OUTPUT")
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "dtype in which the model is saved and evaluated (auto: that of MODEL)"
    )
    evaluate: bool = option(True, "answer and score the forget and retain questions before and after")
    filter: str = option(
        "",
        f"leave forget questions out of training, evaluate them all the same and report their rows: {CHOICES} (outliers "
        "of hidden states; needs scikit-learn)",
    )
    skip_known_forgotten: bool = option(
        False,
        "as --filter known_forgotten: leave out forget questions whose NUM_SAMPLES sampled answers never contain the truth; "
        "if none is left, write nothing and exit 0",
    )
    skip_threshold: Threshold = option(
        0.0,
        "filter known_forgotten: the largest ROUGE-L recall at which a sample does not contain the truth; 0 allows no shared "
        "word, which few full sentences meet",
    )
    allow_relearn: bool = option(False, "accept rows of RETAIN and FORGET that an earlier run made MODEL forget")
    profile: bool = option(False, "write a torch profiler trace of two optimizer steps next to the report")
    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = option(
        "none",
        "report the losses and scores of every step there, never a text; TensorBoard's files: OUTPUT.tensorboard",
    )

    def __post_init__(self) -> None:
        if self.retain_weight is None and self.method == "pmc":
            self.retain_weight = PMCConfig.retain_weight
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        alone = parse_filter(self.filter).name != UPCORE or not self.skip_known_forgotten
        require(alone, "filter", self.filter, "left out with skip_known_forgotten, which is a filter")
        if self.method == "pmc":
            for name in PARAMETERS[1:]:
                value = getattr(self, name)
                require(
                    value in (None, ""), name, value, "left out with method pmc: it is another method's parameter"
                )
        else:
            require_without_pmc(self, of_pmc(self.chosen_filter), f"method {self.method}")
        for name in ("max_steps", "checkpoint_steps", "resume"):
            value = getattr(self, name)
            require(not (self.max_seconds and value), name, value, "left out with max_seconds")
        contradicts = self.dtype == "float32" and self.param_dtype == "bfloat16"
        require(
            not contradicts, "param_dtype", self.param_dtype, "float32, or dtype another one: it computes in bfloat16"
        )
        for name in ("attack_samples", "side_effects_text", "min_quality", "min_utility"):
            value = getattr(self, name)
            require(
                self.evaluate or value == getattr(UnlearnConfig, name), name, value, "left out, or evaluate left on"
            )

    @property
    def chosen_filter(self) -> Filter:
        """The filter that leaves forget questions out of training."""
        return filter_of(vars(self))

    @classmethod
    def names(cls) -> dict[str, str]:
        """Return field names by every name that a YAML file may use: the field, its flag, the aliases of the flag."""
        found = {}
        for f in dataclasses.fields(cls):
            for flag in ("--" + f.name, *f.metadata.get("aliases", ())):
                found[flag.removeprefix("--").replace("-", "_")] = f.name
        return found

    @classmethod
    def by_field(cls, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the settings of a file by the names of their fields; `where` is its name for errors. See `names`.

        Raises
        ------
        PMCError
            A setting is given twice, under two names.
        """
        names, found = cls.names(), dict[str, Any]()
        for given, value in settings.items():
            name = names.get(given.removeprefix("--").replace("-", "_"), given)
            if name in found:
                raise PMCError(f"{where} gives {name} twice, under two names: keep one")
            found[name] = value
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
        named, given = PRESETS[preset] if preset else {}, dict[str, Any]()
        for layer in layers:
            given |= layer
        if given.get("method", "pmc") != "pmc":
            named = without_pmc(named, given)
        values = named | given
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), [*known, *cls.names()], n=1)
                hint = f"did you mean {near[0]}?" if near else "`pmc-fast unlearn --help` lists them"
                raise PMCError(f"setting {name!r} is unknown: {hint}")
        return cls(**values)


@dataclass(kw_only=True)
class RequestConfig(UnlearnConfig):
    """Settings of `pmc-fast unlearn`: those of a run, and those of --lora."""

    lora: bool = option(False, "train a LoRA adapter, the next one of STACK, and keep the weights frozen")
    stack: Path = option("", "with --lora, instead of OUTPUT: directory of adapters, one for each request")
    lora_r: PositiveInt = option(16, "rank of the adapter")
    lora_alpha: PositiveInt = option(32, "scale of the adapter: alpha / r")
    lora_target: list[str] = option(
        ["all-linear"], "names of layers that get an adapter, such as q_proj; may be repeated"
    )
    keep_private: bool = option(False, "with --lora: keep the questions and answers in private.jsonl, mode 0600")

    def validate(self) -> None:
        super().validate()
        require(self.method == "pmc" or not self.lora, "method", self.method, "pmc with lora")
        whole = self.chosen_filter.name != UPCORE or not self.lora
        require(whole, "filter", self.filter, "left out with lora: a request trains on all that it is to erase")
        require(bool(self.lora_target), "lora_target", self.lora_target, "all-linear, or names of layers")
        if self.lora:
            require(bool(self.stack), "stack", self.stack, "the directory of the model's adapters, with lora")
            require(not self.output, "output", self.output, "left out with lora: an adapter goes into stack")
            require(self.save_dtype == "auto", "save_dtype", self.save_dtype, "left out with lora: see merge")
        else:
            require(not self.stack, "stack", self.stack, "left out, or lora given")
            require(not self.keep_private, "keep_private", self.keep_private, "left out, or lora given")


@dataclass(kw_only=True)
class EvaluateConfig(EvaluationConfig):
    """Settings of an evaluation: data, prompts, measurements, and a second model to compare with."""

    suite: Literal["questions", "tofu"] = option(
        "questions", "questions: FORGET, RETAIN, PARAPHRASED and GENERAL; tofu: TOFU's sets and metrics"
    )
    max_degenerate: OptionalShare = option(None, "exit 3 if a larger share (0 to 1) of a set's answers is degenerate")
    before: Path = option("", "a second model, evaluated first and shown next to MODEL: directory or hub id")
    tofu: Path = option("", "suite tofu: directory of TOFU's *_perturbed files, or its hub id locuslab/TOFU")
    split: Literal["forget01", "forget05", "forget10"] = option("forget10", "suite tofu: the forgotten split")
    tofu_rows: Count = option(0, "suite tofu: use only the first rows of each set (0: all; TOFU's code: 300)")
    truth_ratio: Literal["geometric", "arithmetic"] = option(
        "geometric",
        "suite tofu: mean over the perturbed answers: geometric as OpenUnlearning, arithmetic as the TOFU paper",
    )
    retain_log: Path = option("", "suite tofu: the --rows file of a model without the forget set, for forget quality")

    def validate(self) -> None:
        super().validate()
        if self.suite == "tofu":
            require(bool(self.tofu), "tofu", self.tofu, "a directory or hub id: suite tofu reads its sets there")
            for name in ("forget", "retain", "paraphrased", "general", "columns", "prompt_words"):
                require(not getattr(self, name), name, getattr(self, name), "left out: suite tofu has its own sets")
        else:
            for name in ("tofu", "retain_log"):
                require(not getattr(self, name), name, getattr(self, name), "left out, or --suite tofu given")


@dataclass(kw_only=True)
class VerifyConfig(Settings):
    """Settings of a verification: which requests are checked, and which bounds must still hold."""

    stack: Path = option("", "directory of the model's adapters")
    requests: Paths = option([], "forget files of the requests, in any order; private files are found by themselves")
    model: Path = option("", "location of the base model (unset: as in the last record)")
    retain: Path = option("", "location of the last request's retain pairs (unset: as in its record)")
    general: Paths = option([], "location of its general knowledge data; may be repeated")
    min_quality: OptionalScore = option(
        None, "exit 3 if a request's unlearn quality is lower (unset: its gate, or its score less slack)"
    )
    min_utility: OptionalScore = option(
        None, "exit 3 if utility is lower (unset: the last request's gate, or its score less slack)"
    )
    slack: NotNegative = option(5.0, "points (of 100) that quality and utility may lose where no other bound is set")
    attack_samples: Count = option(
        0, "leak attack: number of sampled answers for each question (0: off; without a number: 100)", flag_value=100
    )
    max_leak: OptionalShare = option(
        None,
        "leak attack: exit 3 if a larger share (0 to 1) of a request's questions has a sample with half of the truth",
    )
    device: str = option("auto", "cpu, cuda, cuda:1, ... (auto: cuda if available)")

    def validate(self) -> None:
        super().validate()
        require(bool(self.stack), "stack", self.stack, "the directory of the model's adapters")
        given = self.max_leak is None or self.attack_samples > 0
        require(given, "max_leak", self.max_leak, "left out, or --attack-samples given")


@dataclass(kw_only=True)
class BenchConfig(SamplingConfig, PassConfig, ModelConfig):
    """Settings of a benchmark: the model, the work, and how often it is measured."""

    forget: Path = option("", "questions to sample and to train on, as `unlearn` reads them (unset: built-in ones)")
    retain: Path = option("", "question-answer pairs to train on beside them (unset: built-in ones)")
    batch_size: PositiveInt = option(8, "questions of a rollout; questions, and retain pairs, of a training step")
    rounds: PositiveInt = option(7, "rounds in which all contestants run, after a warm-up")

    def pmc(self) -> PMCConfig:
        """Return the algorithm's settings."""
        names = {f.name for base in (SamplingConfig, PassConfig) for f in dataclasses.fields(base)}
        # what is measured is saved nowhere: that it trains on what it is to forget does no harm
        return PMCConfig(**{name: getattr(self, name) for name in names}, allow_overlap=True)

    @classmethod
    def merge(cls, quick: bool, values: Mapping[str, Any]) -> Self:
        """Build settings, with `quick` from QUICK; given values win."""
        return cls(**(QUICK if quick else {}) | dict(values))
