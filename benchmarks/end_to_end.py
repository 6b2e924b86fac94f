"""The demo's whole unlearning run by several methods, with quality and utility against wall time.

    python -m benchmarks.end_to_end                    # 3 seeds x 4 methods: hours, most of them the reference's
    python -m benchmarks.end_to_end --methods pmc_fast stopping --seeds 0
    python -m benchmarks.end_to_end --methods plain trl open_unlearning --seeds 0     # the same task in other trainers
    python -m benchmarks.end_to_end --report           # table and plot of what has been measured

Every run starts from the demo's fine-tuned model with the demo's rows and the preset "small". Its clock counts the
initial answers, rollouts and training; loading and the evaluations on the way are left out, for all methods alike.
Runs are added to results/end_to_end.json one by one; a run that is there is not repeated unless --again.
"""

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from pmc_fast import PMCArguments, PMCTrainer
from pmc_fast.evaluation import greedy_answers
from pmc_fast.models.packed_forward import PackedPass
from pmc_fast.pmc.schedule import Schedule
from pmc_fast.reference import Reference, train

from . import drop_ins, harness
from .runs import Clock, Run, demo_config, measured, optimizer_of, prepared, training_arguments

RESULT = harness.RESULTS / "end_to_end.json"
PLOT = harness.RESULTS / "end_to_end.svg"
CURVE = (6, 12, 18, 24, 30, 36, 42, 48, 54)  # steps after which seed 0 is evaluated; the others after 30
STOP_SCORE = 0.05
TICKS = (0, 30, 60, 120, 250, 500, 1000, 2000)  # seconds, of the plot


def demo_run(method: str, seed: int, epochs: float) -> Run:
    """Return the demo's task, evaluated along the way where methods are compared."""
    stop = {"stop_score": STOP_SCORE} if method == "stopping" else {}
    run = Run(method, demo_config(seed, num_epochs=epochs, **stop))
    points = (CURVE if seed == 0 else (30,)) if method in COMPARED else ()
    run.due = lambda step, seconds: step in points and step < run.steps
    return run


class TimedReference(Reference):
    """Knows how much of its time the published third forward took."""

    tracking_seconds = 0.0

    def cross_entropy(self, pairs: Any) -> torch.Tensor:
        start = time.perf_counter()
        loss = super().cross_entropy(pairs)
        if not torch.is_grad_enabled():
            self.tracking_seconds += time.perf_counter() - start
        return loss


def reference(run: Run) -> dict[str, Any]:
    """Run the published algorithm at the published costs, its forward for the forget loss included."""
    from pmc_fast.rollout import RolloutEngine  # for the evaluations only

    questions, truths = [r.question for r in run.forget], [r.answer or "" for r in run.forget]
    published = TimedReference(
        run.model, run.tokenizer, run.config, questions, tracked_answers=truths, autocast=run.loaded.autocast
    )
    engine = RolloutEngine(run.model, autocast_dtype=run.loaded.autocast_dtype)
    run.answer = lambda asked: greedy_answers(engine, published.encoder, asked)
    run.start()
    published.prepare()
    run.stop()
    run.evaluate(0)
    run.resume()
    train(published, run.retain, run.config, run.on_step)
    return run.result(len(run.history), tracking_seconds=published.tracking_seconds)


def pmc_fast(run: Run) -> dict[str, Any]:
    """Run PMCTrainer with the job's settings."""
    arguments = PMCArguments(**training_arguments(run.config, bf16=run.loaded.autocast_dtype is not None))
    questions = [r.question for r in run.forget]
    trainer = PMCTrainer(
        run.model, arguments, questions, run.retain, run.config, run.tokenizer, callbacks=[Clock(run)]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    prepared(run, trainer.pmc)
    trainer.train()
    return run.result(trainer.state.global_step, stopped=trainer.stopped)


def retain_only(run: Run) -> dict[str, Any]:
    """Fine-tune on the same retain draws alone: what is forgotten without being asked for."""
    from pmc_fast.data import Encoder
    from pmc_fast.rollout import RolloutEngine

    c = run.config
    encoder, engine = Encoder(run.tokenizer, c, run.model.generation_config), RolloutEngine(run.model)
    run.answer = lambda asked: greedy_answers(engine, encoder, asked)
    kept = [encoder.pair(r.question, r.answer or "") for r in run.retain]
    optimizer = optimizer_of(run)
    warmup = Schedule.plan(c, len(run.forget)).steps_per_epoch
    rate = transformers.get_linear_schedule_with_warmup(optimizer, warmup, run.steps)
    order, packed = torch.Generator().manual_seed(c.seed + 1), PackedPass(run.model)
    run.evaluate(0)
    run.model.train()
    run.start()
    for step in range(1, run.steps + 1):
        draws = torch.randint(len(kept), (c.batch_size,), generator=order)
        loss = packed.mean_nll([kept[i] for i in draws.tolist()])
        loss.backward()
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        run.on_step({"step": step, "loss": loss.item()})
        run.model.train()
    return run.result(run.steps)


METHODS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "reference": reference,
    "pmc_fast": pmc_fast,
    "stopping": pmc_fast,
    "retain_only": retain_only,
    "plain": drop_ins.plain,
    "trl": drop_ins.trl,
    "open_unlearning": drop_ins.open_unlearning,
}
LABELS = {
    "reference": "reference (published)", "pmc_fast": "pmc_fast", "stopping": "pmc_fast, stopping rule",
    "retain_only": "fine-tuning on the retain pairs alone", "plain": "PMC in a plain loop", "trl": "TRL's PMCTrainer",
    "open_unlearning": "OpenUnlearning's handler (stand-in)",
}  # fmt: skip
COMPARED = ("reference", "pmc_fast", "stopping", "retain_only")


