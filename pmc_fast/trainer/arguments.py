"""PMC's training arguments: the published defaults; settings of the Trainer that are refused or warned about."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from ..config import PMCConfig
from ..errors import PMCError
from ..ops.adamw import LOW
from ..ops.dispatch import why_refused
from .master_weights import MasterWeights

PURE_LOW_LR = 1e-4  # below it, nearly all updates of a bfloat16 weight round to nothing


def _default(name: str, value: Any) -> Any:
    """Return a field of TrainingArguments with another default and its own help text."""
    return field(default=value, metadata=TrainingArguments.__dataclass_fields__[name].metadata)


@dataclass
class PublishedDefaults:
    """Defaults that PMC changes in TrainingArguments, and its own settings; precedes them in a class's bases."""

    learning_rate: float = _default("learning_rate", 1e-5)
    weight_decay: float = _default("weight_decay", 0.01)
    num_train_epochs: float = _default("num_train_epochs", 30.0)
    per_device_train_batch_size: int = _default("per_device_train_batch_size", 8)
    gradient_accumulation_steps: int = _default("gradient_accumulation_steps", 2)
    max_grad_norm: float = field(default=0.0, metadata={"help": "0: no clipping, as published"})
    optim: str = _default("optim", "adamw_torch_fused")
    save_strategy: str = _default("save_strategy", "no")  # checkpoints hold initial answers: on demand only
    # the filter waits for the device in every micro-batch; a loss that is not finite ends the run, once a step
    logging_nan_inf_filter: bool = _default("logging_nan_inf_filter", False)
    warmup_epochs: float = field(default=1.0, metadata={"help": "epochs of warm-up where warmup_steps is 0"})
    master_weights: bool = field(
        default=True, metadata={"help": "the optimizer keeps float32 masters of bfloat16 parameters"}
    )
    allow_pure_bf16: bool = field(
        default=False, metadata={"help": "train bfloat16 parameters without masters at a learning rate below 1e-4"}
    )
    log_text: bool = field(
        default=False, metadata={"help": "print a table of the questions and sampled answers of every logged step"}
    )


@dataclass
class PMCArguments(PublishedDefaults, TrainingArguments):
    """TrainingArguments with the published settings for defaults (arXiv 2507.04219, appendix)."""

    output_dir: str | None = _default("output_dir", "pmc_output")
    logging_steps: float = _default("logging_steps", 1)


# Settings that would be ignored or change the algorithm: which values are refused, and why (docs/integrations.md)
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "label_smoothing_factor": (bool, "PMC's loss is the plain cross-entropy"),
    "auto_find_batch_size": (bool, "memory depends on PMCConfig.max_tokens, the size of a pass, not on the batch: lower it"),
    "train_sampling_strategy": (lambda x: x != "random", "questions come in a random order, PMCConfig.seed's"),
    "neftune_noise_alpha": (lambda x: x is not None, "its noise depends on the padding of a batch; sequences are packed"),
    "use_liger_kernel": (bool, "pmc_fast has kernels of its own, for the loss too"),
    "optim": (
        lambda x: x in ("lomo", "adalomo") or x.endswith("_layerwise"),
        "it steps within backward, of which a step has several here: use another optimizer",
    ),
    "ignore_data_skip": (bool, "a resumed run would leave its trajectory; passing over questions takes no time"),
    "bf16_full_eval": (bool, "it changes the weights: use bf16, under which evaluation computes as training"),
    "fp16_full_eval": (bool, "it changes the weights: use bf16, under which evaluation computes as training"),
    "enable_jit_checkpoint": (bool, "it saves within a step, whose samples would be lost: use save_steps"),
    "parallelism_config": (lambda x: x is not None, "tensor, context and sequence parallelism are not supported"),
    "accelerator_config": (
        lambda x: bool(getattr(x, "split_batches", None) or getattr(x, "dispatch_batches", None)),
        "split_batches and dispatch_batches are not supported: a batch is per_device_train_batch_size on each process",
    ),
}  # fmt: skip
WITHOUT_EFFECT: dict[str, str] = {  # warned about where they differ from their defaults
    "data_seed": "the order of questions is PMCConfig.seed's",
    "length_column_name": "questions are not grouped by length",
    **{
        f"dataloader_{name}": "the training loader yields numbers of questions, without workers"
        for name in ("num_workers", "persistent_workers", "prefetch_factor", "multiprocessing_context", "in_order")
    },
}
# arguments of the Trainer and of TRL's trainers that the trainers here do not have
ELSEWHERE = {
    "train_dataset": "give forget_dataset and retain_dataset",
    "data_collator": "sequences are packed, not padded by a collator",
    "compute_loss_func": "the loss is the method's",
    "model_init": "what is unlearned is the untouched model's: pass that model",
    "config": "the settings are pmc_config",
    "tokenizer": "it is called processing_class",
    "formatting_func": "give rows with a question and an answer; PMCConfig.prompt_format puts them into a prompt",
    "peft_config": "wrap the model with peft.get_peft_model, or use pmc_fast.integrations.trl",
    "quantization_config": "quantised weights are not supported",
}


