"""The main job: check everything, unlearn, evaluate before and after, write the result whole."""

import dataclasses
import shutil
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from ..config import UnlearnConfig
from ..data import (
    Encoded,
    Encoder,
    Question,
    Row,
    load_rows,
)
from ..distributed import Ranks, launched
from ..errors import PMCError, Terminated
from ..evaluation import (
    EvalSet,
    SideEffects,
    TokenMass,
    attack,
    check_attacks,
    check_sets,
    check_truths,
    evaluate,
    greedy_answers,
    leakage_settings,
    load_sets,
    truths_of,
    with_initial_answers,
    with_side_effects,
)
from ..models import loading
from ..models.packed_forward import PackedPass, causal_lm
from ..pmc.algorithm import PMC
from ..pmc.reward import choose_scorer
from ..pmc.schedule import Schedule
from ..report import gates, render
from ..report.environment import machine, versions
from ..rollout import RolloutEngine, SharedEngine
from ..trainer import checkpointing
from ..trainer.arguments import PMCArguments, check_optimizer_name
from ..trainer.callbacks import TRACE, StepProfiler
from ..trainer.trainer import PMCTrainer
from ..utils.text import row_numbers
from . import earlier_runs, known_forgotten
from .interrupts import CheckpointOnSigterm, what_is_left
from .outputs import Outcome, WholeModel
from .progress import Monitor, Silent, Stages

FEW_STEPS = 50
COLD = 0.1


@dataclass(slots=True)
class Plan:
    """A run that was checked: nothing of it has been computed, and nothing written."""

    config: UnlearnConfig
    tokenizer: Any
    forget: list[Row]
    retain: list[Row]
    sets: list[EvalSet]
    schedule: Schedule
    paraphrases: list[Question | None]  # of the forget questions, for skip_known_forgotten
    text: SideEffects | None  # unrelated, for the evaluation
    kept: list[int]  # the forget questions that are trained on, from 0
    earlier: list[dict[str, Any]]  # what the model was made to forget before
    cut: dict[str, list[int]]  # rows whose answers max_length cuts, by their source
    warnings: list[str] = field(default_factory=list)

    @property
    def rows(self) -> dict[str, list[Row]]:
        """All rows of the run by what they are for, the forget questions' first."""
        others = {s.name: s.rows for s in self.sets if s.name not in ("forget", "retain")}
        return {"forget": self.forget, "retain": self.retain, **others}

    def keep(self, kept: list[int], monitor: Monitor) -> None:
        """Leave out all other forget questions, and plan the steps anew."""
        if kept != self.kept:
            few = _few_steps(self.schedule)
            self.kept, self.schedule = kept, Schedule.plan(self.config, len(kept), launched()[1])
            self.warnings = [text for text in self.warnings if text not in few]
            for text in _few_steps(self.schedule):
                self.warnings.append(text)
                monitor.warn(text)


def _few_samples(config: UnlearnConfig) -> list[str]:
    """Warn of each setting under which nothing but greedy answers is drawn."""
    cold = {
        f"temperature is {config.temperature:g}": config.temperature < COLD,
        f"top_k is {config.top_k}": config.top_k == 1,
        f"top_p is {config.top_p:g}": config.top_p < COLD,
    }
    return [
        f"{what}: samples are nearly always the greedy answer then, and none is found that is unlike it; published are "
        "temperatures of 0.9 and 1.25, top_k 50, top_p 0.95"
        for what, is_cold in cold.items()
        if is_cold
    ]


def _few_steps(schedule: Schedule) -> list[str]:
    if schedule.steps >= FEW_STEPS:
        return []
    return [
        f"only {schedule.steps} optimizer steps are planned: under {FEW_STEPS} little may be forgotten; "
        "raise --epochs or lower --batch-size"
    ]


