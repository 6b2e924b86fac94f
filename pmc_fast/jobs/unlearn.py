"""An unlearning run: check everything, unlearn, evaluate before and after, write the result whole."""

import dataclasses
import shutil
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from ..config import UnlearnConfig
from ..distributed import Ranks, launched
from ..errors import NotFiniteError, PMCError, Terminated
from ..models import loading
from ..models.fused_layers import use_checkpointing
from ..models.packed_forward import causal_lm
from ..report import gates, render
from ..report.environment import machine, versions
from ..rollout import SharedEngine
from ..trainer.arguments import PMCArguments
from ..trainer.callbacks import TRACE, StepProfiler, TrainingClock
from ..trainer.trainer import PMCTrainer
from ..trainer.unlearn import UnlearnTrainer
from . import earlier_runs, methods
from .evaluator import Evaluator, Results, Suite
from .filters import LeftOut, leave_out, settings_of
from .held import Held
from .interrupts import CheckpointOnSigterm, what_is_left
from .memory import Choice
from .memory_limits import Limits
from .outputs import TrainingTarget, WholeModel
from .plan import Plan, make_plan, require_inputs
from .progress import Monitor, Silent, Stages
from .trackers import Tracker
from .training import MethodRun, PMCRun, ProgressCallback, is_step

ENDLESS = 10**9  # steps: the Trainer wants a number, also where the clock ends a run


def check(config: UnlearnConfig, target: TrainingTarget | None = None, held: Held | None = None) -> Plan:
    """Read the data and refuse, before any work, what can't succeed or be written."""
    target = target or WholeModel(config)
    require_inputs(config)
    target.check()
    plan = make_plan(config, target.earlier(), held or Held())
    target.check_room(plan.parameters, plan.dtype)
    return plan


def unlearn(
    config: UnlearnConfig,
    monitor: Monitor | None = None,
    target: TrainingTarget | None = None,
    held: Held | None = None,
) -> dict[str, Any]:
    """Run everything and return the report; with `accelerate launch` all its processes run it together.

    Parameters
    ----------
    config : UnlearnConfig
        Model, forget, retain and output are required.
    monitor : Monitor, optional
        Shows stages, steps and warnings, in the first process.
    target : TrainingTarget, optional
        What is trained and written: by default the whole model, into `config.output`.
    held : Held, optional
        What earlier runs of the same model loaded; by default nothing.

    Returns
    -------
    dict
        What report.json holds; ``failed_gates`` names the gates that were missed. If every question is known to be
        forgotten (filter known_forgotten), nothing is trained or written, and there is no ``history``.

    Raises
    ------
    PMCError
        Bad input, a loss that is not finite, or a full disk; then nothing was written.
    """
    if monitor is None or launched()[0] > 0:
        monitor = Silent()
    stages = Stages(monitor)
    target, held = target or WholeModel(config), held or Held()
    with stages("checking"):
        plan = check(config, target, held)
    for text in plan.warnings:
        monitor.warn(text)
    first = launched()[0] == 0
    tracker = _tracker(plan.config, target, monitor)
    with target.claimed() if first else nullcontext():
        if first:
            target.check()  # another run may have ended here since
        try:
            return _run(plan, target, tracker, stages, held)
        except (KeyboardInterrupt, Terminated) as error:
            error.add_note(what_is_left(target.destination, target.checkpoints, tracker.place if tracker else ""))
            raise


def _tracker(config: UnlearnConfig, target: TrainingTarget, monitor: Monitor) -> Tracker | None:
    if config.report_to == "none":
        return None
    result = Path(target.destination).resolve()
    files = result.with_name(result.name + ".tensorboard")
    return Tracker(config.report_to, files, target.run_name, monitor)


def _run(plan: Plan, target: TrainingTarget, tracker: Tracker | None, stages: Stages, held: Held) -> dict[str, Any]:
    """Run the stages of a plan."""
    limits = Limits(plan, target, held=held.loaded is not None)
    c = plan.config
    loaded = held.load(c.model, c.device, c.dtype, c.param_dtype, stages)
    weights = held.weights
    target.prepare(loaded, stages)
    arguments = _arguments(plan.config, loaded, target)  # several processes know each other from here on
    limits.agree(Ranks(), stages.monitor)
    if plan.choice is not None and plan.choice.checkpointing:
        use_checkpointing(causal_lm(loaded.model))
        held.reusable = False  # a later run may have the memory to do without
    evaluator = _evaluator(held, plan, stages.monitor)
    left_out = leave_out(plan, evaluator, loaded.model, weights, target.checkpoints, stages)
    if left_out and not left_out.kept:
        return {"questions": left_out.questions, **left_out.report(), "failed_gates": []}
    clock = TrainingClock(c.max_seconds)
    profiler = StepProfiler() if c.profile and launched()[0] == 0 else None
    progress = ProgressCallback(stages.monitor, plan.schedule.steps, clock)
    run = _made(plan, loaded, arguments, target, [clock, progress, *(x for x in (profiler, tracker) if x)])
    trainer = run.trainer
    trainer.clock, trainer.filter_settings = clock, settings_of(c)
    run.share(held, plan)
    if causal_lm(loaded.model) is loaded.model:  # no adapter, whose hash is another one
        trainer.weights_sha256 = weights  # not read twice
    resumed = trainer.find_checkpoint(plan.config.resume, warn=stages.monitor.warn)
    clock.before = run.prepare(plan, evaluator, resumed, stages)
    if c.max_seconds is not None and clock.before >= c.max_seconds:
        raise PMCError(
            f"max_seconds is {c.max_seconds:g}, and what method {c.method} needs of the untouched model took {clock.before:.1f} s "
            "of it: no time is left to train; raise it"
        )
    results, text = Results(), plan.text
    suite = Suite(plan.config, plan.sets, text=text, tokens=text.answer_tokens(plan.sets) if text else [])
    if plan.config.evaluate:
        evaluator.measure("before", suite, results, stages, " before")
    _train(trainer, resumed, stages)
    other = _unround(trainer, loaded, target.rounds_to, plan.config.dtype)
    try:
        target.finalize(loaded.model.eval(), stages)
        trainer.drop_optimizer()
        if plan.config.evaluate:
            if other:
                held.drop_passes()  # others will hold as much again
                evaluator = _evaluator(held, plan, stages.monitor)
            evaluator.weights_changed()
            evaluator.measure("after", suite, results, stages, " after")
    except NotFiniteError as error:  # weights that are finite, and logits that are not
        raise trainer.diverged() from error
    data = earlier_runs.data_of(plan.rows, target.recorded(plan.earlier))
    report = _report(plan, run, clock, results, left_out, weights, data, stages)
    if launched()[0] == 0:
        with stages("rendering"):
            files = {name: text.encode() for name, text in render.render(report, results.rows).items()}
        if profiler is not None and profiler.trace is not None:
            files[TRACE] = profiler.trace
        with stages("saving"):
            target.write(report, files, plan)
        shutil.rmtree(target.checkpoints, ignore_errors=True)  # they hold the initial answers
    trainer.ranks.gather(None)  # a launcher would end a process whose peer is done
    return report


