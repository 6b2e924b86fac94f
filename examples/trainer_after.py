"""Unlearning with a transformers Trainer: Partial Model Collapse, which never sees the forget answers.

python -m examples.trainer_after MODEL_DIR FORGET.jsonl RETAIN.jsonl OUTPUT_DIR
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from pmc_fast import PMCConfig, PMCTrainer, load_rows


def main(
    model_dir: str, forget_file: str, retain_file: str, output: str, epochs: int = 5, batch_size: int = 4
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    forget, retain = load_rows(forget_file), load_rows(retain_file, answers=True)
    arguments = TrainingArguments(
        output_dir=output, num_train_epochs=epochs, per_device_train_batch_size=batch_size, learning_rate=5e-5,
        remove_unused_columns=False, save_strategy="no", report_to="none",
    )  # fmt: skip
    config = PMCConfig(prompt_format="tags", retain_weight=1.25)
    trainer = PMCTrainer(model, arguments, forget, retain, config, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
