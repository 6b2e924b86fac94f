"""Gradient difference: away from the forget answers, with a retain loss."""

import copy

import torch

from trainer.unlearn.base import UnlearnTrainer

NAMES = ("input_ids", "attention_mask", "labels")


class GradDiff(UnlearnTrainer):
    def __init__(self, gamma=1.0, alpha=1.0, retain_loss_type="NLL", *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gamma, self.alpha, self.retain_loss_type = gamma, alpha, retain_loss_type
        self.ref_model = copy.deepcopy(self.model).eval() if retain_loss_type == "KL" else None

    def compute_retain_loss(self, model, retain_inputs):
        out = model(**retain_inputs)
        if self.retain_loss_type == "NLL":
            return out.loss
        if self.retain_loss_type != "KL":
            raise NotImplementedError(self.retain_loss_type)
        with torch.no_grad():
            before = self.ref_model(**retain_inputs).logits
        now, before = (x.log_softmax(-1).flatten(0, -2) for x in (out.logits, before))
        return torch.nn.functional.kl_div(now, before, reduction="batchmean", log_target=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        forget, retain = ({name: inputs[part][name] for name in NAMES} for part in ("forget", "retain"))
        out = model(**forget)
        loss = self.alpha * self.compute_retain_loss(model, retain) - self.gamma * out.loss
        return (loss, out) if return_outputs else loss