def _evaluator(held: Held, plan: Plan, monitor: Monitor) -> Evaluator:
    engine, packed = held.passes(
        plan.choice or Choice.of(plan.config, loading.resolve_device(plan.config.device).type)
    )
    return Evaluator(SharedEngine(engine, Ranks()), plan.encoder, packed, monitor)


def _arguments(c: UnlearnConfig, loaded: loading.LoadedModel, target: TrainingTarget) -> PMCArguments:
    arguments = PMCArguments(
        output_dir=str(target.checkpoints),
        num_train_epochs=c.num_epochs,
        max_steps=ENDLESS if c.max_seconds else c.max_steps or -1,
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
        report_to="none",  # a Tracker is among the callbacks
        run_name=target.run_name,
    )
    arguments.mixed_precision = "no" if loaded.autocast_dtype is None else "bf16"  # dtype decides, not the launcher
    return arguments


def _made(
    plan: Plan,
    loaded: loading.LoadedModel,
    arguments: PMCArguments,
    target: TrainingTarget,
    callbacks: list[TrainerCallback],
) -> PMCRun | MethodRun:
    run = (
        PMCRun(plan, loaded, arguments, callbacks)
        if plan.method is None
        else MethodRun(plan, loaded, arguments, callbacks, plan.method)
    )
    with suppress(OSError):
        target.checkpoints.rmdir()  # the Trainer makes it even if nothing will be saved
    run.trainer.remove_callback(PrinterCallback)  # the monitor shows what the Trainer would print
    return run


def _train(trainer: PMCTrainer | UnlearnTrainer, resumed: tuple[Path, dict[str, Any]] | None, stages: Stages) -> None:
    with stages("unlearning" if resumed is None else f"unlearning, from {resumed[0].name} on"):
        on_sigterm: Any = nullcontext()
        saves = trainer.args.save_strategy != "no"
        if saves and trainer.ranks.size == 1 and current_thread() is main_thread():
            on_sigterm = CheckpointOnSigterm(stages.monitor.warn)
            trainer.add_callback(on_sigterm)
        with on_sigterm:
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed[0]))
    if not all(torch.isfinite(p).all() for p in trainer.model.parameters()):
        raise trainer.diverged()


def _unround(
    trainer: PMCTrainer | UnlearnTrainer, loaded: loading.LoadedModel, saved: torch.dtype | None, dtype: str
) -> bool:
    """Where a model is saved in another dtype than its parameters', let it have their masters, which are not rounded."""
    if saved in (None, loaded.model.get_input_embeddings().weight.dtype) or not trainer.unround():
        return False
    loaded.autocast_dtype = torch.bfloat16 if loading.low_precision(dtype, loaded.model.device) else None
    return True


def _report(
    plan: Plan,
    run: PMCRun | MethodRun,
    clock: TrainingClock,
    results: Results,
    left_out: LeftOut | None,
    weights: str,
    data: dict[str, Any],
    stages: Stages,
) -> dict[str, Any]:
    config = plan.config
    before, after = (results.scores.get(when, {}) for when in ("before", "after"))
    history = [record for record in run.trainer.state.log_history if is_step(record)]
    plan.warn(gates.warnings(before, after, history), stages.monitor)
    judged = gates.judge(config, after, before)
    return {
        "method": methods.facts(config),
        "settings": dataclasses.asdict(config),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": {"before": {"source": config.model, "sha256": weights}},
        "questions": len(plan.forget),
        "retain_rows": len(plan.retain),
        "data": data,
        "cut": {source: len(rows) for source, rows in plan.cut.items()} | {"initial answers": run.cut_answers},
        "truth_of_forget": "given answers" if all(r.answer for r in plan.forget) else "initial answers",
        "versions": versions(),
        "machine": machine(),
        **({} if left_out is None else left_out.report()),
        **results.report(),
        "history": history,
        **run.report(log_text=config.log_text),
        "gates": judged,
        "failed_gates": gates.missed(judged),
        "warnings": plan.warnings,
        "training_seconds": clock.seconds,
        "stage_seconds": stages.seconds,
    }