def check_inputs(
    model: Any, args: Any, config: Any, processing_class: Any, others: Mapping[str, Any], trainer: Any
) -> None:
    """Refuse arguments of the wrong type, and `others`, which the trainer does not have."""
    elsewhere = trainer.ELSEWHERE
    for name in others:
        if name not in elsewhere:
            raise TypeError(f"{trainer.__name__} got an unexpected keyword argument {name!r}")
        raise PMCError(f"{name} is not an argument of {trainer.__name__}: {elsewhere[name]}")
    load = "load it, with AutoModelForCausalLM.from_pretrained; pmc_fast.integrations.trl takes names"
    for name, value, kind, remedy in (
        ("model", model, torch.nn.Module, load),
        ("args", args, TrainingArguments, "it must be PMCArguments or TrainingArguments"),
        ("pmc_config", config, PMCConfig, "it must be a PMCConfig"),
    ):
        if not isinstance(value, kind):
            raise PMCError(f"{name} is a {type(value).__name__}: {remedy}")
    if processing_class is None:
        raise PMCError("processing_class is not given: pass the model's tokenizer")
    if isinstance(processing_class, (str, PurePath, torch.nn.Module)) or hasattr(processing_class, "tokenizer"):
        raise PMCError(
            f"processing_class is a {type(processing_class).__name__}: pass the model's tokenizer, as of AutoTokenizer"
        )


def check_arguments(args: TrainingArguments, config: PMCConfig) -> list[str]:
    """Refuse settings that would change or ignore what was asked for; return warnings of those without effect."""
    theirs = [c for c in type(args).__mro__ if c.__module__.startswith("trl.")]
    if theirs and not isinstance(args, PublishedDefaults):
        raise PMCError(
            f"args is a {theirs[0].__name__}, whose own settings are another trainer's: use PMCArguments, or PMCConfig of "
            "pmc_fast.integrations.trl"
        )
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise PMCError(f"{name} is {getattr(args, name)}: it must be at least 1")
    if why := why_refused(args.device):  # which the Trainer would move the model to
        raise PMCError(f"args.device is {args.device}: {why} (use_cpu=True)")
    if args.learning_rate < 0:
        raise PMCError(f"learning_rate is {args.learning_rate:g}: it must be 0 or more")
    for name, (refuses, why) in REFUSED.items():
        value = getattr(args, name, None)
        if value is not None and refuses(value):
            raise PMCError(f"{name} is {_shown(value)}: {why}")
    if args.push_to_hub and args.save_strategy != "no" and args.hub_strategy != "end":
        raise PMCError(
            "push_to_hub would push checkpoints, which hold initial answers of the model: use hub_strategy='end'"
        )
    if str(args.metric_for_best_model).endswith("forget_score") and args.greater_is_better:
        raise PMCError("greater_is_better is True but a smaller forget_score is better: set greater_is_better=False")
    fields = TrainingArguments.__dataclass_fields__
    warnings = [
        f"{name} is {_shown(getattr(args, name))} and has no effect: {why}"
        for name, why in WITHOUT_EFFECT.items()
        if name in fields and getattr(args, name) != fields[name].default
    ]
    if args.world_size > 1 and not args.average_tokens_across_devices:
        warnings.append("average_tokens_across_devices is False and has no effect: PMCConfig.normalization decides")
    if args.seed not in (fields["seed"].default, config.seed):
        warnings.append(
            f"seed is {args.seed} but PMCConfig.seed {config.seed}: samples and the order of rows are the latter's"
        )
    return warnings


