"""The parts that the commands' settings are composed of: fields with a help text and a range, checked together."""

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from ..errors import PMCError
from .columns import parse_columns

PromptFormat = Literal["tags", "chat"]
RewardName = Literal["auto", "rouge", "unicode"]


@dataclass(frozen=True)
class Range:
    """The valid values of a setting, in words and as a test. None is valid wherever the type allows it."""

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
SHORTEST_CUT = (
    32  # tokens, at which max_length_ratio still leaves to a sample: a short answer may be replaced by a longer one
)
MAX_DEGENERATE = 0.5  # share of answers that say nothing, above which a set misses its gate
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
    """Refuse a value of the wrong type or out of range. Integers are valid floats."""
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
    """Expand ~, which shells leave alone in YAML files and after --output=; refuse names that are not UTF-8."""
    for path in [value] if isinstance(value, str) else value:
        if any("\ud800" <= c <= "\udfff" for c in path):
            raise PMCError(f"{name} {path!a} is not UTF-8, or the locale is not: rename it, or set LC_ALL=C.UTF-8")
    home = os.path.expanduser
    return home(value) if isinstance(value, str) else [home(path) for path in value]


@dataclass(kw_only=True)
class ModelConfig(Settings):
    """The model, where it computes and in what."""

    model: Path = option("", "directory or hub id of the model (safetensors)")
    device: str = option("auto", "cpu, cuda, cuda:1, ... (auto: cuda if available)")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "compute dtype (auto: bfloat16 on cuda, float32 on cpu)"
    )


@dataclass(kw_only=True)
class DataConfig(ModelConfig):
    """The model and the data that training and evaluation read."""

    forget: Path = option(
        "", "questions to forget: a .jsonl, .json, .parquet, .csv or .tsv file, or owner/name:config of the hub"
    )
    retain: Path = option("", "question-answer pairs to keep, in the same formats")
    paraphrased: Path = option("", "paraphrased forget questions with answers, for the evaluation")
    general: Paths = option([], "general knowledge questions with answers, for the evaluation; may be repeated")
    columns: str = option(
        "",
        "which columns of the data hold what: question=COLUMN,answer=COLUMN, or forget.question=COLUMN for FORGET's alone "
        "(unset: by their usual names)",
    )
    prompt_words: Count = option(
        0,
        "have texts continued (a column text): their first words, so many, are the question, the rest the answer (0: off)",
    )

    def validate(self) -> None:
        """Raise PMCError for the first value that is out of its range."""
        super().validate()
        parse_columns(self.columns)

    def reading(self, name: str) -> dict[str, Any]:
        """Return how the data of the setting `name` are read, as arguments of `load_rows`."""
        return {"columns": parse_columns(self.columns)[name], "prompt_words": self.prompt_words}


@dataclass(kw_only=True)
class PromptConfig(Settings):
    """How prompts are built from questions."""

    prompt_format: Literal["auto", "tags", "chat"] = option(
        "auto", "'Question: ... Answer: ...' tags, or the tokenizer's chat template (auto: chat if it has one)"
    )
    system_prompt: str = option("You are a helpful assistant.", "system prompt of the chat format")
    date_string: str = option("10 Apr 2025", "date in chat templates that print one; fixed for reproducible prompts")
    max_length: Length = option(200, "maximum tokens of prompt and answer together")
    allow_control_tokens: bool = option(False, "accept control tokens such as <|im_start|> in questions and answers")
    accidents: bool = option(
        False, "reproduce quirks of the published code: 8 characters cut from each tagged sample, a second BOS"
    )


@dataclass(kw_only=True)
class PassConfig(PromptConfig):
    """Prompts, forward passes and the seed."""

    max_tokens: PositiveInt = option(8192, "maximum tokens of one forward pass; larger micro-batches take several")
    cuda_graphs: bool = option(True, "replay rollout steps and training passes as CUDA graphs where possible")
    seed: Seed = option(0, "seed of the samples, the data order and the retain draws")


@dataclass(kw_only=True)
class SharedConfig(PassConfig):
    """Settings that training and evaluation share: prompts, reward, seed, forward passes."""

    reward: RewardName = option(
        "auto",
        "how answers are compared in training and evaluation: rouge, the published ROUGE-L over a-z and 0-9; or unicode, words "
        "of any script (auto: unicode if rouge would ignore more than 1 in 100 letters)",
    )


@dataclass(kw_only=True)
class SamplingConfig(Settings):
    """How answers are sampled."""

    num_samples: PositiveInt = option(20, "N: answers sampled for each forget question")
    temperature: Positive = option(0.9, "sampling temperature")
    top_k: TopK = option(50, "sample among the k most likely tokens (0: all); the published runs use 50")
    top_p: Probability = option(0.95, "nucleus sampling: keep the most likely tokens with this total probability")

    def validate(self) -> None:
        """Raise PMCError for the first value that is out of its range."""
        # not "of type int": some libraries mean all by None
        require(self.top_k is not None, "top_k", None, "0 (all tokens) or more")
        super().validate()


