"""The demo's whole run in other people's trainers, for `benchmarks.end_to_end`: the same settings, the same clock."""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from pmc_fast import PMC
from pmc_fast.config import PMCConfig
from pmc_fast.schedule import Schedule, micro_batches

from .runs import Clock, Run, optimizer_of, own_settings, prepared, training_arguments

STAND_IN = Path(__file__).parent.parent / "tests" / "open_unlearning" / "src"


def _trained(run: Run, pmc: PMC, train: Any, steps: Any, encoder: Any = None) -> dict[str, Any]:
    prepared(run, pmc, encoder)
    train()
    return run.result(steps())


def plain(run: Run) -> dict[str, Any]:
    """Run a loop of prepare, sample and loss, in the Trainer's order, with its optimizer and schedule."""
    c = run.config
    pmc = PMC(run.model, run.tokenizer, PMCConfig(**own_settings(c)), [row.question for row in run.forget])
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
        **training_arguments(run.config) | own_settings(run.config), bf16=False, gradient_checkpointing=False
    )
    trainer = PMCTrainer(
        run.model, arguments, [row.question for row in run.forget], run.retain, processing_class=run.tokenizer,
        callbacks=[Clock(run)],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return _trained(run, trainer.pmc, trainer.train, lambda: trainer.state.global_step)


class _Pairs(torch.utils.data.Dataset[Any]):
    """Forget rows, each with a retain row drawn at random, as OpenUnlearning's dataset gives them."""

    def __init__(self, forget: list[Any], retain: list[Any]) -> None:
        self.forget, self.retain = forget, retain

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"forget": self.forget[i], "retain": self.retain[int(torch.randint(len(self.retain), (1,)))]}


def open_unlearning(run: Run) -> dict[str, Any]:
    """Run OpenUnlearning's handler in the stand-in, on padded batches in its Trainer's own order."""
    sys.path.insert(0, str(STAND_IN))
    from data import Collator  # type: ignore[import-not-found]

    from pmc_fast.integrations.open_unlearning import PMC as Handler

    def items(rows: list[Any]) -> list[Any]:
        pairs = [encoder.pair(row.question, row.answer or "") for row in rows]
        return [{"input_ids": torch.tensor(p.input_ids), "labels": torch.tensor(p.labels)} for p in pairs]

    c = run.config
    encoder = PMC(run.model, run.tokenizer, PMCConfig(**own_settings(c)), ["?"]).encoder
    own = ("num_samples", "temperature", "top_k", "top_p", "max_length")
    trainer = Handler(
        model=run.model, eval_dataset=None, processing_class=run.tokenizer, evaluators=None, template_args=None,
        args=transformers.TrainingArguments(
            **training_arguments(run.config), remove_unused_columns=False, max_grad_norm=0.0, save_strategy="no",
            warmup_steps=Schedule.plan(c, len(run.forget)).steps_per_epoch,
        ),
        train_dataset=_Pairs(items(run.forget), items(run.retain)), data_collator=Collator(run.tokenizer),
        alpha=c.retain_weight, **{name: getattr(c, name) for name in own},
    )  # fmt: skip
    trainer.add_callback(Clock(run))
    trainer.remove_callback(transformers.PrinterCallback)
    return _trained(run, trainer.pmc, trainer.train, lambda: trainer.state.global_step, encoder)
