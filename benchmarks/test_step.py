"""One training step against the published one: SmolLM2-135M float32, 8 questions and 8 retain rows.

The reference pads to 200, runs collapse and retain apart and a third forward for a plot, as published. Both train
on the same sampled answers; a step is loss, backward and AdamW. Then LoRA. Steps in trainers: test_integrations.py.

Needs the demo's models: `make demo DEMO=--short` makes them.
"""

import pytest
import torch
import transformers

from benchmarks.settings import StepSetting, with_optimizer
from examples.demo_model import finetuned_model
from pmc_fast import PMC
from pmc_fast.bench import measure

COUNT = 8


@pytest.fixture(scope="module")
def setting() -> StepSetting:
    return StepSetting(finetuned_model(), COUNT)


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
        peaks[name] = measure.peak_bytes(backward)  # gradients included, the optimizer's state not
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
    full = StepSetting(finetuned_model(), COUNT)
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
        peak = measure.peak_bytes(steps[name])
        peaks[name] = None if peak is None else peak + state
    result = contest("LoRA", steps, rounds=5, warmup=1, memory=False)
    result["facts"].update(peak_bytes_of_a_step_and_the_optimizer=peaks)