def check(config: UnlearnConfig, outcome: Outcome | None = None) -> Plan:
    """Read the data and refuse, before any work, what can't succeed."""
    if not config.model:
        raise PMCError("model is not given: --model takes a directory or a hub id")
    if not config.forget:
        raise PMCError("forget is not given: --forget takes a file of questions to forget")
    if not config.retain:
        raise PMCError(
            "retain is not given: --retain takes pairs to keep; without them forgetting takes all else along"
        )
    check_optimizer_name(config.optimizer)
    outcome = outcome or WholeModel(config)
    outcome.check()
    forget = load_rows(config.forget)
    retain = load_rows(config.retain, answers=True)
    runs = outcome.earlier()
    warnings = earlier_runs.check(runs, (config.forget, forget), (config.retain, retain), allow=config.allow_relearn)
    tokenizer = loading.load_tokenizer(config.model)
    outcome.check_room(*loading.check_source(config.model, config.device))
    if config.resume not in ("", "auto"):
        checkpointing.load(Path(config.resume), {})
    warnings += loading.check_config(config.model, tokenizer, config.max_length)
    generation_config = None if config.accidents else loading.load_generation_config(config.model)
    encoder = Encoder(tokenizer, config, generation_config)
    warnings += encoder.warnings + (encoder.text_warnings() if config.store != "ids" else [])
    config = dataclasses.replace(config, prompt_format=encoder.format)
    warnings += earlier_runs.check_prompts(config.model, config)
    # the evaluation alone sees the forget answers: training gets the questions
    sets = load_sets(config, forget, retain) if config.evaluate else []
    every = [EvalSet(config.forget, "forget", forget), EvalSet(config.retain, "keep", retain)]
    every += [s for s in sets if s.name not in ("forget", "retain")]
    cut = {s.name: rows for s in every if (rows := encoder.check_lengths(s.name, s.pairs))}
    warnings += [encoder.cut_warning(s.name, cut[s.name], len(s.rows)) for s in every if s.name in cut]
    warnings += check_sets(every, allow_overlap=config.allow_overlap)
    judged = sets or ([EvalSet("forget", "forget", forget)] if config.skip_known_forgotten else [])
    check_truths(choose_scorer(config.reward, truths_of(judged)), judged, known=True)
    check_attacks(encoder, sets, leakage_settings(config))
    text = None
    if config.side_effects_text:
        text = SideEffects.read(config.side_effects_text, tokenizer, loading.max_positions(config.model))
    paraphrases: list[Question | None] = [None] * len(forget)
    if config.skip_known_forgotten:
        paraphrases = known_forgotten.read_paraphrases(config, forget)
    encoder.check_lengths(config.paraphrased, [(q or "", None) for q in paraphrases])
    schedule = Schedule.plan(config, len(forget), launched()[1])
    everything = list(range(len(forget)))
    warnings += [*_few_samples(config), *_few_steps(schedule)]
    return Plan(config, tokenizer, forget, retain, sets, schedule, paraphrases, text, everything, runs, cut, warnings)


def unlearn(config: UnlearnConfig, monitor: Monitor | None = None, outcome: Outcome | None = None) -> dict[str, Any]:
    """Run the whole job and return its report; started by `accelerate launch`, on all its processes together.

    Parameters
    ----------
    config : UnlearnConfig
        Model, forget, retain and output are required.
    monitor : Monitor, optional
        Is told of stages, steps and warnings, in the first process.
    outcome : Outcome, optional
        What is trained and written: by default the whole model, into `config.output`.

    Returns
    -------
    dict
        What report.json holds; ``failed_gates`` names the gates that were missed. Where every question is known to
        be forgotten (skip_known_forgotten) there is nothing to do: ``known_forgotten`` says so, and nothing was written.

    Raises
    ------
    PMCError
        Bad input, a loss that is not finite, or a full disk; then nothing was written.
    """
    if monitor is None or launched()[0] > 0:
        monitor = Silent()
    stages = Stages(monitor)
    outcome = outcome or WholeModel(config)
    with stages("checking"):
        plan = check(config, outcome)
    for text in plan.warnings:
        monitor.warn(text)
    first = launched()[0] == 0
    with outcome.claimed() if first else nullcontext():
        if first:
            outcome.check()  # another run may have ended here since
        try:
            return _run(plan, monitor, stages, outcome)
        except (KeyboardInterrupt, Terminated) as error:
            error.add_note(what_is_left(outcome.destination, outcome.checkpoints))
            raise


