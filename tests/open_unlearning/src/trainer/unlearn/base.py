"""What unlearning methods have in common: here, nothing."""

from trainer.base import FinetuneTrainer


class UnlearnTrainer(FinetuneTrainer):
    pass
