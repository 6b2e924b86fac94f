"""Settings: the algorithm's (PMCConfig), a run's (UnlearnConfig) and others', one help text per field."""

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from .errors import PMCError

PromptFormat = Literal["tags", "chat"]
RewardName = Literal["auto", "rouge", "unicode"]
PATHS = (
    "model", "before", "forget", "retain", "output", "paraphrased", "general", "resume", "side_effects_text", "stack",
    "tofu", "retain_log", "requests",
)  # fmt: skip


def _option(default: Any, help: str, **metadata: Any) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(kw_only=True)
class PMCConfig:
    """Settings of Partial Model Collapse, with the names of arXiv 2507.04219 where it has one."""

    num_samples: int = _option(20, "N: answers sampled for each forget question")
    temperature: float = _option(0.9, "sampling temperature")
    top_k: int = _option(50, "sample among the k likeliest tokens (0: all); the published runs use 50")
    top_p: float = _option(0.95, "then among the likeliest of these that hold this probability mass")
    retain_weight: float = _option(1.25, "the paper's lambda: weight of the retain loss", aliases=["--lambda"])
    reward: RewardName = _option(
        "auto",
        "how answers are compared, in training and evaluation: the published ROUGE-L, which sees a to z and 0 to 9 alone, "
        "or by the words of any script (auto: unicode where rouge would not see more than 1 in 100 letters)",
    )
    min_len: int = _option(0, "answers of fewer words than this score worse (0: off)")
    max_length: int = _option(200, "tokens of prompt and answer together")
    prompt_format: Literal["auto", "tags", "chat"] = _option(
        "auto", "'Question: ... Answer: ...' tags or the tokenizer's chat template (auto: chat if it has one)"
    )
    system_prompt: str = _option("You are a helpful assistant.", "system prompt of the chat format")
    date_string: str = _option(
        "10 Apr 2025", "the date that chat templates with a date print; fixed: prompts stay equal"
    )
    allow_control_tokens: bool = _option(
        False, "let tokens such as <|im_start|> in questions and answers through as what they are to the model"
    )
    allow_overlap: bool = _option(
        False,
        "train to keep questions that are to be forgotten, too: such rows of the retain data are refused otherwise",
    )
    accidents: bool = _option(
        False,
        "repeat the published code's accidents: 8 characters of each tagged sample dropped unseen, a second BOS",
    )
    selection: Literal["argmin", "bradley_terry", "soft"] = _option(
        "argmin",
        "train on the first answer of the lowest score, on one drawn by softmax((1 - score) / tau), or on all",
    )
    tau: float = _option(0.1, "temperature of bradley_terry and soft")
    store: Literal["auto", "text", "ids"] = _option(
        "auto", "keep sampled answers as text and encode them again, or as token ids (auto: text where questions are)"
    )
    normalization: Literal["micro_batch", "step"] = _option(
        "micro_batch", "each loss is the mean over its micro-batch's answer tokens (published), or over the step's"
    )
    max_tokens: int = _option(8192, "tokens of one forward pass; a micro-batch of more takes several")
    cuda_graphs: bool = _option(
        True, "on CUDA, replay rollout steps and training passes as CUDA graphs where they can be captured"
    )
    stop_score: float | None = _option(
        None, "stop once the mean best score is at most this, such as 0.05 (unset: off)"
    )
    stop_retain_loss: float | None = _option(
        None, "and the smoothed retain loss is at most this (unset: what it was before, plus 0.05)"
    )
    stop_steps: int = _option(3, "for so many steps in a row")
    seed: int = _option(0, "seed of the samples, the data order and the retain draws")

    def __post_init__(self) -> None:
        self.validate()
        _check_paths(self)

    def algorithm(self) -> dict[str, Any]:
        """Return the settings of PMC alone, whatever else a subclass holds."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(PMCConfig)}

    def validate(self) -> None:
        """Raise PMCError for the first value that can't be meant."""
        _require(self.top_k is not None, "top_k", None, "0 (all tokens) or more")
        _check_types(self)
        _require(self.num_samples >= 1, "num_samples", self.num_samples, "at least 1")
        _require(self.temperature > 0, "temperature", self.temperature, "above 0")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.retain_weight >= 0, "retain_weight", self.retain_weight, "0 or more")
        _require(self.min_len >= 0, "min_len", self.min_len, "0 (off) or more")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 4294967295")
        _require(self.tau > 0, "tau", self.tau, "above 0")
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(self.stop_score is None or 0 <= self.stop_score <= 1, "stop_score", self.stop_score, "0 to 1")
        _require(
            self.stop_retain_loss is None or self.stop_retain_loss > 0,
            "stop_retain_loss", self.stop_retain_loss, "above 0",
        )  # fmt: skip
        _require(self.stop_steps >= 1, "stop_steps", self.stop_steps, "at least 1")
        _require(self.max_length >= 2, "max_length", self.max_length, "at least 2")


