"""The parts that the commands' settings are composed of: fields with a help text and a range, checked together."""

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from ..errors import PMCError

PromptFormat = Literal["tags", "chat"]
RewardName = Literal["auto", "rouge", "unicode"]


@dataclass(frozen=True)
class Range:
    """The values that a setting may have, in words and as a test. None, where the type allows it, is always in range."""

    words: str
    holds: Callable[[Any], bool]


class PathMarker:
    """Marks settings that are paths."""


PositiveInt = Annotated[int, Range("at least 1", lambda n: n >= 1)]
Count = Annotated[int, Range("0 or more", lambda n: n >= 0)]
TopK = Annotated[int, Range("0 (all tokens) or more", lambda n: n >= 0)]
Length = Annotated[int, Range("at least 2", lambda n: n >= 2)]
Seed = Annotated[int, Range("from 0 to 4294967295", lambda n: 0 <= n < 2**32)]
Positive = Annotated[float, Range("above 0", lambda x: x > 0)]
NotNegative = Annotated[float, Range("0 or more", lambda x: x >= 0)]
Probability = Annotated[float, Range("above 0 and at most 1", lambda x: 0 < x <= 1)]
Level = Annotated[float, Range("between 0 and 1", lambda x: 0 < x < 1)]
Threshold = Annotated[float, Range("0 or more, and below 1", lambda x: 0 <= x < 1)]
OptionalPositive = Annotated[float | None, Range("above 0", lambda x: x > 0)]
OptionalShare = Annotated[float | None, Range("between 0 and 1", lambda x: 0 <= x <= 1)]
OptionalScore = Annotated[float | None, Range("between 0 and 100", lambda x: 0 <= x <= 100)]
Path = Annotated[str, PathMarker]
Paths = Annotated[list[str], PathMarker]


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Return a dataclass field with a help text.

    `aliases` are more names of its flag; `flag_value` is what the flag means without a value.
    """
    metadata["help"] = help
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def require(good: bool, name: str, value: object, words: str) -> None:
    """Raise PMCError unless a setting is as `words` say it must be."""
    if not good:
        raise PMCError(f"{name} is {value!r}: it must be {words}")


@dataclass(kw_only=True)
class Settings:
    """Settings that check themselves."""

    def __post_init__(self) -> None:
        self.validate()
        for name, hint in self._hints().items():
            if PathMarker in get_args(hint):
                setattr(self, name, _expanded(name, getattr(self, name)))

    def validate(self) -> None:
        """Raise PMCError for the first value that is out of its range."""
        for name, hint in self._hints().items():
            _check(name, getattr(self, name), hint)

    @classmethod
    def _hints(cls) -> dict[str, Any]:
        hints = get_type_hints(cls, include_extras=True)
        return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _check(name: str, value: Any, hint: Any) -> None:
    """Refuse a value of a wrong type (a YAML file holds anything) or out of range. Whole numbers pass as floats."""
    hint, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        require(value in choices, name, value, f"one of {', '.join(map(str, choices))}")
        return
    types, type_name = {
        float: ((int, float), "of type float"),
        float | None: ((int, float, type(None)), "a number"),
        list[str]: ((list,), "a list of names"),
    }.get(hint, ((hint,), f"of type {getattr(hint, '__name__', hint)}"))
    good = isinstance(value, types) and isinstance(value, bool) == (hint is bool)
    require(good, name, value, type_name)
    if isinstance(value, float):
        require(math.isfinite(value), name, value, "finite")
    for note in notes:
        if isinstance(note, Range) and value is not None:
            require(note.holds(value), name, value, note.words)


def _expanded(name: str, value: str | list[str]) -> str | list[str]:
    """Expand ~, which no shell does in a file or after --output=; refuse names that no report could hold."""
    for path in [value] if isinstance(value, str) else value:
        if any("\ud800" <= c <= "\udfff" for c in path):
            raise PMCError(f"{name} {path!a} is not UTF-8, or the locale is not: rename it, or set LC_ALL=C.UTF-8")
    home = os.path.expanduser
    return home(value) if isinstance(value, str) else [home(path) for path in value]


@dataclass(kw_only=True)
class DataConfig(Settings):
    """The model and the data that training and evaluation read."""

    model: Path = option("", "directory or hub id of the model (safetensors)")
    forget: Path = option(
        "", "questions to forget: a .jsonl, .json, .parquet, .csv or .tsv file, or owner/name:config of the hub"
    )
    retain: Path = option("", "question-answer pairs to keep, likewise")
    paraphrased: Path = option("", "forget questions in other words with their answers, for the evaluation")
    general: Paths = option([], "data of general knowledge, for the evaluation; may be given again")
    device: str = option("auto", "cpu, cuda, cuda:1, ... (auto: cuda where there is one)")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "what training computes in (auto: bfloat16 on cuda, float32 on cpu)"
    )


@dataclass(kw_only=True)
class PromptConfig(Settings):
    """How a question is put to the model."""

    prompt_format: Literal["auto", "tags", "chat"] = option(
        "auto", "'Question: ... Answer: ...' tags or the tokenizer's chat template (auto: chat if it has one)"
    )
    system_prompt: str = option("You are a helpful assistant.", "system prompt of the chat format")
    date_string: str = option(
        "10 Apr 2025", "the date that chat templates with a date print; fixed: prompts stay equal"
    )
    max_length: Length = option(200, "tokens of prompt and answer together")
    allow_control_tokens: bool = option(
        False, "let tokens such as <|im_start|> in questions and answers through as what they are to the model"
    )
    accidents: bool = option(
        False,
        "repeat the published code's accidents: 8 characters of each tagged sample dropped unseen, a second BOS",
    )


@dataclass(kw_only=True)
class SharedConfig(PromptConfig):
    """What training and evaluation have in common: prompts, reward, seed, and how passes run."""

    reward: RewardName = option(
        "auto",
        "how answers are compared, in training and evaluation: the published ROUGE-L, which sees a to z and 0 to 9 alone, "
        "or by the words of any script (auto: unicode where rouge would not see more than 1 in 100 letters)",
    )
    max_tokens: PositiveInt = option(8192, "tokens of one forward pass; a micro-batch of more takes several")
    cuda_graphs: bool = option(
        True, "on CUDA, replay rollout steps and training passes as CUDA graphs where they can be captured"
    )
    seed: Seed = option(0, "seed of the samples, the data order and the retain draws")


@dataclass(kw_only=True)
class PMCConfig(SharedConfig):
    """Settings of Partial Model Collapse, with the names of arXiv 2507.04219 where it has one."""

    num_samples: PositiveInt = option(20, "N: answers sampled for each forget question")
    temperature: Positive = option(0.9, "sampling temperature")
    top_k: TopK = option(50, "sample among the k likeliest tokens (0: all); the published runs use 50")
    top_p: Probability = option(0.95, "then among the likeliest of these that hold this probability mass")
    retain_weight: NotNegative = option(1.25, "the paper's lambda: weight of the retain loss", aliases=["--lambda"])
    min_len: Count = option(0, "answers of fewer words than this score worse (0: off)")
    allow_overlap: bool = option(
        False,
        "train to keep questions that are to be forgotten, too: such rows of the retain data are refused otherwise",
    )
    selection: Literal["argmin", "bradley_terry", "soft"] = option(
        "argmin",
        "train on the first answer of the lowest score, on one drawn by softmax((1 - score) / tau), or on all",
    )
    tau: Positive = option(0.1, "temperature of bradley_terry and soft")
    store: Literal["auto", "text", "ids"] = option(
        "auto", "keep sampled answers as text and encode them again, or as token ids (auto: text where questions are)"
    )
    normalization: Literal["micro_batch", "step"] = option(
        "micro_batch", "each loss is the mean over its micro-batch's answer tokens (published), or over the step's"
    )
    stop_score: OptionalShare = option(
        None, "stop once the mean best score is at most this, such as 0.05 (unset: off)"
    )
    stop_retain_loss: OptionalPositive = option(
        None, "and the smoothed retain loss is at most this (unset: what it was before, plus 0.05)"
    )
    stop_steps: PositiveInt = option(3, "for so many steps in a row")

    def algorithm(self) -> dict[str, Any]:
        """Return the settings of PMC alone, whatever else a subclass holds."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(PMCConfig)}

    def validate(self) -> None:
        """Raise PMCError for the first value that is out of its range."""
        require(self.top_k is not None, "top_k", None, "0 (all tokens) or more")  # what None means elsewhere
        super().validate()