def check_optimizer(args: TrainingArguments, model: Any) -> None:
    """Refuse an optimizer that can't be created, as where its package is not installed, before any work."""
    if reason := _why_no_optimizer(args, model):
        raise PMCError(f"optim is {_shown(args.optim)}: {reason}")


def check_optimizer_name(name: str) -> None:
    """Refuse an optimizer that transformers does not know or can't create, before a model is loaded."""
    if name not in {known.value for known in OptimizerNames}:
        raise PMCError(f"optimizer is {name!r}: use one that transformers knows, such as adamw_torch_fused")
    defaults = {f.name: f.default for f in fields(TrainingArguments)}
    if reason := _why_no_optimizer(SimpleNamespace(**defaults | {"optim": name}), None):
        raise PMCError(f"optimizer {name!r} can't be used here: {reason}")


def _why_no_optimizer(args: Any, model: Any) -> str:
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, model)
    except Exception as error:  # ImportError, ValueError, AttributeError: it depends on the optimizer
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""


def check_overrides(trainer: type) -> None:
    """Refuse a subclass that overrides a method which PMCTrainer does not call in training."""
    for name, instead in (("compute_loss", "training_step"), ("_get_train_sampler", "get_train_dataloader")):
        if getattr(trainer, name) is not getattr(Trainer, name):
            raise PMCError(f"{trainer.__name__} overrides {name}, which training does not call: override {instead}")


def _shown(value: Any) -> str:
    return repr(getattr(value, "value", value))  # an enum as it was typed


def has_low_precision(model: Any) -> bool:
    """Return whether a model has parameters to train in bfloat16 or float16."""
    return any(p.dtype in LOW for p in model.parameters() if p.requires_grad)


def check_precision(model: Any, args: TrainingArguments, optimizer: Any = None) -> None:
    """Refuse settings under which most updates of low-precision parameters are lost.

    `optimizer` is the one that the caller gave, if any: its masters and learning rate count.
    """
    masters, rate = getattr(args, "master_weights", True), args.learning_rate
    if optimizer is not None:
        masters, rate = isinstance(optimizer, MasterWeights), max(group["lr"] for group in optimizer.param_groups)
    if has_low_precision(model) and not masters and rate < PURE_LOW_LR:
        if getattr(args, "allow_pure_bf16", False):
            return
        raise PMCError(
            f"learning_rate is {rate:g} for bfloat16 parameters without float32 masters: most of their updates would "
            "round to nothing; keep master_weights on (and give no optimizer), load the model in float32, or "
            "allow_pure_bf16"
        )


def training_settings(args: Any) -> dict[str, str]:
    """Return the settings that a run's trajectory depends on, as text, for the fingerprint of its checkpoints."""
    names = (
        "learning_rate", "weight_decay", "num_train_epochs", "max_steps", "optim", "optim_args", "bf16", "fp16",
        "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_epochs", "adam_beta1",
        "adam_beta2", "adam_epsilon", "seed", "data_seed", "master_weights", "neftune_noise_alpha",
    )  # fmt: skip
    return {name: str(getattr(args, name, None)) for name in names}


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """Return the dtype of autocast, as the arguments or `accelerate launch --mixed_precision` set it."""
    name = args.mixed_precision
    known = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in known:
        raise PMCError(f"mixed precision is {name!r}: it must be one of {', '.join(known)}")
    return known[name]