@dataclass(kw_only=True)
class UnlearnConfig(PMCConfig):
    """Settings of one unlearning run: the algorithm's, the optimizer's, and what to read and write."""

    model: str = _option("", "directory or hub id of the model (safetensors)")
    forget: str = _option(
        "", "questions to forget: a .jsonl, .json, .parquet, .csv or .tsv file, or owner/name:config of the hub"
    )
    retain: str = _option("", "question-answer pairs to keep, likewise")
    output: str = _option("", "directory to write, new or empty")
    paraphrased: str = _option("", "forget questions in other words with their answers, for the evaluation")
    general: list[str] = _option([], "data of general knowledge, for the evaluation; may be given again")

    num_epochs: float = _option(30.0, "passes over the forget questions", aliases=["--epochs"])
    batch_size: int = _option(8, "forget questions (and retain pairs) in a micro-batch")
    gradient_accumulation_steps: int = _option(2, "micro-batches in an optimizer step", aliases=["--accumulation"])
    learning_rate: float = _option(1e-5, "peak of the learning rate", aliases=["--lr"])
    weight_decay: float = _option(0.01, "the optimizer's weight decay")
    optimizer: str = _option(
        "adamw_torch_fused", "one of transformers' optimizers by its name in TrainingArguments.optim"
    )
    device: str = _option("auto", "cpu, cuda, cuda:1, ... (auto: cuda where there is one)")
    dtype: Literal["auto", "float32", "bfloat16"] = _option(
        "auto", "what training computes in (auto: bfloat16 on cuda, float32 on cpu)"
    )
    param_dtype: Literal["float32", "bfloat16"] = _option(
        "float32", "what parameters are kept in; bfloat16: the optimizer keeps float32 masters of them"
    )
    allow_pure_bf16: bool = _option(
        False, "bfloat16 parameters without masters: at small learning rates they hardly move"
    )
    checkpoint_steps: int = _option(0, "write a checkpoint into OUTPUT.checkpoints every so many steps (0: never)")
    resume: str = _option("", "go on from a checkpoint: its directory, or auto for the newest sound one of OUTPUT")
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "what is saved and evaluated (auto: as the model came)"
    )
    evaluate: bool = _option(True, "answer the forget and retain questions before and after, and score them")
    attack_samples: int = _option(
        0,
        "leak attacks: answers sampled for each forget question, and the largest recall of the truth (0: off; without "
        "a number: 100, as published)",
        flag_value=100,
    )
    attack_temperature: float = _option(1.0, "leak attacks: sampling temperature; 1 is the model's own distribution")
    attack_top_k: int = _option(0, "leak attacks: sample among the k likeliest tokens (0: all)")
    attack_top_p: float = _option(1.0, "leak attacks: then among the likeliest that hold this probability mass")
    attack_prefill: str = _option(
        "The answer is: ", "leak attacks: one more, where answers are made to begin with this ('': not)"
    )
    attack_first_words: int = _option(
        3, "leak attacks: one more, where answers are made to begin with so many words of the truth (0: not)"
    )
    leak_threshold: float = _option(
        0.5, "leak attacks: a sample leaks if its recall of the truth is at least this; leak@k counts these"
    )
    confidence: float = _option(0.95, "leak attacks: level of the bootstrap intervals over questions")
    side_effects_text: str = _option(
        "", "a text file unrelated to FORGET: its perplexity, and how probable the answers' words are in it"
    )
    skip_known_forgotten: bool = _option(
        False,
        "leave out forget questions of which NUM_SAMPLES sampled answers never say the truth, report their rows; if "
        "none is left, nothing is written and the exit code is 0",
    )
    skip_threshold: float = _option(
        0.0,
        "skip_known_forgotten: the largest ROUGE-L recall of the truth at which a sample does not say it; at 0 not one "
        "word may be shared, which few whole sentences fulfil",
    )
    allow_relearn: bool = _option(
        False, "accept rows of RETAIN and FORGET that an earlier run or request made MODEL forget"
    )
    min_quality: float | None = _option(None, "exit 3 if the unlearn quality (0 to 100) ends below this")
    min_utility: float | None = _option(None, "exit 3 if the utility (0 to 100) ends below this")
    max_degenerate: float | None = _option(
        0.5,
        "exit 3 if more than this share (0 to 1) of a set's answers say nothing: under 3 words where the truth has more, or "
        "the same few words over and over; a set that was no better before passes",
    )
    log_text: bool = _option(False, "put questions and sampled answers into the report")
    profile: bool = _option(False, "write a torch profiler trace of two optimizer steps beside the report")

    lora: bool = _option(False, "train a LoRA adapter on the frozen model, the next one of STACK, not its weights")
    stack: str = _option(
        "", "with --lora, in OUTPUT's place: directory of a model's adapters, one a request, in order"
    )
    lora_r: int = _option(16, "rank of the adapter")
    lora_alpha: int = _option(32, "the adapter is scaled by alpha / r")
    lora_target: list[str] = _option(
        ["all-linear"], "layers that get an adapter, by name, such as q_proj; may be given again (all-linear: all)"
    )
    keep_private: bool = _option(False, "with --lora: keep the questions and answers in private.jsonl, mode 0600")

    def validate(self) -> None:
        super().validate()
        _require(self.num_epochs > 0, "num_epochs", self.num_epochs, "above 0")
        for name in ("batch_size", "gradient_accumulation_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        _require(self.checkpoint_steps >= 0, "checkpoint_steps", self.checkpoint_steps, "0 (never) or more")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        for name in ("attack_samples", "attack_top_k", "attack_first_words"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 (off) or more")
        _require(self.attack_temperature > 0, "attack_temperature", self.attack_temperature, "above 0")
        for name in ("attack_top_p", "leak_threshold"):
            _require(0 < getattr(self, name) <= 1, name, getattr(self, name), "above 0 and at most 1")
        _require(0 < self.confidence < 1, "confidence", self.confidence, "between 0 and 1")
        _require(0 <= self.skip_threshold < 1, "skip_threshold", self.skip_threshold, "0 or more, and below 1")
        for name, off in (("attack_samples", 0), ("side_effects_text", "")):
            value = getattr(self, name)
            _require(value == off or self.evaluate, name, value, "left out, or evaluate left on")
        for name in ("min_quality", "min_utility"):
            gate = getattr(self, name)
            _require(gate is None or 0 <= gate <= 100, name, gate, "between 0 and 100")
            _require(gate is None or self.evaluate, name, gate, "left out, or evaluate left on")
        share = self.max_degenerate
        _require(share is None or 0 <= share <= 1, "max_degenerate", share, "between 0 and 1")
        self._validate_lora()

    def _validate_lora(self) -> None:
        _require(self.lora_r >= 1, "lora_r", self.lora_r, "at least 1")
        _require(self.lora_alpha >= 1, "lora_alpha", self.lora_alpha, "at least 1")
        _require(bool(self.lora_target), "lora_target", self.lora_target, "all-linear, or names of layers")
        if self.lora:
            _require(bool(self.stack), "stack", self.stack, "the directory of the model's adapters, with lora")
            _require(not self.output, "output", self.output, "left out with lora: an adapter goes into stack")
            _require(self.param_dtype == "float32", "param_dtype", self.param_dtype, "float32 with lora")
            _require(self.save_dtype == "auto", "save_dtype", self.save_dtype, "left out with lora: see merge")
        else:
            _require(not self.stack, "stack", self.stack, "left out, or lora given")
            _require(not self.keep_private, "keep_private", self.keep_private, "left out, or lora given")

    @classmethod
    def names(cls) -> dict[str, str]:
        """Return each field's name by all that a file may call it: as it is, as its flag, and as its flag's short forms."""
        found = {}
        for f in dataclasses.fields(cls):
            for flag in ("--" + f.name, *f.metadata.get("aliases", ())):
                found[flag.removeprefix("--").replace("-", "_")] = f.name
        return found

    @classmethod
    def merge(cls, preset: str | None, *layers: Mapping[str, Any]) -> Self:
        """Build a config from a preset's values and then each layer's, the last one winning.

        Raises
        ------
        PMCError
            An unknown preset or field, or a value out of its range.
        """
        values: dict[str, Any] = {}
        if preset is not None:
            if preset not in PRESETS:
                raise PMCError(f"preset {preset!r} is unknown: use one of {', '.join(PRESETS)}")
            values |= PRESETS[preset]
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
class EvaluateConfig(UnlearnConfig):
    """Settings of an evaluation: of a run's those that it needs, and what is measured and compared."""

    suite: Literal["questions", "tofu"] = _option(
        "questions", "ask FORGET, RETAIN, PARAPHRASED and GENERAL, or TOFU's sets, and measure its metrics too"
    )
    max_degenerate: float | None = _option(  # with nothing to compare with, a model may always have been so
        None, "exit 3 if more than this share (0 to 1) of a set's answers say nothing; see unlearn"
    )
    before: str = _option("", "a second model, evaluated first and shown beside MODEL: directory or hub id")
    tofu: str = _option("", "suite tofu: directory of TOFU's *_perturbed files, or its hub id locuslab/TOFU")
    split: Literal["forget01", "forget05", "forget10"] = _option("forget10", "suite tofu: what was to be forgotten")
    tofu_rows: int = _option(0, "suite tofu: only the first so many rows of each set (0: all; TOFU's own code: 300)")
    truth_ratio: Literal["geometric", "arithmetic"] = _option(
        "geometric", "suite tofu: mean over the perturbed answers, OpenUnlearning's or the TOFU paper's"
    )
    retain_log: str = _option(
        "", "suite tofu: what --rows wrote for a model that never saw the forget set; gives forget quality"
    )

    def validate(self) -> None:
        super().validate()
        _require(self.tofu_rows >= 0, "tofu_rows", self.tofu_rows, "0 (all) or more")
        if self.suite == "tofu":
            _require(bool(self.tofu), "tofu", self.tofu, "a directory or hub id: suite tofu reads its sets there")
            for name in ("forget", "retain", "paraphrased", "general"):
                _require(not getattr(self, name), name, getattr(self, name), "left out: suite tofu has its own sets")
        else:
            for name in ("tofu", "retain_log"):
                _require(not getattr(self, name), name, getattr(self, name), "left out, or --suite tofu given")