def _run(plan: Plan, monitor: Monitor, stages: Stages, outcome: Outcome) -> dict[str, Any]:
    config = plan.config
    with stages("loading the model"):
        device = loading.resolve_device(config.device)
        loaded = loading.load_model(config.model, device=device, dtype=config.dtype, param_dtype=config.param_dtype)
        loading.check_fit(loaded.model, plan.tokenizer, config.model)
        weights, base = loading.weights_hash(loaded.model), loaded.model
    outcome.attach(loaded, stages)
    model = loaded.model
    arguments = _arguments(config, loaded, outcome)  # several processes know each other from here on
    known = None
    if config.skip_known_forgotten:
        with stages("looking for what is known to be forgotten"):
            known = _known_forgotten(plan, loaded, weights, outcome)
        which = f" ({row_numbers(known.rows)})" if known.rows else ""
        monitor.stage(f"  {len(known.rows)} of {known.questions} questions are left out{which}")
        if not known.kept:
            return {"questions": known.questions, "known_forgotten": dataclasses.asdict(known), "failed_gates": []}
        plan.keep(known.kept, monitor)
    trainer, profiler = _trainer(plan, loaded, arguments, monitor, outcome)
    if model is base:
        trainer.weights_sha256 = weights  # not read twice
    pmc, ranks = trainer.pmc, trainer.pmc.ranks
    engine = SharedEngine(pmc.engine, ranks)
    resumed = trainer.find_checkpoint(config.resume, warn=monitor.warn)
    result: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    masses: dict[str, TokenMass] = {}

    said: dict[Question, str] = {}  # question -> greedy answer of the model as it is now

    def answer(asked: Any) -> list[str]:
        if new := [question for question in asked if question not in said]:
            said.update(zip(new, greedy_answers(engine, pmc.encoder, new), strict=True))
        return [said[question] for question in asked]

    def measure(when: str) -> None:
        numbers: list[dict[str, Any]] = []
        how: dict[str, Any] = {"log_text": config.log_text, "rows": numbers}
        with stages(f"evaluation {when}"):
            result[when] = evaluate(answer, sets, reward=config.reward, on_set=stages.on_set, **how)
        if settings := leakage_settings(config):
            with stages(f"leak attacks {when}"):
                result[when]["leakage"] = attack(
                    engine, pmc.encoder, sets, settings, on_attack=stages.on_attack, **how
                )
        if plan.text:
            with stages(f"side effects {when}"):
                masses[when] = plan.text.measure(model, plan.text.tokens(sets), loaded.autocast_dtype)
        rows.extend({"model": when, **row} for row in numbers)

    with stages("initial answers"):
        left_out = [i for i in range(len(plan.forget)) if i not in plan.kept] if config.evaluate else []
        initial = dict(zip(left_out, answer([plan.forget[i].question for i in left_out]), strict=True))
        pmc.source, pmc.rows = f"initial answers to {config.forget}", [i + 1 for i in plan.kept]
        # one reward for training and evaluation
        pmc.prepare([*truths_of(plan.sets), *(y for i, y in initial.items() if not plan.forget[i].answer)])
        if resumed is not None:
            pmc.load_state_dict(resumed[1]["pmc"])
        initial |= dict(zip(plan.kept, pmc.initial_answers, strict=True))
    for text in pmc.warnings:
        if text not in plan.warnings:  # `check` has said what was known then
            monitor.warn(text)
            plan.warnings.append(text)
    config = dataclasses.replace(config, reward=pmc.scorer.name)
    monitor.stage(f"  reward: {config.reward}")
    said.update((plan.forget[i].question, y) for i, y in initial.items())
    if config.evaluate:
        sets = with_initial_answers(plan.sets, [initial[i] for i in range(len(plan.forget))])
        measure("before")
    with stages("unlearning" if resumed is None else f"unlearning, from {resumed[0].name} on"):
        on_sigterm: Any = nullcontext()
        if config.checkpoint_steps and ranks.size == 1 and current_thread() is main_thread():
            on_sigterm = CheckpointOnSigterm(monitor.warn)
            trainer.add_callback(on_sigterm)
        with on_sigterm:
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed[0]))
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise trainer.diverged()
    model = outcome.detach(model.eval(), stages)
    if model is not loaded.model:
        engine = SharedEngine(_engine(model, loaded, config), ranks)
    said.clear()
    if config.evaluate:
        measure("after")
    history = [r for r in trainer.state.log_history if "collapse_loss" in r]
    for text in gates.warnings(result.get("before", {}), result.get("after", {}), history):
        plan.warnings.append(text)
        monitor.warn(text)
    judged = gates.judge(config, result.get("after", {}), result.get("before"))
    made = {
        "settings": dataclasses.asdict(config),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": {"before": {"source": config.model, "sha256": weights}},
        "questions": len(plan.forget),
        "retain_rows": len(plan.retain),
        "data": earlier_runs.data_of(plan.rows, plan.earlier),
        "cut": {source: len(rows) for source, rows in plan.cut.items()} | {"initial answers": len(pmc.cut_answers)},
        "truth_of_forget": "given answers" if all(r.answer for r in plan.forget) else "initial answers",
        "versions": versions(),
        "machine": machine(),
        **({} if known is None else {"known_forgotten": dataclasses.asdict(known)}),
        **result,
        **with_side_effects(result, masses),
        "history": history,
        "stopped": trainer.stopped,
        **({"sampled_answers": _sampled(pmc)} if config.log_text else {}),
        "gates": judged,
        "failed_gates": gates.missed(judged),
        "warnings": plan.warnings,
        "stage_seconds": stages.seconds,
    }
    if ranks.rank == 0:
        files = {name: text.encode() for name, text in render.render(made, rows).items()}
        if profiler is not None and profiler.trace is not None:
            files[TRACE] = profiler.trace
        with stages("saving"):
            outcome.write(made, files, plan)
        shutil.rmtree(outcome.checkpoints, ignore_errors=True)  # they hold the initial answers
    ranks.gather(None)  # a launcher would end a process whose peer is done
    return made


