"""Trains as the configuration says."""

import hydra
import torch
import transformers
from data import Collator, ForgetRetain, Rows
from trainer import load_trainer


@hydra.main(version_base=None, config_path="../configs", config_name="unlearn.yaml")
def main(cfg):
    tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32)
    forget = Rows(tokenizer, [(f"What is fact {i}?", f"It is {i}.") for i in range(4)])
    retain = Rows(tokenizer, [(f"Is {i} even?", "No." if i % 2 else "Yes, it is.") for i in range(6)])
    trainer, args = load_trainer(
        cfg.trainer, model, processing_class=tokenizer, train_dataset=ForgetRetain(forget, retain), eval_dataset=None,
        data_collator=Collator(tokenizer), evaluators=None, template_args=None,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
