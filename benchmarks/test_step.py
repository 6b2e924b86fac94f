"""One training step against the published one: SmolLM2-135M float32, 8 questions and 8 retain rows.

The reference pads to 200, runs collapse and retain apart and a third forward for a plot, as published. Both train
on the same sampled answers; a step is loss, backward and AdamW. Then LoRA, and PMCTrainer's step against the core's.

Needs the demo's models: `make demo DEMO=--short` makes them.
"""

import tempfile
from typing import Any

import pytest
import torch
import transformers

from benchmarks import harness
from examples.demo_model import finetuned_model
from pmc_fast import PMC, PMCArguments, PMCConfig, PMCTrainer
from pmc_fast.data import load_rows
from pmc_fast.reference import Reference

TOFU = "examples/tofu"
COUNT = 8


class Setting:
    """The demo's model and a sampled step of it."""

    def __init__(self) -> None:
        path = finetuned_model()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.forget = load_rows(f"{TOFU}/forget20.jsonl")[:COUNT]
        self.retain = load_rows(f"{TOFU}/retain60.jsonl", answers=True)[:COUNT]
        self.config = PMCConfig(num_samples=20, temperature=1.25, prompt_format="tags", retain_weight=1.25)
        self.pmc = PMC(self.model, self.tokenizer, self.config, [row.question for row in self.forget])
        self.pmc.prepare()
        self.step = self.pmc.sample(range(COUNT))
        self.kept = self.pmc.encode_retain(self.retain)
        self.model.train()

    def published(self) -> Reference:
        """Return the reference with the same answers in its store."""
        questions, truths = [r.question for r in self.forget], [r.answer or "" for r in self.forget]
        reference = Reference(self.model, self.tokenizer, self.config, questions, tracked_answers=truths)
        for i in range(COUNT):
            [[answer, _]] = self.pmc.store.answer(i)
            reference.sampled_data[i] = {"answer": answer, "score": self.pmc.store.score(i)}
        return reference


def with_optimizer(model: Any, backward: Any, **how: Any) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, **how)

    def step() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


def test_step(contest, setting):
    reference = setting.published()
    ours = lambda: setting.pmc.loss(setting.step, setting.kept).loss.backward()  # noqa: E731
    theirs = lambda: reference.loss(range(COUNT), setting.retain)["loss"].backward()  # noqa: E731
    steps = {
        "pmc_fast": with_optimizer(setting.model, ours, fused=True),
        "reference": with_optimizer(setting.model, theirs),
    }
    result = contest("training step, 8 + 8", steps, rounds=5, warmup=1, memory=False)
    setting.model.zero_grad()
    peaks = {}
    for name, backward in (("pmc_fast", ours), ("reference", theirs)):
        peaks[name] = harness.peak_bytes(backward)  # gradients included, the optimizer's state not
        setting.model.zero_grad()
    losses = {
        "pmc_fast": setting.pmc.loss(setting.step, setting.kept).loss.item(),
        "reference": reference.loss(range(COUNT), setting.retain)["loss"].item(),
    }
    result["facts"].update(
        counters=setting.pmc.loss(setting.step, setting.kept).counters,
        padded_tokens=3 * COUNT * setting.config.max_length, peak_bytes_of_loss_and_backward=peaks, losses=losses,
    )  # fmt: skip


def test_lora(contest):
    """r 16 on all linear layers, and on PEFT's default ones (q_proj, v_proj).

    Memory is a step's peak, gradients included, and the optimizer's state; weights are not counted.
    """
    peft = pytest.importorskip("peft")
    full = Setting()
    ways = {"full": (full.model, lambda: full.pmc.loss(full.step, full.kept).loss.backward())}
    for name, targets in (
        ("LoRA r 16, all linear layers", "all-linear"),
        ("LoRA r 16, q and v", ["q_proj", "v_proj"]),
    ):
        base = transformers.AutoModelForCausalLM.from_pretrained(finetuned_model(), dtype=torch.float32)
        lora = peft.LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, lora).train()
        pmc = PMC(model, full.tokenizer, full.config, [row.question for row in full.forget])
        ways[name] = (
            model,
            lambda pmc=pmc, model=model: pmc.loss(full.step, full.kept, model=model).loss.backward(),
        )
    steps = {name: with_optimizer(*way, fused=True) for name, way in ways.items()}
    peaks = {}
    for name, (model, _) in ways.items():
        steps[name]()  # a first step also takes what is kept for good
        state = sum(2 * p.nbytes for p in model.parameters() if p.requires_grad)  # AdamW's two moments
        peak = harness.peak_bytes(steps[name])
        peaks[name] = None if peak is None else peak + state
    result = contest("LoRA", steps, rounds=5, warmup=1, memory=False)
    result["facts"].update(peak_bytes_of_a_step_and_the_optimizer=peaks)


def test_trainer(contest):
    """Three steps of PMCTrainer.train against three of the core, rollouts left out on both sides."""
    count, setting = 3, Setting()
    with tempfile.TemporaryDirectory() as directory:
        arguments = PMCArguments(
            output_dir=directory, max_steps=count, per_device_train_batch_size=COUNT, gradient_accumulation_steps=1,
            learning_rate=1e-9, use_cpu=True, disable_tqdm=True, report_to="none",
        )  # fmt: skip
        questions = [row.question for row in setting.forget]
        trainer = PMCTrainer(setting.model, arguments, questions, setting.retain, setting.config, setting.tokenizer)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.pmc.load_state_dict(setting.pmc.state_dict())
        trainer.pmc.sample = lambda indices: setting.step
        trainer._draw_retain = lambda count: setting.kept
        step = with_optimizer(
            setting.model, lambda: setting.pmc.loss(setting.step, setting.kept).loss.backward(), fused=True
        )
        steps = {"core": lambda: [step() for _ in range(count)], "PMCTrainer": trainer.train}
        contest(f"{count} steps in the Trainer", steps, rounds=3, warmup=1, memory=False)
