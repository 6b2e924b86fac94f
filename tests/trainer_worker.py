"""Trains a tiny model with PMCTrainer on the processes that torchrun starts.

torchrun --nproc-per-node 2 tests/trainer_worker.py MODEL OUTPUT [--batch 2] [--kill STEP]
"""

import argparse
import os
import signal
from pathlib import Path

import torch
import transformers

from pmc_fast import PMCArguments, PMCConfig, PMCTrainer
from tests.ranks_worker import QUESTIONS, RETAIN, some


class Kill(transformers.TrainerCallback):
    """Kills the second process within a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer_of(path, output, batch, accumulation=1, normalization="step", kill=None, save=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    arguments = PMCArguments(
        output_dir=str(output), num_train_epochs=3, per_device_train_batch_size=batch, learning_rate=1e-3,
        gradient_accumulation_steps=accumulation, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="steps" if save else "no", save_steps=save or 1, optim="sgd",
    )  # fmt: skip
    config = PMCConfig(
        num_samples=3, max_length=40, prompt_format="tags", temperature=1.25, normalization=normalization,
        max_tokens=80,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    callbacks = [] if kill is None else [Kill(kill)]
    return PMCTrainer(model, arguments, QUESTIONS, RETAIN, config, tokenizer, reward=some, callbacks=callbacks)


def result(trainer):
    logs = [r for r in trainer.state.log_history if "collapse_loss" in r]
    kept = ("collapse_loss", "retain_loss", "mean_score", "pending", "sampled_tokens", "loss")
    return {
        "parameters": {n: p.detach().clone() for n, p in trainer.model.named_parameters()},
        "state": trainer.pmc.state_dict(),
        "logs": [{name: r[name] for name in kept} for r in logs],
    }


def evaluation(trainer):
    """All processes together; the Trainer's eval_loss is a mean over batches, of all processes' rows."""
    trainer.args.per_device_eval_batch_size = 2 // trainer.args.world_size
    metrics = trainer.evaluate(RETAIN[:4])
    return {name: metrics[f"eval_{name}"] for name in ("loss", "recall", "forget_score")}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--normalization", default="step")
    parser.add_argument("--kill", type=int)
    parser.add_argument("--save", type=int)
    a = parser.parse_args()
    torch.set_num_threads(1)
    trainer = trainer_of(a.model, a.output, a.batch, a.accumulation, a.normalization, a.kill, a.save)
    trainer.train()
    evaluated = evaluation(trainer)
    if trainer.is_world_process_zero():
        torch.save(result(trainer) | {"evaluated": evaluated}, a.output / "result.pt")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
    os._exit(0)  # the trainer holds the group until Python ends, and gloo's threads may abort it then
