"""Unlearning in a plain torch loop: gradient difference (ascent on forget answers, descent on retain ones).

python -m examples.plain_before MODEL_DIR FORGET.jsonl RETAIN.jsonl OUTPUT_DIR
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmc_fast import collate, encode_pair, load_rows


def main(
    model_dir: str, forget_file: str, retain_file: str, output: str, epochs: int = 5, batch_size: int = 4
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    forget, retain = load_rows(forget_file, answers=True), load_rows(retain_file, answers=True)
    encode = lambda row: encode_pair(tokenizer, row.question, row.answer, prompt_format="tags")  # noqa: E731
    batch = lambda rows: collate([encode(row) for row in rows], tokenizer.pad_token_id)  # noqa: E731
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    model.train()
    for epoch in range(epochs):
        for indices in torch.randperm(len(forget)).split(batch_size):
            retain_batch = batch([retain[i] for i in torch.randint(len(retain), (len(indices),))])
            loss = -model(**batch([forget[i] for i in indices])).loss + 1.25 * model(**retain_batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
