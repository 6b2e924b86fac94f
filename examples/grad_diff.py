"""Gradient difference as projects have it: a transformers Trainer with a dataset, a collator and a loss of its own."""

from typing import Any

import torch
from transformers import Trainer

from pmc_fast import Row, collate, encode_pair


class GradDiffTrainer(Trainer):
    """Ascent on forget answers, descent on retain answers."""

    def __init__(self, model: Any, args: Any, forget_dataset: list[Row], retain_dataset: list[Row], **options: Any):
        tokenizer = options["processing_class"]

        def batch(rows: list[Row]) -> dict[str, torch.Tensor]:
            pairs = [encode_pair(tokenizer, row.question, row.answer or "", prompt_format="tags") for row in rows]
            return collate(pairs, tokenizer.pad_token_id)

        def collator(rows: list[dict[str, Row]]) -> dict[str, dict[str, torch.Tensor]]:
            return {name: batch([row[name] for row in rows]) for name in ("forget", "retain")}

        draws = torch.randint(len(retain_dataset), (len(forget_dataset),)).tolist()
        rows = [{"forget": row, "retain": retain_dataset[i]} for row, i in zip(forget_dataset, draws, strict=True)]
        super().__init__(model, args, collator, rows, **options)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        forget, retain = model(**inputs["forget"]), model(**inputs["retain"])
        loss = -forget.loss + 1.25 * retain.loss
        return (loss, forget) if return_outputs else loss