def _engine(model: Any, loaded: loading.LoadedModel, config: UnlearnConfig) -> RolloutEngine:
    return RolloutEngine(model, autocast_dtype=loaded.autocast_dtype, cuda_graphs=config.cuda_graphs)


def _known_forgotten(
    plan: Plan, loaded: loading.LoadedModel, weights: str, outcome: Outcome
) -> known_forgotten.KnownForgotten:
    """Judge the forget questions, or take over what an earlier start of this run found."""
    c, ranks = plan.config, Ranks()
    directory = outcome.checkpoints if c.resume in ("", "auto") else Path(c.resume).parent
    about = (c, plan.forget, plan.paraphrases)
    found = ranks.gather(known_forgotten.remembered(directory, weights, *about) if c.resume else None)[
        0
    ]  # the first one's files count
    if found is None:
        engine = SharedEngine(_engine(loaded.model, loaded, c), ranks)
        encoder = Encoder(plan.tokenizer, c, None if c.accidents else loaded.model.generation_config)
        found = known_forgotten.judge(
            engine, encoder, *about, PackedPass(causal_lm(loaded.model)), loaded.autocast_dtype,
            truths=truths_of(plan.sets),
        )  # fmt: skip
    found = ranks.gather(found)[0]  # one list, whatever another process's rounding
    if c.checkpoint_steps and found.kept and ranks.rank == 0:
        known_forgotten.remember(outcome.checkpoints, found, weights, *about)
    return found


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


def _arguments(c: UnlearnConfig, loaded: loading.LoadedModel, outcome: Outcome) -> PMCArguments:
    made = PMCArguments(
        output_dir=str(outcome.checkpoints),
        num_train_epochs=c.num_epochs,
        per_device_train_batch_size=c.batch_size,
        gradient_accumulation_steps=c.gradient_accumulation_steps,
        learning_rate=c.learning_rate,
        weight_decay=c.weight_decay,
        optim=c.optimizer,
        bf16=loaded.autocast_dtype is not None,
        allow_pure_bf16=c.allow_pure_bf16,
        master_weights=not c.allow_pure_bf16,
        save_strategy="steps" if c.checkpoint_steps else "no",
        save_steps=c.checkpoint_steps or 1,
        save_total_limit=2,
        use_cpu=loaded.model.device.type == "cpu",
        seed=c.seed,
        disable_tqdm=True,
        report_to="none",
    )
    made.mixed_precision = "no" if loaded.autocast_dtype is None else "bf16"  # a launcher's is not: dtype says it
    return made


def _trainer(
    plan: Plan, loaded: loading.LoadedModel, arguments: PMCArguments, monitor: Monitor, outcome: Outcome
) -> tuple[PMCTrainer, StepProfiler | None]:
    c = plan.config
    questions = [plan.forget[i].question for i in plan.kept]
    profiler = StepProfiler() if c.profile and launched()[0] == 0 else None
    callbacks = [_Told(monitor, plan.schedule.steps), *([profiler] if profiler else [])]
    trainer = _Trainer(loaded.model, arguments, questions, plan.retain, c, plan.tokenizer, callbacks=callbacks)
    with suppress(OSError):
        outcome.checkpoints.rmdir()  # the Trainer makes it even if nothing will be saved
    trainer.remove_callback(PrinterCallback)  # the monitor shows what the Trainer would print
    return trainer, profiler


class _Trainer(PMCTrainer):
    """A PMCTrainer whose data `check` has checked."""

    def _encode_retain(self, dataset: Any) -> list[Encoded]:
        return self.pmc.encode(dataset, "retain_dataset")


class _Told(TrainerCallback):
    """Tells a monitor of each step as it is logged."""

    def __init__(self, monitor: Monitor, steps: int) -> None:
        self.monitor, self.steps = monitor, steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "collapse_loss" in logs:
            self.monitor.step(logs | {"step": state.global_step}, self.steps)
