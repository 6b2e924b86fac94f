"""The demo's whole run in other people's trainers, for `benchmarks.end_to_end`: the same settings, the same clock."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from pmc_fast import PMC
from pmc_fast.config import PMCConfig
from pmc_fast.data import Encoded
from pmc_fast.pmc.schedule import Schedule, micro_batches

from .runs import Clock, Run, optimizer_of, prepared, training_arguments

STAND_IN = Path(__file__).parent.parent / "tests" / "open_unlearning" / "src"


def _trained(run: Run, pmc: PMC, train: Any, steps: Any, encoder: Any = None) -> dict[str, Any]:
    prepared(run, pmc, encoder)
    train()
    return run.result(steps())


def plain(run: Run) -> dict[str, Any]:
    """Run a loop of prepare, sample and loss, in the Trainer's order, with its optimizer and schedule."""
    c = run.config
    pmc = PMC(run.model, run.tokenizer, PMCConfig(**c.algorithm()), [row.question for row in run.forget])
    kept = pmc.encode_retain(run.retain)
    optimizer = optimizer_of(run)
    warmup = Schedule.plan(c, len(run.forget)).steps_per_epoch
    rate = transformers.get_linear_schedule_with_warmup(optimizer, warmup, run.steps)
    order = torch.Generator().manual_seed(c.seed + 1)

    def train() -> None:
        batches = micro_batches(c, len(run.forget))
        for number, [indices] in zip(range(1, run.steps + 1), batches, strict=False):
            step = pmc.sample(indices)
            draws = torch.randint(len(kept), (len(indices),), generator=order)
            run.model.train()
            out = pmc.loss(step, [kept[i] for i in draws.tolist()])
            out.loss.backward()
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            run.on_step({"step": number, "loss": out.loss.item(), "collapse_loss": out.collapse.item()})

    return _trained(run, pmc, train, lambda: run.steps)


def trl(run: Run) -> dict[str, Any]:
    """Run TRL's PMCTrainer."""
    from pmc_fast.integrations.trl import PMCConfig as TRLConfig
    from pmc_fast.integrations.trl import PMCTrainer

    arguments = TRLConfig(
        **training_arguments(run.config) | run.config.algorithm(), bf16=False, gradient_checkpointing=False
    )
    trainer = PMCTrainer(
        run.model, arguments, [row.question for row in run.forget], run.retain, processing_class=run.tokenizer,
        callbacks=[Clock(run)],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return _trained(run, trainer.pmc, trainer.train, lambda: trainer.state.global_step)


def stand_in() -> Any:
    """Return the module of OpenUnlearning's data as the tests' stand-in has it."""
    if str(STAND_IN) not in sys.path:
        sys.path.insert(0, str(STAND_IN))
    return importlib.import_module("data")


def items(sequences: Sequence[Encoded]) -> list[dict[str, torch.Tensor]]:
    """Return encoded pairs as rows of that data."""
    return [{"input_ids": torch.tensor(s.input_ids), "labels": torch.tensor(s.labels)} for s in sequences]


def open_unlearning(run: Run) -> dict[str, Any]:
    """Run OpenUnlearning's handler in the stand-in, on padded batches in its Trainer's own order."""
    data = stand_in()
    from pmc_fast.integrations.open_unlearning import PMC as Handler

    c = run.config
    encoder = PMC(run.model, run.tokenizer, PMCConfig(**c.algorithm()), ["?"]).encoder
    forget, retain = (
        items([encoder.pair(row.question, row.answer or "") for row in rows]) for rows in (run.forget, run.retain)
    )
    own = ("num_samples", "temperature", "top_k", "top_p", "max_length")
    trainer = Handler(
        model=run.model, eval_dataset=None, processing_class=run.tokenizer, evaluators=None, template_args=None,
        args=transformers.TrainingArguments(
            **training_arguments(run.config), remove_unused_columns=False, max_grad_norm=0.0, save_strategy="no",
            warmup_steps=Schedule.plan(c, len(run.forget)).steps_per_epoch,
        ),
        train_dataset=data.ForgetRetain(forget, retain), data_collator=data.Collator(run.tokenizer),
        alpha=c.retain_weight, **{name: getattr(c, name) for name in own},
    )  # fmt: skip
    trainer.add_callback(Clock(run))
    trainer.remove_callback(transformers.PrinterCallback)
    return _trained(run, trainer.pmc, trainer.train, lambda: trainer.state.global_step, encoder)