@dataclass(kw_only=True)
class PMCConfig(SamplingConfig, SharedConfig):
    """Settings of Partial Model Collapse, with the names of arXiv 2507.04219 where it has one."""

    retain_weight: NotNegative = option(1.25, "weight of the retain loss, lambda in the paper", aliases=["--lambda"])
    min_len: Count = option(0, "penalize answers of fewer words than this (0: off)")
    allow_overlap: bool = option(False, "accept retain rows whose question is also to be forgotten")
    selection: Literal["argmin", "likeliest", "bradley_terry", "soft"] = option(
        "argmin",
        "train on the best answer (published), or, as extensions, on the likeliest of those that score at most RESAMPLE_ABOVE (on the "
        "best if there is none), on one drawn by softmax((1 - score) / tau), or on all, weighted so",
    )
    tau: Positive = option(0.1, "temperature of bradley_terry and soft")
    answer_penalty: NotNegative = option(
        0.0,
        "extension: subtract this from the logits of the words of a question's initial answer when it is sampled, so that "
        "samples are unlike it (0: off, as published)",
    )
    resample_above: Threshold = option(
        0.0,
        "extension: questions whose stored answer scores at most this are trained on without being sampled again (0: as "
        "published)",
    )
    question_dropout: Threshold = option(
        0.0,
        "extension: in every other step that a forget question is in, leave out each of its words with this probability, so that other "
        "wordings are forgotten, too (0: off, as published)",
    )
    rollout_batch_size: Count = option(
        0,
        "extension: where a step samples, let it sample up to so many questions at once, so that later steps need not: fewer and "
        "larger rollouts, from weights of some steps before (0: each step its own questions, as published)",
    )
    max_length_ratio: NotNegative = option(
        0.0,
        "extension: cut samples at this multiple of their initial answer's tokens, but at no fewer than "
        f"{SHORTEST_CUT}; what was cut is not selected (0: at MAX_LENGTH alone, as published)",
    )
    retain_loss: Literal["nll", "kl"] = option(
        "nll",
        "loss on retain pairs: nll, the cross-entropy of their answers, as published; kl (extension), the KL divergence of the model's "
        "distributions there from the untouched model's",
    )
    retain_order: Literal["random", "shuffled"] = option(
        "random",
        "how trainers draw retain pairs: random, each from all of them, as published; shuffled (extension), every pair once before "
        "any comes again",
    )
    retain_per_question: PositiveInt = option(
        1, "retain pairs that trainers draw for each forget question (1: as published)"
    )
    rollout_dtype: Literal["auto", "fp8"] = option(
        "auto",
        "extension: what answers are sampled with: auto, the model itself; fp8, copies of its weights in 8 bits, which CUDA reads "
        "faster (sm_89 or later)",
    )
    store: Literal["auto", "text", "ids"] = option(
        "auto", "store sampled answers as text, encoded again, or as token ids (auto: as the questions are)"
    )
    normalization: Literal["micro_batch", "step"] = option(
        "micro_batch", "average each loss over the answer tokens of its micro-batch (published) or of the step"
    )
    stop_score: OptionalShare = option(None, "stop when the mean best score is at most this, e.g. 0.05 (unset: off)")
    stop_retain_loss: OptionalPositive = option(
        None, "and the smoothed retain loss is at most this (unset: its initial value + 0.05)"
    )
    stop_steps: PositiveInt = option(3, "for this many steps in a row")

    def algorithm(self) -> dict[str, Any]:
        """Return the settings of PMC, without those of a subclass."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(PMCConfig)}

    def validate(self) -> None:
        """Raise PMCError for the first value that is out of its range."""
        super().validate()
        plain = not self.answer_penalty or self.selection in ("argmin", "likeliest")
        require(
            plain,
            "selection",
            self.selection,
            "argmin or likeliest with answer_penalty, under which samples are not the model's",
        )
        reached = self.stop_score is None or self.stop_score >= self.resample_above
        kept = f"at least resample_above, {self.resample_above}: answers of that score are not improved"
        require(reached, "stop_score", self.stop_score, kept)


@dataclass(kw_only=True)
class AttackConfig(Settings):
    """Leak attacks: many samples for each question, also with the beginning of the answer given."""

    attack_samples: Count = option(
        0,
        "leak attacks: number of sampled answers for each forget question (0: off; without a number: 100, as published)",
        flag_value=100,
    )
    attack_temperature: Positive = option(1.0, "leak attacks: sampling temperature; 1: the model's distribution")
    attack_top_k: Count = option(0, "leak attacks: sample among the k most likely tokens (0: all)")
    attack_top_p: Probability = option(1.0, "leak attacks: nucleus sampling (1: off)")
    attack_prefill: str = option("The answer is: ", "leak attacks: also force answers to begin with this ('': off)")
    attack_first_words: Count = option(
        3, "leak attacks: also force answers to begin with this many words of the truth (0: off)"
    )
    leak_threshold: Probability = option(
        0.5, "leak attacks: a sample with at least this recall of the truth counts as a leak"
    )
    confidence: Level = option(0.95, "leak attacks: confidence level of the bootstrap intervals over questions")


@dataclass(kw_only=True)
class EvaluationConfig(AttackConfig, SharedConfig, DataConfig):
    """What is measured, and the gates that the scores must pass."""

    side_effects_text: Path = option(
        "", "text file unrelated to FORGET: measure its perplexity and the probability of answer tokens in it"
    )
    min_quality: OptionalScore = option(None, "exit 3 if the final unlearn quality (0 to 100) is lower")
    min_utility: OptionalScore = option(None, "exit 3 if the final utility (0 to 100) is lower")
    max_degenerate: OptionalShare = option(
        MAX_DEGENERATE,
        "exit 3 if a larger share (0 to 1) of a set's answers is degenerate: under 3 words where the truth has more, or "
        "repeating the same few words; sets that were no better before pass",
    )
    log_text: bool = option(False, "include questions and sampled answers in the report")