@dataclass(kw_only=True)
class VerifyConfig:
    """Settings of a verification: what is asked again, and what must still hold."""

    stack: str = _option("", "directory of the model's adapters")
    requests: list[str] = _option([], "the requests' forget files, in any order; those kept private are found")
    model: str = _option("", "where the base model is now (unset: where the last record says)")
    retain: str = _option("", "where the last request's pairs to keep are now (unset: where its record says)")
    general: list[str] = _option([], "where its data of general knowledge is now; may be given again")
    min_quality: float | None = _option(
        None,
        "exit 3 if a request's unlearn quality is below this (unset: its record's gate, or what it was less slack)",
    )
    min_utility: float | None = _option(
        None, "exit 3 if utility is below this (unset: the last record's gate, or what it was less slack)"
    )
    slack: float = _option(
        5.0, "points of 100 that quality and utility may have lost where nothing else is their bound"
    )
    attack_samples: int = _option(
        0,
        "leak attack: answers sampled for each forget question, in which the truth is looked for (0: off; without a "
        "number: 100)",
        flag_value=100,
    )
    max_leak: float | None = _option(
        None,
        "leak attack: exit 3 if of a request's questions a larger share (0 to 1) has a sample with half of the truth",
    )
    device: str = _option("auto", "cpu, cuda, cuda:1, ... (auto: cuda where there is one)")

    def __post_init__(self) -> None:
        _check_types(self)
        _check_paths(self)
        _require(bool(self.stack), "stack", self.stack, "the directory of the model's adapters")
        for name in ("min_quality", "min_utility"):
            gate = getattr(self, name)
            _require(gate is None or 0 <= gate <= 100, name, gate, "between 0 and 100")
        _require(self.slack >= 0, "slack", self.slack, "0 or more")
        _require(self.attack_samples >= 0, "attack_samples", self.attack_samples, "0 (off) or more")
        _require(self.max_leak is None or 0 <= self.max_leak <= 1, "max_leak", self.max_leak, "between 0 and 1")
        _require(
            self.max_leak is None or self.attack_samples > 0,
            "max_leak",
            self.max_leak,
            "left out, or --attack-samples given",
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
        "stop_score": 0.05, "stop_retain_loss": 0.08, "lora_r": 16, "lora_alpha": 32, "lora_target": ["all-linear"],
    },
}  # fmt: skip


