"""What a run trains with: PMC, or another method; both with the same batches, optimizer and callbacks."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..config import OF_RETAIN, PMCConfig, SharedConfig
from ..data import Encoded, sequences_of
from ..evaluation import truths_of, with_initial_answers
from ..methods import Method
from ..models.loading import LoadedModel
from ..pmc.algorithm import PMC
from ..pmc.reward import choose_scorer
from ..trainer.arguments import PMCArguments
from ..trainer.callbacks import TrainingClock
from ..trainer.checkpointing import ResumableTrainer
from ..trainer.trainer import PMCTrainer
from ..trainer.unlearn import UnlearnTrainer
from ..utils.files import digest
from ..utils.words import says_nothing
from .evaluator import Evaluator
from .held import Held
from .plan import Plan
from .progress import Monitor, Stages

Resumed = tuple[Path, dict[str, Any]] | None  # a checkpoint and its state


class ProgressCallback(TrainerCallback):
    """Shows a monitor each step as it is logged."""

    def __init__(self, monitor: Monitor, steps: int | None, clock: TrainingClock) -> None:
        self.monitor, self.steps, self.clock = monitor, steps, clock

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if is_step(logs or {}):
            step = state.global_step
            steps = self.clock.expected(step) if self.steps is None else self.steps
            self.monitor.step(logs | {"step": step}, steps)


def is_step(record: dict[str, Any]) -> bool:
    """Return whether a record of the Trainer's log is of an optimizer step."""
    return "loss" in record and "train_seconds" in record


class PMCRun:
    """A run's training by PMC."""

    def __init__(
        self, plan: Plan, loaded: LoadedModel, arguments: PMCArguments, callbacks: Sequence[TrainerCallback]
    ) -> None:
        questions = [plan.forget[i].question for i in plan.kept]
        self.trainer = _PMCTrainer(
            loaded.model, arguments, questions, plan.retain, plan.config, plan.tokenizer, callbacks=[*callbacks]
        )

    def share(self, held: Held, plan: Plan) -> None:
        """Use what the evaluation uses: each is checked and allocated once."""
        pmc = self.trainer.pmc
        assert held.engine is not None
        assert held.packed is not None
        pmc.share(held.engine, held.packed)
        if plan.choice is not None:
            pmc.limit(plan.choice.max_tokens, plan.choice.graph_tokens if plan.choice.cuda_graphs else 0)

    def prepare(self, plan: Plan, evaluator: Evaluator, resumed: Resumed, stages: Stages) -> float:
        """Answer the forget questions with the untouched model; where no truth was given, these are the truths.

        Return the seconds that the method itself needed.
        """
        c, count, pmc = plan.config, len(plan.forget), self.trainer.pmc
        left_out = sorted({*range(count)} - {*plan.kept}) if c.evaluate else []
        initial: dict[int, str] = {}
        if left_out:  # for the evaluation alone
            with stages("answers to questions left out"):
                answers = evaluator.answers([plan.forget[i].question for i in left_out])
            initial = dict(zip(left_out, answers, strict=True))
        with stages("initial answers"):
            pmc.source, pmc.rows = f"initial answers to {c.forget}", [i + 1 for i in plan.kept]
            # one reward for training and evaluation
            pmc.prepare([*truths_of(plan.sets), *(y for i, y in initial.items() if not plan.forget[i].answer)])
            if resumed is not None:
                pmc.load_state_dict(resumed[1]["pmc"])
            initial |= dict(zip(plan.kept, pmc.initial_answers, strict=True))
        evaluator.add_answers({plan.forget[i].question: y for i, y in initial.items()})
        plan.warn(pmc.warnings, stages.monitor)
        plan.judge_by(pmc.scorer.name, stages.monitor)
        if c.evaluate:
            plan.sets = with_initial_answers(plan.sets, [initial[i] for i in range(count)])
        return stages.seconds["initial answers"]

    def report(self, *, log_text: bool) -> dict[str, Any]:
        """Return what report.json holds of PMC alone."""
        sampled = {"sampled_answers": _sampled(self.trainer.pmc)} if log_text else {}
        return {"stopped": self.trainer.stopped, **sampled}

    @property
    def cut_answers(self) -> int:
        """Initial answers that did not end before max_length."""
        return len(self.trainer.pmc.cut_answers)