def table(results: list[dict[str, Any]]) -> str:
    """Return means over the seeds, and the time of each that unlearns against the reference's on the same seeds."""
    lines = [
        "| method | seeds | steps | seconds | x | unlearn quality | utility | R(retain) |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    by = {m: {r["seed"]: r for r in results if r["method"] == m} for m in METHODS}
    for method, runs in by.items():
        if not runs:
            continue
        ends = [r["curve"][-1] for r in runs.values()]
        mean = lambda values: sum(values) / len(values)  # noqa: E731
        both = [s for s in runs if s in by["reference"] and method != "retain_only"]
        times = [by["reference"][s]["seconds"] / runs[s]["seconds"] for s in both]
        lines.append(
            f"| {LABELS[method]} | {', '.join(map(str, sorted(runs)))} | {mean([r['steps'] for r in runs.values()]):.0f} "
            f"| {mean([r['seconds'] for r in runs.values()]):.0f} | {f'{mean(times):.2f}' if both else '-'} "
            f"| {mean([e['unlearn_quality'] for e in ends]):.1f} | {mean([e['utility'] for e in ends]):.1f} "
            f"| {mean([e['sets']['retain']['rouge_l_recall'] for e in ends]):.3f} |"
        )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]]) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (key, label) in zip(
        figure.subplots(1, 2), (("unlearn_quality", "unlearn quality"), ("utility", "utility")), strict=True
    ):
        for color, method in enumerate(COMPARED):
            for r in sorted((r for r in results if r["method"] == method), key=lambda r: r["seed"]):
                seconds = [p["seconds"] for p in r["curve"]]
                axes.plot(seconds, [p[key] for p in r["curve"]], color=f"C{color}", alpha=1.0 if r["seed"] == 0 else 0.35,
                          label=LABELS[method] if r["seed"] == 0 else None, marker="o", markersize=2.5)  # fmt: skip
        axes.set_xscale(
            "symlog", linthresh=60
        )  # equal steps to a minute, then equal ratios: both methods are legible
        axes.set_xticks(TICKS, [str(t) for t in TICKS], minor=False)
        axes.set_xticks([], minor=True)
        axes.set(xlabel="wall time (s)", ylabel=f"{label} (0-100)", xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=4, loc="outside upper center", fontsize=8)
    with rc_context({"svg.hashsalt": "pmc_fast"}):  # the same picture, the same file
        figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=COMPARED)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=12.0, help="the preset has 12; fewer is a trial run")
    parser.add_argument("--again", action="store_true", help="repeat runs that have been measured")
    parser.add_argument("--report", action="store_true", help="only print the table and draw the plot")
    arguments = parser.parse_args()
    for seed in [] if arguments.report else arguments.seeds:
        for method in arguments.methods:
            done = {(r["method"], r["seed"]) for r in measured(RESULT)}
            if (method, seed) in done and not arguments.again:
                continue
            print(f"{method}, seed {seed}", flush=True)
            result = METHODS[method](demo_run(method, seed, arguments.epochs))
            gc.collect()  # a run refers to itself: its model would stay until memory is short
            # read again: another process may have added a run
            others = [r for r in measured(RESULT) if (r["method"], r["seed"]) != (method, seed)]
            harness.write(RESULT, "end_to_end", [*others, result])
    results = measured(RESULT)
    if results:
        plot(results)
        print(table(results))


if __name__ == "__main__":
    main()