def _require(good: bool, name: str, value: object, range_: str) -> None:
    if not good:
        raise PMCError(f"{name} is {value!r}: it must be {range_}")


def _check_paths(config: Any) -> None:
    """Expand a path's ~, which no shell does in a file or after --output=; refuse names that no report could hold."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name not in PATHS or not value:
            continue
        for path in [value] if isinstance(value, str) else value:
            if any("\ud800" <= c <= "\udfff" for c in path):
                raise PMCError(
                    f"{f.name} {path!a} is not UTF-8, or the locale is not: rename it, or set LC_ALL=C.UTF-8"
                )
        home = os.path.expanduser
        setattr(config, f.name, home(value) if isinstance(value, str) else [home(path) for path in value])


def _check_types(config: Any) -> None:
    """Refuse values of a wrong type (a YAML file gives whatever was typed); whole numbers pass as floats."""
    hints = get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        if get_origin(hint) is Literal:
            choices = get_args(hint)
            _require(value in choices, f.name, value, f"one of {', '.join(map(str, choices))}")
            continue
        special: dict[Any, tuple[type, ...]] = {
            float: (int, float),
            list[str]: (list,),
            float | None: (int, float, type(None)),
        }
        kinds = special.get(hint, (hint,))
        good = isinstance(value, kinds) and (isinstance(value, bool) == (hint is bool))
        if isinstance(value, float):
            _require(math.isfinite(value), f.name, value, "finite")
        name = {float | None: "a number", list[str]: "a list of names"}.get(hint, getattr(hint, "__name__", ""))
        _require(good, f.name, value, f"of type {name}")