class MethodRun:
    """A run's training by another method; the model's own answers are asked for where the evaluation has no others."""

    def __init__(
        self,
        plan: Plan,
        loaded: LoadedModel,
        arguments: PMCArguments,
        callbacks: Sequence[TrainerCallback],
        method: Method,
    ) -> None:
        c, rows = plan.config, [plan.forget[i] for i in plan.kept]
        read = (*(f.name for f in dataclasses.fields(SharedConfig)), *OF_RETAIN)
        config = PMCConfig(**{name: getattr(c, name) for name in read})
        self.trainer = _UnlearnTrainer(
            loaded.model, arguments, rows, plan.retain, config, plan.tokenizer, method=method, callbacks=[*callbacks]
        )
        if plan.choice is not None:  # not in the config: a run that is resumed may find other memory
            self.trainer.task.max_tokens = plan.choice.max_tokens
        self.cut_answers = 0

    def share(self, held: Held, plan: Plan) -> None:
        """Do nothing: the method has a packed pass of its own, without CUDA graphs, with which it was not tried."""

    def prepare(self, plan: Plan, evaluator: Evaluator, resumed: Resumed, stages: Stages) -> float:
        """Compute what the method needs of the untouched model, and what the evaluation does; as of `PMCRun`."""
        c = plan.config
        with stages("preparing the method"):
            self.trainer.task.prepare()
        unknown = [i for i, row in enumerate(plan.forget) if not row.answer] if c.evaluate else []
        if unknown:
            with stages("initial answers"):
                answers = evaluator.answers([plan.forget[i].question for i in unknown])
            initial = dict(zip(unknown, answers, strict=True))
            scorer = choose_scorer(c.reward, [*truths_of(plan.sets), *answers])
            said = [(i + 1, y) for i, y in initial.items() if not says_nothing(y)]
            scorer.require_words(f"initial answers to {c.forget}", said)
            plan.sets = with_initial_answers(plan.sets, [initial.get(i, "") for i in range(len(plan.forget))])
        else:
            scorer = choose_scorer(c.reward, truths_of(plan.sets))
        plan.judge_by(scorer.name, stages.monitor)
        return stages.seconds["preparing the method"]

    def report(self, *, log_text: bool) -> dict[str, Any]:
        """Return what report.json holds of such a method alone: it samples nothing."""
        return {"stopped": None}


class _FilteredTrainer(ResumableTrainer):
    """A trainer whose checkpoints are of a run with the same filter."""

    filter_settings: Sequence[Any] = ()  # of `filters.settings_of`

    def _own_fingerprint(self) -> dict[str, Any]:
        own = {"filter": digest(self.filter_settings)} if self.filter_settings else {}
        return super()._own_fingerprint() | own


class _PMCTrainer(_FilteredTrainer, PMCTrainer):
    """A PMCTrainer whose data `check` has checked."""

    def _encode_retain(self, dataset: Any) -> list[Encoded]:
        return self.pmc.encode(dataset, "retain_dataset")


class _UnlearnTrainer(_FilteredTrainer, UnlearnTrainer):
    """An UnlearnTrainer whose data `check` has checked."""

    def _check_rows(self, rows: list[Any]) -> None:
        pass

    def _encode_retain(self, dataset: Any, rows: list[Any]) -> list[Encoded]:
        return sequences_of(dataset, self.task.encoder)


def _sampled(pmc: PMC) -> list[dict[str, Any]]:
    """Return what was trained on: each question's initial answer, stored answers and score."""
    return [
        {
            "question": q,
            "initial": y,
            "stored": [answer for answer, _ in pmc.store.answer(i)],
            "score": pmc.store.score(i),
        }
        for i, (q, y) in enumerate(zip(pmc.questions, pmc.initial_answers, strict=True))
        if pmc.store.visits(i)
    ]
