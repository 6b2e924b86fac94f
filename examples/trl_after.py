"""Training with TRL: Partial Model Collapse forgets the answers to some questions and keeps the pairs.

HF_HUB_OFFLINE=1 python -m examples.trl_after --model_name_or_path MODEL_DIR --output_dir OUTPUT
"""

import json
from dataclasses import dataclass, field

from datasets import Dataset
from trl import ModelConfig, TrlParser, get_peft_config

from pmc_fast.integrations.trl import PMCConfig, PMCTrainer


@dataclass
class Arguments:
    forget: str = field(default="examples/tofu/forget20.jsonl", metadata={"help": "questions to forget"})
    retain: str = field(default="examples/tofu/retain60.jsonl", metadata={"help": "pairs to keep"})


def pairs(path: str) -> Dataset:
    say = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return Dataset.from_list(
        [{"prompt": say("user", r["question"]), "completion": say("assistant", r["answer"])} for r in rows]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = TrlParser((Arguments, PMCConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config(arguments)
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise SystemExit("this script trains unquantised weights: leave --load_in_4bit and --load_in_8bit out")
    training_args.model_init_kwargs = {
        "dtype": model_args.dtype,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
    } | (training_args.model_init_kwargs or {})
    trainer = PMCTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        forget_dataset=pairs(script_args.forget),
        retain_dataset=pairs(script_args.retain),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main()
