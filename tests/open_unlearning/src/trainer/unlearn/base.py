"""What unlearning methods have in common: an evaluation that leaves their losses alone."""

import torch

from trainer.base import FinetuneTrainer


class UnlearnTrainer(FinetuneTrainer):
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss, _ = super().compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        return loss.mean().detach(), None, None
