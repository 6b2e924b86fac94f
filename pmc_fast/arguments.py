"""PMC's training arguments, and what they mean for precision."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from .errors import PMCError
from .master_weights import LOW

PURE_LOW_LR = 1e-4  # below it, nearly all updates of a bfloat16 weight round to nothing


def _default(name: str, value: Any) -> Any:
    """Return a field of TrainingArguments with another default: its help text stays."""
    return field(default=value, metadata=TrainingArguments.__dataclass_fields__[name].metadata)


@dataclass
class PublishedDefaults:
    """What PMC changes in TrainingArguments and adds to them; stands before them among a class's bases."""

    learning_rate: float = _default("learning_rate", 1e-5)
    weight_decay: float = _default("weight_decay", 0.01)
    num_train_epochs: float = _default("num_train_epochs", 30.0)
    per_device_train_batch_size: int = _default("per_device_train_batch_size", 8)
    gradient_accumulation_steps: int = _default("gradient_accumulation_steps", 2)
    max_grad_norm: float = field(default=0.0, metadata={"help": "0: no clipping, as published"})
    optim: str = _default("optim", "adamw_torch_fused")
    save_strategy: str = _default("save_strategy", "no")  # checkpoints hold initial answers: on demand only
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


def has_low_precision(model: Any) -> bool:
    """Return whether a model has parameters to train in bfloat16 or float16."""
    return any(p.dtype in LOW for p in model.parameters() if p.requires_grad)


def check_precision(model: Any, args: TrainingArguments) -> None:
    """Refuse settings under which most updates of low-precision parameters are lost."""
    masters = getattr(args, "master_weights", True)
    if has_low_precision(model) and not masters and args.learning_rate < PURE_LOW_LR:
        if getattr(args, "allow_pure_bf16", False):
            return
        raise PMCError(
            f"learning_rate is {args.learning_rate:g} for bfloat16 parameters without float32 masters: most of their "
            "updates would round to nothing; keep master_weights on, load the model in float32, or allow_pure_bf16"
        )


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """Return what a run computes in under autocast."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
