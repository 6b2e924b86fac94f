"""A stand-in for OpenUnlearning's trainers, as far as a handler meets them."""

from transformers import TrainingArguments

from trainer.unlearn.grad_diff import GradDiff

TRAINER_REGISTRY = {}


def _register_trainer(handler):
    TRAINER_REGISTRY[handler.__name__] = handler


def load_trainer(trainer_cfg, model, processing_class=None, **given):
    args = TrainingArguments(**trainer_cfg.args)
    handler = TRAINER_REGISTRY[trainer_cfg.handler]
    settings = trainer_cfg.get("method_args", {})
    return handler(model=model, args=args, processing_class=processing_class, **given, **settings), args


_register_trainer(GradDiff)
