"""A training step in other people's trainers against the core's: SmolLM2-135M float32, 8 questions and 8 retain rows.

All train on the same sampled answers; rollouts are left out on all sides. Three steps a round. OpenUnlearning is the
stand-in of tests/open_unlearning with padded batches.

Needs the demo's models: `make demo DEMO=--short` makes them.
"""

import os

import pytest
import torch
import transformers

from benchmarks.drop_ins import items, stand_in
from benchmarks.settings import StepSetting, with_optimizer
from benchmarks.test_step import COUNT
from examples.demo_model import finetuned_model
from pmc_fast import PMC, PMCArguments, PMCTrainer

STEPS = 3


@pytest.fixture(scope="module")
def setting() -> StepSetting:
    os.environ["HF_HUB_OFFLINE"] = "1"  # TRL's trainers look for the hub
    return StepSetting(finetuned_model(), COUNT)


def common(path: object) -> dict[str, object]:
    return {
        "output_dir": str(path), "max_steps": STEPS, "per_device_train_batch_size": COUNT, "use_cpu": True,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-9, "disable_tqdm": True, "report_to": "none",
    }  # fmt: skip


def test_integrations(contest, setting, tmp_path):
    step = with_optimizer(
        setting.model, lambda: setting.pmc.loss(setting.step, setting.kept).loss.backward(), fused=True
    )
    contest(
        f"{STEPS} steps in other trainers",
        {
            "core": lambda: [step() for _ in range(STEPS)],
            "accelerate": accelerated(setting),
            "PMCTrainer": in_trainer(setting, tmp_path),
            "TRL": in_trl(setting, tmp_path),
            "OpenUnlearning": in_open_unlearning(setting, tmp_path),
        },
        rounds=3,
        warmup=1,
        memory=False,
    )


def accelerated(setting):
    """Return the steps under accelerate, retain rows padded as a loader has them."""
    from accelerate import Accelerator

    from pmc_fast.data import collate

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(setting.model.parameters(), lr=1e-9, fused=True)
    model, optimizer = accelerator.prepare(setting.model, optimizer)
    retain = collate(setting.kept, setting.tokenizer.pad_token_id)

    def steps():
        for _ in range(STEPS):
            accelerator.backward(setting.pmc.loss(setting.step, retain, model=model).loss)
            optimizer.step()
            optimizer.zero_grad()

    return steps


def prepared(trainer, setting):
    """Give a trainer the sampled step."""
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.pmc.load_state_dict(setting.pmc.state_dict())
    trainer.pmc.sample = lambda indices: setting.step
    return trainer


def in_trainer(setting, path):
    questions = [row.question for row in setting.forget]
    arguments = PMCArguments(**common(path / "trainer"))
    trainer = PMCTrainer(setting.model, arguments, questions, setting.retain, setting.config, setting.tokenizer)
    trainer._draw_retain = lambda questions: [[s] for s in setting.kept]
    return prepared(trainer, setting).train


def in_trl(setting, path):
    from pmc_fast.integrations.trl import PMCConfig as TRLConfig
    from pmc_fast.integrations.trl import PMCTrainer as TRLTrainer

    c = setting.config
    arguments = TRLConfig(
        **common(path / "trl"), bf16=False, gradient_checkpointing=False, num_samples=c.num_samples,
        temperature=c.temperature, prompt_format="tags", retain_weight=c.retain_weight, logging_steps=1,
    )  # fmt: skip
    trainer = TRLTrainer(
        setting.model, arguments, [row.question for row in setting.forget], setting.retain,
        processing_class=setting.tokenizer,
    )  # fmt: skip
    trainer._draw_retain = lambda questions: [[s] for s in setting.kept]
    return prepared(trainer, setting).train


def in_open_unlearning(setting, path):
    data = stand_in()
    from pmc_fast.integrations.open_unlearning import PMC as Handler

    forget = [setting.pmc.encoder.pair(row.question, row.answer) for row in setting.forget]
    kept, collate = items(setting.kept), data.Collator(setting.tokenizer)

    def collate_kept(rows):  # the same retain rows as in the other trainers, not those drawn
        return collate([row | {"retain": kept[i]} for i, row in enumerate(rows)])

    trainer = Handler(
        model=setting.model,
        args=transformers.TrainingArguments(
            **common(path / "ou"),
            remove_unused_columns=False,
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            weight_decay=0.01,
        ),
        train_dataset=data.ForgetRetain(items(forget), kept),
        eval_dataset=None,
        processing_class=setting.tokenizer,
        data_collator=collate_kept,
        evaluators=None,
        template_args=None,
        alpha=setting.config.retain_weight,
    )
    assert isinstance(trainer.pmc, PMC)
    return prepared(trainer, setting).train
