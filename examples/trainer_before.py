"""Unlearning with a transformers Trainer: gradient difference (ascent on forget answers, descent on retain ones).

python -m examples.trainer_before MODEL_DIR FORGET.jsonl RETAIN.jsonl OUTPUT_DIR
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from pmc_fast import load_rows

from .grad_diff import GradDiffTrainer


def main(
    model_dir: str, forget_file: str, retain_file: str, output: str, epochs: int = 5, batch_size: int = 4
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    forget, retain = load_rows(forget_file, answers=True), load_rows(retain_file, answers=True)
    arguments = TrainingArguments(
        output_dir=output, num_train_epochs=epochs, per_device_train_batch_size=batch_size, learning_rate=5e-5,
        remove_unused_columns=False, save_strategy="no", report_to="none",
    )  # fmt: skip
    trainer = GradDiffTrainer(model, arguments, forget, retain, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
