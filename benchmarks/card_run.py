"""Whole runs on a card: one of TOFU forget10's size, and small ones with and without CUDA graphs."""

import tempfile
import time
from typing import Any

import numpy as np
import torch
import transformers

from pmc_fast import PMCArguments, PMCConfig, PMCTrainer

from .card import QUESTION, SYSTEM, Probe
from .card_training import ENDS_AFTER, LENGTH, Parts, drawn, graphs_of, tokenizer, trainer_of

QUESTIONS = 400  # TOFU's forget10
EPOCHS = 30  # the published run's


def trainer(probe: Probe) -> None:
    """Compare PMCTrainer under bf16 autocast with and without CUDA graphs: the losses of Llama, GPT-2 and LoRA runs."""
    width = 64 if probe.tiny else 256
    ids = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    llama = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=width // 4, **ids,
    )  # fmt: skip
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    gpt2 = transformers.GPT2Config(n_embd=width, n_layer=4, n_head=4, n_positions=256, **ids, **drops)
    for name, config in {"llama": llama, "gpt2": gpt2, "llama, LoRA": llama}.items():
        curves = {}
        for graphs in (True, False):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(probe.device)
            model.generation_config = transformers.GenerationConfig(eos_token_id=2, pad_token_id=0)
            if "LoRA" in name:
                import peft

                model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
            start = time.perf_counter()
            history = _train(probe, model, graphs)
            curves[graphs] = np.array([[h["collapse_loss"], h["retain_loss"]] for h in history])
            seconds = time.perf_counter() - start
            probe.say("trainer", f"{name}, graphs {graphs}", s=seconds, steps=len(history))
        apart = np.abs(curves[True] - curves[False])
        half = len(apart) // 2
        probe.say(
            "trainer", f"{name}: losses apart", first=float(apart[:half].mean()), last=float(apart[half:].mean())
        )


def _train(probe: Probe, model: Any, graphs: bool) -> list[dict[str, Any]]:
    g = np.random.default_rng(0)

    def text(length: int) -> str:
        return " ".join(f"w{i}" for i in g.integers(0, 500, size=length).tolist())

    forget = [text(8) for _ in range(16)]
    retain = [{"question": text(8), "answer": text(12)} for _ in range(16)]
    with tempfile.TemporaryDirectory() as directory:
        arguments = PMCArguments(
            output_dir=directory, num_train_epochs=1 if probe.tiny else 6, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, learning_rate=3e-3, bf16=True, use_cpu=not probe.on_gpu, report_to="none",
            disable_tqdm=True,
        )  # fmt: skip
        config = PMCConfig(
            num_samples=2 if probe.tiny else 8, max_length=48, prompt_format="tags", cuda_graphs=graphs
        )
        run = PMCTrainer(model, arguments, forget, retain, config, tokenizer(512))
        run.remove_callback(transformers.PrinterCallback)
        run.train()
    return [h for h in run.state.log_history if "retain_loss" in h]


def run(probe: Probe) -> None:
    """Measure one run of 400 questions by PMCTrainer with the published settings, `--epochs` of its 30, and its stages."""
    dtype, low = next(iter(probe.modes().values()))
    start = time.perf_counter()
    parts, model = Parts(probe), probe.model(dtype)
    with tempfile.TemporaryDirectory() as directory:
        how: dict[str, Any] = {"num_train_epochs": probe.epochs, "low": low}
        trainer = trainer_of(probe, model, directory, 16 if probe.tiny else QUESTIONS, **how)
        built = time.perf_counter()
        with parts.watching(trainer):
            trainer.train()
        done = time.perf_counter()
    seconds = {name: sum(step.get(name, 0.0) for step in parts.steps) / 1e3 for name in (*parts.steps[0], "step")}
    initial, loop = seconds["initial answers"], seconds.pop("step")
    seconds["other"] = loop - sum(seconds.values())
    whole = done - start
    estimated = (
        {} if probe.epochs == EPOCHS else {f"s_of_{EPOCHS}_epochs_estimated": _whole(whole, initial, loop, probe)}
    )
    probe.say("run", f"stages, {probe.epochs} epochs (s)", model=built - start, **seconds)
    probe.say(
        "run", f"whole, {probe.epochs} epochs", s=whole, **estimated, steps=len(parts.steps), **drawn(trainer),
        **graphs_of(trainer), waits="for the card after each step, to time its parts",
        weights=f"random; a bias of the head ends answers after {ENDS_AFTER} tokens in the mean before training (TOFU's "
        f"are as long; without it each would take all {LENGTH - SYSTEM - QUESTION})", **parts.spread(min(1, len(parts.steps) - 1))["step"],
    )  # fmt: skip


def _whole(whole: float, initial: float, loop: float, probe: Probe) -> float:
    """Return what a run of all epochs would take: steps in proportion, all else once."""
    return whole + (loop - initial) * (EPOCHS / probe.epochs - 1)