@dataclass(kw_only=True)
class AttackConfig(Settings):
    """Leak attacks: how a model is asked for the truth many times, or with a part of it given."""

    attack_samples: Count = option(
        0,
        "leak attacks: answers sampled for each forget question, and the largest recall of the truth (0: off; without "
        "a number: 100, as published)",
        flag_value=100,
    )
    attack_temperature: Positive = option(
        1.0, "leak attacks: sampling temperature; 1 is the model's own distribution"
    )
    attack_top_k: Count = option(0, "leak attacks: sample among the k likeliest tokens (0: all)")
    attack_top_p: Probability = option(1.0, "leak attacks: then among the likeliest that hold this probability mass")
    attack_prefill: str = option(
        "The answer is: ", "leak attacks: one more, where answers are made to begin with this ('': not)"
    )
    attack_first_words: Count = option(
        3, "leak attacks: one more, where answers are made to begin with so many words of the truth (0: not)"
    )
    leak_threshold: Probability = option(
        0.5, "leak attacks: a sample leaks if its recall of the truth is at least this; leak@k counts these"
    )
    confidence: Level = option(0.95, "leak attacks: level of the bootstrap intervals over questions")


@dataclass(kw_only=True)
class EvaluationConfig(AttackConfig, SharedConfig, DataConfig):
    """What is measured of a model, and the gates that its scores must pass."""

    side_effects_text: Path = option(
        "", "a text file unrelated to FORGET: its perplexity, and how probable the answers' words are in it"
    )
    min_quality: OptionalScore = option(None, "exit 3 if the unlearn quality (0 to 100) ends below this")
    min_utility: OptionalScore = option(None, "exit 3 if the utility (0 to 100) ends below this")
    max_degenerate: OptionalShare = option(
        0.5,
        "exit 3 if more than this share (0 to 1) of a set's answers say nothing: under 3 words where the truth has more, or "
        "the same few words over and over; a set that was no better before passes",
    )
    log_text: bool = option(False, "put questions and sampled answers into the report")
