"""Unlearning with accelerate: Partial Model Collapse, on one process or many.

accelerate launch -m examples.accelerate_after MODEL_DIR FORGET.jsonl RETAIN.jsonl OUTPUT_DIR
"""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmc_fast import PMC, PMCConfig, collate, encode_pair, load_rows


def main(
    model_dir: str, forget_file: str, retain_file: str, output: str, epochs: int = 5, batch_size: int = 4
) -> None:
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(accelerator.device)
    forget, retain = load_rows(forget_file), load_rows(retain_file, answers=True)
    encode = lambda row: encode_pair(tokenizer, row.question, row.answer, prompt_format="tags")  # noqa: E731
    batch = lambda rows: {  # noqa: E731
        k: v.to(accelerator.device) for k, v in collate([encode(row) for row in rows], tokenizer.pad_token_id).items()
    }
    pmc = PMC(model, tokenizer, PMCConfig(prompt_format="tags", retain_weight=1.25), [row.question for row in forget])
    pmc.prepare()
    loader = DataLoader(range(len(forget)), batch_size, shuffle=True, collate_fn=list)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for epoch in range(epochs):
        for indices in loader:
            retain_batch = batch([retain[i] for i in torch.randint(len(retain), (len(indices),))])
            loss = pmc.loss(pmc.sample(indices), retain_batch, model=model).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    accelerator.unwrap_model(model).save_pretrained(output, is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:
        tokenizer.save_pretrained(output)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
